"""A plan: the decisions of a run, as a file that people and CI read, diff and edit.

plan.json is canonical (``canonical.dumps``): no times, hosts or absolute paths, so the same inputs give the same bytes.
Masks are too big for JSON: a decision carries their count and sha256, and the bits lie in the sidecar plan.safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import canonical
from .budget import Budget, budget_from_json
from .errors import InputError, UsageError, escape
from .pattern import parse_pattern
from .widths import BY_CHANNEL as BY_CHANNEL
from .widths import WIDTHS, Width, is_mixed, is_width, shown

SCHEMA = "hcompress.plan/1"
# How a weight's range is found, and the letter of each in a range that differs by channel: ``clip0.20`` (A) to
# ``clip1.20`` (Z) cover that share of the largest magnitude.
CLIPS = {f"clip{0.2 + 0.04 * step:.2f}": chr(ord("A") + step) for step in range(26)}
RANGES = {"minmax": "m", "mse": "s", "p99.9": "a", "p99.5": "b", "p99": "c", "p98": "d", **CLIPS}
RANGE_NAMES = "minmax, mse, p99.9, p99.5, p99, p98, clip0.20 to clip1.20 by 0.04"
WIDEST = 8
SYMMETRIC, REDUCED, ASYMMETRIC = ("symmetric", "symmetric_reduced", "asymmetric")
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class MaskWeights:
    """Zero all but ``kept`` of a tensor's ``total`` elements.

    Attributes:
        tensor: State-dict key.
        pattern: ``unstructured``, ``n:m`` (at most n of m consecutive weights along the input dimension), or ``RxC``
            (blocks of R outputs by C inputs that go together).
        mask_sha256: Hash of the packed mask bits, which lie in the sidecar under the tensor's key.
        values_sha256: Hash of the survivors' new values, which lie in the sidecar under the key and ``#values``; None
            where they keep the checkpoint's.
    """

    tensor: str
    kept: int
    total: int
    pattern: str
    mask_sha256: str
    values_sha256: str | None = None
    kind: str = field(default="mask", init=False)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Round a tensor to ``2**bits`` levels.

    Attributes:
        tensor: State-dict key of a weight, or the name of an activation in the traced graph.
        target: ``weight`` or ``activation``.
        bits: 2 to 8; or ``channels:`` and a letter for each index of ``axis`` (``widths.WIDTHS``).
        scheme: ``symmetric`` (zero point 0), ``symmetric_reduced`` (the levels of one bit less, so that no integer
            kernel overflows) or ``asymmetric`` (uint, zero point within the range).
        axis: Dimension that has one scale per index; None for one scale per tensor.
        range: How a weight's range is found: one of ``RANGES``, or ``channels:`` and a letter of theirs for each scale;
            or an activation's ``(low, high)``.
        values_sha256: Hash of the levels and scales that make up for one another's rounding, which lie in the sidecar
            under the key and ``#levels`` and ``#scales``; None where each is the nearest, by the range.
        group_size: Inputs of a row that share a scale of 16 bits, one of ``GROUP_SIZES``, in order; the last group of a
            row may be shorter. None for one scale per index of ``axis``.
    """

    tensor: str
    target: str
    bits: Width
    scheme: str
    axis: int | None
    range: str | tuple[float, float]
    values_sha256: str | None = None
    group_size: int | None = None
    kind: str = field(default="quantize", init=False)


@dataclass(frozen=True, slots=True)
class CorrectBias:
    """New values of a bias, or of a batch norm's: the channels' means are those of before the weights were rounded.

    Attributes:
        tensor: State-dict key.
        values_sha256: Hash of the new values, which lie in the sidecar under the key and ``#values``.
    """

    tensor: str
    values_sha256: str
    kind: str = field(default="correct_bias", init=False)


@dataclass(frozen=True, slots=True)
class PruneChannels:
    """Cut all channels of a group but those of ``keep`` out of the network.

    Attributes:
        tensor: The group's name: the weight that makes its channels first; ``hcompress inspect --channels`` lists them.
        size: Channels that the group has in the source.
        keep: Those that stay, ascending from 0.
    """

    tensor: str
    size: int
    keep: tuple[int, ...]
    kind: str = field(default="prune_channels", init=False)


@dataclass(frozen=True, slots=True)
class Replace:
    """New values of a tensor, trained or computed: all of it, in the shape that the cut network has.

    Attributes:
        tensor: State-dict key of a parameter or buffer.
        values_sha256: Hash of the new values, which lie in the sidecar under the key and ``#values``.
    """

    tensor: str
    values_sha256: str
    kind: str = field(default="replace", init=False)


