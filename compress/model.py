"""A checkpoint with its architecture: state dict + factory, exported program, or a run folder.

A factory is code: it comes from the command line or the user's own config, never from a checkpoint or a preset.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .canonical import sha256_of_file
from .errors import InputError, UsageError, escape
from .formats.checkpoint import Checkpoint, read_checkpoint
from .formats.packed import QuantizedTensor, decode
from .graph.trace import tied_names
from .manifest import NAME as MANIFEST
from .manifest import check_files, read_manifest
from .task import load_object

MAX_LISTED = 8
WEIGHTS, PROGRAM = "model.safetensors", "model.pt2"


@dataclass(frozen=True, slots=True)
class Source:
    """A network ready to be compressed.

    Attributes:
        path: As the user gave it.
        sha256: Of the checkpoint file; of model.safetensors for a run folder.
        module: In evaluation mode, parameters without gradients.
        format: ``torch``, ``safetensors``, ``pt2`` or ``run``.
        example_inputs: What an exported program carries; else None.
        stored: Quantized tensors of a run folder by key, as stored.
        parents: sha256 of a run folder's manifest, by role.
        notes: What was picked or stripped while reading.
    """

    path: Path
    sha256: str
    module: nn.Module
    format: str
    example_inputs: tuple[Tensor, ...] | None
    stored: Mapping[str, QuantizedTensor]
    parents: Mapping[str, str]
    notes: tuple[str, ...]


def load_source(path: Path, factory: str | None, factory_args: str | None) -> Source:
    """Read a checkpoint and put it into its architecture.

    Raises:
        InputError: Unreadable, unsafe, or its keys and shapes don't fit the architecture.
        UsageError: No architecture given for a state dict.
    """
    if path.is_dir():
        return _load_run(path, factory, factory_args)
    checkpoint = read_checkpoint(path)
    sha256 = sha256_of_file(path)
    if checkpoint.program is not None:
        program: nn.Module = checkpoint.program.module(check_guards=False)
        example = checkpoint.program.example_inputs
        inputs = tuple(x for x in example[0] if isinstance(x, Tensor)) if example else None
        return Source(path, sha256, _ready(program), "pt2", inputs or None, {}, {}, checkpoint.notes)
    if factory is None:
        raise UsageError(
            f"{path}: a state dict holds no architecture",
            hint="pass --model FILE.py:FACTORY (or PACKAGE.MODULE:FACTORY), or set [model] factory in hcompress.toml",
        )
    state, stored = _unpack(checkpoint)
    module = build_module(factory, factory_args)
    load_state(module, state, path)
    return Source(path, sha256, _ready(module), checkpoint.format, None, stored, {}, checkpoint.notes)


def _load_run(folder: Path, factory: str | None, factory_args: str | None) -> Source:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    name = WEIGHTS if factory is not None else PROGRAM
    if name not in manifest.files:
        raise UsageError(
            f"{folder}: has no {name}", hint="pass --model FILE.py:FACTORY, as for the checkpoint it came from"
        )
    inner = load_source(folder / name, factory, factory_args)
    notes = inner.notes
    if inner.stored:
        notes = (*notes, f"{folder.name} is quantized: its rounded weights are the starting point")
    parents = {"manifest": sha256_of_file(folder / MANIFEST)}
    weights_hash = manifest.files[WEIGHTS]["sha256"]
    return Source(folder, weights_hash, inner.module, "run", inner.example_inputs, inner.stored, parents, notes)


def _unpack(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, QuantizedTensor]]:
    tensors = decode(checkpoint.state, checkpoint.metadata)
    stored = {key: value for key, value in tensors.items() if isinstance(value, QuantizedTensor)}
    state = {key: value.dequantize() if isinstance(value, QuantizedTensor) else value for key, value in tensors.items()}
    return state, stored


def build_module(factory: str, factory_args: str | None) -> nn.Module:
    """Call the user's factory.

    Raises:
        UsageError: Not a factory, bad arguments, or it raised.
    """
    try:
        arguments = json.loads(factory_args) if factory_args else {}
    except ValueError as error:
        raise UsageError(
            f"--model-args {factory_args!r} is not JSON ({error})", hint="""write '{"depth": 20}'"""
        ) from None
    if not isinstance(arguments, dict):
        raise UsageError(f"--model-args {factory_args!r} is not a JSON object", hint="""write '{"depth": 20}'""")
    return call_factory(load_object(factory, "--model"), arguments, factory)


def call_factory(make: Callable[..., Any], arguments: dict[str, Any], name: str) -> nn.Module:
    """The module that a factory returns."""
    try:
        module = make(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise UsageError(
            f"--model {name} failed ({type(error).__name__}: {error})", hint="pass its arguments with --model-args JSON"
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model {name} returned {type(module).__name__}", hint="it must return a torch.nn.Module")
    return module


def _ready(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for child in module.modules():  # an exported program's module refuses .eval() as a whole
        child.training = False
    return module


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a state dict into a module, strictly: missing, unexpected and misshapen keys are all listed.

    A key that is missing while another name of the same tensor is there is filled by that tensor.
    ``num_batches_tracked`` may be missing: torch before 0.4.1 didn't write it, and evaluation doesn't read it.

    Raises:
        InputError: The two don't fit.
    """
    expected = module.state_dict()
    defaults = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state = {**defaults, **state}
    for names in tied_names(module):
        present = [name for name in names if name in state]
        for name in names:
            if present and name in expected and name not in state:
                state[name] = state[present[0]]
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} is {list(state[key].shape)}, the model's is {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(found)} {label} ({_listed(found)})"
        for label, found in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if found
    ]
    if problems:
        raise InputError(
            f"{path}: keys don't fit the model: {'; '.join(problems)}",
            hint="check --model and --model-args: this checkpoint was saved from another architecture",
        )
    module.load_state_dict(state, strict=True)


