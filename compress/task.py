"""What a network is for: its data, its loss and the metric that decides whether a result is good.

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
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError, NumericsError, UsageError
from .formats.arrays import read_arrays
from .registry import TASKS

ARRAY_SUFFIXES = (".npz", ".safetensors")


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

    def sample(self, count: int, seed: int) -> Data:
        """``count`` examples drawn without replacement; all of them, in order, where there are no more."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Data(
            tuple(x[chosen] for x in self.inputs), None if self.targets is None else self.targets[chosen], self.name
        )

    def batches(self, size: int) -> Iterable[Data]:
        """Successive slices of at most ``size`` examples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            targets = None if self.targets is None else self.targets[part]
            yield Data(tuple(x[part] for x in self.inputs), targets, self.name)

    def sha256(self) -> str:
        """Hash of every tensor's dtype, shape and bytes."""
        digest = hashlib.sha256()
        for tensor in (*self.inputs, *(() if self.targets is None else (self.targets,))):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return digest.hexdigest()


def _head(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]


class Task(Protocol):
    """What ``file.py:Task`` has to provide; the three built-in tasks do.

    Attributes:
        name: Of the metric.
        unit: Of the metric.
        higher_is_better: Whether a larger metric is better.
    """

    name: str
    unit: str
    higher_is_better: bool

    def prepare(self, data: Data) -> Data:
        """Inputs and targets from the data as read, checked."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean loss of a batch, a scalar to differentiate."""
        ...

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """The metric of each example, ``[n]``; the mean over examples is the figure."""
        ...