Decision = MaskWeights | Quantize | CorrectBias | PruneChannels | Replace
KINDS: dict[str, type[Decision]] = {
    "mask": MaskWeights,
    "quantize": Quantize,
    "correct_bias": CorrectBias,
    "prune_channels": PruneChannels,
    "replace": Replace,
}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of the network: the shape of an example, without the batch, and its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a method decided, and from what.

    Attributes:
        method: Registered name.
        options: The method's options that were in force.
        source_sha256: Hash of the checkpoint that was planned on.
        task_sha256: Hash of the calibration data that the method saw; None for data-free methods.
        predicted: Figures that the method expects, e.g. ``average_bits`` and ``sparsity``.
        sidecar: sha256 of plan.safetensors; None where every decision is in the JSON.
        inputs: What the network was traced with, so that applying the plan needs no data.
    """

    method: str
    options: dict[str, Any]
    seed: int
    source_sha256: str
    task_sha256: str | None
    budget: Budget | None
    decisions: tuple[Decision, ...]
    predicted: dict[str, float]
    sidecar: str | None = None
    inputs: tuple[InputSpec, ...] = ()
    schema: str = SCHEMA

    def masks(self) -> dict[str, MaskWeights]:
        """The mask decisions by tensor."""
        return {d.tensor: d for d in self.decisions if isinstance(d, MaskWeights)}

    def has_values(self) -> bool:
        """Whether the plan holds new values of weights, which belong to the checkpoint that it was made on."""
        masks = self.masks().values()
        return self.makes_up_for_rounding() or bool(self.replaced()) or any(m.values_sha256 is not None for m in masks)

    def makes_up_for_rounding(self) -> bool:
        """Whether levels or biases were computed on calibration data, once the widths were known."""
        return bool(self.corrections()) or any(d.values_sha256 is not None for d in self.quantized("weight").values())

    def channels(self) -> dict[str, PruneChannels]:
        """The channel decisions by group."""
        return {d.tensor: d for d in self.decisions if isinstance(d, PruneChannels)}

    def replaced(self) -> dict[str, Replace]:
        """The tensors with new values."""
        return {d.tensor: d for d in self.decisions if isinstance(d, Replace)}

    def corrections(self) -> dict[str, CorrectBias]:
        """The corrected biases by tensor."""
        return {d.tensor: d for d in self.decisions if isinstance(d, CorrectBias)}

    def without_corrections(self) -> Plan:
        """A plan of rounding with nearest levels and the checkpoint's own tensors; a sidecar of these is gone."""
        rest = tuple(
            replace(d, values_sha256=None) if isinstance(d, Quantize) else d
            for d in self.decisions
            if not isinstance(d, CorrectBias | Replace)
        )
        return replace(self, decisions=rest, sidecar=self.sidecar if self.masks() else None)

    def untrained(self) -> Plan:
        """The plan without a record of training."""
        return replace(self, options={name: value for name, value in self.options.items() if name != "recover"})

    def quantized(self, target: str) -> dict[str, Quantize]:
        """The quantization decisions for weights or activations, by tensor."""
        return {d.tensor: d for d in self.decisions if isinstance(d, Quantize) and d.target == target}


def weight_scheme(bits: Width, *, with_integers: bool) -> str:
    """The scheme of a weight that is multiplied ``with_integers`` (8-bit activations) or with floats.

    The int8 kernels of x86 processors without VNNI add two products of an 8-bit activation and a weight in 16 bits:
    ``2 x 255 x 64`` fits, ``2 x 255 x 127`` doesn't. Source: ONNX Runtime's documentation of quantization, on U8S8.
    """
    return REDUCED if with_integers and bits == WIDEST else SYMMETRIC


def grid_bits(bits: Width, scheme: str) -> Width:
    """Bits of the levels in use, where each is stored in ``bits``."""
    return bits - 1 if scheme == REDUCED and isinstance(bits, int) else bits


