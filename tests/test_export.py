"""Every file computes what the assembled network computes, over the zoo."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from zoo import Network, named

from compress import export
from compress.apply import Compressed, apply_plan, assemble
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.errors import InputError, NumericsError, UsageError
from compress.export import (
    USUAL,
    Form,
    form_notes,
    input_names,
    onnx_model,
    safetensors_bytes,
    serialize,
    to_onnx,
    write_program,
)
from compress.float_storage import DTYPES, assemble_stored
from compress.formats import onnx_blocks, pt2
from compress.formats.checkpoint import read_checkpoint
from compress.formats.onnx_dynamic import dynamic_weights
from compress.formats.packed import QuantizedTensor, decode
from compress.graph.dynamic import integer_linears, round_inputs
from compress.graph.rewrite import SUMS, operand
from compress.graph.trace import CONVOLUTIONS, Graph, trace_graph, trace_module
from compress.model import Source
from compress.quantize import uniform
from compress.task import Calibration, Classification
from compress.verify import measure_parity, open_session, parity_holds, run_session

PLAIN = ("plain_cnn", "Split", "transposed_2d", "mlp", "Gpt", "DataclassOutput", "TwoInputs")
ODD = ("Recurrent", "SqueezeExcite", "Attention", "weight_norm")


def build(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    activations: str,
    bits: int | None,
    float_storage: str = "fp32",
    float_addends: bool = False,
) -> tuple[Graph, Compressed, fx.GraphModule]:
    """The network assembled dense (``bits`` None) or uniformly quantized."""
    graph = trace_graph(module, tuple(x[:2] for x in inputs))
    if bits is None:
        compressed = Compressed(dict(module.state_dict()), None)
    else:
        source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
        context = Context(torch.Generator(), torch.device("cpu"), lambda *_: None, lambda _: 0, [])
        calibration = Calibration(Classification(), Data(inputs, None, "zoo"))
        options: dict[str, Any] = {
            "activations": activations,
            "range": "mse" if bits < 8 else "minmax",
            "reconstruction": "none",
            "bias_correction": "off",
        }
        plan, tensors = uniform.plan(source, graph, {}, calibration, Budget("bits", bits), options, context)
        compressed = apply_plan(module, graph.tied, plan, tensors)
    return graph, *assemble_stored(graph, compressed, DTYPES[float_storage], float_addends=float_addends)


@functools.cache
def built(
    name: str, activations: str, bits: int | None, float_storage: str = "fp32"
) -> tuple[Graph, Compressed, fx.GraphModule]:
    """A network of the zoo of ``build``, calibrated on 16 examples; not to be changed."""
    network = named(name)
    return build(network.make(), network.inputs(16), activations, bits, float_storage)


@pytest.fixture(scope="module", autouse=True)
def translations() -> Iterator[None]:
    """A network is translated once for all forms of its file."""
    real, kept = export.to_onnx, dict[nn.Module, onnx.ModelProto]()

    def translated(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
        if module not in kept:
            kept[module] = real(module, example_inputs)
        return copy.deepcopy(kept[module])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_onnx", translated)
        yield


def check_onnx(network: Network, activations: str, bits: int | None, form: Form = USUAL) -> None:
    graph, compressed, module = built(network.name, activations, bits, form.float_storage)
    model = onnx_model(graph, compressed, module, form=form)
    content = serialize(model)
    for parity in measure_parity(module, open_session(content, 1), network.inputs(8)):
        assert parity_holds(parity, activations != "float"), parity
    assert input_names(model) == list(network.shapes)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not re.search(rb"\.py|/tmp|/home|/work|Traceback|site-packages", content)


def check_program(network: Network, activations: str, bits: int | None, folder: Path) -> None:
    graph, _, module = built(network.name, activations, bits)
    write_program(module, graph.example_inputs, folder / "model.pt2")
    found = pt2.read(folder / "model.pt2").module(check_guards=False)
    for count in (1, 3, 7):
        inputs = network.inputs(count)
        for e, f in zip(tree_leaves(module(*inputs)), tree_leaves(found(*inputs)), strict=True):
            assert torch.equal(e, f)


@pytest.mark.slow
def test_integer_networks_run_alike_in_onnx_runtime(network: Network) -> None:
    check_onnx(network, "8", 8)


@pytest.mark.parametrize("name", [*PLAIN, "padded_residual", *ODD])
def test_integer_networks_of_a_few_run_alike_in_onnx_runtime(name: str) -> None:
    check_onnx(named(name), "8", 8)


@pytest.mark.parametrize("name", [*PLAIN, "padded_residual", *(pytest.param(n, marks=pytest.mark.slow) for n in ODD)])
def test_integer_networks_of_4_bits_run_alike_in_onnx_runtime(name: str) -> None:
    check_onnx(named(name), "4", 4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 2, 3, 5])
def test_float_activations_run_alike_in_onnx_runtime(network: Network, bits: int | None) -> None:
    check_onnx(network, "float", bits)


@pytest.mark.parametrize(("name", "bits"), zip(PLAIN, (None, 3, None, 4, 3, None, 5), strict=True))
def test_float_activations_of_a_few_run_alike_in_onnx_runtime(name: str, bits: int | None) -> None:
    check_onnx(named(name), "float", bits)


@pytest.mark.slow
@pytest.mark.parametrize(("activations", "bits"), [("float", None), ("8", 8), ("float", 3)])
def test_programs_are_equal_after_reading(network: Network, activations: str, bits: int | None, tmp_path: Path) -> None:
    check_program(network, activations, bits, tmp_path)


@pytest.mark.parametrize("activations", ["8", "4"])
@pytest.mark.parametrize("name", PLAIN)
def test_integer_programs_of_a_few_are_equal_after_reading(name: str, activations: str, tmp_path: Path) -> None:
    check_program(named(name), activations, 4, tmp_path)


@pytest.mark.parametrize("name", ["plain_cnn", "TiedEmbedding", "transposed_2d"])
def test_weights_are_equal_after_reading(name: str, tmp_path: Path) -> None:
    network = named(name)
    _, compressed, _ = build(network.make(), network.inputs(8), "float", 3)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(compressed))
    checkpoint = read_checkpoint(path)
    found = decode(checkpoint.state, checkpoint.metadata)
    assert found.keys() == compressed.tensors.keys()
    for key, value in compressed.tensors.items():
        other = found[key]
        if isinstance(value, QuantizedTensor):
            assert isinstance(other, QuantizedTensor) and torch.equal(value.levels, other.levels)
            assert torch.equal(value.scale, other.scale)
        else:
            assert isinstance(other, Tensor) and torch.equal(value, other)


def kernels(content: bytes, folder: Path) -> list[str]:
    """Ops of the network that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    "name", ["plain_cnn", "depthwise", "Split", "Inception", "SqueezeExcite", "mlp", "smooth_activations", "conv3d"]
)
@pytest.mark.parametrize("activations", ["8", "4"])
def test_every_layer_is_an_integer_kernel(name: str, activations: str, tmp_path: Path) -> None:
    graph, compressed, module = built(name, activations, 8)
    ops = kernels(serialize(onnx_model(graph, compressed, module)), tmp_path)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(ops)
    assert sum(op in ("QLinearConv", "QGemm", "MatMulInteger") for op in ops) == len(graph.layers)


