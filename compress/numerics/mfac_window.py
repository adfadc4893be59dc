"""Dynamic M-FAC: the inverse empirical Fisher of a window of gradients that come and go one by one.

Source: Frantar, Kurtic, Alistarh 2021 (arXiv:2107.03356), section 3.2, by other means. With ``S = u I + G G^T``, ``X``
its inverse and ``V = X G``, a gradient ``j`` leaves as a Schur complement and comes as a border::

    X <- X - x x^T / X_jj,   V <- V - x V_j / X_jj                       where x = X e_j
    X <- X + y y^T / s,      V <- V - y V_j,     V_j = (g - G^T y) / s   where y = X G g,  s = u + g^T g - g^T G^T y

and the new row of X is ``[-y^T, 1] / s``. ``u = n damping`` follows the number ``n`` of gradients: an ``X`` of a ``u``
that is off by no more than an eighth solves with the right one in a few refinements, each in float64. X is computed
anew where ``u`` has moved further, and once in a wrap of the window, so that nothing adds up.
Cost: of a gradient that comes or goes, 2 to 5 passes over G and a few products of ``m^2``, on average over the window's
life; of an element, ``m`` (``m^2`` where ``u`` is off). Memory: G, two m x m matrices in float64, and V from the first
element on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from .mfac import DTYPES, SMALL_GAP, InverseFisher, check_damping, inverse_fisher, piece, solve_beyond_span

NEAR = 1 / 8  # of u: how far X's may be from the one that is solved with
LEAST_BORDER = 0.5  # of u: s is u or more; below this, rounding has spoilt X


class GramWindow:
    """``G G^T`` of the gradients in ``m`` slots and its regularised inverse; the gradients are kept elsewhere.

    Attributes:
        gram: ``[m, m]``, float64; zero where a slot is empty.
        order: Slots in use, oldest first.
    """

    def __init__(self, capacity: int, *, device: torch.device | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"a window of {capacity} gradients; 1 or more are needed")
        self.gram = torch.zeros(capacity, capacity, dtype=torch.float64, device=device)
        self.order: list[int] = []
        self.ridge = 0.0  # u of the inverse
        self.inverse: Tensor | None = None  # zero where a slot is empty
        self.changes = 0  # of it since it was computed

    def __len__(self) -> int:
        return len(self.order)

    @property
    def capacity(self) -> int:
        return len(self.gram)

    def free_slot(self) -> int | None:
        """The first empty slot; None where the window is full."""
        return min(set(range(self.capacity)) - set(self.order), default=None)

    def empty(self, slot: int) -> Tensor | None:
        """Take a gradient out; ``X e_j / X_jj`` ``[m]``, or None where there is no inverse."""
        self.order.remove(slot)
        self.gram[slot] = 0
        self.gram[:, slot] = 0
        if not self._may_change():
            return None
        assert self.inverse is not None
        column = self.inverse[:, slot].clone()
        scaled = column / column[slot]
        self.inverse.addr_(column, scaled, alpha=-1)
        self.inverse[slot] = 0
        self.inverse[:, slot] = 0
        return scaled

    def fill(self, slot: int, products: Tensor) -> tuple[Tensor, float] | None:
        """Put a gradient into an empty slot.

        Args:
            products: With all gradients of the window, itself included, ``[m]``, float64; zero for empty slots.

        Returns:
            ``y`` ``[m]`` and ``s`` of the border; None where there is no inverse.
        """
        border = self._border(slot, products) if self._may_change() else None
        self.gram[slot] = products
        self.gram[:, slot] = products
        self.order.append(slot)
        return border

    def factorise(self, ridge: float) -> float:
        """Have an inverse that ``solve`` can use at this ``u``; the ``u`` in force, tenfold where Cholesky fails."""
        if self.inverse is not None and abs(ridge - self.ridge) <= NEAR * self.ridge:
            return ridge
        used = torch.tensor(self.order, device=self.gram.device)
        gram = self.gram[used[:, None], used]
        while True:
            damped = gram.clone()
            damped.diagonal().add_(ridge)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                break
            ridge *= 10
        self.inverse = torch.zeros_like(self.gram)
        self.inverse[used[:, None], used] = torch.cholesky_inverse(lower)
        self.ridge, self.changes = ridge, 0
        return ridge

    def solve(self, right: Tensor, ridge: float) -> Tensor:
        """``(u I + G G^T)^-1 right`` after ``factorise``, refined until it no longer gets better.

        Args:
            right: ``[m]`` or ``[m, k]``, float64; zero for empty slots.
        """
        assert self.inverse is not None
        found, rest = torch.zeros_like(right), right
        while True:
            better = found + self.inverse @ rest
            left = right - (self.gram @ better + ridge * better)
            if not float(left.norm()) < float(rest.norm()) / 2:
                # The last one was lost in rounding; its correction counts if it was the first.
                return better if rest is right else found
            found, rest = better, left

    def state_dict(self) -> dict[str, Any]:
        """All that there is, so that a window that is restored goes on with the same bits."""
        return {
            "gram": self.gram,
            "order": list(self.order),
            "ridge": self.ridge,
            "inverse": self.inverse,
            "changes": self.changes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It is of a window of another size.
        """
        if state["gram"].shape != self.gram.shape:
            raise ValueError(f"the state is of {len(state['gram'])} gradients, the window of {self.capacity}")
        device, inverse = self.gram.device, state["inverse"]
        self.gram = state["gram"].to(device, torch.float64, copy=True)
        self.inverse = None if inverse is None else inverse.to(device, torch.float64, copy=True)
        self.order, self.ridge, self.changes = list(state["order"]), float(state["ridge"]), int(state["changes"])

    def _may_change(self) -> bool:
        """Whether the inverse is changed, and not computed anew at the next use."""
        self.changes += 1
        if self.changes > 2 * self.capacity:  # a wrap: each slot emptied and filled
            self.inverse = None
        return self.inverse is not None

    def _border(self, slot: int, products: Tensor) -> tuple[Tensor, float] | None:
        assert self.inverse is not None
        others = products.clone()
        others[slot] = 0
        y = self.inverse @ others
        rest = others - (self.gram @ y + self.ridge * y)
        # With y off by e, s is off by e^T S e alone.
        s = float(self.ridge + products[slot] - y @ others - y @ rest)
        y += self.inverse @ rest
        if not s > LEAST_BORDER * self.ridge:
            self.inverse = None
            return None
        self.inverse.addr_(y, y, alpha=1 / s)
        self.inverse[slot] = -y / s
        self.inverse[:, slot] = -y / s
        self.inverse[slot, slot] = 1 / s
        return y, s