def read_plan(path: Path) -> Plan:
    """Read and check plan.json.

    Raises:
        InputError: Not a plan, or a decision with a missing, unknown or misfit field; names it.
    """
    record = canonical.read_record(path, SCHEMA)
    try:
        decisions = tuple(_decision(path, entry) for entry in record["decisions"])
        _check_groups(path, decisions)
        return Plan(
            method=str(record["method"]),
            options=dict(record["options"]),
            seed=int(record["seed"]),
            source_sha256=str(record["source_sha256"]),
            task_sha256=record["task_sha256"],
            budget=budget_from_json(record["budget"]),
            decisions=decisions,
            predicted=dict(record["predicted"]),
            sidecar=record["sidecar"],
            inputs=tuple(_input(entry) for entry in record["inputs"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {_field_error(error)}", hint="see docs/plan-format.md") from None


def _input(entry: dict[str, Any]) -> InputSpec:
    shape = tuple(int(size) for size in entry["shape"])
    if any(size < 1 for size in shape):
        raise ValueError(f"input of shape {list(shape)}")
    return InputSpec(shape, str(entry["dtype"]))


def _field_error(error: Exception) -> str:
    return f"key {error} is missing" if isinstance(error, KeyError) else f"bad value ({error})"


def _decision(path: Path, entry: dict[str, Any]) -> Decision:
    kind = entry.get("kind")
    if kind not in KINDS:
        raise InputError(
            f"{path}: unknown decision kind {escape(str(kind))}", hint=f"known kinds: {', '.join(sorted(KINDS))}"
        )
    fields = {key: value for key, value in entry.items() if key != "kind"}
    if isinstance(fields.get("range"), list):
        low, high = fields["range"]
        fields["range"] = (float(low), float(high))
    if isinstance(fields.get("keep"), list):
        fields["keep"] = tuple(fields["keep"])
    decision = KINDS[kind](**fields)
    _check(path, decision)
    return decision


def _check(path: Path, decision: Decision) -> None:
    name = escape(str(decision.tensor))
    if isinstance(decision, MaskWeights):
        if not 0 <= decision.kept <= decision.total:
            raise InputError(f"{path}: {name} keeps {decision.kept} of {decision.total}", hint="kept lies in 0..total")
        try:
            parse_pattern(str(decision.pattern))
        except UsageError as error:
            raise InputError(f"{path}: {name} has pattern {escape(str(decision.pattern))}", hint=error.hint) from None
        return
    if isinstance(decision, PruneChannels):
        _check_channels(path, name, decision)
        return
    if isinstance(decision, CorrectBias | Replace):
        return
    if not is_width(decision.bits):
        raise InputError(
            f"{path}: {name} has {escape(str(decision.bits))} bits",
            hint=f"bits lie in 2..8; or {BY_CHANNEL} and for each channel a letter of {''.join(WIDTHS)}",
        )
    if is_mixed(decision.bits) and (decision.target != "weight" or decision.axis is None):
        raise InputError(f"{path}: {name} has bits by channel, but no axis", hint="give one number of bits, 2..8")
    if decision.target not in ("weight", "activation"):
        raise InputError(f"{path}: {name} has target {escape(str(decision.target))}", hint="weight or activation")
    schemes = (ASYMMETRIC,) if decision.target == "activation" else (SYMMETRIC, REDUCED)
    if decision.scheme not in schemes or grid_bits(decision.bits, decision.scheme) == 1:
        raise InputError(
            f"{path}: {name} has scheme {escape(str(decision.scheme))} with {decision.bits} bits",
            hint=f"{' or '.join(schemes)} for a{'n' * (decision.target == 'activation')} {decision.target}",
        )
    if isinstance(decision.range, tuple) != (decision.target == "activation"):
        raise InputError(
            f"{path}: {name} has range {decision.range!r}",
            hint=f"{RANGE_NAMES} for a weight; [low, high] for an activation",
        )
    if not isinstance(decision.range, tuple):
        _check_range(path, name, str(decision.range))


def _check_groups(path: Path, decisions: tuple[Decision, ...]) -> None:
    """Scales of groups go with floats: no integer kernel multiplies with several scales in one sum."""
    quantized = [decision for decision in decisions if isinstance(decision, Quantize)]
    grouped = [decision for decision in quantized if decision.group_size is not None]
    for decision in grouped:
        name = escape(str(decision.tensor))
        if decision.group_size not in GROUP_SIZES or (decision.target, decision.axis) != ("weight", 0):
            raise InputError(
                f"{path}: {name} has groups of {escape(str(decision.group_size))}",
                hint=f"a weight with axis 0 may have groups of {', '.join(map(str, GROUP_SIZES))}, or null for none",
            )
        if decision.scheme != SYMMETRIC or is_mixed(decision.bits):
            raise InputError(
                f"{path}: {name} has groups, and {decision.scheme} levels of {shown(decision.bits)}",
                hint="a weight with groups has the scheme symmetric and one width",
            )
    if grouped and any(decision.target == "activation" for decision in quantized):
        raise InputError(
            f"{path}: {escape(str(grouped[0].tensor))} has groups, and activations are rounded",
            hint="groups go with float activations: set group_size to null, or remove the activations",
        )


def _check_channels(path: Path, name: str, decision: PruneChannels) -> None:
    keep = decision.keep
    if not isinstance(keep, tuple) or any(not isinstance(i, int) or isinstance(i, bool) for i in keep):
        raise InputError(f"{path}: {name} keeps {keep!r}", hint="keep lists the channels that stay, ascending")
    if list(keep) != sorted(set(keep)) or not keep or keep[0] < 0 or keep[-1] >= decision.size:
        raise InputError(
            f"{path}: {name} keeps {len(keep)} of {decision.size} channels, out of order, twice or beyond the last",
            hint=f"keep lists one or more of 0 to {decision.size - 1}, ascending",
        )


def _check_range(path: Path, name: str, found: str) -> None:
    if found in RANGES:
        return
    letters = found.removeprefix(BY_CHANNEL)
    if letters in ("", found):
        raise InputError(
            f"{path}: {name} has range {found!r}",
            hint=f"{RANGE_NAMES}, or {BY_CHANNEL} and a letter for each channel",
        )
    for channel, letter in enumerate(letters):
        if letter not in RANGES.values():
            raise InputError(
                f"{path}: {name} has the range letter {letter!r} for channel {channel}",
                hint="known letters: m (minmax), s (mse), a to d (p99.9 to p98), A to Z (clip0.20 to clip1.20)",
            )
