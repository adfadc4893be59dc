"""Files that a runtime loads: ONNX (opset 21, dynamic batch, packed weights), safetensors and exported programs.

Every file is a pure function of the network: no times, paths or stack traces are left in it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from .apply import Compressed
from .errors import InputError, UsageError
from .float_storage import DTYPES
from .formats import pt2
from .formats.onnx_blocks import as_blocks, is_faster_in_blocks
from .formats.onnx_decoded import decode_through_int32
from .formats.onnx_dynamic import INTEGER_PRODUCT, as_dynamic, is_faster_as_integers
from .formats.onnx_graph import drop_unused, merge_equal, shorten
from .formats.onnx_half import store_halves
from .formats.onnx_packed import pack_weights
from .formats.onnx_products import find_products
from .formats.onnx_rereads import rereads_as_sums
from .formats.onnx_shortcuts import SHORTCUT_BITS, shortcuts_as_convolutions
from .formats.onnx_sparse import sparse_bytes, sparsify
from .formats.onnx_vectors import share_vectors
from .formats.packed import QuantizedTensor, encode
from .formats.planes import packed_size
from .graph.rewrite import operand, to_aten
from .graph.trace import Graph, trace_module
from .pruned import Cut, cuts_metadata
from .registry import Runtime, find_runtime
from .widths import Width

OPSET = 21
IR_VERSION = 10  # what opset 21 came with, so that runtimes of 2024 load the file
BATCH_NAME = "batch"
DECODING = (
    "Cast",
    "Div",
    "Mod",
    "Mul",
    "Range",
    "Reshape",
    "Sub",
)  # what tables and steps of several streams are made by
NODE_BYTES = 60  # of the nodes of one masked weight, beside those that all share
EXTERNAL_DATA_BYTES = 2**31 - 2**20  # protobuf's limit, less the graph


@dataclass(frozen=True, slots=True)
class Form:
    """How a network is written.

    Attributes:
        runtime: One of ``registry.RUNTIMES``: the op set of model.onnx.
        float_storage: How the floats lie in the files: ``fp32``, ``fp16`` or ``bf16``.
    """

    runtime: str = "onnxruntime"
    float_storage: str = "fp32"

    @property
    def float_addends(self) -> bool:
        return find_runtime(self.runtime).float_addends


USUAL = Form()


def to_onnx(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> ModelProto:
    """Translate a network, inputs named after the forward's arguments, batch dimension dynamic.

    Raises:
        InputError: An op has no ONNX form; names it.
    """
    program = trace_module(module, example_inputs)
    _keep_tensors(program)
    try:
        try:
            return _translated(program, optimize=True)
        except Exception:  # noqa: BLE001 - onnxscript's optimizer can't do some graphs that it translates
            return _translated(program, optimize=False)
    # torch.onnx has one error class for many causes and lets others through; all are facts about the network.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx's own message says only which step failed
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(
            f"the network has no ONNX form ({reason})", hint="write the op with others in forward"
        ) from error


def _keep_tensors(program: ExportedProgram) -> None:
    """ONNX has no outputs but tensors: numbers and None are left out."""
    output, signature = program.graph.output_node(), program.graph_signature
    values, specs = operand(output, 0), signature.output_specs
    kept = [i for i, spec in enumerate(specs) if isinstance(spec.arg, TensorArgument)]
    if len(kept) < len(specs):
        output.args = (tuple(values[i] for i in kept),)
        signature.output_specs = [specs[i] for i in kept]
        entry: Any = program.module_call_graph[0].signature
        entry.out_spec = pytree.tree_structure((None,) * len(kept))
        program.graph_module.recompile()


def _translated(program: ExportedProgram, *, optimize: bool) -> ModelProto:
    with _silenced(), _one_table():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=optimize,
        )
    assert exported is not None
    model = exported.model_proto
    _clean(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _average_pool3d(x: Any, output_size: Sequence[int]) -> Any:
    """``adaptive_avg_pool3d`` where windows are alike, for which torch.onnx has no translation."""
    from onnxscript import opset21  # a second of every start

    sizes = [int(size) for size in x.shape[-3:]]
    windows = [size // count for size, count in zip(sizes, output_size, strict=True)]
    if [count * window for count, window in zip(output_size, windows, strict=True)] != sizes:
        raise ValueError(f"adaptive_avg_pool3d from {sizes} to {list(output_size)} has windows of several sizes")
    return opset21.AveragePool(x, kernel_shape=windows, strides=windows)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """torch prints progress on stdout, and warns of its own deprecations and of libraries that aren't needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _one_table() -> Iterator[None]:
    """torch reads its table of operators in each export, which takes longer than a small network: once will do."""
    registry: Any = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    table, read = _operators(registry), vars(registry)["from_torchlib"]
    registry.from_torchlib = staticmethod(lambda opset_version: table)
    try:
        yield
    finally:
        registry.from_torchlib = read


