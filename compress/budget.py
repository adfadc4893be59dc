"""Budgets as people write them: ``0.3MB``, ``25%``, ``4bit``, ``sparsity=0.5``, ``macs=50%``, ``latency=2ms``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

QUANTITIES = ("bytes", "bits", "sparsity", "macs", "params", "bops", "latency")
UNITS = {
    "bytes": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3},
    "bits": {"bit": 1.0, "bits": 1.0},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "params": {"": 1.0, "k": 1e3, "m": 1e6},
    "bops": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "sparsity": {"": 1.0},
}
SLACK = 1e-9  # of the last digit: what is lost to floats
EXAMPLES = "0.3MB, 25%, 4bit, sparsity=0.5, macs=50%, latency=2ms"


@dataclass(frozen=True, slots=True)
class Budget:
    """The goal of a run.

    Attributes:
        quantity: One of ``QUANTITIES``: bytes of the delivered model file, average bits of a weight, MACs (of methods
            that zero weights, those whose weight isn't zero), parameters, bit operations, milliseconds of latency, or
            sparsity (zeros / elements of all weights; of methods that cut channels, the share of the channels that
            goes).
        limit: The most that may remain; for sparsity, the least that must be removed. A fraction if ``of`` is
            ``dense``.
        of: ``absolute``, or ``dense`` where the limit is a fraction of the dense model's figure.
    """

    quantity: str
    limit: float
    of: str = "absolute"

    def __str__(self) -> str:
        if self.of == "dense":
            share = f"{100 * self.limit:g}%"
            return share if self.quantity == "bytes" else f"{self.quantity}={share}"
        if self.quantity == "bytes":
            return format_bytes(self.limit)
        if self.quantity == "bits":
            return f"{self.limit:g}bit"
        return f"{self.quantity}={self.limit:g}" + ("ms" if self.quantity == "latency" else "")

    def absolute(self, dense: float) -> float:
        """The limit in the quantity's own unit, ``dense`` being the dense model's figure."""
        return self.limit * dense if self.of == "dense" else self.limit


def rounded_up(amount: float) -> float:
    """The amount at four digits, and no less: a minimum that is printed is one that can be asked for."""
    step = 10.0 ** (math.floor(math.log10(amount)) - 3) if amount > 0 else 1.0
    return float(f"{math.ceil(amount / step - SLACK) * step:.4g}")


def format_bytes(size: float) -> str:
    """Decimal bytes as people read them: ``283.0 kB`` is written ``283.0KB``; 1 MB = 10^6 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{size / scale:.4g}{unit}"
    return f"{size:g}B"


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        UsageError: Not a budget, or out of range; names the text and shows the forms that are.

    Example:
        >>> parse_budget("0.3MB")
        Budget(quantity='bytes', limit=300000.0, of='absolute')
        >>> parse_budget("macs=50%")
        Budget(quantity='macs', limit=0.5, of='dense')
    """
    match = re.fullmatch(r"(?:([a-z]+)\s*=\s*)?(-?[0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([a-z%]*)", text.strip().lower())
    if match is None:
        raise UsageError(f"budget {text!r} is not understood", hint=f"examples: {EXAMPLES}")
    name, number, unit = match.group(1), float(match.group(2)) + 0.0, match.group(3)  # no -0
    quantity = name or ("bits" if unit in UNITS["bits"] else "bytes")
    if quantity not in QUANTITIES:
        raise UsageError(f"budget {text!r}: unknown quantity {name!r}", hint=f"one of {', '.join(QUANTITIES)}")
    outside = UsageError(f"budget {text!r} is out of range", hint="sparsity lies between 0 and 1; others are above 0")
    if number < 0 or (number == 0 and quantity != "sparsity"):
        raise outside
    budget = _with_unit(text, quantity, number, unit)
    if budget.of == "dense" and budget.limit > 1:
        raise UsageError(
            f"budget {text!r} is more than the whole network",
            hint="give the share that remains, below 100%; hcompress export writes the network as it is",
        )
    if budget.quantity == "sparsity" and budget.limit > 1:
        raise outside
    return budget


def _with_unit(text: str, quantity: str, number: float, unit: str) -> Budget:
    if unit == "%":
        if quantity == "sparsity":
            return Budget("sparsity", number / 100)
        if quantity == "bits":
            raise UsageError(f"budget {text!r}: bits are absolute", hint="write 4bit, or 25% for bytes")
        return Budget(quantity, number / 100, "dense")
    if quantity == "bytes" and not unit:
        raise UsageError(
            f"budget {text!r} has no unit", hint=f"write {text}B, {text}KB or {text}MB; examples: {EXAMPLES}"
        )
    if unit not in UNITS[quantity]:
        allowed = ", ".join(u for u in UNITS[quantity] if u)
        raise UsageError(
            f"budget {text!r}: unit {unit or 'missing'!r} does not fit {quantity}",
            hint=f"use {allowed or 'a plain number'} or a percentage; examples: {EXAMPLES}",
        )
    return Budget(quantity, number * UNITS[quantity][unit])


def budget_from_json(record: dict[str, Any] | None) -> Budget | None:
    """The budget in a plan."""
    return None if record is None else Budget(str(record["quantity"]), float(record["limit"]), str(record["of"]))
