"""The traced network: torch.export's undecomposed ATen graph, its weight layers, and what can't be compressed.

Traced with a batch of two or more, so that a batch of one doesn't become a constant, and with a dynamic batch
dimension.
"""

from __future__ import annotations

import difflib
import io
import linecache
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import InputError, UsageError
from .regions import inline_regions
from .writes import replace_writes

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.padding: "conv3d",
}
TRANSPOSED = {
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}
WEIGHT_OPS = {**CONVOLUTIONS, **TRANSPOSED, aten.linear.default: "linear"}
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[1])  # whose code isn't the network's
WEIGHT_ARGUMENT = 1  # of every op above: (input, weight, bias, ...)


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        tensor: State-dict key of the weight; the first of its names where it is tied.
        op: ``conv2d``, ``linear``...
        node: Name of the layer's node in the graph; the first one where the weight is used more than once.
        shape: Of the weight.
        elements: Number of its weights.
        macs: Multiply-accumulates of one example, over all uses of the weight.
        axis: Output-channel dimension of the weight; None where it has none of its own (grouped transposed).
        input_axis: Dimension that the layer sums over, and patterns count as columns.
        activations: Elements of the layer's output for one example, over all uses of the weight.
    """

    tensor: str
    op: str
    node: str
    shape: tuple[int, ...]
    elements: int
    macs: int
    axis: int | None
    input_axis: int
    activations: int = 0


@dataclass(frozen=True, slots=True)
class Blocker:
    """Something that stays as it is, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Graph:
    """A network as torch.export sees it.

    Attributes:
        program: With a dynamic batch dimension.
        example_inputs: What it was traced with; the batch is the first dimension of each.
        layers: In the order of execution.
        tied: State-dict keys that name one tensor, the canonical key first.
        blockers: Parameters that no method touches, with the reason.
        macs: Of one example, attention products included.
    """

    program: ExportedProgram
    example_inputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    tied: tuple[tuple[str, ...], ...]
    blockers: tuple[Blocker, ...]
    macs: int

    def matching(self, glob: str, flag: str) -> tuple[Layer, ...]:
        """The layers whose weights match a glob that was given as ``flag``.

        Raises:
            UsageError: It matches none: a misspelt one would not do what was asked.
        """
        found = tuple(layer for layer in self.layers if fnmatchcase(layer.tensor, glob))
        if not found:
            names = [layer.tensor for layer in self.layers]
            close = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
            raise UsageError(
                f"{flag} {glob!r} matches no weight", hint=f"weights: {', '.join(close or names[:3])}, ..."
            )
        return found

    def without(self, globs: Sequence[str]) -> tuple[Layer, ...]:
        """The layers whose weights match none of ``globs``.

        Raises:
            UsageError: A glob matches no layer.
        """
        excluded = {layer.tensor for glob in globs for layer in self.matching(glob, "--exclude")}
        return tuple(layer for layer in self.layers if layer.tensor not in excluded)

    def compressible(self, exclude: Sequence[str], verb: str) -> tuple[Layer, ...]:
        """The layers that a method may ``verb``, one at least.

        Raises:
            UsageError: A glob matches no layer, or no layer is left.
        """
        layers = self.without(exclude)
        if not layers:
            blocked = f"{self.blockers[0].layer} is {self.blockers[0].reason}" if self.blockers else ""
            hint = blocked or "is it quantized already? hcompress inspect lists its layers"
            raise UsageError(f"the network has no float weight to {verb}", hint="check --exclude" if exclude else hint)
        return layers

    def nonzero_macs(self, kept: Mapping[str, int]) -> int:
        """Multiply-accumulates of one example, less those whose weight is zero.

        Args:
            kept: Weights that aren't zero, by tensor; all of those that it doesn't name.
        """
        kept = {layer.tensor: kept.get(layer.tensor, layer.elements) for layer in self.layers}
        zeros = (layer.macs * (layer.elements - kept[layer.tensor]) // layer.elements for layer in self.layers)
        return self.macs - sum(zeros)

    def layer(self, tensor: str) -> Layer:
        """The layer whose weight is ``tensor``."""
        return next(layer for layer in self.layers if layer.tensor == tensor)


def trace_module(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export ``module`` in evaluation mode with a dynamic batch.

    Raises:
        InputError: torch.export can't trace it, or its batch can't vary; says where.
    """
    dynamic = tuple({0: Dim.AUTO} for _ in example_inputs)
    try:
        # With gradients, so that a region without them shows.
        with _silent(), torch.enable_grad():
            program = torch.export.export(module, example_inputs, dynamic_shapes=dynamic, strict=False)
    # torch.export lets any error of the traced code through; all of them are facts about the user's network.
    except GuardOnDataDependentSymNode as error:
        raise InputError(
            f"torch.export can't trace the network: what it does depends on values{place_of(error, module)}",
            hint="make the branch a torch.where or a torch.cond",
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"torch.export can't trace the network ({type(error).__name__}: {reason}){place_of(error, module)}",
            hint="check --data or --input-shape; branches on values must become torch.where or torch.cond",
        ) from error
    inline_regions(program)
    replace_writes(program)
    require_dynamic_batch(program)
    return program


def place_of(error: Exception, module: nn.Module) -> str:
    """Where in the network's own code an error comes from, ``, in block.fc (Linear) at net.py:7: code``, or nothing.

    Args:
        error: Caught where the network was called: what called that isn't part of its traceback.
    """
    names = {id(part): name for name, part in module.named_modules()}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if Path(file).is_file() and not any(Path(file).is_relative_to(folder) for folder in LIBRARIES):
            owner = frame.f_locals.get("self")
            kind, name = type(owner).__name__, names.get(id(owner))
            whose = f" in {name} ({kind})" if name else f" in {kind}" if name is not None else ""
            shown = Path(file).relative_to(Path.cwd()) if Path(file).is_relative_to(Path.cwd()) else file
            place = f",{whose} at {shown}:{line}: {linecache.getline(file, line).strip()}"
    return place


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what torch warns of, logs and prints of a network that it can't trace; the error says it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def require_dynamic_batch(program: ExportedProgram) -> None:
    """Refuse a program whose batch is a constant.

    Raises:
        InputError: Names the input and its batch.
    """
    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor):
            value = node.meta["val"]
            # A batch that tracing found to be constant may still be written as a symbol.
            size = value.shape[0] if value.dim() else None
            fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
            if fixed is not None:
                raise InputError(
                    f"input {node.name}: the network fixes its batch size to {fixed}",
                    hint="in forward, use x.shape[0], not len(x) or a constant; a .pt2 needs a dynamic batch dimension",
                )


def trace_graph(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> Graph:
    """Trace a network and find its weight layers.

    Args:
        module: In evaluation mode.
        example_inputs: Tensors ``[n, ...]`` with n of 2 or more.
    """
    _require_float32(module)
    _require_names(module)
    program = trace_module(module, example_inputs)
    tied = tied_names(module)
    canonical = {alias: names[0] for names in tied for alias in names}
    batch = example_inputs[0].shape[0]
    saved = module.state_dict().keys()
    sources = {name: key for name, key in _parameter_sources(program).items() if key in saved}

    found: dict[str, Layer] = {}
    total_macs = 0
    used: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        macs = node_macs(node, batch)
        total_macs += macs
        for argument in node.all_input_nodes:
            if argument.name in sources:
                key = sources[argument.name]
                used.setdefault(canonical.get(key, key), []).append(str(node.target))
        if node.target in WEIGHT_OPS and node.args[WEIGHT_ARGUMENT].name in sources:
            key = sources[node.args[WEIGHT_ARGUMENT].name]
            key = canonical.get(key, key)
            layer = _layer(node, key, macs, batch)
            if key in found:
                before = found[key]
                total = before.activations + layer.activations
                layer = replace(before, macs=before.macs + macs, activations=total)
            found[key] = layer
    blockers = _blockers(program, canonical, found, used)
    return Graph(program, example_inputs, tuple(found.values()), tied, blockers, total_macs)


def _require_names(module: nn.Module) -> None:
    taken = set(dir(fx.GraphModule)) - set(dir(nn.Module))
    for name in (*module._modules, *module._parameters, *module._buffers):
        if name in taken:
            raise InputError(
                f"the network calls a part of itself {name!r}, which torch's graphs keep for themselves",
                hint=f"rename self.{name}, and its keys in the checkpoint",
            )


def _require_float32(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if (
            isinstance(tensor, Tensor)
            and (tensor.is_floating_point() or tensor.is_complex())
            and tensor.dtype is not torch.float32
        ):
            raise InputError(
                f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, and the network is run in float32",
                hint="return model.float() from the factory; export a .pt2 from the float32 model",
            )


def tied_names(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of state-dict keys that name one parameter or buffer."""
    by_identity: dict[int, list[str]] = {}
    everything = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        by_identity.setdefault(id(tensor), []).append(name)
    return tuple(tuple(names) for names in by_identity.values() if len(names) > 1)


def _parameter_sources(program: ExportedProgram) -> dict[str, str]:
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def _layer(node: fx.Node, key: str, macs: int, batch: int) -> Layer:
    weight = node.args[WEIGHT_ARGUMENT].meta["val"]  # type: ignore[union-attr]
    shape = tuple(int(size) for size in weight.shape)
    transposed = node.target in TRANSPOSED
    groups = argument(node, "groups", 1) if transposed else 1
    axis = (1 if groups == 1 else None) if transposed else 0
    op = WEIGHT_OPS[node.target]  # type: ignore[index]
    outputs = _product([_size(size) for size in node.meta["val"].shape]) // batch
    return Layer(key, op, node.name, shape, weight.numel(), macs, axis, 0 if transposed else 1, outputs)


def unused_parameters(program: ExportedProgram) -> int:
    """How many parameters no node reads."""
    sources = program.graph_signature.inputs_to_parameters
    unread = [n.name for n in program.graph.nodes if n.op == "placeholder" and n.name in sources and not n.users]
    return sum(program.state_dict[sources[name]].numel() for name in unread)


def batch_statistics(graph: fx.Graph) -> list[str]:
    """Batch norms that take their statistics from the batch, by the name of their node."""
    return [
        node.name
        for node in graph.nodes
        if node.target is aten.batch_norm.default and (node.args[3] is None or bool(node.args[5]))
    ]


def argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of an ATen call by its schema name."""
    names = argument_names(node.target)
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


@cache
def argument_names(target: Any) -> tuple[str, ...]:
    """Of an operator's schema, which torch builds anew for each look; none of what has no schema."""
    schema = getattr(target, "_schema", None)
    return () if schema is None else tuple(parameter.name for parameter in schema.arguments)


def _size(value: Any) -> int:
    """A symbolic size at the traced batch."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    if value.node.hint is None:
        raise InputError(
            f"the network has a tensor whose size {value} depends on values",
            hint="make it a mask: torch.where(condition, x, 0), not x[condition] or nonzero",
        )
    return int(value.node.hint)


def node_macs(node: fx.Node, batch: int) -> int:
    """Multiply-accumulates of one example in one node: layers, matrix products, attention and recurrent layers."""
    value = node.meta.get("val")
    if node.target in RECURRENT:
        return _recurrent_macs(node)
    if not isinstance(value, Tensor):
        return 0
    shapes = [
        [_size(size) for size in a.meta["val"].shape]
        for a in node.args
        if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)
    ]
    out = [_size(size) for size in value.shape]
    elements = _product(out)
    if node.target in CONVOLUTIONS:
        macs = elements * _product(shapes[1][1:])
    elif node.target in TRANSPOSED:
        macs = _product(shapes[0]) * _product(shapes[1][1:])
    elif node.target in (aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default):
        macs = elements * shapes[0][-1]
    elif node.target in (aten.addmm.default, aten.baddbmm.default):
        macs = elements * shapes[1][-1]
    elif node.target is aten.scaled_dot_product_attention.default:
        query, key, val = shapes[:3]
        macs = _product(query[:-1]) * key[-2] * (query[-1] + val[-1])
    elif node.target is aten.einsum.default:
        macs = _einsum_macs(node)
    else:
        return 0
    return macs // batch


def _einsum_macs(node: fx.Node) -> int:
    """The product of all index sizes, for two operands; what more of them cost depends on the order."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    terms = equation.split("->")[0].split(",")
    if len(operands) != 2 or "." in equation:
        return 0
    sizes = {
        letter: _size(size)
        for term, value in zip(terms, operands, strict=True)
        for letter, size in zip(term, value.meta["val"].shape, strict=True)
    }
    return _product(list(sizes.values()))


def _recurrent_macs(node: fx.Node) -> int:
    """Every weight matrix once a time step."""
    sequence = node.args[0].meta["val"]  # type: ignore[union-attr]
    steps = _size(sequence.shape[1 if argument(node, "batch_first", False) else 0])
    weights = [w.meta["val"] for w in argument(node, "params", ())]
    return steps * sum(int(w.numel()) for w in weights if w.dim() == 2)


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _blockers(
    program: ExportedProgram, canonical: dict[str, str], layers: dict[str, Layer], used: dict[str, list[str]]
) -> tuple[Blocker, ...]:
    """Parameters of two or more dimensions that are no layer's weight."""
    found = []
    for name in program.graph_signature.parameters:
        key = canonical.get(name, name)
        if key != name or key in layers or program.state_dict[name].dim() < 2:
            continue
        ops = Counter(used.get(key, []))
        reason = (
            f"used by {', '.join(sorted(ops))}, which no method compresses" if ops else "not used by the forward pass"
        )
        found.append(Blocker(key, reason))
    return tuple(found)
