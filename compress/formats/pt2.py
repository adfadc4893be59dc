"""Exported programs (.pt2), guarded: torch's loader unpickles members and evaluates strings, so all are checked first.

What passes is written again, in memory and by us, and torch loads that copy: no byte of the file reaches it unchecked.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from ..errors import InputError, escape
from .archive import DAMAGED, Archive, opened_archive, read_member
from .extents import check_extent
from .pt2_grammar import is_dotted_name, is_expression, is_guard, is_identifier, is_target, is_tree_spec
from .torch_pt import read_tree

SUFFIXES = (".pt2",)
EXPORT_AGAIN = f"export it again from its source with torch {torch.__version__.split('+')[0]} and torch.export.save"
SCHEMA_MAJOR = 8
MODEL = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
PAYLOADS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d+"),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d+"),
}
PLAIN_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/version|\.data/serialization_id"
    r"|\.format_version|\.storage_alignment|data/weights/weight_\d+|data/constants/tensor_\d+"
)
COMPILED = re.compile(r"data/aotinductor/.*|.*\.(so|cpp|cubin|o|dll|dylib|exe|bin|h|ptx)")
CUSTOM_OBJECT = re.compile(r"data/constants/(custom_obj|opaque_obj).*")
# Values of torch._export.serde.schema.ScalarType and their bytes; complex types are left out on purpose.
NUMBERS = {1: (1, 2, 12, 29, 30, 31, 32, 33), 2: (3, 6, 13, 28), 4: (4, 7, 34), 8: (5, 8, 35)}
DTYPE_BYTES = {number: size for size, numbers in NUMBERS.items() for number in numbers}
STRIDED = 7
# The rest of a node's metadata is resolved by attribute lookups, and nothing here needs it.
KEPT_METADATA = ("stack_trace", "nn_module_stack", "torch_fn")
IDENTIFIER_KEYS = frozenset(["as_name", "user_input_name"])
DOTTED_KEYS = frozenset(["parameter_name", "buffer_name", "tensor_constant_name", "fqn"])
KEYED_BY_NAME = frozenset(
    ["tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "as_string_to_argument"]
)
CUSTOM_KEYS = frozenset(["as_custom_obj", "custom_obj", "class_fqn", "custom_obj_name"])
LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SpecViolationError,
    SyntaxError,
    TypeError,
    ValueError,
)


def read(path: Path) -> ExportedProgram:
    """The exported program in ``path``, whose every member and string was checked before torch saw it.

    Raises:
        InputError: Damaged, or with anything that would run as it is loaded: compiled code, custom objects, pickles
            beyond torch's safe list, expressions, names or operators beyond the listed ones; names the string.
    """
    with path.open("rb") as stream, opened_archive(stream, str(path)) as archive:
        copy = checked_copy(archive)
    try:
        return load_pt2(copy).exported_programs["model"]
    except LOAD_ERRORS as error:
        raise InputError(
            f"{path}: torch can't load this exported program ({type(error).__name__}: {escape(str(error))})",
            hint=EXPORT_AGAIN,
        ) from None


def write(program: ExportedProgram, path: Path) -> None:
    """Save ``program``; the bytes don't depend on the path's name, as they do where torch opens the file itself."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def checked_copy(archive: Archive) -> io.BytesIO:
    """The checked members as a fresh archive; sample inputs are rebuilt, extra files and unused metadata dropped."""
    label = archive.label
    for name in archive.members:
        _check_member_name(name, label)
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as out:
        out.writestr(f"model/{MODEL}", json.dumps(_checked_program(_read_json(archive, MODEL), label)))
        for config, pattern in PAYLOADS.items():
            payloads = _read_json(archive, config)
            _check_payloads(payloads, archive, config.rsplit("/", 1)[0], pattern)
            out.writestr(f"model/{config}", json.dumps(payloads))
        out.writestr(f"model/{SAMPLE_INPUTS}", _checked_inputs(archive))
        for name in archive.members:
            if PLAIN_MEMBERS.fullmatch(name):
                out.writestr(f"model/{name}", read_member(archive, name))
    copy.seek(0)
    return copy


