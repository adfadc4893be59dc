"""The user's own module without the channels that were cut: its tensors sliced, the sizes that it keeps made to fit.

Which attributes are sizes is decided by running: a module that stops, or whose output is no value of the cut graph, is
given other sizes (``sizes``). What comes out is proved. Numbers in the code, and in closures, are out of reach: a
module that has them runs the cut graph.
Cost: a forward pass in float64 for each try, and for each attribute that could have stayed.
"""

from __future__ import annotations

import copy
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import InputError
from .channel_rules import op_name, shape_of
from .cut import cut, float64_by_default, probe_inputs, randomised, seeded, sliced_tensor, tensor_leaves
from .graph_forward import give_graph
from .groups import Channels, source_line
from .rewrite import put_tensor, tensor_at
from .sizes import (
    PRIVATE,
    Need,
    Place,
    Size,
    Unit,
    around,
    find_needs,
    find_units,
    kept_sizes,
    layer_sizes,
    module_path,
    put_size,
)
from .sliced_attention import slice_attentions
from .trace import Graph, argument, aten

TOLERANCE = 1e-9  # of the largest output, in float64
MOST_TRIES = 150
HINT = "let forward read that size from an attribute, or write -1"


class ReloadError(InputError):
    """The user's class can't hold the smaller network."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the cut graph computes on random tensors.

    Attributes:
        outputs: In the order of the network's.
        shapes: Of every node's output, by the node's name.
        prints: Two sums of every node's output, by shape.
    """

    outputs: list[Tensor] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prints: dict[tuple[int, ...], list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a try is none.

    Attributes:
        path: Of the first module whose output is wrong, or else of the innermost one that stopped.
        others: Modules with wrong outputs after it, and the one that stopped.
        passed: Modules with right outputs.
        where: Line of the user's code; empty where nothing stopped.
    """

    path: str
    others: tuple[str, ...]
    passed: frozenset[str]
    reason: str
    where: str


def sliced(module: nn.Module, graph: Graph, channels: Channels, kept: Tensor, *, seed: int = 0) -> nn.Module:
    """A copy of the user's module with its tensors sliced as ``cut`` slices them, and its attributes made to fit.

    Proved: in evaluation mode, with random parameters and buffers in float64, its outputs equal the cut graph's within
    1e-9 of the largest, on a batch that it wasn't traced with. Where its code has a size in it that no attribute holds,
    its ``forward`` runs the cut graph, and ``why_graph`` of it says why.

    Args:
        module: What ``graph`` was traced from; not changed.
        channels: Of ``graph``.
        kept: bool over all channels, as ``kept_channels`` gives it.
        seed: Of the random tensors.

    Raises:
        ReloadError: The module can't be copied, or its graph doesn't run on its tensors; names the layer.
    """
    base = copied(module)
    names = {group[0]: group for group in graph.tied}
    stored = {target: names.get(target, (target,)) for target in channels.weights if _has_tensor(base, target)}
    for target, aliases in stored.items():
        _put(base, aliases, sliced_tensor(channels, kept, target, tensor_at(base, target)))
    _forget(base)
    slice_attentions(base, channels, kept)

    whole = randomised(channels.module, seed=seed).cpu()
    for target in channels.weights.keys() - stored.keys():  # made by the user's code: no other values can be had
        constant = tensor_at(channels.module, target)
        put_tensor(whole, target, constant.double() if constant.is_floating_point() else constant)
    small, inputs = cut(channels, whole, kept), probe_inputs(graph, seed=seed)
    reference = _reference(small, inputs)
    trial = copy.deepcopy(base).cpu().double().eval()
    for target, aliases in stored.items():
        _put(trial, aliases, sliced_tensor(channels, kept, target, tensor_at(whole, target)))

    needs = find_needs(trial, channels, small)
    fixed = layer_sizes(trial, channels, needs, reference.shapes)
    for place, size in fixed.items():
        put_size(trial, place, size)
    units, homeless = find_units(trial, channels, needs, reference.shapes)
    try:
        chosen = _search(trial, inputs, reference, units)
    except _NotFound as error:
        chosen = {}
        refusal = _refusal(trial, error.failure, homeless, _narrowed(channels, small, reference))
        give_graph(trial, small, refusal.message, refusal.hint)
        if _tried(trial, inputs, reference) is not None:
            raise refusal from None
        give_graph(base, cut(channels, channels.module, kept), refusal.message, refusal.hint)
    for place, size in (fixed | chosen).items():
        put_size(base, place, size)
    return base


# -- tensors ---------------------------------------------------------------------------------------------------------


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; tensors that were computed, as a weight under a norm is, without their history.

    Raises:
        ReloadError: Something that it holds can't be copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in pytree.tree_leaves([held for name, held in vars(part).items() if name not in PRIVATE]):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    # What a user's object can't do when it is copied may raise anything.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ReloadError(
            f"{type(module).__name__} can't be copied ({reason})", hint="leave out what can't be"
        ) from error


def _has_tensor(module: nn.Module, target: str) -> bool:
    try:
        tensor_at(module, target)
    except (AttributeError, AssertionError):
        return False
    return True


def _put(module: nn.Module, aliases: Sequence[str], value: Tensor) -> None:
    """Set a tensor under all of its names; a parameter stays one."""
    owners = [(module.get_submodule(path), name) for path, _, name in (alias.rpartition(".") for alias in aliases)]
    before = getattr(*owners[0])
    if before.is_complex() and not value.is_complex():
        value = torch.view_as_complex(value)
    made = nn.Parameter(value, requires_grad=before.requires_grad) if isinstance(before, nn.Parameter) else value
    for owner, name in owners:
        held: Any = next((d for d in (owner._parameters, owner._buffers) if name in d), vars(owner))
        held[name] = made


def _forget(module: nn.Module) -> None:
    """Empty dictionaries of tensors, which forward fills: a table of all heads' biases, by device."""
    for part in module.modules():
        for name, held in vars(part).items():
            is_cache = name not in PRIVATE and isinstance(held, dict) and held
            if is_cache and all(isinstance(value, Tensor) for value in held.values()):
                vars(part)[name] = type(held)()


# -- the reference ---------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what tells its values apart."""

    def __init__(self, module: fx.GraphModule, reference: Reference) -> None:
        super().__init__(module)
        self.reference = reference

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.reference.shapes[n.name] = tuple(value.shape)
            if value.is_floating_point():
                self.reference.prints[tuple(value.shape)].append(_print(value))
        return value


def _reference(small: fx.GraphModule, inputs: Sequence[Tensor]) -> Reference:
    reference = Reference()
    with torch.no_grad(), float64_by_default(), seeded(0):
        outputs = _Recorder(small, reference).run(*inputs)
    reference.outputs.extend(tensor_leaves(outputs))
    return reference


def _print(value: Tensor) -> tuple[float, float]:
    """A sum that no permutation keeps, and the sum that its errors are measured by."""
    flat = value.detach().reshape(-1).double()
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return float(flat @ weights), float(flat.abs().sum())


class _Wide(TorchFunctionMode):
    """Code that asks for float32 gets float64; constants keep the value that they have in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        value = func(*args, **kwargs)
        is_constant = func in (torch.tensor, torch.as_tensor) and value.dtype is torch.float64
        return value.float().double() if is_constant else value


# -- the search ------------------------------------------------------------------------------------------------------


class _NotFound(Exception):
    """No sizes that were tried fit; of the try that came furthest."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


Attributes = Mapping[str, dict[str, Any]]


def _search(
    module: nn.Module, inputs: Sequence[Tensor], reference: Reference, units: Mapping[str, Unit]
) -> dict[Place, Size]:
    """Sizes with which the module computes what the reference has.

    Raises:
        _NotFound: None of those tried.
    """
    before = {path: dict(vars(module.get_submodule(path))) for path in units}
    failures: list[Failure] = []
    while len(failures) < MOST_TRIES:
        chosen = {place: size for unit in units.values() for place, size in unit.choices[unit.number].items()}
        _set_sizes(module, before, chosen)
        failure = _tried(module, inputs, reference)
        if failure is None:
            return _needed(module, inputs, reference, before, chosen)
        failures.append(failure)
        if not _advance(units, failure):
            break
    raise _NotFound(max(failures, key=lambda failure: len(failure.passed)))


def _set_sizes(module: nn.Module, before: Attributes, chosen: Mapping[Place, Size]) -> None:
    """Give modules with the attributes ``before`` other sizes."""
    for path, attributes in before.items():
        held = vars(module.get_submodule(path))
        held.clear()
        held.update(attributes)
    for place, size in chosen.items():
        put_size(module, place, size)


def _advance(units: Mapping[str, Unit], failure: Failure) -> bool:
    """The next choice of the innermost module around the failure that has one, and of those like it."""
    for path in (failure.path, *failure.others):
        inner = [units[p] for p in around(path) if p in units]
        for depth, unit in enumerate(inner):
            before = unit.number
            if unit.moved():
                for other, found in units.items():
                    if found.kind == unit.kind and found.number == before and other not in failure.passed:
                        found.number = unit.number
                for found in inner[:depth]:
                    found.tries = 0
                return True
    return False


def _needed(
    module: nn.Module,
    inputs: Sequence[Tensor],
    reference: Reference,
    before: Attributes,
    chosen: Mapping[Place, Size],
) -> dict[Place, Size]:
    """Without the sizes that only happen to equal one that changes: an attribute at a time, in all modules."""
    _set_sizes(module, before, {})
    sizes = {path: kept_sizes(module.get_submodule(path), path) for path in before}
    needed = {place: size for place, size in chosen.items() if sizes[place.module][place] != size}
    for steps in sorted({place.steps for place in needed}, key=lambda steps: (-len(steps), str(steps))):
        fewer = {place: size for place, size in needed.items() if place.steps != steps}
        _set_sizes(module, before, fewer)
        if _tried(module, inputs, reference) is None:
            needed = fewer
    return needed


def _tried(module: nn.Module, inputs: Sequence[Tensor], reference: Reference) -> Failure | None:
    """Run the module; None where it computes what the reference has."""
    running, passed, wrong = [""], set[str](), list[str]()
    hooks = []

    def watch(path: str, part: nn.Module) -> None:
        def enter(*_: Any) -> None:
            running.append(path)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            running.pop()
            if all(_is_known(reference, t) for t in tensor_leaves(output) if t.is_floating_point()):
                passed.add(path)
            elif path not in wrong:
                wrong.append(path)

        hooks.extend([part.register_forward_pre_hook(enter), part.register_forward_hook(leave)])

    for path, part in module.named_modules():
        watch(path, part)
    _forget(module)
    try:
        with torch.no_grad(), float64_by_default(), seeded(0), _Wide():
            outputs = tensor_leaves(module(*inputs))
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything when a size doesn't fit
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        path, *others = (*wrong, running[-1])
        return Failure(path, tuple(others), frozenset(passed), reason, _line(error))
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) == len(reference.outputs) and all(map(_equal, outputs, reference.outputs)):
        return None
    path, *others = wrong or [""]
    return Failure(path, tuple(others), frozenset(passed), "computes something else with the smaller sizes", "")


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _is_known(reference: Reference, value: Tensor) -> bool:
    total, _ = _print(value)
    return any(abs(total - other) <= TOLERANCE * size for other, size in reference.prints.get(tuple(value.shape), ()))