class FisherWindow:
    """``F^-1`` of ``F = damping I + G^T G / n`` for the ``n`` gradients of now, at most ``capacity``.

    Positions count from the oldest gradient, 0. ``damping`` is the one in force: larger than asked for, by a power of
    ten, where Cholesky failed.

    Args:
        capacity: ``m``, any number of 1 or more.
        d: Parameters.
        damping: Above 0.
        dtype: Of the gradients, float32 or float64. ``m x m`` algebra is float64.

    Raises:
        NumericsError: ``damping`` is not a positive finite number.

    Example:
        >>> window = FisherWindow(2, 2, 1.0)
        >>> for gradient in ([9.0, 9.0], [3.0, 0.0], [3.0, 0.0]):
        ...     window.add(torch.tensor(gradient))
        >>> window.element(0, 0)
        0.1
    """

    def __init__(
        self,
        capacity: int,
        d: int,
        damping: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        check_damping(damping)
        if dtype not in DTYPES or d < 1:
            raise ValueError(f"gradients must be [m, d] in float32 or float64, not {[capacity, d]} in {dtype}")
        self.damping = damping
        self._window = GramWindow(capacity, device=device)
        self._rows = torch.zeros(capacity, d, dtype=dtype, device=device)
        self._solved: Tensor | None = None  # V, where elements were asked for

    def __len__(self) -> int:
        return len(self._window)

    def gradients(self) -> Tensor:
        """Those of now, oldest first, ``[n, d]``: a copy."""
        return self._rows[self._window.order]

    def add(self, gradient: Tensor) -> None:
        """Add a gradient ``[d]``; the oldest one leaves a full window.

        Raises:
            NumericsError: It is not finite, or a product with one that is there isn't; the window is as it was.
        """
        if gradient.shape != self._rows.shape[1:]:
            raise ValueError(f"a gradient must be [{self._rows.shape[1]}], not {list(gradient.shape)}")
        row = gradient.detach().to(self._rows)
        products, own = row_products(self._rows, row), float(row.to(torch.float64).square().sum())
        check_products(products, own)
        slot = self._window.free_slot()
        if slot is None:
            slot = self._window.order[0]
            self.remove(0)
        products[slot] = own
        border = self._window.fill(slot, products)
        if border is None:
            self._solved = None
        if self._solved is not None and border is not None:
            y, s = border
            fresh = (row - combination(self._rows, y)) / s
            self._solved.addr_(y.to(row.dtype), fresh.to(row.dtype), alpha=-1)
            self._solved[slot] = fresh
        self._rows[slot] = row

    def remove(self, position: int) -> None:
        """Take a gradient out.

        Raises:
            IndexError: There is none at this position.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is not in 0 .. {len(self) - 1}")
        slot = self._window.order[position]
        column = self._window.empty(slot)
        if column is None:
            self._solved = None
        if self._solved is not None and column is not None:
            self._solved.addr_(column.to(self._rows.dtype), self._solved[slot].clone(), alpha=-1)
            self._solved[slot] = 0
        self._rows[slot] = 0

    def ihvp(self, x: Tensor) -> Tensor:
        """``F^-1 x``, in the wider dtype of ``x`` and the gradients; refined in float64, as ``InverseFisher.ihvp``.

        Args:
            x: ``[d]`` or ``[d, k]``.

        Raises:
            NumericsError: ``x`` is not finite.
        """
        if not len(self):
            return x.detach() / self.damping
        u = self._ridge()
        return len(self) * solve_beyond_span(self._rows, u, lambda right: self._window.solve(right, u), x)

    def ihvp_span(self, coefficients: Tensor) -> Tensor:
        """``F^-1 G^T c``, float64, without a subtraction.

        Args:
            coefficients: ``c`` of the gradients of now, oldest first, ``[n]`` or ``[n, k]``.
        """
        if len(coefficients) != len(self):
            raise ValueError(f"coefficients must have {len(self)} rows, not {list(coefficients.shape)}")
        d, rest = self._rows.shape[1], coefficients.shape[1:]
        right = torch.zeros(self._window.capacity, *rest, dtype=torch.float64, device=self._rows.device)
        if not len(self):
            return right.new_zeros(d, *rest)
        right[self._window.order] = coefficients.detach().to(torch.float64)
        return len(self) * combination(self._rows, self._window.solve(right, self._ridge()))

    def element(self, i: int, j: int) -> float:
        """``(F^-1)_ij``.

        Raises:
            IndexError: An index is not in ``0 .. d - 1``.
        """
        d = self._rows.shape[1]
        for index in (i, j):
            if not 0 <= index < d:
                raise IndexError(f"index {index} is not in 0 .. {d - 1}")
        if not len(self):
            return (i == j) / self.damping
        u = self._ridge()
        left, right = self._rows[:, i].to(torch.float64), self._rows[:, j].to(torch.float64)
        if u == self._window.ridge:
            solved = self._solutions()
            left_solved, right_solved = (solved[:, at].to(torch.float64) for at in (i, j))
        else:
            left_solved, right_solved = (self._window.solve(column, u) for column in (left, right))
        if min(1 - float(left @ left_solved), 1 - float(right @ right_solved)) < SMALL_GAP:
            unit = torch.zeros(d, dtype=torch.float64, device=self._rows.device)
            unit[j] = 1
            return float(self.ihvp(unit)[i])
        return ((i == j) - float(left @ right_solved)) / self.damping

    def static(self) -> InverseFisher:
        """``F^-1`` of the gradients of now, for its diagonal and submatrices: a copy, which the window leaves behind.

        Cost: ``m^3``; the products of gradients are known.
        """
        order = self._window.order
        gram = self._window.gram[order][:, order]
        return inverse_fisher(self.gradients(), self.damping, gram=gram)

    def state_dict(self) -> dict[str, Any]:
        """Damping, gradients and what was computed of them."""
        return {"damping": self.damping, "rows": self._rows, **self._window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; products have the bits that they would have had.

        Raises:
            ValueError: It is of another window.
        """
        if state["rows"].shape != self._rows.shape:
            raise ValueError(
                f"the state is of a window {list(state['rows'].shape)}, this one is {list(self._rows.shape)}"
            )
        self._window.load_state_dict(state)
        self._rows = state["rows"].to(self._rows, copy=True)
        self.damping, self._solved = float(state["damping"]), None

    def _ridge(self) -> float:
        """``u`` of now, with an inverse near it."""
        had = self._window.inverse
        u = self._window.factorise(len(self) * self.damping)
        if self._window.inverse is not had:
            self._solved = None
        if u > len(self) * self.damping:
            self.damping = u / len(self)
        return u

    def _solutions(self) -> Tensor:
        """``V``, of the inverse as it is."""
        if self._solved is None:
            assert self._window.inverse is not None
            self._solved = torch.empty_like(self._rows)
            step = max(1, piece(self._rows.device) // self._window.capacity)
            for part in torch.split(torch.arange(self._rows.shape[1], device=self._rows.device), step):
                columns = slice(int(part[0]), int(part[-1]) + 1)
                self._solved[:, columns] = self._window.inverse @ self._rows[:, columns].to(torch.float64)
        return self._solved


def check_products(products: Tensor, own: float) -> None:
    """Refuse a gradient by its products with those of a window, and with itself, before the window is changed.

    Raises:
        NumericsError: One is not finite.
    """
    if not (math.isfinite(own) and bool(torch.isfinite(products).all())):
        raise NumericsError(
            "a gradient for the window, or its product with one that is there, is not finite",
            hint="the loss is far from normal; check the data and the learning rate",
        )


def row_products(rows: Tensor, row: Tensor) -> Tensor:
    """``G g`` ``[m]`` in float64, of ``G`` ``[m, d]`` and ``g`` ``[d]``."""
    found = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    step = max(1, piece(rows.device) // len(rows))
    for start in range(0, rows.shape[1], step):
        columns = slice(start, start + step)
        found += rows[:, columns].to(torch.float64) @ row[columns].to(torch.float64)
    return found


def combination(rows: Tensor, coefficients: Tensor) -> Tensor:
    """``G^T c`` ``[d]`` or ``[d, k]`` in float64, of ``G`` ``[m, d]`` and ``c`` ``[m]`` or ``[m, k]``."""
    step = max(1, piece(rows.device) // len(rows))
    parts = [
        rows[:, start : start + step].to(torch.float64).mT @ coefficients for start in range(0, rows.shape[1], step)
    ]
    return torch.cat(parts)
