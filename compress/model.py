"""A checkpoint with its architecture: state dict + factory, exported program, or a run folder.

A factory is code: it comes from the command line or the user's own config, never from a checkpoint or a preset.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .canonical import sha256_of_file
from .data import load_object
from .errors import HCompressError, InputError, UsageError, escape
from .formats.checkpoint import Checkpoint, read_checkpoint
from .formats.packed import QuantizedTensor, decode
from .graph.graph_forward import why_graph
from .graph.trace import require_dynamic_batch, tied_names
from .manifest import NAME as MANIFEST
from .manifest import check_files, read_manifest
from .pruned import Cut, cut_module, read_cuts

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
        cuts: What was cut out of the factory's architecture, as a file's metadata record it.
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
    cuts: tuple[Cut, ...] = ()


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
        _require_float32(program, path)
        require_dynamic_batch(checkpoint.program)
        example = checkpoint.program.example_inputs
        inputs = tuple(x for x in example[0] if isinstance(x, Tensor)) if example else None
        return Source(path, sha256, _ready(program), "pt2", inputs or None, {}, {}, checkpoint.notes)
    if factory is None:
        raise UsageError(
            f"{path}: a state dict holds no architecture",
            hint="pass --model FILE.py:FACTORY (or PACKAGE.MODULE:FACTORY), or set [model] factory in hcompress.toml",
        )
    state, stored = _unpack(checkpoint)
    cuts = read_cuts(checkpoint.metadata, path)
    module, notes = _filled(build_module(factory, factory_args), state, cuts, path)
    notes = (*checkpoint.notes, *notes)
    return Source(path, sha256, module, checkpoint.format, None, stored, {}, notes, cuts)


def _filled(
    module: nn.Module, state: Mapping[str, Tensor], cuts: Sequence[Cut], path: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    """An architecture without what was cut, with a state dict in it, and what there is to note."""
    module = cut_module(module, cuts, path)
    notes = load_state(module, state, path)
    why = why_graph(module)
    return _ready(module), (*notes, f"{type(module).__name__}: {why}") if why else notes


def _require_float32(program: nn.Module, path: Path) -> None:
    """The casts in a program's graph are fixed: its weights can't be widened without changing what it computes."""
    for name, tensor in program.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: {escape(name)} is {dtype}; exported programs are read in float32 alone",
                hint="export it again after model.float(), or pass its state dict with --model",
            )


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
    weights_hash = sha256_of_file(folder / WEIGHTS if WEIGHTS in manifest.files else folder / name)
    cuts = inner.cuts
    if factory is None and WEIGHTS in manifest.files:
        cuts = read_cuts(read_checkpoint(folder / WEIGHTS).metadata, folder / WEIGHTS)
    return Source(folder, weights_hash, inner.module, "run", inner.example_inputs, inner.stored, parents, notes, cuts)


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
    """The module that a factory returns: in float32, on the CPU, every parameter there.

    Raises:
        UsageError: It isn't a function, raised, or returned something that can't be filled with a checkpoint.
    """
    if isinstance(make, nn.Module) or not callable(make):
        raise UsageError(
            f"--model {name} is a {type(make).__name__}, not a factory",
            hint="name a function or a class that makes the torch.nn.Module",
        )
    try:
        # Tensors that the checkpoint doesn't hold may be drawn at random: the same ones each time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = make(**arguments)
    except HCompressError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(
            f"--model {name} failed ({type(error).__name__}: {error})", hint="pass its arguments with --model-args JSON"
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model {name} returned {type(module).__name__}", hint="it must return a torch.nn.Module")
    _require_materialized(module, name)
    # Before the checkpoint goes in: a half-precision module would round it.
    return module.cpu().float()


def _require_materialized(module: nn.Module, name: str) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [key for key, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"--model {name}: {_listed(lazy)} has no shape yet (a lazy module)",
            hint="give the sizes in the factory, or run one batch there before the module is returned",
        )
    meta = [key for key, tensor in tensors if tensor.is_meta]
    if meta:
        raise UsageError(
            f"--model {name}: {_listed(meta)} is on the meta device, without values",
            hint="build the module on the CPU, outside of torch.device('meta')",
        )


def _ready(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for child in module.modules():  # an exported program's module refuses .eval() as a whole
        child.training = False
    return module


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Copy a state dict into a module, strictly: missing, unexpected and misfitting keys are all listed.

    A key that is missing while another name of the same tensor is there is filled by that tensor.
    ``num_batches_tracked`` may be missing: torch before 0.4.1 didn't write it, and evaluation doesn't read it.

    Returns:
        Notes: which floats were converted to the module's own dtype.

    Raises:
        InputError: The two don't fit.
        UsageError: The module keeps state that isn't a tensor.
    """
    expected: dict[str, Any] = dict(module.state_dict())
    others = [key for key, value in expected.items() if not isinstance(value, Tensor)]
    if others:
        raise UsageError(
            f"the network keeps state that isn't a tensor ({_listed(others)})",
            hint="let its factory return a module without get_extra_state",
        )
    state = {**{key: value for key, value in expected.items() if _is_counter(key)}, **state}
    differing = []
    for names in tied_names(module):
        present = [name for name in names if name in state]
        for name in names:
            if present and name in expected and name not in state:
                state[name] = state[present[0]]
        differing += [
            f"{name} differs from {present[0]}, which the model ties to it"
            for name in present[1:]
            if not torch.equal(state[name], state[present[0]])
        ]
    both = [key for key in expected if key in state]
    found = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshapen": [
            f"{escape(key)} is {list(state[key].shape)}, the model's is {list(expected[key].shape)}"
            for key in both
            if state[key].shape != expected[key].shape
        ],
        "of another kind": [
            f"{escape(key)} is {_dtype(state[key])}, the model's is {_dtype(expected[key])}"
            for key in both
            if not _is_counter(key) and state[key].is_floating_point() != expected[key].is_floating_point()
        ],
        "untied": differing,
    }
    problems = [f"{len(names)} {label} ({_listed(names)})" for label, names in found.items() if names]
    if problems:
        raise InputError(
            f"{path}: keys don't fit the model: {'; '.join(problems)}",
            hint="check --model and --model-args: this checkpoint was saved from another architecture",
        )
    try:
        module.load_state_dict(state, strict=True)
    except Exception as error:  # a module's own hooks may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: the model doesn't take its state ({reason})", hint="check --model") from error
    return _converted({key: value for key, value in state.items() if not _is_counter(key)}, expected, path)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _converted(state: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """One note for each float dtype that the model doesn't have.

    Raises:
        InputError: A value is beyond float32; names the key.
    """
    counts: dict[str, int] = {}
    for key, value in state.items():
        if value.dtype != loaded[key].dtype:
            counts[_dtype(value)] = counts.get(_dtype(value), 0) + 1
            if bool(torch.isinf(loaded[key]).any()) and not bool(torch.isinf(value).any()):
                raise InputError(
                    f"{path}: {escape(key)} has values beyond float32 (largest {float(value.abs().max()):.3g})",
                    hint="hcompress computes in float32; rescale the layer",
                )
    return tuple(f"{count} tensors of {dtype} were read as float32" for dtype, count in counts.items())


def _listed(names: list[str]) -> str:
    shown = ", ".join(escape(name, limit=240) for name in names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown}, and {len(names) - MAX_LISTED} more"


def load(run: str | Path, factory: Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Load a run folder's network.

    Args:
        run: The folder.
        factory: The architecture (a callable, or ``file.py:name``): the result is the user's own class with the
            compressed weights as floats. Without it, the guarded model.pt2 is loaded: integer weights and rounded
            activations, as in model.onnx.

    Returns:
        The network in evaluation mode; parameters of the user's own class learn where those of the factory do. Warns
        where the class's own code can't compute what is left after a cut: its ``forward`` runs the exported graph.

    Raises:
        InputError: Not a run folder, or its files were changed.

    Example:
        >>> import compress
        >>> network = compress.load("run-q", resnet20)  # doctest: +SKIP
    """
    if factory is None:
        return load_source(Path(run), None, None).module
    if not Path(run).exists():
        raise InputError(f"{run}: no such file", hint="pass the --out folder of a finished run")
    manifest = read_manifest(Path(run))
    check_files(Path(run), manifest)
    path = Path(run) / WEIGHTS
    checkpoint = read_checkpoint(path)
    state, _ = _unpack(checkpoint)
    if isinstance(factory, str):
        module = build_module(factory, None)
    else:
        module = call_factory(factory, {}, getattr(factory, "__name__", "factory"))
    learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    loaded = _filled(module, state, read_cuts(checkpoint.metadata, path), path)[0]
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(name in learning)
    if why_graph(loaded):
        warnings.warn(f"{type(loaded).__name__}: {why_graph(loaded)}", stacklevel=2)
    return loaded


def guess_inputs(module: nn.Module, input_shape: str | None) -> tuple[tuple[Tensor, ...], str]:
    """Example inputs of batch 2 where no data are given, and a sentence that says what was assumed.

    The first layer with a weight says what the network takes: a linear layer its features, an embedding token ids, a
    convolution its channels, at the first usual size that the network accepts.

    Raises:
        UsageError: No shape that was tried fits; asks for --input-shape.
    """
    generator = torch.Generator().manual_seed(0)
    required = _required_inputs(module)
    if len(required) > 1:
        raise UsageError(
            f"the network takes {len(required)} inputs ({', '.join(required)}), whose shapes can't be guessed",
            hint="pass --data FILE.py:fn, a function that returns (({}), y)".format(", ".join(required)),
        )
    candidates = _candidate_shapes(module) if input_shape is None else [_parse_shape(input_shape)]
    is_tokens = isinstance(_first_layer(module), nn.Embedding)
    reason = "no layer says what the network takes"
    for shape in candidates:
        size = (2, *shape)
        try:
            x = torch.zeros(size, dtype=torch.int64) if is_tokens else torch.randn(size, generator=generator)
            with torch.no_grad():
                copy.deepcopy(module)(x)
        except Exception as error:  # noqa: BLE001 - the user's network may raise anything; the last reason is shown
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        kind = "token ids" if is_tokens else "inputs"
        return (x,), f"no data given: traced with {kind} of shape [n, {', '.join(map(str, shape))}]"
    raise UsageError(
        f"the shape of the inputs isn't known ({reason})", hint="pass --input-shape 3,32,32 (no batch), or --data"
    )


def _required_inputs(module: nn.Module) -> list[str]:
    """Names of forward's arguments without a default."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional and p.default is p.empty]


def _parse_shape(text: str) -> list[int]:
    try:
        shape = [int(size) for size in text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {text!r} isn't sizes", hint="write 3,32,32 (no batch)")
    return shape


def _first_layer(module: nn.Module) -> nn.Module | None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase)
    return next((layer for layer in module.modules() if isinstance(layer, kinds)), None)


def _candidate_shapes(module: nn.Module) -> list[list[int]]:
    layer = _first_layer(module)
    if isinstance(layer, nn.Linear):
        return [[layer.in_features], [16, layer.in_features]]
    if isinstance(layer, nn.Embedding):
        return [[256], [128], [64], [32], [16]]
    if isinstance(layer, nn.RNNBase):
        return [[16, layer.input_size]]
    if isinstance(layer, nn.Conv1d):
        return [[layer.in_channels, size] for size in (1024, 16000, 128, 256, 512, 64)]
    if isinstance(layer, nn.Conv3d):
        return [[layer.in_channels, size, size, size] for size in (16, 32, 64)]
    if isinstance(layer, nn.Conv2d):
        small = layer.in_channels == 1 or (layer.stride[0] == 1 and layer.kernel_size[0] <= 5)
        sizes = (28, 32, 64, 224) if layer.in_channels == 1 else (32, 64, 28, 224)
        return [[layer.in_channels, size, size] for size in (sizes if small else (224, 256, 299, *sizes))]
    return []
