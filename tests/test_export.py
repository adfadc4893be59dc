"""Every file computes what the assembled network computes, over the zoo."""

from __future__ import annotations

import re
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

from compress.apply import Compressed, apply_plan, assemble
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.errors import InputError
from compress.export import input_names, onnx_model, safetensors_bytes, serialize, to_onnx, write_program
from compress.formats import pt2
from compress.formats.checkpoint import read_checkpoint
from compress.formats.packed import QuantizedTensor, decode
from compress.graph.trace import Graph, trace_graph, trace_module
from compress.model import Source
from compress.quantize import uniform
from compress.task import Calibration, Classification
from compress.verify import measure_parity, open_session, parity_holds, run_session

PLAIN = ("plain_cnn", "Split", "transposed_2d", "mlp", "Gpt", "DataclassOutput", "TwoInputs")


def build(
    module: nn.Module, inputs: tuple[Tensor, ...], activations: str, bits: int | None
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
    return graph, compressed, assemble(graph, compressed)


def check_onnx(network: Network, activations: str, bits: int | None) -> None:
    graph, compressed, module = build(network.make(), network.inputs(16), activations, bits)
    model = onnx_model(graph, compressed, module)
    content = serialize(model)
    for parity in measure_parity(module, open_session(content, 1), network.inputs(8)):
        assert parity_holds(parity, activations != "float"), parity
    assert input_names(model) == list(network.shapes)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not re.search(rb"\.py|/tmp|/home|/work|Traceback|site-packages", content)


def check_program(network: Network, activations: str, bits: int | None, folder: Path) -> None:
    graph, _, module = build(network.make(), network.inputs(16), activations, bits)
    write_program(module, graph.example_inputs, folder / "model.pt2")
    found = pt2.read(folder / "model.pt2").module(check_guards=False)
    for count in (1, 3, 7):
        inputs = network.inputs(count)
        for e, f in zip(tree_leaves(module(*inputs)), tree_leaves(found(*inputs)), strict=True):
            assert torch.equal(e, f)


@pytest.mark.slow
def test_integer_networks_run_alike_in_onnx_runtime(network: Network) -> None:
    check_onnx(network, "8", 8)


@pytest.mark.parametrize("name", [*PLAIN, "Recurrent", "SqueezeExcite", "padded_residual", "Attention", "weight_norm"])
def test_integer_networks_of_a_few_run_alike_in_onnx_runtime(name: str) -> None:
    check_onnx(named(name), "8", 8)
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
    network = named(name)
    graph, compressed, module = build(network.make(), network.inputs(16), activations, 8)
    ops = kernels(serialize(onnx_model(graph, compressed, module)), tmp_path)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(ops)
    assert sum(op in ("QLinearConv", "QGemm", "MatMulInteger") for op in ops) == len(graph.layers)


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


def test_writing_twice_gives_the_same_bytes() -> None:
    network = named("padded_residual")
    graph, compressed, module = build(network.make(), network.inputs(8), "8", 4)
    first = serialize(onnx_model(graph, compressed, module))
    assert serialize(onnx_model(graph, compressed, assemble(graph, compressed))) == first


@pytest.mark.data
@pytest.mark.parametrize(
    "factory",
    ["resnet_cifar:resnet20", pytest.param("resnet_cifar:resnet32", marks=pytest.mark.slow), "babyllama:babyllama"],
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