@functools.cache
def _operators(registry: Any) -> Any:
    table = registry.from_torchlib(OPSET)
    table.register_op(torch.ops.aten._adaptive_avg_pool3d.default, _average_pool3d)
    return table


def _clean(model: ModelProto) -> None:
    """Drop stack traces and producer notes, name the batch, make integer zero points small."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "hcompress", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "network", ""
    del graph.metadata_props[:], graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param:
            dims[0].dim_param = BATCH_NAME
    _drop_zero_points(model)


def _drop_zero_points(model: ModelProto) -> None:
    """A zero point that is all zeros says nothing where the type of the integers gives it: leave it out.

    But ONNX Runtime makes an integer kernel of a matrix product only where its weight's zero point is written.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    is_integer = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    products = {name for n in model.graph.node if n.op_type in ("Gemm", "MatMul") for name in n.input[:2]}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[0] in initializers:
            tensor = initializers.get(node.input[2]) or constants.get(node.input[2])
            is_needed = is_integer and node.output[0] in products
            if tensor is not None and not is_needed and not numpy_helper.to_array(tensor).any():
                del node.input[2]
    drop_unused(model)


def weight_bits(graph: Graph, compressed: Compressed) -> dict[str, Width]:
    """Bit width of each integer initializer of the exported network, by its name; tied weights once."""
    aliases = {alias for names in graph.tied for alias in names[1:]}
    return {
        f"{key}_levels": value.bits
        for key, value in compressed.tensors.items()
        if isinstance(value, QuantizedTensor) and key not in aliases
    }


def onnx_model(
    graph: Graph,
    compressed: Compressed,
    module: fx.GraphModule,
    *,
    is_cut: bool = False,
    form: Form = USUAL,
    dynamic: Collection[str] = (),
) -> ModelProto:
    """The compressed network with its weights at their packed bits, or in int8 where the runtime is ``portable``.

    Of one with fewer channels, the shortcuts are written so that runtimes needn't leave their layout for them.

    With rounded activations the integers stay behind DequantizeLinear, so that runtimes run integer kernels. With float
    activations they are decoded to float weights when the file is loaded: left to itself, ONNX Runtime would round the
    activations of matrix products to 8 bits (MatMulNBits at accuracy level 4), and be slower on convolutions. Where
    4-bit blocks with float activations are faster in ONNX Runtime, they stay integers.

    Args:
        module: The network of ``assemble_stored``, whose floats ``form`` stores without a loss.
        dynamic: Levels of the weights whose products round their activations as they come where that is faster, of a
            network whose activations are floats otherwise.

    Raises:
        UsageError: The graph has another form of a product in ``dynamic``; names the weight.
    """
    runtime, dtype = find_runtime(form.runtime), DTYPES[form.float_storage]
    model = to_onnx(module, graph.example_inputs)
    shortcuts: list[str] = []
    if (is_rounded := any(node.op_type == "QuantizeLinear" for node in model.graph.node)) or is_cut:
        model, shortcuts = shortcuts_as_convolutions(model, floats=not is_rounded)
    if is_rounded:
        model = rereads_as_sums(model)
    # torch.onnx keeps one of several equal initializers: what is left of them fits either's width.
    stored = {tensor.name for tensor in model.graph.initializer}
    bits = {name: width for name, width in weight_bits(graph, compressed).items() if name in stored}
    bits |= dict.fromkeys(shortcuts, SHORTCUT_BITS)
    sparse = _sparse_initializers(model, bits, dtype.itemsize) if runtime.packs else []
    is_packed = runtime.packs and bool(bits or sparse)
    has_groups = any(isinstance(value, QuantizedTensor) and value.group_size for value in compressed.tensors.values())

    def written(sparse: Sequence[str]) -> ModelProto:
        widths = {name: 8 if name in sparse or not runtime.packs else width for name, width in bits.items()}
        made = _with_integers(model, widths, dynamic, runtime)
        if sparse:
            made = sparsify(made, sparse)
        if is_packed:
            made = _compact(made)
        if has_groups:
            made = store_halves(made, torch.bfloat16)  # the scales of groups are such values
        if dtype != torch.float32:
            made = store_halves(made, dtype)
        shorten(made, named=(INTEGER_PRODUCT,), has_own_names=not is_packed)
        return made

    smallest = min((written(names) for names in ([sparse, []] if sparse else [[]])), key=ModelProto.ByteSize)
    onnx.checker.check_model(smallest, full_check=True)
    return smallest


def _compact(model: ModelProto) -> ModelProto:
    """What the layers of a compressed network have beside their weights, in few constants and nodes."""
    compact = share_vectors(model)
    merge_equal(compact, DECODING)
    return compact