FORMS = [Form(runtime, floats) for runtime in ("openvino", "portable") for floats in ("fp32", "fp16", "bf16")]
CASES = [("plain_cnn", "8", 3), ("plain_cnn", "float", 3), ("padded_residual", "4", 4), ("Gpt", "float", 4)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.runtime}-{form.float_storage}")
@pytest.mark.parametrize(("name", "activations", "bits"), [*CASES, ("mlp", "float", None)])
def test_every_form_runs_alike_in_onnx_runtime(name: str, activations: str, bits: int | None, form: Form) -> None:
    check_onnx(named(name), activations, bits, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", [Form("portable", "fp16"), Form("openvino", "bf16")], ids=lambda form: form.runtime)
@pytest.mark.parametrize(("activations", "bits"), [("8", 8), ("float", 3)])
def test_every_form_of_all_runs_alike_in_onnx_runtime(
    network: Network, activations: str, bits: int, form: Form
) -> None:
    check_onnx(network, activations, bits, form)


def onnx_outputs(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return run_session(open_session(serialize(model), 1), inputs)


@functools.cache
def with_floats(name: str, bits: int) -> fx.GraphModule:
    """The network of ``built`` with the values that its integers stand for."""
    graph, compressed, _ = built(name, "float", bits)
    return assemble(graph, Compressed(dict(compressed.state()), None))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "portable"])