class Classification:
    """Logits ``[n, classes]`` against integer labels ``[n]``; accuracy in percent."""

    name, unit, higher_is_better = "accuracy", "%", True

    def prepare(self, data: Data) -> Data:
        if data.targets is None:
            return data
        if data.targets.dim() != 1 or data.targets.is_floating_point():
            raise UsageError(
                f"{data.name}: labels have dtype {data.targets.dtype} and shape {list(data.targets.shape)}",
                hint="classification needs integer labels [n]; for float targets pass --task regression",
            )
        return Data(data.inputs, data.targets.long(), data.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 100.0 * (outputs.argmax(-1) == targets).double()


class Regression:
    """Outputs against float targets of the same shape; mean squared error."""

    name, unit, higher_is_better = "mse", "squared error", False

    def prepare(self, data: Data) -> Data:
        targets = None if data.targets is None else data.targets.float()
        return Data(data.inputs, targets, data.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets.reshape(outputs.shape))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.numel() != targets.numel():
            raise UsageError(f"targets have shape {list(targets.shape)}, the outputs {list(outputs.shape)}")
        return (outputs - targets.reshape(outputs.shape)).double().square().reshape(len(outputs), -1).mean(1)


class CausalLM:
    """Token windows ``[n, t]``: inputs are all but the last token, targets all but the first; nats per token."""

    name, unit, higher_is_better = "loss", "nats per token", False

    def prepare(self, data: Data) -> Data:
        ids = data.inputs[0]
        if ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 2:
            raise UsageError(
                f"{data.name}: token ids have dtype {ids.dtype} and shape {list(ids.shape)}",
                hint="causal-lm needs one integer tensor [n, t] with t of 2 or more",
            )
        ids = ids.long()
        return Data((ids[:, :-1].contiguous(),), ids[:, 1:].contiguous(), data.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        nats = F.cross_entropy(outputs.flatten(0, -2).double(), targets.flatten(), reduction="none")
        return nats.reshape(len(targets), -1).mean(1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that a planner sees of the user's data."""

    task: Task
    data: Data

    def sha256(self) -> str:
        """Hash of the examples and of the metric's name."""
        return hashlib.sha256(f"{self.task.name} {self.data.sha256()}".encode()).hexdigest()


BUILT_IN: dict[str, Callable[[], Task]] = {
    "classification": Classification,
    "regression": Regression,
    "causal-lm": CausalLM,
}


def load_task(kind: str | None, data: Data | None) -> Task:
    """The task called ``kind``, guessed from the data where it is None.

    Raises:
        UsageError: Unknown kind, or a class without what ``Task`` needs; says what.
    """
    if kind is None:
        return BUILT_IN[guess_kind(data)]()
    if kind in BUILT_IN:
        return BUILT_IN[kind]()
    if ":" not in kind:
        choices = ", ".join(task.name for task in TASKS)
        raise UsageError(f"task {kind!r} is unknown", hint=f"choices: {choices}, or FILE.py:Task")
    task = load_object(kind, "--task")()
    missing = [n for n in ("name", "unit", "higher_is_better", "loss", "score") if not hasattr(task, n)]
    if missing:
        raise UsageError(f"{kind} lacks {', '.join(missing)}", hint="docs/tasks.md shows a complete task")
    if not hasattr(task, "prepare"):
        task.prepare = lambda data: data
    checked: Task = task
    return checked


def guess_kind(data: Data | None) -> str:
    """Integer windows without labels are text; integer labels are classes; anything else is regression."""
    if (
        data is not None
        and data.targets is None
        and data.inputs[0].dim() == 2
        and not data.inputs[0].is_floating_point()
    ):
        return "causal-lm"
    if data is not None and data.targets is not None and data.targets.is_floating_point():
        return "regression"
    return "classification"


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
        public = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise UsageError(f"{location} has no {name!r}", hint=f"it has: {public or 'no public callable'}")
    return getattr(module, name)


def _import_file(path: Path, flag: str) -> Any:
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
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # the file's own imports, as `python file.py` would find them
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[unique]
        raise UsageError(f"{flag}: {path} failed to import ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
    return module


def _import_module(name: str, flag: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{flag}: module {name!r} can't be imported ({error})", hint="install it, or write FILE.py:NAME"
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
    head = spec.split("(")[0]
    data = _call_data(spec, flag) if ":" in head and not Path(spec).exists() else _read_file(Path(spec), flag)
    inputs = tuple(_normalise(x, mean, std, layout) for x in data.inputs)
    data = Data(inputs, data.targets, data.name)
    _check(data, flag)
    return data


def _read_file(path: Path, flag: str) -> Data:
    if not path.exists():
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


def _call_data(spec: str, flag: str) -> Data:
    name, _, rest = spec.partition("(")
    function = load_object(name, flag)
    positional, keywords = _literal_arguments(spec, rest, flag)
    try:
        value = function(*positional, **keywords)
        return _as_data(value, spec.rpartition("/")[2])
    except (UsageError, InputError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"{flag}: {spec} failed ({type(error).__name__}: {error})") from error


def _literal_arguments(spec: str, rest: str, flag: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f({rest}" if rest else "f()", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("not a call")
        positional = [ast.literal_eval(a) for a in call.args]
        return positional, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(
            f"{flag}: the arguments of {spec!r} aren't literals", hint='write FILE.py:fn("calib", size=512)'
        ) from None


def _as_data(value: Any, name: str) -> Data:
    if isinstance(value, Tensor):
        return Data((value,), None, name)
    if isinstance(value, dict) and isinstance(value.get("x"), Tensor | tuple | list):
        return _as_data((value["x"], value.get("y")), name)
    if isinstance(value, tuple) and len(value) == 2 and (value[1] is None or isinstance(value[1], Tensor)):
        inputs = value[0]
        if isinstance(inputs, Tensor):
            return Data((inputs,), value[1], name)
        if isinstance(inputs, tuple | list) and all(isinstance(x, Tensor) for x in inputs) and inputs:
            return Data(tuple(inputs), value[1], name)
    if hasattr(value, "__iter__") and not isinstance(value, str | bytes | tuple | dict):
        return _concatenate([_as_data(_as_tuple(batch), name) for batch in value], name)
    raise UsageError(
        f"{name} returned {type(value).__name__}",
        hint="return a tensor, (x, y), {'x': ..., 'y': ...} or batches of those",
    )


def _as_tuple(batch: Any) -> Any:
    return tuple(batch) if isinstance(batch, list) else batch


def _concatenate(parts: list[Data], name: str) -> Data:
    if not parts:
        raise UsageError(f"{name} returned no batches", hint="return at least two examples")
    inputs = tuple(torch.cat([p.inputs[i] for p in parts]) for i in range(len(parts[0].inputs)))
    targets = [p.targets for p in parts if p.targets is not None]
    return Data(inputs, torch.cat(targets) if targets else None, name)


def _normalise(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, layout: str | None) -> Tensor:
    if layout == "nhwc" and x.dim() == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    if x.dtype == torch.uint8 and x.dim() >= 3:
        x = x.float() / 255
    if x.dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = x.float()
    if mean is None and std is None:
        return x
    if x.dim() < 2 or not x.is_floating_point():
        raise UsageError(f"--mean and --std don't fit inputs of dtype {x.dtype} and shape {list(x.shape)}")
    for flag, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) not in (1, x.shape[1]):
            raise UsageError(
                f"{flag} has {len(values)} values, the inputs {x.shape[1]} channels (shape {list(x.shape)})",
                hint="give one value a channel; pass --layout nhwc for channels-last images",
            )
    shape = [1, -1] + [1] * (x.dim() - 2)
    shifted = x - torch.tensor(mean or (0.0,)).reshape(shape)
    return shifted / torch.tensor(std or (1.0,)).reshape(shape)


def _check(data: Data, flag: str) -> None:
    lengths = {len(x) if x.dim() else 0 for x in data.inputs}
    if lengths == {0} or not lengths:
        raise UsageError(f"{flag}: {data.name} holds no examples", hint="pass at least two")
    if data.targets is not None:
        lengths.add(len(data.targets) if data.targets.dim() else 0)
    if len(lengths) > 1:
        raise UsageError(
            f"{flag}: {data.name} has tensors of different lengths {sorted(lengths)}", hint="one row an example"
        )
    if len(data) < 2:
        raise UsageError(f"{flag}: {data.name} holds one example", hint="pass at least two")
    for tensor in (*data.inputs, *(() if data.targets is None else (data.targets,))):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{flag}: {data.name} holds NaN or Inf", hint="clean the data")


def check_forward(module: torch.nn.Module, data: Data, flag: str) -> Any:
    """Run two examples, so that data of the wrong shape are an answer and not a crash inside a library.

    Raises:
        UsageError: The network doesn't take the data; gives both sides' words.
    """
    sample = data.first(2)
    try:
        with torch.no_grad():
            return module(*sample.inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}".replace("torch.", "") for x in sample.inputs)
        takes = inspect.signature(module.forward)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{flag}: the network doesn't take {data.name} of shape {shapes} ({reason})",
            hint=f"forward{takes}; check --data, --layout, --mean and --std",
        ) from error
