"""Measure gradients of single examples and of small batches against loops of autograd, in ratios of one process.

    python -m tests.benchmarks.gradients --out docs/benchmarks.md

ResNet-20 and its calibration images, from the folder that HCOMPRESS_TEST_DATA names. Cost: about a minute of one core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from compress.cli.main import keep_freed_memory
from torch import Tensor, nn
from torch.nn import functional as F

from compress.curvature.network import Network, open_network
from compress.curvature.sample_gradients import sample_gradients
from compress.data import Data, read_data
from compress.graph.trace import trace_graph
from compress.model import load_source
from compress.task import Classification

from .mfac import cpu_time_s
from .page import data_folder, machine, publish, table

TITLE = "Per-sample gradients"
CPU = torch.device("cpu")
EXAMPLES, CHECKED = 512, 128
PART = 32  # examples that torch.func takes at once, as many as a pass here
GROUPS = (1, 16)


def ours(network: Network, images: Tensor, labels: Tensor, group: int) -> Tensor:
    """``[n / group, d]``."""
    found = sample_gradients(
        network,
        Classification(),
        Data((images,), labels, "images"),
        mode="labels",
        generator=torch.Generator().manual_seed(0),
        progress=lambda *_: None,
        group=group,
    )
    assert isinstance(found, Tensor)
    return found


def loop(model: nn.Module, weights: Sequence[Tensor], images: Tensor, labels: Tensor, group: int) -> Tensor:
    """The same by a forward and a backward pass of each group."""
    rows = images.new_empty(len(images) // group, sum(weight.numel() for weight in weights))
    for number, (part, own) in enumerate(zip(images.split(group), labels.split(group), strict=True)):
        model.zero_grad()
        F.cross_entropy(model(part), own, reduction="sum").backward()  # type: ignore[no-untyped-call]
        rows[number] = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    return rows


def vectorised(model: nn.Module, names: Sequence[str], images: Tensor, labels: Tensor) -> Tensor:
    """The same by ``torch.func``, for single examples."""
    values = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values | weights, image.unsqueeze(0))
        return F.cross_entropy(output, label.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    weights, rows = {name: values[name] for name in names}, []
    for part, own in zip(images.split(PART), labels.split(PART), strict=True):
        found = gradients(weights, part, own)
        rows.append(torch.cat([found[name].flatten(1) for name in names], 1))
    return torch.cat(rows)


def apart(rows: Tensor, exact: Tensor) -> float:
    """The largest difference, of the largest entry."""
    return float((rows.double() - exact).abs().max() / exact.abs().max())


def measure(folder: Path, rounds: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The rows of the two tables."""
    checkpoint = folder / "cifar10" / "resnet20-12fca82f.th"
    model = load_source(checkpoint, f"{folder}/resnet_cifar.py:resnet20", None).module.requires_grad_(True)
    spec = f"{folder}/cifar.py:tensors('calib')"
    data = read_data(spec, "--data", mean=None, std=None, layout=None).first(EXAMPLES)
    images, labels = data.inputs[0], data.targets
    assert labels is not None
    network = open_network(trace_graph(model, (images[:2],)), device=CPU)
    names = list(network.weights)
    calls: dict[tuple[str, int], Callable[[Tensor, Tensor], Tensor]] = {}
    weights = [model.get_parameter(name) for name in names]
    for group in GROUPS:
        calls["here", group] = lambda x, y, group=group: ours(network, x, y, group)
        calls["autograd", group] = lambda x, y, group=group: loop(model, weights, x, y, group)
    calls["torch.func", 1] = lambda x, y: vectorised(model, names, x, y)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(cpu_time_s(lambda call=call: call(images, labels)))
    best = {key: 1e3 * min(values) / EXAMPLES for key, values in times.items()}
    double = copy.deepcopy(model).double()
    exact_weights = [double.get_parameter(name) for name in names]
    speeds, errors = [], []
    for (way, group), found in best.items():
        exact = loop(double, exact_weights, images[:CHECKED].double(), labels[:CHECKED], group)
        difference = apart(calls[way, group](images[:CHECKED], labels[:CHECKED]), exact)
        errors.append((f"rows of {group}, {way}", f"{difference:.1g}"))
        if way != "here":
            mine = best["here", group]
            speeds.append((f"rows of {group}, {way}", f"{mine:.2f} ms", f"{found:.2f} ms", f"{found / mine:.2f}x"))
    return speeds, errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    folder = data_folder("gradients")
    if folder is None:
        return
    torch.set_num_threads(1)
    keep_freed_memory()  # as every command does
    speeds, errors = measure(Path(folder), given.rounds)
    lines = [
        *machine(),
        "",
        f"ResNet-20, {EXAMPLES} images, one thread; processor time of an image, the best of {given.rounds} in turns.",
        "Rows of 16 are sums over 16 images. `autograd` is a forward and a backward pass of each row's images, and a",
        "copy of the weights' gradients; `torch.func` is `vmap(grad)`. Freed memory is kept, as all commands do.",
        "",
        table(("", "here", "other", "ratio"), speeds),
        table(("", "largest difference from float64, of the largest entry"), errors),
        *("```sh", "python -m tests.benchmarks.gradients --out docs/benchmarks.md", "```"),
    ]
    publish(given.out, TITLE, lines)


if __name__ == "__main__":
    main()
