"""Exported programs: what torch writes round-trips, and nothing that torch's own loader would run gets to it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from compress.errors import InputError
from compress.formats import pt2
from compress.formats.pt2_grammar import is_expression, is_guard, is_target, is_tree_spec

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
INPUTS = "data/sample_inputs/model.pt"
Edit = Callable[[dict[str, Any]], None]


class Payload:
    """Unpickled, it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


class Net(nn.Module):
    """Two layers, a buffer outside the state dict, and sizes that depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("shift", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor, *, target: Tensor) -> dict[str, Any]:
        y = self.second(torch.relu(self.first(x)) + self.shift)
        with torch.no_grad():
            scale = target * 2
        return {"y": y * scale, "both": (y.reshape(-1, 2, y.shape[0] // 2), [x.shape[0] * 2])}


def program() -> ExportedProgram:
    shapes = {"x": {0: Dim.AUTO}, "target": {}}
    return export(Net().eval(), (torch.randn(8, 4),), {"target": torch.ones(2)}, dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def saved() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program(), buffer)
    return buffer.getvalue()


def rewrite(
    saved: bytes,
    path: Path,
    *,
    edits: dict[str, Edit] | None = None,
    members: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """The saved program with JSON members edited and other members replaced or added."""
    with zipfile.ZipFile(io.BytesIO(saved)) as file:
        content = {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}
    for name, edit in (edits or {}).items():
        record = json.loads(content[name])
        edit(record)
        content[name] = json.dumps(record).encode()
    content |= members or {}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in content.items():
            file.writestr(f"archive/{name}", value)
    return path


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        pt2.read(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


def set_expression(text: str) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        values = record["graph_module"]["graph"]["sym_int_values"]
        next(iter(values.values()))["as_expr"]["expr_str"] = text

    return edit


def set_in(*keys: str | int, value: Any) -> Edit:
    def edit(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return edit


def data_module(name: str) -> ModuleType:
    root = os.environ.get("HCOMPRESS_TEST_DATA")
    if root is None:
        pytest.skip("HCOMPRESS_TEST_DATA is not set: the real models are not here")
    spec = importlib.util.spec_from_file_location(name, Path(root) / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_program_round_trips_with_its_inputs_and_guards(tmp_path: Path) -> None:
    original = program()
    pt2.write(original, tmp_path / "m.pt2")
    found = pt2.read(tmp_path / "m.pt2")
    assert list(found.state_dict) == list(original.state_dict)
    assert all(torch.equal(found.state_dict[key], original.state_dict[key]) for key in found.state_dict)
    (args, kwargs), (expected, _) = found.example_inputs, original.example_inputs
    assert torch.equal(args[0], expected[0]) and torch.equal(kwargs["target"], torch.ones(2))
    x = torch.randn(12, 4)
    first, second = (p.module()(x, target=torch.ones(2)) for p in (found, original))
    assert torch.equal(first["y"], second["y"]) and first["both"][1] == [24]
    assert any(node.meta.get("nn_module_stack") for node in found.graph.nodes)


def test_bytes_do_not_depend_on_the_name(tmp_path: Path) -> None:
    original = program()
    pt2.write(original, tmp_path / "a.pt2")
    pt2.write(original, tmp_path / "b.tmp")
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.tmp").read_bytes()


def test_resnet_with_a_dynamic_batch_round_trips(tmp_path: Path) -> None:
    model = data_module("resnet_cifar").resnet20().eval()
    x = torch.randn(2, 3, 32, 32)
    torch.export.save(export(model, (x,), dynamic_shapes={"x": {0: Dim("batch", max=512)}}), tmp_path / "m.pt2")
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(pt2.read(tmp_path / "m.pt2").module()(x), model(x))


def test_language_model_with_dynamic_length_round_trips(tmp_path: Path) -> None:
    model = data_module("babyllama").babyllama().eval()
    ids = torch.randint(0, 105, (2, 257))[:, :-1]
    shapes = {"ids": {0: Dim("batch"), 1: Dim("length", max=256)}}
    torch.export.save(export(model, (ids,), dynamic_shapes=shapes), tmp_path / "m.pt2")
    ids = torch.randint(0, 105, (3, 40))
    found = pt2.read(tmp_path / "m.pt2")
    torch.testing.assert_close(found.module()(ids), model(ids))
    assert found.state_dict["output.weight"].data_ptr() == found.state_dict["tok_embeddings.weight"].data_ptr()


def attacks(target: Path) -> dict[str, tuple[dict[str, Edit], dict[str, bytes], str]]:
    """Ways to run code as a program is loaded; each control shows that torch's own loader runs it."""
    evil, call = pickled(Payload(target)), f"__import__('os').mkdir('{target}')"

    def pickle_constant(name: str) -> Edit:
        return lambda record: record["config"]["shift"].update(use_pickle=True, path_name=name)

    return {
        "sample inputs": ({}, {INPUTS: evil}, "posix.mkdir"),
        "weight": (
            {WEIGHTS: lambda record: record["config"]["first.weight"].update(use_pickle=True, path_name="weight_0")},
            {"data/weights/weight_0": evil},
            "'first.weight' is stored as a pickle",
        ),
        "constant": (
            {CONSTANTS: pickle_constant("tensor_0")},
            {"data/constants/tensor_0": evil},
            "'shift' is stored as a pickle",
        ),
        "opaque object": (
            {CONSTANTS: pickle_constant("opaque_obj_0")},
            {"data/constants/opaque_obj_0": pickle.dumps(Payload(target))},
            "holds a custom object (data/constants/opaque_obj_0)",
        ),
        "old constants": ({}, {"data/constants/model.pt": evil}, "which torch.export.save doesn't write"),
        "expression": ({MODEL: set_expression(call)}, {}, "a size expression beyond integers, symbols"),
    }


