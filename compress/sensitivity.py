"""Sensitivity and cost records: one number, with its error, for each (layer, option) pair; no tensors.

An option is what could be done to a layer: a bit width (``"4"``), a sparsity (``"0.5"``), or ``""`` for the layer
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import canonical
from .errors import InputError

SENSITIVITY_SCHEMA = "hcompress.sensitivity/1"
COST_SCHEMA = "hcompress.cost/1"
TOGETHER = "all layers"  # in place of a layer: of all of them
FEW_PASSES = (2, 4)  # of trials
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error (0 where it is exact)."""

    value: float
    stderr: float = 0.0


@dataclass(frozen=True, slots=True)
class Repeats:
    """What a measure does again and again, in passes, products or widths: ``repeats(options, total)`` of its file.

    Attributes:
        options: Of a short trial, and of one with more repeats.
        counts: Repeats of the two.
        least: Of the measure itself, if ``rtol`` is met at once.
        most: Of the measure itself.
        examples: That it looks at each time.
    """

    options: tuple[dict[str, Any], dict[str, Any]]
    counts: tuple[int, int]
    least: int
    most: int
    examples: int


def repeats_once(options: Mapping[str, Any], total: int) -> Repeats:
    """Of a measure that goes over its ``total`` examples once."""
    same = dict(options)
    return Repeats((same, same), (1, 1), 1, 1, total)


def repeats_of_passes(options: Mapping[str, Any], total: int, *, fewest: int) -> Repeats:
    """Of a measure that makes ``fewest`` passes and then more, until ``rtol`` is met or there were ``passes``."""
    one, two = ({**options, "passes": count} for count in FEW_PASSES)
    most = int(options["passes"])
    return Repeats((one, two), FEW_PASSES, min(most, fewest), most, total)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a change of each layer costs in loss.

    Attributes:
        method: The measure's registered name.
        unit: Of every value, e.g. ``loss per squared weight`` or ``squared weight``.
        task_sha256: Hash of the data it was measured on; None for data-free measures.
        options: How it was measured.
    """

    method: str
    unit: str
    source_sha256: str
    task_sha256: str | None
    entries: Mapping[Key, Estimate]
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON, entries in layer order."""
        return {
            "schema": SENSITIVITY_SCHEMA,
            "method": self.method,
            "unit": self.unit,
            "source_sha256": self.source_sha256,
            "task_sha256": self.task_sha256,
            "options": dict(self.options),
            "entries": [
                {"layer": layer, "option": option, "value": e.value, "stderr": e.stderr}
                for (layer, option), e in self.entries.items()
            ],
        }


@dataclass(frozen=True, slots=True)
class CostTable:
    """What each layer costs under each option.

    Attributes:
        quantity: A budget's quantity: ``bytes``, ``bits``, ``macs``, ``latency``...
        fixed: What the network costs whatever is chosen.
    """

    quantity: str
    entries: Mapping[Key, float]
    fixed: float = 0.0

    def has(self, option: str) -> bool:
        """Whether any layer has a cost under ``option``."""
        return any(found == option for _, found in self.entries)

    def total(self, option: str) -> float:
        """The sum over layers under one option."""
        return sum(value for (_, found), value in self.entries.items() if found == option)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON, entries in layer order."""
        return {
            "schema": COST_SCHEMA,
            "quantity": self.quantity,
            "fixed": self.fixed,
            "entries": [
                {"layer": layer, "option": option, "value": value} for (layer, option), value in self.entries.items()
            ],
        }


def sensitivity_from(record: Mapping[str, Any], where: str) -> Sensitivity:
    """The record that ``to_json`` made plain.

    Raises:
        InputError: A key is missing or wrong; names ``where`` and the key.
    """
    try:
        entries = {
            (str(e["layer"]), str(e["option"])): Estimate(float(e["value"]), float(e["stderr"]))
            for e in record["entries"]
        }
        return Sensitivity(
            str(record["method"]),
            str(record["unit"]),
            str(record["source_sha256"]),
            record["task_sha256"],
            entries,
            dict(record["options"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: bad entry ({error})", hint="make the run again") from None


def cost_table_from(record: Mapping[str, Any], where: str) -> CostTable:
    """The table that ``to_json`` made plain.

    Raises:
        InputError: A key is missing or wrong; names ``where`` and the key.
    """
    try:
        entries = {(str(e["layer"]), str(e["option"])): float(e["value"]) for e in record["entries"]}
        return CostTable(str(record["quantity"]), entries, float(record["fixed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: bad entry ({error})", hint="make the run again") from None


def read_sensitivity(path: Path) -> Sensitivity:
    """Read sensitivity.json.

    Raises:
        InputError: Not a sensitivity record; names the file and the key.
    """
    return sensitivity_from(canonical.read_record(path, SENSITIVITY_SCHEMA), str(path))