@pytest.mark.parametrize(("name", "activations", "bits"), CASES)
def test_every_runtimes_file_computes_what_the_plain_one_does(
    name: str, activations: str, bits: int, runtime: str
) -> None:
    network = named(name)
    graph, compressed, module = built(name, activations, bits)
    plain = export.to_onnx(module, graph.example_inputs)
    if activations == "float":  # DequantizeLinear in front of a product makes ONNX Runtime round activations
        plain = export.to_onnx(with_floats(name, bits), graph.example_inputs)
    written = onnx_model(graph, compressed, module, form=Form(runtime))
    inputs = network.inputs(5)
    for expected, found in zip(onnx_outputs(plain, inputs), onnx_outputs(written, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "portable"])
@pytest.mark.parametrize(("name", "bits"), [("mlp", 4), ("mlp", 8), ("Gpt", 7), ("Attention", 3), ("TwoInputs", 5)])
def test_dynamic_activations_run_alike_in_onnx_runtime(
    name: str, bits: int, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "is_faster_as_integers", lambda product: True)
    network = named(name)
    graph, compressed, module = built(name, "float", bits)
    before = [leaf.clone() for leaf in tree_leaves(module(*network.inputs(3)))]
    layers = integer_linears(module)
    model = onnx_model(graph, compressed, module, form=Form(runtime), dynamic=layers)
    module = copy.deepcopy(module)
    round_inputs(module, layers)
    assert layers == dynamic_weights(model)
    assert layers and [node.op_type for node in model.graph.node].count("MatMulInteger") == len(layers)
    assert {node.domain for node in model.graph.node} == {""}
    session = open_session(serialize(model), 1)
    assert all(parity_holds(p, True) for p in measure_parity(module, session, network.inputs(8)))
    after = tree_leaves(module(*network.inputs(3)))
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    write_program(module, graph.example_inputs, tmp_path / "model.pt2")
    found = pt2.read(tmp_path / "model.pt2").module(check_guards=False)
    for one, other in zip(after, tree_leaves(found(*network.inputs(3))), strict=True):
        assert torch.equal(one, other)


def test_inputs_of_zeros_are_rounded_to_zeros() -> None:
    module = nn.Sequential(nn.Linear(8, 4)).eval().requires_grad_(False)
    _, _, assembled = build(module, (torch.randn(4, 8),), "float", 4)
    expected = assembled(torch.zeros(2, 8))
    round_inputs(assembled, integer_linears(assembled))
    assert torch.equal(assembled(torch.zeros(2, 8)), expected)


def test_a_dynamic_product_that_is_written_in_another_way_is_named() -> None:
    graph, compressed, module = build(*((n := named("mlp")).make(), n.inputs(8)), "float", 4)
    with pytest.raises(UsageError, match=r"the product with other\.weight is written in another way") as caught:
        onnx_model(graph, compressed, module, dynamic=["other.weight_levels"])
    assert caught.value.hint == "pass --exclude other.weight, or --activations float"


def test_small_products_keep_their_activations() -> None:
    network = named("mlp")
    graph, compressed, module = build(network.make(), network.inputs(8), "float", 4)
    layers = integer_linears(module)
    model = onnx_model(graph, compressed, module, dynamic=layers)
    assert dynamic_weights(model) == set()
    notes = form_notes(model, layers)
    assert notes[0].startswith(f"0 of {len(layers)} matrix products round their activations")
    assert notes[1].startswith(f"{len(layers)} of them are left in floats, which are no slower")