@pytest.mark.parametrize("name", attacks(Path()))
def test_code_in_a_program_is_refused_and_does_not_run(tmp_path: Path, saved: bytes, name: str) -> None:
    target = tmp_path / "created"
    edits, members, words = attacks(target)[name]
    path = rewrite(saved, tmp_path / "evil.pt2", edits=edits, members=members)
    assert words in message(path)
    assert not target.exists()
    with contextlib.suppress(Exception):  # The control only asks whether the payload ran.
        torch.export.load(path)
    assert target.exists(), "the attack no longer works on torch itself: the test proves nothing"


NODE = ("graph_module", "graph", "nodes", 0)
SIGNATURE = ("graph_module", "module_call_graph", 0, "signature")
IMPORT = [1, {"type": "builtins.dict", "context": '[{"__enum__": 1, "fqn": "os:x", "name": "y"}]', "children_spec": []}]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (set_in("guards_code", value=["__import__('os')"]), "a guard that is no condition on input sizes"),
        (set_in("guards_code", value=["1, 2) #"]), "a guard that is no condition on input sizes"),
        (set_in("range_constraints", value={"x()": {}}), "a size expression beyond integers"),
        (set_in("verifiers", value=["os.x"]), "a verifiers that is no plain name"),
        (set_in(*NODE, "target", value="torch.hub.load"), 'an operator that hcompress doesn\'t load: "torch.hub.load"'),
        (set_in(*NODE, "target", value="torch.ops.aten.from_file.default"), "an operator that hcompress doesn't load"),
        (set_in(*NODE, "target", value="_operator.attrgetter"), "an operator that hcompress doesn't load"),
        (set_in(*NODE, "target", value="#x:y"), "an operator that hcompress doesn't load"),
        (set_in(*NODE, "name", value="x=1;import os"), "a name that is no plain name"),
        (set_in(*NODE, "inputs", value=[{"arg": {"as_custom_obj": {}}}]), "uses a custom object"),
        (set_in(*NODE, "inputs", value=[{"arg": {"as_device": {"type": "cuda"}}}]), "was exported on the device"),
        (set_in(*SIGNATURE, "in_spec", value=json.dumps(IMPORT)), "inputs other than tensors in tuples"),
        (set_in(*SIGNATURE, "out_spec", value='[1, {"type": "my.Out"}]'), "outputs other than tensors in tuples"),
        (set_in(*SIGNATURE, "forward_arg_names", value=["x): pass"]), "a forward_arg_names that is no plain name"),
        (set_in("graph_module", "treespec_namedtuple_fields", value={"a": 1}), "named tuples"),
        (set_in("schema_version", "major", value=7), "has schema version {'major': 7"),
        (set_in("graph_module", "signature", value={}), "torch can't load this exported program"),
    ],
)
def test_strings_that_torch_interprets_have_a_grammar(tmp_path: Path, saved: bytes, edit: Edit, words: str) -> None:
    text = message(rewrite(saved, tmp_path / "m.pt2", edits={MODEL: edit}))
    assert words in text and ("export it again" in text or "move the model to the CPU" in text)


