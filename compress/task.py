"""What a network is for: its loss and the metric that decides whether a result is good."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from .data import Data, describe, dtype_name, load_object
from .errors import HCompressError, UsageError
from .registry import TASKS

LOSS_CHUNK = 2**22  # logits that are widened to float64 at a time


class Task(Protocol):
    """What ``file.py:Task`` has to provide; the three built-in tasks do.

    Attributes:
        name: Of the metric.
        unit: Of the metric.
        higher_is_better: Whether a larger metric is better.
    """

    name: str
    unit: str
    higher_is_better: bool

    def prepare(self, data: Data) -> Data:
        """Inputs and targets from the data as read, checked."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean loss of a batch, a scalar to differentiate."""
        ...

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """The metric of each example, ``[n]``; the mean over examples is the figure."""
        ...


class Classification:
    """Logits ``[n, classes]`` against integer labels ``[n]``; accuracy in percent."""

    name, unit, higher_is_better = "accuracy", "%", True

    def prepare(self, data: Data) -> Data:
        if data.targets is None:
            return data
        if data.targets.dim() != 1 or data.targets.is_floating_point():
            floats = "classification needs integer labels [n]; for float targets pass --task regression"
            one_hot = "classification needs integer labels [n]; of one-hot rows, pass y.argmax(1)"
            many = "for a label of each position, as of a segmentation, pass --task FILE.py:Task (docs/tasks.md)"
            raise UsageError(
                f"{data.name}: labels have dtype {dtype_name(data.targets)} and shape {list(data.targets.shape)}",
                hint=one_hot if _is_one_hot(data.targets) else floats if data.targets.is_floating_point() else many,
            )
        if int(data.targets.min()) < 0:
            raise UsageError(
                f"{data.name}: label {int(data.targets.min())} is negative", hint="labels are 0 to classes - 1"
            )
        return Data(data.inputs, data.targets.long(), data.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_one_tensor(outputs), targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = _one_tensor(outputs)
        self.check(outputs, targets)
        return 100.0 * (outputs.argmax(1) == targets).double()

    def check(self, outputs: Tensor, targets: Tensor, name: str = "") -> None:
        if outputs.dim() != 2 or outputs.shape[1] < 2:
            raise UsageError(
                f"classification needs logits [n, classes]; the network gives {list(outputs.shape)}",
                hint="pass --task regression, or --task FILE.py:Task with a score of your own",
            )
        largest = int(targets.max())
        if largest >= outputs.shape[1]:
            raise UsageError(
                f"{_place(name, int(targets.argmax()), f'label {largest}')} is out of range: the network has "
                f"{outputs.shape[1]} classes",
                hint=f"labels are 0 to {outputs.shape[1] - 1}",
            )


def _is_one_hot(targets: Tensor) -> bool:
    if targets.dim() != 2 or targets.shape[1] < 2:
        return False
    return bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(1) == 1).all())


def _place(name: str, example: int | None, what: str) -> str:
    """``what`` of an example of the data called ``name``; in a batch, of which neither is known, alone."""
    if not name:
        return what
    return f"{name}: {what}" if example is None else f"{name}: {what} of example {example}"


def _one_tensor(outputs: Any) -> Tensor:
    """The built-in tasks score one tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    raise UsageError(
        f"the network gives {describe(outputs)}, the task scores one tensor",
        hint="pass --task FILE.py:Task, whose score takes all outputs",
    )


class Regression:
    """Outputs against float targets of the same shape; mean squared error."""

    name, unit, higher_is_better = "mse", "squared error", False

    def prepare(self, data: Data) -> Data:
        targets = None if data.targets is None else data.targets.float()
        return Data(data.inputs, targets, data.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = _one_tensor(outputs)
        return F.mse_loss(outputs, targets.reshape(outputs.shape))

    def check(self, outputs: Tensor, targets: Tensor, name: str = "") -> None:
        if outputs[:1].numel() != targets[:1].numel():
            raise UsageError(
                f"{_place(name, None, 'targets')} have shape {list(targets.shape)}, the outputs {list(outputs.shape)}",
                hint="regression compares numbers one by one; for class labels pass --task classification",
            )

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = _one_tensor(outputs)
        self.check(outputs, targets)
        return (outputs - targets.reshape(outputs.shape)).double().square().reshape(len(outputs), -1).mean(1)


class CausalLM:
    """Token windows ``[n, t]``: inputs are all but the last token, targets all but the first; nats per token."""

    name, unit, higher_is_better = "loss", "nats per token", False

    def prepare(self, data: Data) -> Data:
        ids = data.inputs[0]
        if ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 2:
            raise UsageError(
                f"{data.name}: token ids have dtype {dtype_name(ids)} and shape {list(ids.shape)}",
                hint="causal-lm needs one integer tensor [n, t] with t of 2 or more",
            )
        ids = ids.long()
        return Data((ids[:, :-1].contiguous(),), ids[:, 1:].contiguous(), data.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_one_tensor(outputs).flatten(0, -2), targets.flatten())

    def check(self, outputs: Tensor, targets: Tensor, name: str = "") -> None:
        if outputs.shape[1:-1] != targets.shape[1:]:
            raise UsageError(
                f"causal-lm needs logits {[len(outputs), *targets.shape[1:], 'vocabulary']}; "
                f"the network gives {list(outputs.shape)}",
                hint="its forward takes token ids [n, t] and returns logits [n, t, vocabulary]",
            )
        is_bad = (targets < 0) | (targets >= outputs.shape[-1])
        if is_bad.any():
            example = int(is_bad.any(1).nonzero()[0])
            raise UsageError(
                f"{_place(name, example, f'token {int(targets[is_bad][0])}')} is out of range: "
                f"the network has {outputs.shape[-1]} tokens",
                hint="tokenize with the network's own vocabulary",
            )

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = _one_tensor(outputs)
        self.check(outputs, targets)
        rows = max(1, LOSS_CHUNK // outputs.shape[-1])
        parts = zip(torch.split(outputs.flatten(0, -2), rows), torch.split(targets.flatten(), rows), strict=True)
        nats = torch.cat([F.cross_entropy(logits.double(), ids, reduction="none") for logits, ids in parts])
        return nats.reshape(len(targets), -1).mean(1)


def check_targets(task: Task, outputs: Any, data: Data) -> None:
    """Targets that the network's outputs don't fit, before a long run comes to them.

    Args:
        task: One of the user's may have no such check.
        outputs: Of a few examples.
        data: Prepared by the task.

    Raises:
        UsageError: Names the data and the example.
    """
    check = getattr(task, "check", None)
    if check is not None and data.targets is not None and isinstance(outputs, Tensor):
        check(outputs, data.targets, data.name)


def has_logits(task: Task) -> bool:
    """Whether the network's outputs are logits, compared by KL divergence; a task says so by ``logits = True``."""
    return bool(getattr(task, "logits", isinstance(task, Classification | CausalLM)))