def _listed(names: list[str]) -> str:
    shown = ", ".join(escape(name) for name in names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown}, and {len(names) - MAX_LISTED} more"


def load(run: str | Path, factory: Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Load a run folder's network.

    Args:
        run: The folder.
        factory: The architecture (a callable, or ``file.py:name``): the result is the user's own class with the
            compressed weights as floats. Without it, the guarded model.pt2 is loaded: integer weights and rounded
            activations, as in model.onnx.

    Returns:
        The network in evaluation mode.

    Raises:
        InputError: Not a run folder, or its files were changed.

    Example:
        >>> import compress
        >>> network = compress.load("run-q", resnet20)  # doctest: +SKIP
    """
    if factory is None or isinstance(factory, str):
        return load_source(Path(run), factory, None).module
    manifest = read_manifest(Path(run))
    check_files(Path(run), manifest)
    state, _ = _unpack(read_checkpoint(Path(run) / WEIGHTS))
    module = call_factory(factory, {}, getattr(factory, "__name__", "factory"))
    load_state(module, state, Path(run) / WEIGHTS)
    return _ready(module)


def guess_inputs(module: nn.Module, input_shape: str | None) -> tuple[tuple[Tensor, ...], str]:
    """Example inputs of batch 2 where no data are given, and a sentence that says what was assumed.

    The first layer with a weight says what the network takes: a linear layer its features, an embedding token ids, a
    convolution its channels, at the first usual size that the network accepts.

    Raises:
        UsageError: No shape that was tried fits; asks for --input-shape.
    """
    generator = torch.Generator().manual_seed(0)
    if input_shape is not None:
        try:
            shape = [int(size) for size in input_shape.split(",")]
        except ValueError:
            raise UsageError(f"--input-shape {input_shape!r} isn't sizes", hint="write 3,32,32 (no batch)") from None
        candidates = [shape]
    else:
        candidates = _candidate_shapes(module)
    is_tokens = isinstance(_first_layer(module), nn.Embedding)
    reason = "no layer says what the network takes"
    for shape in candidates:
        size = (2, *shape)
        x = torch.zeros(size, dtype=torch.int64) if is_tokens else torch.randn(size, generator=generator)
        try:
            with torch.no_grad():
                copy.deepcopy(module)(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        kind = "token ids" if is_tokens else "inputs"
        return (x,), f"no data given: traced with {kind} of shape [n, {', '.join(map(str, shape))}]"
    raise UsageError(
        f"the shape of the inputs isn't known ({reason})", hint="pass --input-shape 3,32,32 (no batch), or --data"
    )


def _first_layer(module: nn.Module) -> nn.Module | None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
    return next((layer for layer in module.modules() if isinstance(layer, kinds)), None)


def _candidate_shapes(module: nn.Module) -> list[list[int]]:
    layer = _first_layer(module)
    if isinstance(layer, nn.Linear):
        return [[layer.in_features], [16, layer.in_features]]
    if isinstance(layer, nn.Embedding):
        return [[256], [128], [64], [32], [16]]
    if isinstance(layer, nn.Conv1d):
        return [[layer.in_channels, size] for size in (1024, 16000, 128, 256, 512, 64)]
    if isinstance(layer, nn.Conv3d):
        return [[layer.in_channels, size, size, size] for size in (16, 32, 64)]
    if isinstance(layer, nn.Conv2d):
        small = layer.stride[0] == 1 and layer.kernel_size[0] <= 5
        sizes = (28, 32, 64, 224) if layer.in_channels == 1 else (32, 64, 28, 224)
        return [[layer.in_channels, size, size] for size in (sizes if small else (224, 256, 299, *sizes))]
    return []