def test_parameter_names_that_would_end_a_string_are_refused(tmp_path: Path, saved: bytes) -> None:
    def rename(record: dict[str, Any]) -> None:
        record["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = 'a"+exec("1")+"'

    assert "a parameter_name that is no plain name" in message(
        rewrite(saved, tmp_path / "m.pt2", edits={MODEL: rename})
    )


META = ("config", "first.weight", "tensor_meta")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (set_in(*META, "sizes", value=[{"as_int": 2**40}]), "'first.weight' has a shape, stride or offset"),
        (set_in(*META, "sizes", value=[{"as_int": 2**20}] * 2), "'first.weight' declares 1099511627776 elements"),
        (
            set_in(*META, "storage_offset", value={"as_int": 1}),
            "declares 12 elements reaching element 13",
        ),
        (set_in(*META, "sizes", value=[{"as_expr": {}}] * 2), "'first.weight' has a shape, stride or offset"),
        (set_in(*META, "dtype", value=10), "'first.weight' is no dense tensor of real numbers"),
        (set_in(*META, "layout", value=1), "'first.weight' is no dense tensor of real numbers"),
        (set_in("config", "first.weight", "tensor_meta", value=None), "'first.weight' is no dense tensor"),
        (set_in(*META, "device", value={"type": "cuda", "index": 0}), "was exported on the device"),
        (set_in("config", "first.weight", "path_name", value="../x"), "'first.weight' is stored as a pickle"),
        (set_in("config", "first.weight", "path_name", value="weight_99"), "'first.weight' is no dense tensor"),
        (set_in("config", 'a"b', value={}), "is no tensor name"),
        (set_in("config", value=[]), "the list of data/weights is damaged"),
    ],
)
def test_weights_that_do_not_fit_their_bytes_are_refused(tmp_path: Path, saved: bytes, edit: Edit, words: str) -> None:
    assert words in message(rewrite(saved, tmp_path / "m.pt2", edits={WEIGHTS: edit}))


def test_empty_weight_file_can_not_ask_for_memory(tmp_path: Path, saved: bytes) -> None:
    path = rewrite(saved, tmp_path / "m.pt2", members={"data/weights/weight_0": b""})
    assert "of a storage of 0" in message(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data/aotinductor/model/a.so", "holds compiled code (data/aotinductor/model/a.so)"),
        ("kernel.cubin", "holds compiled code (kernel.cubin)"),
        ("data/constants/custom_obj_0", "holds a custom object (data/constants/custom_obj_0)"),
        ("models/other.json", "has the entry 'models/other.json', which torch.export.save doesn't write"),
    ],
)
def test_members_that_are_no_program_are_refused(tmp_path: Path, saved: bytes, name: str, words: str) -> None:
    assert words in message(rewrite(saved, tmp_path / "m.pt2", members={name: b"x"}))


def test_damaged_json_is_refused(tmp_path: Path, saved: bytes) -> None:
    assert f"entry {MODEL!r} is not JSON" in message(rewrite(saved, tmp_path / "a.pt2", members={MODEL: b"{"}))
    assert "is not a JSON object" in message(rewrite(saved, tmp_path / "b.pt2", members={MODEL: b"[]"}))
    assert "nested" in message(rewrite(saved, tmp_path / "c.pt2", edits={MODEL: set_in("x", value=nested(900))}))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_sample_inputs_beyond_plain_values_are_refused(tmp_path: Path, saved: bytes) -> None:
    path = rewrite(saved, tmp_path / "m.pt2", members={INPUTS: pickled(((torch.device("cpu"),), {}))})
    assert "sample inputs: holds a value that is neither a tensor nor plain" in message(path)


def test_extra_files_are_dropped_and_missing_inputs_allowed(tmp_path: Path, saved: bytes) -> None:
    path = rewrite(saved, tmp_path / "m.pt2", members={"extra/a.bin": b"\xff\xfe", INPUTS: b""})
    assert pt2.read(path).example_inputs is None


