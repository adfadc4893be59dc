"""The checks of a run: what was measured, what was allowed, and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One gate or proof.

    Attributes:
        name: Of the setting or proof: ``max_drop``, ``min_metric``, ``max_bytes``, ``max_latency``, ``parity``...
        value: What was measured, in ``unit``.
        limit: What was allowed; None for a figure that is only reported.
        ok: Whether the value keeps the limit.
    """

    name: str
    value: float
    limit: float | None
    unit: str
    ok: bool

    def __str__(self) -> str:
        mark = "ok" if self.ok else "FAILED"
        limit = "" if self.limit is None else f" (limit {self.limit:.6g} {self.unit})"
        return f"{self.name}: {self.value:.6g} {self.unit}{limit} {mark}"


@dataclass(frozen=True, slots=True)
class Verdict:
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def failures(self) -> tuple[Check, ...]:
        """The checks that don't hold."""
        return tuple(check for check in self.checks if not check.ok)


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that turn a figure into an exit code; None where the user set none.

    Attributes:
        max_drop: Most that the metric may get worse, in its own unit (percentage points for accuracy).
        min_metric: Worst value of the metric that passes: at least this for accuracy, at most this for a loss.
        max_bytes: Most bytes of the delivered model file.
        max_latency: Most milliseconds at batch 1.
    """

    max_drop: float | None = None
    min_metric: float | None = None
    max_bytes: float | None = None
    max_latency: float | None = None


def metric_checks(gates: Gates, *, unit: str, higher_is_better: bool, dense: float, compressed: float) -> list[Check]:
    """The checks of the metric against ``max_drop`` and ``min_metric``."""
    checks = []
    drop = dense - compressed if higher_is_better else compressed - dense
    if gates.max_drop is not None:
        # A drop equal to the limit passes; the slack is far below one example of a million.
        # A drop of 91 % to 90 % is one point; one percent of 91 % would be another number.
        drop_unit = "points" if unit == "%" else unit
        checks.append(Check("max_drop", drop, gates.max_drop, drop_unit, drop <= gates.max_drop + 1e-9))
    if gates.min_metric is not None:
        good = compressed >= gates.min_metric - 1e-9 if higher_is_better else compressed <= gates.min_metric + 1e-9
        checks.append(Check("min_metric", compressed, gates.min_metric, unit, good))
    return checks


def limit_check(name: str, value: float, limit: float | None, unit: str) -> list[Check]:
    """A check that ``value`` is at most ``limit``; none where there is no limit."""
    return [] if limit is None else [Check(name, value, limit, unit, value <= limit)]