def _check_member_name(name: str, label: str) -> None:
    known = (MODEL, SAMPLE_INPUTS, *PAYLOADS)
    if name in known or PLAIN_MEMBERS.fullmatch(name) or name.startswith("extra/"):
        return
    if CUSTOM_OBJECT.fullmatch(name):
        raise InputError(
            f"{label}: holds a custom object ({escape(name)}), which only running code would load", hint=EXPORT_AGAIN
        )
    if COMPILED.fullmatch(name):
        raise InputError(
            f"{label}: holds compiled code ({escape(name)}), which would run as it is loaded",
            hint="pass the program before AOTInductor compiled it: torch.export.save(program, 'model.pt2')",
        )
    raise InputError(
        f"{label}: has the entry {escape(name)!r}, which torch.export.save doesn't write", hint=EXPORT_AGAIN
    )


def _read_json(archive: Archive, name: str) -> dict[str, Any]:
    try:
        record = json.loads(read_member(archive, name).decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{archive.label}: entry {name!r} is not JSON", hint=DAMAGED) from None
    if not isinstance(record, dict):
        raise InputError(f"{archive.label}: entry {name!r} is not a JSON object", hint=DAMAGED)
    return record


def _checked_program(record: dict[str, Any], label: str) -> dict[str, Any]:
    version = record.get("schema_version")
    if not isinstance(version, dict) or version.get("major") != SCHEMA_MAJOR:
        raise InputError(
            f"{label}: has schema version {escape(str(version))}, expected major {SCHEMA_MAJOR}", hint=EXPORT_AGAIN
        )
    for key in ("range_constraints", "guards_code", "verifiers"):
        value = record.get(key, [])
        for item in value if isinstance(value, list | dict) else [value]:
            is_allowed = (
                is_guard if key == "guards_code" else is_expression if key == "range_constraints" else is_identifier
            )
            if not is_allowed(item):
                _refuse(label, key, item)
    try:
        return _checked_dict(record, label)
    except RecursionError:
        raise InputError(f"{label}: its graph is nested too deeply") from None


def _checked(value: Any, label: str) -> Any:
    """The same JSON, refused where a string that torch interprets is outside its grammar."""
    if isinstance(value, list):
        return [_checked(item, label) for item in value]
    return _checked_dict(value, label) if isinstance(value, dict) else value


def _checked_dict(record: dict[str, Any], label: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, item in record.items():
        if key == "metadata":
            kept = item if isinstance(item, dict) else {}
            checked[key] = {name: kept[name] for name in KEPT_METADATA if isinstance(kept.get(name), str)}
            continue
        if key in CUSTOM_KEYS:
            raise InputError(f"{label}: uses a custom object ({escape(str(item))})", hint=EXPORT_AGAIN)
        if not _is_allowed(key, item):
            _refuse(label, key, item)
        if key in KEYED_BY_NAME:
            # These keys are the program's own names, such as an input called target.
            checked[key] = {name: _checked(entry, label) for name, entry in item.items()}
        else:
            checked[key] = _checked(item, label)
    return checked


def _is_allowed(key: str, item: Any) -> bool:
    match key:
        case "expr_str":
            return is_expression(item)
        case "target" | "as_operator":
            return is_target(item)
        case "in_spec":
            return is_tree_spec(item, is_key=is_identifier)
        case "out_spec":
            return is_tree_spec(item, is_key=is_dotted_name)
        case "forward_arg_names":
            return item is None or (isinstance(item, list) and all(is_identifier(name) for name in item))
        case "name":
            # Empty where the operator's schema names no argument, and for constant outputs.
            return item is None or item == "" or is_identifier(item)
        case "device" | "as_device":
            return isinstance(item, dict) and item.get("type") == "cpu"
        case "treespec_namedtuple_fields" | "custom_obj_values":
            return not item
        case _ if key in IDENTIFIER_KEYS:
            return is_identifier(item)
        case _ if key in DOTTED_KEYS:
            return item == "" or is_dotted_name(item)
        case _ if key in KEYED_BY_NAME:
            return isinstance(item, dict) and all(is_identifier(name) for name in item)
    return True


def _refuse(label: str, key: str, item: Any) -> None:
    shown = escape(json.dumps(item))
    if key in ("device", "as_device"):
        raise InputError(
            f"{label}: was exported on the device {shown}", hint="move the model to the CPU, then torch.export it"
        )
    what = {
        "expr_str": "a size expression beyond integers, symbols and the listed functions",
        "range_constraints": "a size expression beyond integers, symbols and the listed functions",
        "guards_code": "a guard that is no condition on input sizes",
        "target": "an operator that hcompress doesn't load",
        "as_operator": "an operator that hcompress doesn't load",
        "in_spec": "inputs other than tensors in tuples, lists and dicts",
        "out_spec": "outputs other than tensors in tuples, lists and dicts",
        "treespec_namedtuple_fields": "named tuples",
    }.get(key, f"a {key} that is no plain name")
    raise InputError(f"{label}: its graph has {what}: {shown}", hint=EXPORT_AGAIN)


def _check_payloads(record: dict[str, Any], archive: Archive, folder: str, pattern: re.Pattern[str]) -> None:
    """Every weight or constant is raw bytes that its shape fits, and none is a pickle."""
    config = record.get("config")
    if not isinstance(config, dict):
        raise InputError(f"{archive.label}: the list of {folder} is damaged", hint=DAMAGED)
    dtypes: dict[str, object] = {}
    for key, payload in config.items():
        name = escape(key)
        if not is_dotted_name(key) or not isinstance(payload, dict):
            raise InputError(f"{archive.label}: {name!r} is no tensor name", hint=EXPORT_AGAIN)
        file = payload.get("path_name")
        if payload.get("use_pickle") is not False or not isinstance(file, str) or not pattern.fullmatch(file):
            raise InputError(
                f"{archive.label}: {name!r} is stored as a pickle, which runs as it is loaded", hint=EXPORT_AGAIN
            )
        meta = payload.get("tensor_meta")
        if not isinstance(meta, dict):
            meta = {}
        dtype: Any = meta.get("dtype")
        is_dense = meta.get("layout") == STRIDED and type(dtype) is int and dtype in DTYPE_BYTES
        # torch reads a file's bytes as the dtype of its first user.
        if not is_dense or dtypes.setdefault(file, dtype) != dtype or f"{folder}/{file}" not in archive:
            raise InputError(f"{archive.label}: {name!r} is no dense tensor of real numbers", hint=EXPORT_AGAIN)
        if not _is_allowed("device", meta.get("device")):
            _refuse(archive.label, "device", meta.get("device"))
        check_extent(
            _integers(meta.get("sizes")),
            _integers(meta.get("strides")),
            _integer(meta.get("storage_offset")),
            num_stored=archive.members[f"{folder}/{file}"].file_size // DTYPE_BYTES[dtype],
            label=archive.label,
            key=name,
        )


def _integers(values: object) -> list[object]:
    return [_integer(value) for value in values] if isinstance(values, list) else [None]


def _integer(value: object) -> object:
    return value.get("as_int") if isinstance(value, dict) and len(value) == 1 else None


def _checked_inputs(archive: Archive) -> bytes:
    content = read_member(archive, SAMPLE_INPUTS)
    if not content:
        return b""
    inputs = read_tree(io.BytesIO(content), f"{archive.label}: sample inputs")
    buffer = io.BytesIO()
    torch.save(inputs, buffer)
    return buffer.getvalue()