def test_compressed_program_is_refused(tmp_path: Path, saved: bytes) -> None:
    path = rewrite(saved, tmp_path / "m.pt2", compression=zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch never writes" in message(path)


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "Mul(Integer(128), Symbol('s27', positive=True, integer=True))",
        "FloorDiv(Add(Symbol('u0', integer=True), Integer(-1)), Integer(2))",
        "Pow(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Min(s0, Max(s1, 4)) + 2*s0 // 3",
        "Eq(Mod(s0, 2), 0)",
        "Float('0.5', precision=53)",
    ],
)
def test_size_expressions_of_torch_pass(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "open('x')",
        "s0.__class__",
        "[s0]",
        "lambda: 1",
        "(s0 := 1)",
        "9**9**9",
        "Pow(Pow(s0, 9), 9)",
        "Pow(9, Pow(9, 9))",
        "Pow(9, 99999999)",
        "PowByNatural(2, s0)",
        "LShift(1, 999999999)",
        "'s1' * 99999999999",
        "Symbol('x' * 9)",
        "Symbol('evil')",
        "u9999999999",
        "Lambda(s0, s0)",
        "1" * 30,
        "s0 + " * 2000 + "s0",
        "f'{s0}'",
        "",
        None,
    ],
)
def test_other_expressions_are_refused(text: str | None) -> None:
    assert not is_expression(text)


def test_guards_are_conditions_on_sizes() -> None:
    assert is_guard("(L['x'].size()[1]*(L['y'].size()[0] + 2)) % (2*(L['x'].size()[1] // 2)) == 0")
    assert is_guard("min(L['d']['k'][0].size()[0], 5) <= L['x'].stride()[0] and not math.isnan(L['x'][1])")
    for text in (
        "L['x'].size()*10**9 == 1",
        "L['x'].size()*99999999 == 1",
        "L['x'].__class__ == 1",
        "exec('x')",
        "torch.hub.load('x')",
        "1 == 1 # x",
        "1\n2",
    ):
        assert not is_guard(text)


def test_targets_compute_on_tensors_and_sizes() -> None:
    assert is_target("torch.ops.aten.conv2d.default") and is_target("_operator.add") and is_target("torch.sym_max")
    for target in (
        "torch.ops.aten.save.default",
        "torch.ops.aten",
        "torch.ops.load_library",
        "builtins.eval",
        "os",
        None,
    ):
        assert not is_target(target)


def test_tree_specs_name_no_module() -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    for kind, context, allowed in (
        ("builtins.tuple", "null", True),
        ("builtins.dict", '["a"]', True),
        ("builtins.dict", '[{"__enum__": true}]', False),
        ("collections.namedtuple", '"x"', False),
        ("torch.Size", "null", False),
    ):
        text = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])
        assert is_tree_spec(text, is_key=lambda key: isinstance(key, str)) is allowed
    for text in ("", "[2, {}]", "[1]", "{", "[1, {}]"):
        assert not is_tree_spec(text, is_key=lambda key: True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_changed_or_cut_program_is_refused_or_the_same(
    tmp_path: Path, saved: bytes, position: float, bit: int, cut: bool
) -> None:
    content = bytearray(saved)
    at = int(position * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    (tmp_path / "m.pt2").write_bytes(content)
    try:
        found = pt2.read(tmp_path / "m.pt2")
    except InputError:
        return
    expected = torch.export.load(io.BytesIO(saved)).state_dict
    assert all(torch.equal(found.state_dict[key], expected[key]) for key in expected)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_graphs_never_raise_anything_else(tmp_path: Path, saved: bytes, data: st.DataObject) -> None:
    def change(record: Any) -> None:
        value: Any = record
        while True:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(value[key], dict | list) or not value[key] or data.draw(st.integers(0, 9)) == 0:
                break
            value = value[key]
        value[key] = data.draw(st.sampled_from([None, 0, -1, 2**70, "x", "", [], {}, [0], {"as_int": 1}, True, 1.5]))

    try:
        pt2.read(rewrite(saved, tmp_path / "m.pt2", edits={MODEL: change}))
    except InputError:
        return