@pytest.mark.parametrize("bits", [2, 4])
def test_one_row_reads_4_bit_blocks_where_they_are_faster(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False), nn.Linear(32, 5)).eval()
    inputs = (torch.randn(16, 64, generator=torch.Generator().manual_seed(0)),)
    monkeypatch.setattr(onnx_blocks, "MIN_WEIGHTS", 48 * 32)
    graph, compressed, assembled = build(module.requires_grad_(False), inputs, "float", bits)
    model = onnx_model(graph, compressed, assembled)
    assert [node.op_type for node in model.graph.node].count("MatMulNBits") == 2
    assert all(parity_holds(p, False) for p in measure_parity(assembled, open_session(serialize(model), 1), inputs))
    assert form_notes(model)[0].startswith("2 matrix products of one row read 4-bit weights")
    other = onnx_model(graph, compressed, assembled, form=Form("openvino"))
    assert {node.domain for node in other.graph.node} == {""} and form_notes(other) == []


@pytest.mark.parametrize("activations", ["8", "float"])
def test_a_portable_file_has_int8_weights_and_nothing_to_unpack(activations: str) -> None:
    graph, compressed, module = built("plain_cnn", activations, 3)
    model = onnx_model(graph, compressed, module, form=Form("portable"))
    shapes = {
        tuple(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    }
    assert shapes == {layer.shape for layer in graph.layers}
    assert not {"Gather", "Split", "Div", "Mod", "TopK"} & {node.op_type for node in model.graph.node}
    assert [(opset.domain, opset.version) for opset in model.opset_import if opset.domain == ""] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}


def test_a_portable_file_has_the_zeros_of_a_masked_weight() -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False)).eval().requires_grad_(False)
    module[0].weight.masked_fill_(torch.rand(64, 64) > 0.1, 0)
    graph, compressed, assembled = build(module, (torch.randn(4, 64),), "float", None)
    assert len(serialize(onnx_model(graph, compressed, assembled))) < 4000
    model = onnx_model(graph, compressed, assembled, form=Form("portable"))
    assert [list(tensor.dims) for tensor in model.graph.initializer] == [[64, 64]]


@pytest.mark.parametrize("activations", ["8", "4"])
@pytest.mark.parametrize("form", [Form("portable", "fp16"), Form("openvino", "bf16")], ids=lambda form: form.runtime)
def test_every_layer_of_other_forms_is_an_integer_kernel(form: Form, activations: str, tmp_path: Path) -> None:
    graph, compressed, module = built("plain_cnn", activations, 8, form.float_storage)
    ops = kernels(serialize(onnx_model(graph, compressed, module, form=form)), tmp_path)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Cast"} & set(ops)
    assert sum(op in ("QLinearConv", "QGemm", "MatMulInteger") for op in ops) == len(graph.layers)


@pytest.mark.parametrize("float_storage", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["plain_cnn", "TiedEmbedding", "depthwise", "Gpt"])
def test_floats_take_two_bytes_in_every_file(name: str, float_storage: str, tmp_path: Path) -> None:
    dtype = DTYPES[float_storage]
    graph, whole, module = built(name, "float", None)
    _, half, rounded = built(name, "float", None, float_storage)
    before = {t.name: t for t in onnx_model(graph, whole, module).graph.initializer}
    written = onnx_model(graph, half, rounded, form=Form(float_storage=float_storage))
    large = {n for n, t in before.items() if t.data_type == 1 and t.dims and torch.Size(t.dims).numel() >= 64}
    assert large and {f"{n}_{float_storage}" for n in large} <= {t.name for t in written.graph.initializer}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(half))
    checkpoint = read_checkpoint(path)
    found = decode(checkpoint.state, checkpoint.metadata)
    for key, value in whole.tensors.items():
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            other = found[key]
            assert isinstance(other, Tensor) and torch.equal(other, value.to(dtype))
    assert len(safetensors_bytes(half)) < 0.6 * len(safetensors_bytes(whole)) + 1000


def test_the_network_of_halves_holds_halves_after_its_batch_norms_are_folded() -> None:
    network = named("plain_cnn")
    _, _, module = build(network.make(), network.inputs(8), "float", None, "fp16")
    for name, value in module.state_dict().items():
        assert value.dtype != torch.float32 or torch.equal(value, value.half().float()), name


@pytest.mark.parametrize(("value", "float_storage"), [(1e5, "fp16"), (-3.4e38, "bf16")])
def test_a_value_beyond_16_bits_is_named(value: float, float_storage: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4)).eval().requires_grad_(False)
    module[0].bias[2] = value
    with pytest.raises(NumericsError, match=r"0.bias has values to .* beyond the .* of torch.b?float16") as caught:
        build(module, (torch.randn(4, 4),), "float", None, float_storage)
    assert "fp32" in str(caught.value.hint)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "portable"])
