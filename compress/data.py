"""The user's examples: arrays in files, or what a function of the user's returns.

Data come from ``.npz`` or ``.safetensors`` files (keys ``x`` and ``y``) or from ``file.py:fn(arguments)``, whose
function returns a tensor, a pair ``(x, y)``, a dict with those keys, or an iterable of such batches. The file is code
and runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import HCompressError, InputError, NumericsError, UsageError
from .formats.arrays import read_arrays
from .graph.trace import place_of

ARRAY_SUFFIXES = (".npz", ".safetensors")
# FILE.py:NAME or PACKAGE.MODULE:NAME, then maybe arguments; the folders may hold parentheses, the name doesn't.
CALL = re.compile(r"(?P<location>.+?\.py|[\w.]+):(?P<name>[^(/]*)(?P<arguments>\(.*)?", re.DOTALL)
MAX_LISTED = 12


@dataclass(frozen=True, slots=True)
class Data:
    """Examples in memory.

    Attributes:
        inputs: Tensors ``[n, ...]`` that the network's forward takes, in order.
        targets: ``[n, ...]``, or None without labels.
        name: What the user called it.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None
    name: str

    def __len__(self) -> int:
        return len(self.inputs[0])

    def first(self, count: int) -> Data:
        """The first ``count`` examples."""
        return Data(tuple(x[:count] for x in self.inputs), _head(self.targets, count), self.name)

    def every(self, step: int) -> Data:
        """One example in ``step``, from the first on."""
        return Data(
            tuple(x[::step] for x in self.inputs), None if self.targets is None else self.targets[::step], self.name
        )

    def sample(self, count: int, seed: int) -> Data:
        """``count`` examples drawn without replacement; all of them, in order, where there are no more."""
        if count >= len(self):
            return self
        return self.at(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])

    def at(self, places: Tensor) -> Data:
        """The examples of these numbers, in their order."""
        return Data(
            tuple(x[places] for x in self.inputs), None if self.targets is None else self.targets[places], self.name
        )

    def batches(self, size: int) -> Iterable[Data]:
        """Successive slices of at most ``size`` examples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            targets = None if self.targets is None else self.targets[part]
            yield Data(tuple(x[part] for x in self.inputs), targets, self.name)

    def sha256(self) -> str:
        """Hash of every tensor's role, dtype, shape and bytes."""
        digest = hashlib.sha256()
        roles = [("x", x) for x in self.inputs] + ([] if self.targets is None else [("y", self.targets)])
        for role, tensor in roles:
            digest.update(f"{role} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.numel():
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _head(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def load_object(spec: str, flag: str) -> Any:
    """The object that ``file.py:name`` or ``pkg.mod:name`` names. The file is run.

    Raises:
        UsageError: No such file, module or name, or the file raised; names it.
    """
    location, _, name = spec.rpartition(":")
    if not location or not name:
        raise UsageError(f"{flag} {spec!r} names no object", hint="write FILE.py:NAME or PACKAGE.MODULE:NAME")
    module = _import_file(Path(location), flag) if location.endswith(".py") else _import_module(location, flag)
    if not hasattr(module, name):
        raise UsageError(f"{location} has no {name!r}", hint=f"it has: {_public_names(module) or 'no public callable'}")
    return getattr(module, name)


def _public_names(module: ModuleType) -> str:
    """What a user's module defines itself; what it imports where it defines nothing."""
    callables = {n: v for n, v in vars(module).items() if not n.startswith("_") and callable(v)}
    own = [n for n, v in callables.items() if getattr(v, "__module__", None) == module.__name__]
    names = own or list(callables)
    return ", ".join(names[:MAX_LISTED]) + (f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _import_file(path: Path, flag: str) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{flag}: {path}: no such file", hint="write FILE.py:NAME, relative to the current folder")
    unique = "hcompress_user_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{flag}: {path} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    folder = path.resolve().parent
    _forget_neighbours(folder)
    sys.path.insert(0, str(folder))  # the file's own imports, as `python file.py` would find them
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        del sys.modules[unique]
        raise UsageError(
            f"{flag}: {path} failed to import ({type(error).__name__}: {error})",
            hint="its imports are looked up beside it; python must import it without errors",
        ) from error
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # last: for imports inside its functions, shadowing nothing
    return module


def _forget_neighbours(folder: Path) -> None:
    """Drop imported modules of another user file's folder where this folder has one of that name: two `utils.py`."""
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("hcompress_user_")]
    users = {Path(file).resolve().parent for file in files if file} - {folder}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("hcompress_user_") or not isinstance(file, str):
            continue
        top = folder / name.partition(".")[0]
        if (top.with_suffix(".py").is_file() or top.is_dir()) and any(
            Path(file).parts[: len(user.parts)] == user.parts for user in users
        ):
            del sys.modules[name]


def _import_module(name: str, flag: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a module of the current folder is found, and shadows nothing
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(
            f"{flag}: module {name!r} can't be imported ({type(error).__name__}: {error})",
            hint="install it, or write FILE.py:NAME",
        ) from error


def read_data(
    spec: str, flag: str, *, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, layout: str | None
) -> Data:
    """Read examples.

    Args:
        spec: A path to arrays, or ``file.py:fn(arguments)`` with literal arguments.
        flag: The setting that named it, for messages.
        mean: Per channel, subtracted after uint8 images are scaled to [0, 1].
        std: Per channel, divided by.
        layout: ``nhwc`` turns image arrays into ``nchw``.

    Raises:
        UsageError: Empty, of the wrong form, or its function failed; names the data and what was expected.
        InputError: The file can't be read.
        NumericsError: NaN or Inf.
    """
    call = None if _exists(spec) else CALL.fullmatch(spec)
    data = _read_file(Path(spec), flag) if call is None else _call_data(spec, call, flag)
    _check_lengths(data, flag)
    if layout == "nhwc" and all(x.dim() != 4 for x in data.inputs):
        raise UsageError(
            f"--layout nhwc needs images [n, h, w, c]; {data.name} has {_shapes(data.inputs)}", hint="leave it out"
        )
    if any(value <= 0 for value in std or ()):
        raise UsageError(f"--std has {min(std or ()):g}", hint="standard deviations are above zero")
    inputs = tuple(_normalise(x, mean, std, layout) for x in data.inputs)
    data = Data(inputs, data.targets, data.name)
    _check_finite(data, flag)
    return data


def _exists(spec: str) -> bool:
    try:
        return Path(spec).exists()
    except OSError:  # arguments may be longer than a file name
        return False


def _read_file(path: Path, flag: str) -> Data:
    if not _exists(str(path)):
        raise InputError(
            f"{flag}: {path}: no such file", hint="pass .npz or .safetensors with x and y, or FILE.py:fn(args)"
        )
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        raise InputError(
            f"{flag}: {path}: data of kind {path.suffix or 'without suffix'} aren't read",
            hint="pass .npz or .safetensors with keys x and y, or FILE.py:fn(args)",
        )
    arrays = read_arrays(path)
    if "x" not in arrays:
        raise InputError(
            f"{path}: key x is missing; it has {', '.join(sorted(arrays)) or 'no keys'}", hint="save x and y"
        )
    return Data((arrays["x"],), arrays.get("y"), path.name)


def _call_data(spec: str, call: re.Match[str], flag: str) -> Data:
    arguments = call["arguments"] or "()"
    positional, keywords = _literal_arguments(arguments, spec, flag)
    function = load_object(f"{call['location']}:{call['name']}", flag)
    try:
        value = function(*positional, **keywords)
        return _as_data(value, f"{Path(call['location']).name}:{call['name']}{call['arguments'] or ''}")
    except HCompressError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(
            f"{flag}: {spec} failed ({type(error).__name__}: {error})", hint="call it in Python to see where"
        ) from error


def _literal_arguments(arguments: str, spec: str, flag: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments as written in parentheses; nothing in them is run."""
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not one call")
        positional = [ast.literal_eval(a) for a in call.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        if len(keywords) < len(call.keywords):
            raise ValueError("** isn't a literal")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise UsageError(
            f"{flag}: the arguments of {spec!r} aren't literals", hint='write FILE.py:fn("calib", size=512)'
        ) from None
    return positional, keywords


def _as_data(value: Any, name: str) -> Data:
    if _is_array(value):
        return Data((_tensor(value, name),), None, name)
    if isinstance(value, dict) and "x" in value:
        return _as_data((value["x"], value.get("y")), name)
    if isinstance(value, tuple) and len(value) == 2 and (value[1] is None or _is_array(value[1])):
        inputs = (value[0],) if _is_array(value[0]) else value[0]
        if isinstance(inputs, tuple | list) and all(_is_array(x) for x in inputs) and inputs:
            targets = None if value[1] is None else _tensor(value[1], name)
            return Data(tuple(_tensor(x, name) for x in inputs), targets, name)
    if hasattr(value, "__iter__") and not isinstance(value, str | bytes | tuple | dict):
        return _concatenate([_as_data(_as_tuple(batch), name) for batch in value], name)
    raise UsageError(
        f"{name} returned {describe(value)}",
        hint="return a tensor, (x, y), ((x1, x2), y), {'x': ..., 'y': ...} or batches of those",
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _tensor(value: Tensor | np.ndarray[Any, Any], name: str) -> Tensor:
    """A dense tensor on the CPU without a graph behind it."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        return dense.cpu()
    try:
        return torch.from_numpy(np.ascontiguousarray(value)).clone()
    except TypeError:
        raise UsageError(
            f"{name} returned an array of dtype {value.dtype}, which torch can't hold", hint="convert it with astype"
        ) from None


def _as_tuple(batch: Any) -> Any:
    return tuple(batch) if isinstance(batch, list) else batch


def describe(value: Any) -> str:
    """A value's kind, and what it holds."""
    if isinstance(value, dict):
        return f"a dict with keys {', '.join(str(key) for key in list(value)[:MAX_LISTED]) or 'none'}"
    if isinstance(value, tuple | list):
        kinds = ", ".join(type(item).__name__ for item in value[:MAX_LISTED])
        return f"a {type(value).__name__} of {kinds or 'nothing'}"
    return type(value).__name__


def _concatenate(parts: list[Data], name: str) -> Data:
    if not parts:
        raise UsageError(f"{name} returned no batches", hint="return one example at least")
    first = _signature(parts[0])
    other = next((_signature(part) for part in parts if _signature(part) != first), None)
    if other is not None:
        raise UsageError(
            f"{name} returned batches of different form: {first}, then {other}",
            hint="all batches need the same dtypes and, but for the first dimension, shapes; a pair is a tuple (x, y)",
        )
    inputs = tuple(torch.cat([p.inputs[i] for p in parts]) for i in range(len(parts[0].inputs)))
    targets = [p.targets for p in parts if p.targets is not None]
    return Data(inputs, torch.cat(targets) if targets else None, name)


def _signature(part: Data) -> str:
    """Such as ``x [n, 3, 32, 32] float32, y [n] int64``."""

    def form(role: str, tensor: Tensor) -> str:
        shape = ", ".join(("n", *map(str, tensor.shape[1:]))) if tensor.dim() else ""
        return f"{role} [{shape}] {dtype_name(tensor)}"

    inputs = [form("x", x) for x in part.inputs]
    return ", ".join(inputs + ([] if part.targets is None else [form("y", part.targets)]))


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{list(x.shape)} {dtype_name(x)}" for x in tensors)


def _normalise(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, layout: str | None) -> Tensor:
    if layout == "nhwc" and x.dim() == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    if x.dtype == torch.uint8 and x.dim() >= 3:
        x = x.float() / 255
    if x.is_floating_point():
        x = x.float()
    if mean is None and std is None:
        return x
    if x.dim() < 2 or not x.is_floating_point():
        raise UsageError(
            f"--mean and --std don't fit inputs of dtype {dtype_name(x)} and shape {list(x.shape)}",
            hint="they are for float or uint8 images and features",
        )
    for flag, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) not in (1, x.shape[1]):
            raise UsageError(
                f"{flag} has {len(values)} values, the inputs {x.shape[1]} channels (shape {list(x.shape)})",
                hint="give one value a channel; pass --layout nhwc for channels-last images",
            )
    shape = [1, -1] + [1] * (x.dim() - 2)
    shifted = x - torch.tensor(mean or (0.0,)).reshape(shape)
    return shifted / torch.tensor(std or (1.0,)).reshape(shape)


def _check_lengths(data: Data, flag: str) -> None:
    lengths = {len(x) if x.dim() else 0 for x in data.inputs}
    if lengths == {0} or not lengths:
        raise UsageError(f"{flag}: {data.name} holds no examples", hint="pass one at least")
    if data.targets is not None:
        lengths.add(len(data.targets) if data.targets.dim() else 0)
    if len(lengths) > 1:
        raise UsageError(
            f"{flag}: {data.name} has tensors of different lengths {sorted(lengths)}", hint="one row an example"
        )
    if any(x.is_complex() for x in data.inputs):
        raise UsageError(f"{flag}: {data.name} has complex inputs", hint="pass real and imaginary parts as channels")


def _check_finite(data: Data, flag: str) -> None:
    for tensor in (*data.inputs, *(() if data.targets is None else (data.targets,))):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{flag}: {data.name} holds NaN or Inf", hint="clean the data")


def check_forward(module: torch.nn.Module, data: Data, flag: str) -> Any:
    """Run two examples, so that data of the wrong shape are an answer and not a crash inside a library.

    Raises:
        UsageError: The network doesn't take the data; gives both sides' words.
    """
    inputs = [x.clone() for x in data.first(2).inputs]  # a forward may write into its input
    try:
        with torch.no_grad():
            return module(*inputs)
    except Exception as error:  # the user's network may raise anything
        where = place_of(error, module)
        if _takes(module, [x[:1] for x in inputs]):
            raise UsageError(
                f"{flag}: the network takes one example of {data.name}, and not two at once ({_reason(error)}){where}",
                hint="its forward fixes the batch: use x.shape[0] or -1 in place of a number",
            ) from error
        shapes = _shapes(inputs)
        takes = inspect.signature(module.forward)
        raise UsageError(
            f"{flag}: the network doesn't take {data.name} of shape {shapes} ({_reason(error)}){where}",
            hint=f"forward{takes}; check --data, --layout, --mean and --std",
        ) from error


def _takes(module: torch.nn.Module, inputs: list[Tensor]) -> bool:
    try:
        with torch.no_grad():
            module(*(x.clone() for x in inputs))
    except Exception:  # noqa: BLE001 - the user's network may raise anything
        return False
    return True


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
