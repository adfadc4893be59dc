"""Sizes that a module keeps in its attributes: which of them a cut may change, and to what.

A graph has its sizes in its nodes; a module has them under names that nobody knows. Where ``cut`` changed an argument
of a node, the integers with the old value are looked for in the module that ran it, then in those around it: in its
attributes, and in the tuples, lists, dictionaries and configurations that they hold.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .channel_rules import op_name, shape_of, slice_bounds, split_sizes
from .groups import Channels
from .sliced_attention import SlicedAttention
from .trace import argument

MOST_CHOICES = 40  # of sizes for one module
MOST_NESTED = 4  # containers in containers
MOST_SIZES = 2000  # in one attribute
MOST_PARTS = 64  # that the code cuts one size into, or makes it of: heads, positions that are flattened
TO_THE_END = 2**31  # a slice's end beyond any dimension
PRIVATE = frozenset(vars(nn.Module()))
LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.Embedding, nn.PReLU, nn.Bilinear, SlicedAttention,
)  # fmt: skip

Size = int | tuple[int, ...]
Pair = tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a size.

    Attributes:
        module: Its dotted path.
        steps: An attribute's name, then keys, positions and names inside of it.
    """

    module: str
    steps: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """An argument of a node that is another one in the cut graph.

    Attributes:
        path: Of the module that ran the node.
        name: The argument's in the op's schema; empty where it is only a part of one.
    """

    node: fx.Node
    path: str
    name: str
    old: Size
    new: Size


@dataclass(slots=True)
class Unit:
    """A module with sizes to choose.

    Attributes:
        kind: Equal for modules of one class with the same sizes to choose from.
        choices: Values by place, the likeliest first.
        number: Of the choice that is tried.
        tries: How many were given up.
    """

    kind: object
    choices: list[dict[Place, Size]]
    number: int = 0
    tries: int = 0

    def moved(self) -> bool:
        """Whether there is a choice that wasn't tried; it is taken."""
        self.tries += 1
        self.number = (self.number + 1) % len(self.choices)
        return self.tries < len(self.choices)


# -- what a cut changes ----------------------------------------------------------------------------------------------


def find_needs(module: nn.Module, channels: Channels, small: fx.GraphModule) -> list[Need]:
    """Arguments that differ in the cut graph."""
    cut_nodes = {node.name: node for node in small.graph.nodes}
    paths = dict(module.named_modules(remove_duplicate=False))
    needs = []
    for node in channels.module.graph.nodes:
        if node.op == "call_function" and node.name in cut_nodes:
            path = next(path for path in around(module_path(node)) if path in paths)
            pairs = _pairs(node, cut_nodes[node.name])
            needs += [Need(node, path, name, old, new) for name, (old, new) in pairs if old != new]
    return needs


def module_path(node: fx.Node) -> str:
    """Of the innermost module that ran a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = re.sub(r"@\d+", "", str(stack[-1][0])) if stack else ""  # the second call of layer is layer@1
    return "" if path.startswith("_empty") else path


def around(path: str) -> list[str]:
    """A module's path and those of the modules that it is in, the innermost first."""
    found = [path]
    while found[-1]:
        found.append(found[-1].rpartition(".")[0])
    return found


def _pairs(node: fx.Node, small: fx.Node) -> Iterator[tuple[str, Pair]]:
    """Sizes among a node's arguments, and what they are in the cut graph."""
    name = op_name(node)
    if name in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"):
        sizes = split_sizes(node)[1]
        given: Any = small.args[1] if isinstance(small.args[1], (list, tuple)) else sizes
        if "split" in name or len(set(given)) > 1:  # equal chunks have no size in the code
            yield from _sequence_pairs(sizes, given)
    elif name == "slice":
        yield from (("", pair) for pair in _slice_pairs(node, small))
    elif small.target is node.target and isinstance(node.target, torch._ops.OpOverload):
        for parameter in node.target._schema.arguments:
            old, new = (argument(n, parameter.name, parameter.default_value) for n in (node, small))
            if _is_size(old) and _is_size(new):
                yield parameter.name, (old, new)
            elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
                if all(map(_is_size, (*old, *new))):
                    yield parameter.name, (tuple(old), tuple(new))
                yield from _sequence_pairs(old, new)
                if name in ("pad", "constant_pad_nd"):  # one attribute may hold what both sides get
                    for i in range(0, len(old) - 1, 2):
                        yield "", (old[i] + old[i + 1], new[i] + new[i + 1])