def compact_size(dense: bytes) -> int:
    """Bytes that a dense file would have with all but its weights written as in a compressed one's."""
    model = _compact(ModelProto.FromString(dense))
    shorten(model, has_own_names=False)
    return int(model.ByteSize())


def _with_integers(
    model: ModelProto, widths: Mapping[str, Width], dynamic: Collection[str], runtime: Runtime
) -> ModelProto:
    """The integer weights at their widths, in the form that the activations ask for."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return pack_weights(model, widths)
    return _with_float_activations(model, widths, dynamic, runtime)


def _with_float_activations(
    model: ModelProto, widths: Mapping[str, Width], dynamic: Collection[str], runtime: Runtime
) -> ModelProto:
    """Weights decoded to floats, but where their products are faster on integers."""
    products = find_products(model, widths)
    rounded = [product for product in products if product.weight in dynamic and is_faster_as_integers(product)]
    if lost := sorted(set(dynamic) - {product.weight for product in products}):
        layer = lost[0].removesuffix("_levels")
        raise UsageError(
            f"--activations dynamic: the product with {layer} is written in another way than a linear layer's",
            hint=f"pass --exclude {layer}, or --activations float",
        )
    is_fast = [product for product in products if runtime.has_own_ops and is_faster_in_blocks(product)]
    blocks = [product for product in is_fast if product.weight not in dynamic]
    integers = {product.weight for product in (*rounded, *blocks)}
    decoded = {name: width for name, width in widths.items() if name not in integers}
    model = pack_weights(model, {name: width for name, width in widths.items() if name in integers})
    model = pack_weights(model, decoded, dequantize="fold")
    if not runtime.has_own_ops:
        model = decode_through_int32(model, decoded)
    return as_blocks(as_dynamic(model, rounded), blocks)


def form_notes(model: ModelProto, dynamic: Collection[str] = ()) -> list[str]:
    """What a report says of the forms that were chosen in a file, and why."""
    counts = Counter(node.op_type for node in model.graph.node)
    notes, rounded = [], 0
    if in_blocks := counts["MatMulNBits"]:
        notes.append(
            f"{in_blocks} matrix products of one row read 4-bit weights (MatMulNBits, sums and activations in floats): "
            "faster than floats at batch 1, slower in larger batches, where --runtime openvino decodes them to floats"
        )
    if dynamic:
        rounded = counts["MatMulInteger"]
        notes.append(
            f"{rounded} of {len(dynamic)} matrix products round their activations to 8 bits as they come, over the "
            "whole batch, on which what an example gives depends a little"
        )
    if rounded < len(dynamic):
        notes.append(
            f"{len(dynamic) - rounded} of them are left in floats, which are no slower: small products, and those of "
            "8-bit weights with many rows, for which --budget 7bit is faster"
        )
    return notes


def _sparse_initializers(model: ModelProto, bits: Mapping[str, Width], element_size: int) -> list[str]:
    """Weights that take fewer bytes without their zeros.

    Args:
        bits: Of the integer ones.
        element_size: Bytes of a float in the file.
    """
    names = []
    for tensor in model.graph.initializer:
        width = bits.get(tensor.name)
        if width is None and (tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2):
            continue
        values = numpy_helper.to_array(tensor)
        whole = element_size * values.size if width is None else packed_size(values.size, width)
        # Levels with few zeros are left at their bits, which is what plans count on.
        least = 1 if width is None else values.size / 2
        if values.size - np.count_nonzero(values) >= least and sparse_bytes(values) + NODE_BYTES < whole:
            names.append(tensor.name)
    return names


def serialize(model: ModelProto) -> bytes:
    """Deterministic bytes of a model.

    Raises:
        InputError: Above protobuf's 2 GB.
    """
    size = model.ByteSize()
    if size > EXTERNAL_DATA_BYTES:
        raise InputError(f"model.onnx would have {size} bytes, above protobuf's 2 GB", hint="use --for safetensors")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def safetensors_bytes(compressed: Compressed, cuts: Sequence[Cut] = ()) -> bytes:
    """model.safetensors: packed integers, masked floats, the rest as it was (docs/plan-format.md)."""
    return encode(compressed.tensors, {"format": "pt", **cuts_metadata(cuts)})


def write_program(module: fx.GraphModule, example_inputs: tuple[Tensor, ...], path: Path) -> None:
    """model.pt2: the network in ATen ops alone, which ``torch.export.load`` reads without importing anything."""
    plain = copy.deepcopy(module)
    to_aten(plain)
    program = trace_module(plain, example_inputs)
    for node in program.graph.nodes:  # paths of the user's files, and addresses that differ from run to run
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)
    with _silenced():
        pt2.write(program, path)


def input_names(model: ModelProto) -> list[str]:
    """The network's inputs in order."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in initializers]