@pytest.mark.parametrize(("name", "activations", "bits"), [*CASES, ("mlp", "float", 4), ("Attention", "float", 3)])
def test_openvino_runs_alike(name: str, activations: str, bits: int, runtime: str) -> None:
    openvino = pytest.importorskip("openvino")
    network = named(name)
    if runtime == "onnxruntime" and activations == "float":
        pytest.skip("its matrix products are OpenVINO's own affair")
    form = Form(runtime, "fp16")
    graph, compressed, module = build(network.make(), network.inputs(16), activations, bits, "fp16", form.float_addends)
    content = serialize(onnx_model(graph, compressed, module, form=form))
    is_exact = activations == "float" or runtime == "openvino"
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(content), "CPU", exact)
    for count in (1, 3, 7):
        inputs = network.inputs(count)
        outputs = compiled([x.numpy() for x in inputs])
        for i, expected in enumerate(tree_leaves(module(*inputs))):
            found, scale = torch.from_numpy(outputs[i]), float(expected.abs().max())
            difference = float((found - expected).abs().max()) / scale
            assert difference < (1e-5 if is_exact else 0.2), (count, difference)


def rounded_sums(form: Form) -> tuple[int, int]:
    """Operands of the sums of a residual network, and how many of them are rounded on their way from a convolution."""
    network = named("padded_residual")
    _, _, module = build(network.make(), network.inputs(16), "4", 4, float_addends=form.float_addends)
    operands = [a for node in module.graph.nodes if node.target in SUMS for a in node.all_input_nodes]
    rounded = [a for a in operands if a.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default]
    written = [operand(a, 0) for a in rounded]
    through_clamp = [operand(q, 0) if q.target is torch.ops.aten.clamp.default else q for q in written]
    return len(operands), sum(operand(q, 0).target in CONVOLUTIONS for q in through_clamp)


def test_openvino_adds_what_a_convolution_gives_before_it_is_rounded() -> None:
    (operands, rounded), (as_many, none) = rounded_sums(Form()), rounded_sums(Form("openvino"))
    assert operands == as_many
    assert rounded > 0
    assert none == 0


@pytest.mark.data
@pytest.mark.parametrize(
    ("runtime", "activations", "bits"),
    [
        ("onnxruntime", "8", 8),
        ("portable", "8", 8),
        ("openvino", "float", 4),
        ("portable", "float", 4),
    ],
)
def test_openvino_gives_the_classes_of_onnx_runtime(
    runtime: str, activations: str, bits: int, data_folder: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    from compress.data import load_object
    from compress.formats.checkpoint import read_checkpoint as read

    module: nn.Module = load_object(f"{data_folder}/resnet_cifar.py:resnet20", "--model")()
    state = read(data_folder / "cifar10" / "resnet20-12fca82f.th").state
    module.load_state_dict({key.split("module.")[-1]: value for key, value in state.items()})
    module.eval().requires_grad_(False)
    images = load_object(f"{data_folder}/cifar.py:tensors", "--data")
    calibration, x = images("calib")[0][:256], images("test")[0][:1000]
    graph, compressed, assembled = build(module, (calibration,), activations, bits)
    content = serialize(onnx_model(graph, compressed, assembled, form=Form(runtime)))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(content), "CPU", exact)
    session = open_session(content, 1)
    pairs = [(run_session(session, (part,))[0], torch.from_numpy(compiled(part.numpy())[0])) for part in x.split(100)]
    agreement = float(torch.cat([(a.argmax(1) == b.argmax(1)).double() for a, b in pairs]).mean())
    assert agreement >= 0.98


def test_equal_weights_are_stored_once_and_unpacked() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval().requires_grad_(False)
    module[2].weight.copy_(module[0].weight)
    inputs = (torch.randn(8, 6),)
    graph, compressed, assembled = build(module, inputs, "float", 4)
    content = serialize(onnx_model(graph, compressed, assembled))
    assert all(parity_holds(p, False) for p in measure_parity(assembled, open_session(content, 1), inputs))


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