def _line(error: BaseException) -> str:
    """``net.py:12`` of the innermost line outside of torch, as ``source_line`` writes it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""


# -- refusals --------------------------------------------------------------------------------------------------------


def _narrowed(channels: Channels, small: fx.GraphModule, reference: Reference) -> list[fx.Node]:
    """Attentions whose heads got narrower: the scale that torch takes from their width is another one then."""
    cut_nodes = {node.name: node for node in small.graph.nodes}
    found = []
    for node in channels.module.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default and argument(node, "scale", None) is None:
            query = cut_nodes[node.name].args[0]
            if reference.shapes[query.name][-1] != shape_of(node.args[0])[-1]:
                found.append(node)
    return found


def _refusal(module: nn.Module, failure: Failure, homeless: Sequence[Need], narrowed: Sequence[fx.Node]) -> ReloadError:
    paths = dict(module.named_modules(remove_duplicate=False))

    def named(path: str) -> str:
        path = next(p for p in around(path) if p in paths)
        return f"{path or 'the network'} ({type(paths[path]).__name__})"

    for node in narrowed:
        if not failure.where and failure.path.startswith(module_path(node)):
            return ReloadError(
                f"{named(module_path(node))}: scaled_dot_product_attention at {source_line(node)} takes its scale from "
                "the width of its heads, and they get narrower",
                hint="pass scale= in forward",
            )
    lines = [need for need in homeless if source_line(need.node) == failure.where]
    for need in lines or [need for need in homeless if need.path in around(failure.path)]:
        return ReloadError(
            f"{named(need.path)}: {op_name(need.node)} at {source_line(need.node) or 'a line of torch'} needs "
            f"{need.new} where it has {need.old}, and no attribute holds that",
            hint=HINT,
        )
    where = f" at {failure.where}" if failure.where else ""
    return ReloadError(f"{named(failure.path)}{where}: {failure.reason}", hint=HINT)
