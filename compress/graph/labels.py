"""Channel labels: an integer for each channel, carried by tensors through the ops that move data.

Every element of an activation is labelled by the channels that it belongs to. Labels are held with the shape of the
activation, of size 1 along each dimension that they don't vary on, so that a move of data (reshape, permute, cat,
pixel shuffle...) is the same move on the labels. Where an op needs two channels to go together it binds their labels;
where a channel can't go it freezes them. What is bound, directly or not, is one set: all of it stays, or none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MOST_LABELS = 2**22  # of one activation; with more, sub-pixels of a large image were merged into channels


@dataclass(frozen=True, slots=True)
class Axis:
    """One way in which the elements of an activation belong to channels.

    Attributes:
        labels: int64, of the activation's number of dimensions; size 1 where they don't vary.
        is_zero: Whether the activation is exactly zero at a channel whose parameters are all zero.
    """

    labels: Tensor
    is_zero: bool

    def varying(self) -> tuple[int, ...]:
        """The dimensions that the labels vary on."""
        return tuple(d for d, size in enumerate(self.labels.shape) if size > 1)


Value = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Freeze:
    """Labels that stay, and why.

    Attributes:
        where: Name of the node in the graph.
    """

    labels: Tensor
    reason: str
    where: str


@dataclass(slots=True)
class Labels:
    """The labels of a network while its graph is read.

    Attributes:
        free: Labels of constants of any size, which are as large as what they are joined with.
    """

    count: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)  # the first, and the one after the last
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    where: str = ""  # the node that is being read

    def fresh(self, size: int) -> Tensor:
        """New labels ``[size]``."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def fresh_constant(self, size: int) -> Tensor:
        """New labels ``[size]`` of a constant."""
        self.free.append((self.count, self.count + size))
        return self.fresh(size)

    def is_free(self, axis: Axis) -> bool:
        """Whether the labels are a constant's."""
        low, high = int(axis.labels.min()), int(axis.labels.max())
        return any(start <= low and high < end for start, end in self.free)

    def bind(self, first: Tensor, second: Tensor) -> None:
        """Channels that go together; of shapes that broadcast."""
        shape = (first + second).shape
        first, second = first.expand(shape), second.expand(shape)
        self.edges.append((first.reshape(-1), second.reshape(-1)))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Channels that stay."""
        self.freezes.append(Freeze(labels.reshape(-1), reason, self.where))

    def couple(self, axis: Axis, dims: Iterable[int]) -> Axis:
        """Bind all labels along ``dims``, which the result doesn't vary on."""
        labels = axis.labels
        for dim in dims:
            if labels.shape[dim] > 1:
                first = labels.narrow(dim, 0, 1)
                self.bind(first, labels)
                labels = first
        return replace(axis, labels=labels)

    def vector(self, value: Value, dim: int) -> Tensor | None:
        """The labels ``[n]`` along a dimension, bound along all others; None where none vary on it.

        Of several that lie along it, as heads and their width in one dimension, the finest may be cut.
        """
        found = [
            self.couple(axis, [d for d in axis.varying() if d != dim]).labels.reshape(-1)
            for axis in value
            if axis.labels.shape[dim] > 1
        ]
        if not found:
            return None
        finest = max(found, key=lambda labels: len(set(labels.tolist())))
        for labels in found:
            if labels is not finest:
                self.freeze(labels, "its dimension is cut along finer channels")
        return finest

    def roots(self) -> Tensor:
        """For every label the smallest one that it is bound to, ``[count]``."""
        parent = torch.arange(self.count)
        if not self.edges:
            return parent
        first, second = (torch.cat(ends) for ends in zip(*self.edges, strict=True))
        while True:
            low = torch.minimum(parent[first], parent[second])
            before = parent.clone()
            for ends in (parent[first], parent[second], first, second):
                parent.scatter_reduce_(0, ends, low, "amin")
            while not torch.equal(parent, parent[parent]):
                parent = parent[parent]
            if torch.equal(before, parent):
                return parent


def along(labels: Tensor, dim: int, dims: int) -> Tensor:
    """A vector shaped to lie along ``dim`` of ``dims``."""
    return labels.reshape([-1 if d == dim else 1 for d in range(dims)])


def shrink(labels: Tensor) -> Tensor:
    """The same labels with size 1 along each dimension that they are constant on."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1)
    return labels


def matched_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of one shape a reshape makes from which of another: runs of equal products, in order.

    Example:
        >>> matched_dims([2, 12, 5], [2, 3, 4, 5])
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        a, b = (before[i] if left else 1), (after[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                a, left = a * before[i], [*left, i]
                i += 1
            else:
                b, right = b * after[j], [*right, j]
                j += 1
        found.append((left, right))
    return found


def reshaped(
    labels: Labels, axis: Axis, before: Sequence[int], after: Sequence[int], *, copies: Collection[int] = ()
) -> Axis | None:
    """The labels after a reshape; None, frozen, where there would be too many.

    Args:
        copies: Dimensions of copies, which are no positions.
    """
    groups = matched_dims(before, after)
    varying = set(axis.varying())
    moved = [(left, right) for left, right in groups if varying & set(left)]
    if len(moved) > 1:
        # Sub-pixels that go into an image's rows and columns: the other dimensions say the channel.
        for left, _ in moved:
            if any(
                d not in varying and d not in copies and before[d] > 1
                for d in left[: -1 if left[-1] in varying else None]
            ):
                axis = labels.couple(axis, [d for d in left if d in varying])
        varying = set(axis.varying())
        moved = [(left, right) for left, right in groups if varying & set(left)]
    if not moved:
        return None
    wide = [before[d] if any(d in left for left, _ in moved) else 1 for d in range(len(before))]
    size = 1
    for d in wide:
        size *= d
    if size > MOST_LABELS:
        labels.freeze(axis.labels, f"a reshape to {list(after)} would mix too many channels and positions")
        return None
    made = {d for _, right in moved for d in right}
    narrow = [after[d] if d in made else 1 for d in range(len(after))]
    return replace(axis, labels=shrink(axis.labels.expand(wide).reshape(narrow)))
