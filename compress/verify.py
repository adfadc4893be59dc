"""Proof in the runtime that will serve the model: the metric from the written file, and parity with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from .context import Progress
from .data import Data
from .errors import HCompressError, InputError, NumericsError, UsageError
from .task import Task

PARITY_BATCHES = (1, 3, 7)
FLOAT_TOLERANCE = 1e-3  # of the largest output: kernels sum in another order
# Of the largest output, where activations are rounded: a tie that two kernels break differently moves an activation by
# one step of its grid. Over 150 batches of ResNet-20: 0.022 at most, 0.0105 on average over a batch. A layer with its
# channels in the wrong order: 0.37 and 0.076 at least, on the demo's network.
INTEGER_TOLERANCE = 0.1
MEAN_TOLERANCE = 0.02
BATCH = 16  # more is no faster on a CPU, and attention's scores are as large as the batch
BATCH_OUTPUTS = 2**23  # output elements of a batch at most: a language model's logits are large
Session: TypeAlias = onnxruntime.InferenceSession


@dataclass(frozen=True, slots=True)
class Parity:
    """How near the runtime's outputs are to torch's at one batch size.

    Attributes:
        max_abs: Largest difference of an output.
        max_relative: The same over the largest output.
        mean_relative: Mean difference over the largest output.
        argmax_agreement: Share of rows with the same largest output; None for one output column.
    """

    batch: int
    max_abs: float
    max_relative: float
    mean_relative: float
    argmax_agreement: float | None


def open_session(path: Path | bytes, threads: int | None) -> Session:
    """An ONNX Runtime session on the CPU, threads pinned.

    Raises:
        InputError: The runtime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    model = path if isinstance(path, bytes) else str(path)
    try:
        return Session(model, options, providers=["CPUExecutionProvider"])
    # onnxruntime's own exceptions derive from Exception alone.
    except Exception as error:
        shown = "model" if isinstance(path, bytes) else str(path)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{shown}: ONNX Runtime refuses it ({reason})", hint="report this with the file") from error


def run_session(session: Session, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of one batch, in the network's order.

    Raises:
        UsageError: The inputs have another shape or type than the file was written for.
    """
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(inputs):
        raise UsageError(
            f"the model takes {', '.join(names)}; the data have {len(inputs)} inputs",
            hint="return ((x1, x2), y) from the data function",
        )
    feed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
    try:
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]
    except Exception as error:
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}".replace("torch.", "") for x in inputs)
        takes = ", ".join(f"{v.name} {v.shape} {v.type}" for v in session.get_inputs())
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"the model takes {takes}; the data are {shapes} ({reason})", hint="check --eval") from error


def runtime_forward(session: Session) -> Callable[..., Any]:
    """The session as a function of tensors; one output comes bare, several as a tuple."""

    def forward(*inputs: Tensor) -> Any:
        outputs = run_session(session, inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return forward


def require_targets(data: Data) -> None:
    """Refuse evaluation data without labels."""
    if data.targets is None:
        raise UsageError(f"{data.name} has no labels", hint="evaluation data need y: (x, y), or keys x and y")


def evaluate(forward: Callable[..., Any], data: Data, task: Task, stage: str, progress: Progress) -> float:
    """The mean of the task's score over all examples.

    Raises:
        UsageError: The data have no targets, or the task can't score them.
        NumericsError: The figure isn't finite.
    """
    require_targets(data)
    total, done = 0.0, 0
    with torch.no_grad():
        size = _batch_size(forward(*data.first(1).inputs))
        for batch in data.batches(size):
            progress(stage, done, len(data))
            total += float(_scores(task, forward(*batch.inputs), batch).double().sum())
            done += len(batch)
    progress(stage, len(data), len(data))
    metric = total / done
    if not np.isfinite(metric):
        raise NumericsError(f"{task.name} on {data.name} is {metric}", hint="the outputs aren't finite")
    return metric


def _batch_size(one: Any) -> int:
    """How many examples to run at once, by the outputs of one."""
    return max(1, min(BATCH, BATCH_OUTPUTS // max(1, sum(output.numel() for output in _flatten(one)))))


def _scores(task: Task, outputs: Any, batch: Data) -> Tensor:
    """The task's score of each example, checked."""
    if any(output.is_floating_point() and bool(torch.isnan(output).any()) for output in _flatten(outputs)):
        raise NumericsError(f"the network's outputs on {batch.name} hold NaN", hint="check the weights and the data")
    try:
        scores = task.score(outputs, batch.targets)
    except HCompressError:
        raise
    except Exception as error:  # a task may be the user's code, and raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"the task can't score {batch.name} ({reason})", hint="check --task and the labels") from error
    if not isinstance(scores, Tensor) or scores.shape != (len(batch),):
        found = f"a tensor {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UsageError(
            f"the task's score gives {found} for {len(batch)} examples", hint="return one number an example, [n]"
        )
    return scores


def measure_parity(module: nn.Module, session: Session, inputs: tuple[Tensor, ...]) -> list[Parity]:
    """Compare the runtime with the torch network at several batch sizes, on the user's own examples."""
    results = []
    for batch in PARITY_BATCHES:
        sample = tuple(_take(x, batch) for x in inputs)
        with torch.no_grad():
            expected = _flatten(module(*sample))
        found = run_session(session, sample)
        results.append(_compare(batch, expected, found))
    return results


def _take(x: Tensor, count: int) -> Tensor:
    """The first ``count`` rows, repeated where there are fewer."""
    repeats = -(-count // len(x))
    return torch.cat([x] * repeats)[:count] if repeats > 1 else x[:count]


def _flatten(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values or () for tensor in _flatten(value)]


def _compare(batch: int, expected: list[Tensor], found: list[Tensor]) -> Parity:
    if [e.shape for e in expected] != [f.shape for f in found]:
        shapes = f"{[list(f.shape) for f in found]}, torch's {[list(e.shape) for e in expected]}"
        raise InputError(
            f"at batch {batch} the runtime's outputs have shapes {shapes}", hint="report this with the model"
        )
    differences = [_difference(e.double(), f.double()) for e, f in zip(expected, found, strict=True)]
    if not all(torch.isfinite(d).all() for d in differences):
        raise NumericsError(
            f"outputs at batch {batch} aren't finite in torch or in the runtime", hint="check the weights"
        )
    if not any(d.numel() for d in differences):
        raise InputError(f"at batch {batch} the network's outputs are empty", hint="check the shape of the data")
    largest = max(_largest(e.double()) for e in expected) or 1.0
    max_abs = max(float(d.max()) for d in differences if d.numel())
    mean = max(float(d.mean()) for d in differences if d.numel())
    logits = expected[0]
    agreement = None
    if logits.dim() >= 2 and logits.shape[-1] > 1 and logits.is_floating_point():
        agreement = float((logits.argmax(-1) == found[0].argmax(-1)).double().mean())
    return Parity(batch, max_abs, max_abs / largest, mean / largest, agreement)


def _difference(expected: Tensor, found: Tensor) -> Tensor:
    """Absolute difference; none where both are the same infinity, as a masked logit is."""
    return torch.where(expected == found, torch.zeros_like(expected), (expected - found).abs())


def _largest(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def parity_holds(parity: Parity, integer_activations: bool) -> bool:
    """Whether one comparison is within tolerance."""
    if not integer_activations:
        return parity.max_relative <= FLOAT_TOLERANCE
    return parity.max_relative <= INTEGER_TOLERANCE and parity.mean_relative <= MEAN_TOLERANCE