def test_an_op_without_an_onnx_form_is_named() -> None:
    graph, compressed, module = build(Eigenvalues().eval(), (torch.randn(2, 3, 3),), "float", None)
    with pytest.raises(InputError, match=r"the network has no ONNX form .*eig"):
        onnx_model(graph, compressed, module)


def test_torchs_table_of_operators_is_read_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Any = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    reads, real = [], registry.from_torchlib
    read = staticmethod(lambda opset_version: (reads.append(opset_version), real(opset_version))[1])
    monkeypatch.setattr(registry, "from_torchlib", read)
    export._operators.cache_clear()
    sizes = []
    for _ in range(2):
        to_onnx(nn.Linear(3, 2), (torch.randn(2, 3),))
        assert vars(registry)["from_torchlib"] is read
        sizes.append(sum(map(len, export._operators(registry).functions.values())))
    assert reads == [export.OPSET]
    assert sizes[0] == sizes[1]


def test_writing_twice_gives_the_same_bytes() -> None:
    network = named("padded_residual")
    graph, compressed, module = build(network.make(), network.inputs(8), "8", 4)
    first = serialize(onnx_model(graph, compressed, module))
    assert serialize(onnx_model(graph, compressed, assemble(graph, compressed))) == first


@pytest.mark.data
@pytest.mark.parametrize(
    "factory",
    [
        "resnet_cifar:resnet20",
        pytest.param("resnet_cifar:resnet32", marks=pytest.mark.slow),
        pytest.param("babyllama:babyllama", marks=pytest.mark.slow),
    ],
)
def test_real_networks_run_alike_in_onnx_runtime(factory: str, data_folder: Path) -> None:
    from compress.data import load_object

    file, name = factory.split(":")
    module: nn.Module = load_object(f"{data_folder / file}.py:{name}", "--model")()
    module.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    is_text = name == "babyllama"
    x = torch.randint(105, (8, 64), generator=generator) if is_text else torch.randn(8, 3, 32, 32, generator=generator)
    activations = "float" if is_text else "8"
    graph, compressed, assembled = build(module, (x,), activations, 4)
    session = open_session(serialize(onnx_model(graph, compressed, assembled)), 1)
    assert all(parity_holds(p, not is_text) for p in measure_parity(assembled, session, (x,)))


def test_a_program_with_autocast_is_read_again(tmp_path: Path) -> None:
    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    network, x = Rounded(4, 4).eval(), torch.randn(3, 4)
    write_program(trace_module(network, (x,)).module(check_guards=False), (x,), tmp_path / "model.pt2")
    assert torch.equal(pt2.read(tmp_path / "model.pt2").module(check_guards=False)(x), network(x))


class Pooled(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool3d(x, self.sizes)


class Bag(nn.EmbeddingBag):
    """A loop in ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs().long().flatten(1).clamp(max=3))


class HeadsAsExamples(nn.Linear):
    """Joins heads along the batch, which onnxscript's optimizer can't do."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat(torch.chunk(super().forward(x.flatten(2)), 2, 2), 0)
        return torch.cat(torch.chunk(F.softmax(torch.bmm(y, y.mT), -1), 2, 0), 2)


class NotTensors(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"scaled": x * 2, "count": 3, "rest": (x.sum(), None, True)}


@pytest.mark.parametrize(
    "module",
    [Pooled(2, 2, 2), Pooled(1, 2, 3), Bag(4, 4), HeadsAsExamples(144, 8), NotTensors()],
    ids=lambda m: type(m).__name__,
)
def test_what_torch_has_no_onnx_for_is_exported(module: nn.Module) -> None:
    inputs = (torch.randn(2, 3, 4, 6, 6).abs(),)
    session = open_session(serialize(to_onnx(module.eval(), inputs)), 1)
    with torch.no_grad():
        expected = [value for value in tree_leaves(module(*inputs)) if isinstance(value, Tensor)]
    torch.testing.assert_close(run_session(session, inputs), expected)


def test_pooling_windows_of_several_sizes_have_no_onnx_form() -> None:
    with pytest.raises(InputError, match=r"no ONNX form \(adaptive_avg_pool3d from \[4, 6, 6\] to \[3, 3, 3\]"):
        to_onnx(Pooled(3, 3, 3), (torch.randn(2, 3, 4, 6, 6),))
