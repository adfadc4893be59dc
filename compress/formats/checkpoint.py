"""One reader for every checkpoint that people bring: the first bytes decide what a file is, never its suffix."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InputError
from . import pt2, safetensors, torch_pt
from .archive import DAMAGED, ZIP_ERRORS
from .finite import check_finite

ACCEPTED = "pass a state dict (torch.save or safetensors) or an exported program (.pt2)"
# Wrappers that put their own name before every key.
PREFIXES = ("module.", "_orig_mod.")
SNIFFED_BYTES = 1024
MAGICS = (
    (b"\x1f\x8b", 0, "a gzip archive", "unpack it with gunzip (or tar xzf) and pass the checkpoint inside"),
    (b"BZh", 0, "a bzip2 archive", "unpack it and pass the checkpoint inside"),
    (b"\xfd7zXZ\x00", 0, "an xz archive", "unpack it and pass the checkpoint inside"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstandard archive", "unpack it and pass the checkpoint inside"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7-zip archive", "unpack it and pass the checkpoint inside"),
    (b"ustar", 257, "a tar archive", "unpack it with tar xf and pass the checkpoint inside"),
    (
        b"\x89HDF\r\n\x1a\n",
        0,
        "an HDF5 file (Keras or similar)",
        "hcompress reads PyTorch checkpoints; convert it first",
    ),
    (b"\x93NUMPY", 0, "a numpy array, not a checkpoint", f"arrays are data (--data); {ACCEPTED}"),
    (b"GGUF", 0, "a GGUF file, already quantized for llama.cpp", "pass the float checkpoint it was made from"),
    (b"version https://git-lfs", 0, "a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"\x89PNG", 0, "an image", ACCEPTED),
    (b"\xff\xd8\xff", 0, "an image", ACCEPTED),
    (b"%PDF", 0, "a PDF document", ACCEPTED),
    (b"\x7fELF", 0, "a compiled program or library", ACCEPTED),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as plain tensors.

    Args:
        format: ``torch``, ``safetensors`` or ``pt2``.
        state: Parameters and buffers by key, on the CPU, wrappers' prefixes stripped; finite.
        program: The exported program of a .pt2, which brings its architecture.
        metadata: Strings of a safetensors header.
        notes: What was picked, stripped or ignored, one sentence each.
    """

    path: Path
    format: str
    state: dict[str, Tensor]
    program: ExportedProgram | None
    metadata: dict[str, str]
    notes: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, read without running anything that it holds.

    Raises:
        InputError: Missing, damaged, unsafe or of another kind; one sentence that says what the file is.
    """
    try:
        return _read(path, sniff(path))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file", hint="check the path; relative paths start at the current folder"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a checkpoint", hint="pass the checkpoint file inside it") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except MemoryError:
        raise InputError(f"{path}: needs more memory than there is", hint="read it on a machine with more") from None


def sniff(path: Path) -> str:
    """``torch``, ``safetensors`` or ``pt2`` by the first bytes and, in a zip archive, the entries' names.

    Raises:
        InputError: Anything else; says what it is and the way to a checkpoint.
    """
    with path.open("rb") as stream:
        head = stream.read(SNIFFED_BYTES)
    if not head:
        raise InputError(f"{path}: the file is empty", hint="copy or download it again")
    for magic, offset, what, hint in MAGICS:
        if head[offset : offset + len(magic)] == magic:
            raise InputError(f"{path}: is {what}", hint=hint)
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _sniff_zip(path)
    if head.startswith(torch_pt.LEGACY_MAGIC):
        return "torch"
    if torch_pt.LEGACY_MAGIC.startswith(head):
        raise InputError(f"{path}: the file is truncated", hint=DAMAGED)
    # A length above 2^48 is eight letters of a text.
    if head[8:9] == b"{" and head[6:8] == b"\0\0":
        return "safetensors"
    if len(head) <= 8 and head[6:8] == b"\0\0":
        raise InputError(f"{path}: the file is truncated", hint=DAMAGED)
    raise InputError(f"{path}: {_describe(head)}", hint=_way_out(head))


def strip_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Keys without the prefixes that DataParallel and torch.compile put before all of them."""
    notes: list[str] = []
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        notes.append(f"prefix {prefix!r} stripped")
    return state, tuple(notes)


def _read(path: Path, kind: str) -> Checkpoint:
    if kind == "pt2":
        program = pt2.read(path)
        state = {key: value for key, value in program.state_dict.items() if isinstance(value, Tensor)}
        check_finite(state, path)
        return Checkpoint(path, kind, state, program, {}, ())
    metadata: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    if kind == "safetensors":
        state, metadata = safetensors.read(path)
    else:
        state, notes = torch_pt.read(path)
    if not state:
        raise InputError(f"{path}: holds no tensors", hint=ACCEPTED)
    state, stripped = strip_prefixes(state)
    check_finite(state, path)
    return Checkpoint(path, kind, state, None, metadata, notes + stripped)


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.split("/", 1)[-1] for name in file.namelist()]
    except ZIP_ERRORS:
        raise InputError(
            f"{path}: the file is truncated: it starts as a zip archive but has no readable end", hint=DAMAGED
        ) from None
    if "archive_format" in names:
        return "pt2"
    if "serialized_exported_program.json" in names:
        raise InputError(
            f"{path}: is an exported program of torch before 2.8, whose format can't be read safely",
            hint="load it with that torch and torch.export.save it again with torch 2.8 or newer",
        )
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise InputError(
            f"{path}: is a TorchScript archive, not a state dict",
            hint="torch.save(torch.jit.load(path).state_dict(), 'weights.pt') where you trust it, "
            "or torch.export the original model",
        )
    if "data.pkl" in names:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(
            f"{path}: is a numpy .npz archive, not a checkpoint", hint=f"arrays are data (--data); {ACCEPTED}"
        )
    raise InputError(f"{path}: is a zip archive without a checkpoint's data.pkl", hint=f"unpack it; {ACCEPTED}")


def _describe(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, probably a failed download"
    if text.startswith((b"<?xml", b"<error")):
        return "is an XML page, probably a failed download"
    if _is_onnx(head):
        return "is an ONNX model; hcompress compresses the PyTorch checkpoint that it was exported from"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "is a plain pickle that torch.save did not write; it only loads by running code"
    is_text = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
    if is_text and text.startswith((b"{", b"[")):
        return "is JSON text, not a checkpoint"
    return "is a text file, not a checkpoint" if is_text else "is of no format that hcompress knows"


def _way_out(head: bytes) -> str:
    if head[:1] == b"<" or b"<html" in head.lower():
        return "download it again; a page that needs a login or a click gives HTML"
    if _is_onnx(head):
        return "it already runs in ONNX Runtime, whose own tools quantize ONNX files; for hcompress " + ACCEPTED
    return torch_pt.SAVE_AGAIN if head[:1] == b"\x80" else ACCEPTED


def _is_onnx(head: bytes) -> bool:
    """A protobuf that starts as ModelProto does: field 1 (ir_version) a small number, then one of its other fields."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 64 and head[2] in b"\x12\x1a\x22\x28\x32\x3a\x42\x72"