def _sequence_pairs(old: Sequence[Any], new: Sequence[Any]) -> Iterator[tuple[str, Pair]]:
    """Of the integers among two lists, together and one by one."""
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if _is_size(a) and _is_size(b)]
    if len(pairs) > 1:
        yield "", (tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
    yield from (("", pair) for pair in pairs)


def _slice_pairs(node: fx.Node, small: fx.Node) -> list[Pair]:
    """Start, end and length."""
    _, start, length, step = slice_bounds(node)
    low, high = argument(small, "start", 0), argument(small, "end", None)
    if small.target is not node.target or step != 1 or not _is_size(low) or not _is_size(high) or high > TO_THE_END:
        return []
    return [(start, low), (start + length, high), (length, high - low)]


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# -- layers of torch -------------------------------------------------------------------------------------------------


def layer_sizes(
    module: nn.Module, channels: Channels, needs: Sequence[Need], shapes: Mapping[str, tuple[int, ...]]
) -> dict[Place, Size]:
    """The attributes of torch's own layers, by the shapes of their tensors and the arguments of their nodes.

    Args:
        module: With tensors that are sliced.
        shapes: Of the nodes' outputs in the cut graph.
    """
    found: dict[Place, Size] = {}
    for need in needs:
        layer = module.get_submodule(need.path)
        if isinstance(layer, LAYERS) and need.name in vars(layer):
            found[Place(need.path, (need.name,))] = need.new
    outputs = {module_path(n): shapes[n.name] for n in channels.module.graph.nodes if n.name in shapes}
    for path, layer in module.named_modules():
        groups = found.get(Place(path, ("groups",)), getattr(layer, "groups", 1))
        for name, size in _widths(layer, groups, outputs.get(path)).items():
            if vars(layer).get(name, size) != size:
                found[Place(path, (name,))] = size
    return found


def _widths(layer: nn.Module, groups: Any, output: tuple[int, ...] | None) -> dict[str, Size]:
    """Attributes that say a tensor's shape; of a norm without tensors, its output's."""
    if isinstance(layer, nn.MultiheadAttention):
        sides = {"kdim": layer.k_proj_weight, "vdim": layer.v_proj_weight}
        return {name: int(weight.shape[1]) for name, weight in sides.items() if weight is not None}
    if not isinstance(layer, LAYERS):
        return {}
    held = [t for t in (layer.weight, getattr(layer, "running_mean", None)) if isinstance(t, Tensor)]
    size = tuple(held[0].shape) if held else tuple(output or ())[1:2]
    if not size:
        return {}
    if isinstance(layer, nn.modules.conv._ConvNd):
        names = ("in_channels", "out_channels") if layer.transposed else ("out_channels", "in_channels")
        return dict(zip(names, (size[0], size[1] * groups), strict=True))
    if isinstance(layer, nn.Linear):
        return {"out_features": size[0], "in_features": size[1]}
    if isinstance(layer, nn.Embedding):
        return {"num_embeddings": size[0], "embedding_dim": size[1]}
    if isinstance(layer, nn.Bilinear):
        return {"out_features": size[0], "in1_features": size[1], "in2_features": size[2]}
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": size} if held else {}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": size[0]}
    return {"num_features" if isinstance(layer, nn.modules.batchnorm._NormBase) else "num_channels": size[0]}


# -- places ----------------------------------------------------------------------------------------------------------


def put_size(module: nn.Module, place: Place, size: Size) -> None:
    """Set a size; what holds it is copied, so that no other module gets it."""
    owner = module.get_submodule(place.module)
    name, *steps = place.steps
    owner.__dict__[name] = _replaced(getattr(owner, name), steps, size)


def _replaced(held: Any, steps: Sequence[Any], size: Size) -> Any:
    if not steps:
        return _like(held, size) if isinstance(size, tuple) else size
    key, *rest = steps
    if isinstance(held, (tuple, list)):
        items = list(held)
        items[key] = _replaced(items[key], rest, size)
        return _like(held, items)
    made = copy.copy(held)
    if isinstance(made, dict):
        made[key] = _replaced(made[key], rest, size)
    else:  # a frozen dataclass allows it no other way
        object.__setattr__(made, key, _replaced(getattr(made, key), rest, size))
    return made


def _like(held: Any, items: Sequence[Any]) -> Any:
    return type(held)(*items) if hasattr(held, "_fields") else type(held)(items)


def kept_sizes(module: nn.Module, path: str) -> dict[Place, Size]:
    """All integers of two or more, and sequences of integers, in the attributes of a module and its class."""
    attributes: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__):
        if issubclass(kind, nn.Module) and kind is not nn.Module:
            attributes |= {n: v for n, v in vars(kind).items() if _is_size(v) or isinstance(v, (tuple, list))}
    attributes |= {name: value for name, value in vars(module).items() if name not in PRIVATE}
    return {
        Place(path, (name, *steps)): size
        for name, value in attributes.items()
        if not name.startswith("__")
        for steps, size in itertools.islice(_nested(value, 0), MOST_SIZES)
    }