def divergence(reference: Any, outputs: Any, *, are_logits: bool) -> float:
    """How far outputs moved: mean KL divergence for logits ``[..., c]``, mean squared error for other values.

    Where there are several outputs, and the first isn't all that counts as logits, each is compared in units of its own
    variance over the examples, and the mean is taken: a box and a class score have no unit in common.

    Args:
        reference: A tensor, or what a network gives: tensors in tuples or dicts, of which the floating ones count.
    """
    return float(divergences(reference, outputs, are_logits=are_logits).mean())


def divergences(reference: Any, outputs: Any, *, are_logits: bool) -> Tensor:
    """The same of each prediction, or of each value, float64; of several outputs, of each example."""
    wanted, found = (floating(value) for value in (reference, outputs))
    if are_logits and wanted[0].dim() >= 2 and wanted[0].shape[-1] >= 2:
        log_p = torch.log_softmax(wanted[0].double(), -1)
        log_q = torch.log_softmax(found[0].double(), -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    moved = [(a.double() - b.double()).square() for a, b in zip(wanted, found, strict=True)]
    if are_logits or len(moved) == 1:
        return moved[0]
    count = next((len(change) for change in moved if change.dim()), 1)
    each = [_by_example(change, count) / _power(value) for change, value in zip(moved, wanted, strict=True)]
    return torch.stack(each).mean(0)


def _by_example(change: Tensor, count: int) -> Tensor:
    """``[count]``: the mean of each example; of an output that doesn't start with the examples, the mean for each."""
    if change.dim() and len(change) == count:
        return change.reshape(count, -1).mean(1)
    return change.mean().expand(count)


def _power(value: Tensor) -> float:
    """The variance of an output over the examples; of one example or of a constant, its mean square, or 1."""
    wide = value.double()
    return float((wide - wide.mean(0)).square().mean()) or float(wide.square().mean()) or 1.0


def divergence_words(outputs: Any, *, are_logits: bool) -> tuple[str, str]:
    """What ``divergence`` is, and its unit, in words."""
    if are_logits:
        return "KL divergence from", "nats"
    if len(floating(outputs)) > 1:
        return "mean squared difference of the outputs, each in units of its variance, from", "variances"
    return "mean squared difference from", "squared output"


def floating(outputs: Any) -> list[Tensor]:
    """The floating tensors that a network gives."""
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that a planner sees of the user's data."""

    task: Task
    data: Data

    def sha256(self) -> str:
        """Hash of the examples and of the metric's name."""
        return hashlib.sha256(f"{self.task.name} {self.data.sha256()}".encode()).hexdigest()


BUILT_IN: dict[str, Callable[[], Task]] = {
    "classification": Classification,
    "regression": Regression,
    "causal-lm": CausalLM,
}


def load_task(kind: str | None, data: Data | None) -> Task:
    """The task called ``kind``, guessed from the data where it is None.

    Raises:
        UsageError: Unknown kind, or a class without what ``Task`` needs; says what.
    """
    if kind is None:
        return BUILT_IN[guess_kind(data)]()
    if kind in BUILT_IN:
        return BUILT_IN[kind]()
    if ":" not in kind:
        choices = ", ".join(task.name for task in TASKS)
        raise UsageError(f"task {kind!r} is unknown", hint=f"choices: {choices}, or FILE.py:Task")
    make = load_object(kind, "--task")
    try:
        task = make()
        if not hasattr(task, "prepare"):
            task.prepare = lambda data: data
    except HCompressError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(
            f"--task {kind} failed ({type(error).__name__}: {error})", hint="name a class without arguments"
        ) from error
    required = ("name", "unit", "higher_is_better", "loss", "score")
    missing = [name for name in required if not hasattr(task, name)]
    if missing:
        raise UsageError(
            f"--task {kind} lacks {', '.join(missing)}", hint=f"a task has {', '.join(required)}, and maybe prepare"
        )
    checked: Task = task
    return checked


def guess_kind(data: Data | None) -> str:
    """Integer windows without labels are text; integer labels are classes; anything else is regression."""
    if (
        data is not None
        and data.targets is None
        and data.inputs[0].dim() == 2
        and not data.inputs[0].is_floating_point()
        and data.inputs[0].dtype != torch.bool
    ):
        return "causal-lm"
    if data is not None and data.targets is not None and data.targets.is_floating_point():
        return "regression"
    return "classification"