def _nested(value: Any, depth: int) -> Iterator[tuple[tuple[Any, ...], Size]]:
    if _is_size(value):
        if value > 1:
            yield (), int(value)
        return
    if depth == MOST_NESTED or isinstance(value, (nn.Module, Tensor, str, bytes, ModuleType)) or callable(value):
        return
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (tuple, list)):
        if len(value) > 1 and all(map(_is_size, value)):
            yield (), tuple(map(int, value))
        inside = enumerate(value)
    elif isinstance(value, dict):
        inside = value.items()
    else:
        inside = _attributes(value)
    for key, item in inside:
        for steps, size in _nested(item, depth + 1):
            yield (key, *steps), size


def _attributes(value: object) -> list[tuple[str, Any]]:
    """In its dictionary, and in the slots of its classes."""
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    found = [(name, getattr(value, name)) for name in slots if not name.startswith("__") and hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *found]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


# -- what they could be ----------------------------------------------------------------------------------------------


def find_units(
    module: nn.Module, channels: Channels, needs: Sequence[Need], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Unit], list[Need]]:
    """Modules with the sizes that could be theirs, and the needs that no attribute answers."""
    places: dict[str, dict[Place, Size]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        places[path] = {} if isinstance(part, LAYERS) else kept_sizes(part, path)
    likely: dict[Place, Counter[Size]] = defaultdict(Counter)
    possible: dict[Place, Counter[Size]] = defaultdict(Counter)
    homeless = []
    for need in needs:
        if isinstance(module.get_submodule(need.path), LAYERS):
            continue
        held = [places[path] for path in around(need.path)]
        exact = _first({place: need.new for place, size in sizes.items() if size == need.old} for sizes in held)
        scaled, nested = (_first(_scaled(sizes, need, inside) for sizes in held) for inside in (False, True))
        if not exact and not scaled and not nested and isinstance(need.old, int):
            homeless.append(need)
        ranked = [found for found in (exact, scaled, nested) if found]
        for rank, found in enumerate(ranked):
            for place, size in found.items():
                (possible if rank else likely)[place][size] += 1
    shrunk = _shrunk(channels, shapes)
    units = {}
    for path, sizes in places.items():
        options: dict[Place, list[Size]] = {}
        for place, old in sizes.items():
            order: list[Size] = [size for size, _ in likely[place].most_common()] if place in likely else []
            order += [old, *possible.get(place, {})]
            if len(place.steps) == 1:
                order += [new for before, new in shrunk.get(path, ()) if before == old]
            if len(set(order)) > 1:
                options[place] = list(dict.fromkeys(order))
        if options:
            kind = (type(module.get_submodule(path)), [(place.steps, order) for place, order in options.items()])
            units[path] = Unit(kind, _choices(options))
    return units, homeless


def _first(candidates: Iterable[dict[Place, Size]]) -> dict[Place, Size]:
    return next((found for found in candidates if found), {})


def _scaled(sizes: Mapping[Place, Size], need: Need, is_nested: bool) -> dict[Place, Size]:
    """Attributes that are a multiple or a part of what a node has, as they would be in the cut graph.

    Args:
        is_nested: Of those inside of other objects, or else of the module's own.
    """
    old, new = need.old, need.new
    if not isinstance(old, int) or not isinstance(new, int) or old < 2 or new < 1:
        return {}
    found: dict[Place, Size] = {}
    for place, size in sizes.items():
        if isinstance(size, int) and (len(place.steps) > 1) is is_nested and size != old and size * new % old == 0:
            low, high = sorted((size, old))
            if high % low == 0 and high // low <= MOST_PARTS:
                found[place] = size * new // old
    return found


def _shrunk(channels: Channels, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple[int, int]]]:
    """Sizes of activations that got smaller, by the modules that made them and those around: code may check them."""
    found: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for node in channels.module.graph.nodes:
        if node.op == "call_function" and node.name in shapes:
            before, after = shape_of(node), shapes[node.name]
            if len(before) == len(after):
                for path in around(module_path(node))[:2]:
                    found[path] |= {(a, b) for a, b in zip(before, after, strict=True) if b < a}
    return {path: sorted(pairs) for path, pairs in found.items()}


def _choices(options: Mapping[Place, Sequence[Size]]) -> list[dict[Place, Size]]:
    """Combinations in order of how many places don't have their likeliest value."""
    likeliest = {place: order[0] for place, order in options.items()}
    others = (
        dict(zip(places, values, strict=True))
        for count in range(len(options) + 1)
        for places in itertools.combinations(options, count)
        for values in itertools.product(*(options[place][1:] for place in places))
    )
    return [likeliest | other for other in itertools.islice(others, MOST_CHOICES)]
