"""Compare pruning methods on ResNet-20, one-shot: those of the package, and two that are written down here.

    HCOMPRESS_TEST_DATA=DIR python -m tests.benchmarks.pruning --out docs/benchmarks.md

Methods of the package go through the whole pipeline, and the figure is that of the written file in ONNX Runtime. The
peers are the plain ones: saliency ``w^2 F_ii`` with the diagonal of the empirical Fisher matrix of the same calibration
images, and the same with F the identity (magnitude); no weight moves. They are run in torch.
Cost: 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import pipeline, settings
from compress.data import Data, read_data
from compress.model import load_source

from .page import data_folder, machine, publish, table

TITLE = "Pruning methods: ResNet-20, one-shot"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
METHODS = ("layerwise", "obs")
PATTERNS = ("2:4",)
# Figures of others, of the same architecture on the same data; each with what it may not be compared by.
PUBLISHED = (
    (
        "Distiller, network surgery, 69.1 %",
        "91.43 % of 91.78 %",
        "trains for many epochs; IntelLabs/distiller, examples/network_surgery/README.md",
    ),
)


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress, for nobody."""


def pruned_accuracy(module: nn.Module, saliencies: Mapping[str, Tensor], sparsity: float, test: Data) -> float:
    """Percent, with the least salient weights of the whole network at zero."""
    weights = dict(module.named_parameters())
    kept = {name: weights[name].detach().clone() for name in saliencies}
    every = torch.cat([values.flatten() for values in saliencies.values()])
    least = every.kthvalue(max(1, round(sparsity * len(every)))).values
    assert test.targets is not None
    with torch.no_grad():
        for name, values in saliencies.items():
            weights[name].mul_(values > least)
        classes = torch.cat([module(part.inputs[0]).argmax(1) for part in test.batches(250)])
        for name, value in kept.items():
            weights[name].copy_(value)
    return 100 * float((classes == test.targets).double().mean())


def fisher_diagonal(module: nn.Module, names: Sequence[str], data: Data) -> dict[str, Tensor]:
    """Of the data's labels: the mean squared gradient, an example at a time."""
    weights = [dict(module.named_parameters())[name] for name in names]
    sums = [torch.zeros_like(weight) for weight in weights]
    assert data.targets is not None
    for number in range(len(data)):
        part = slice(number, number + 1)
        loss = F.cross_entropy(module(data.inputs[0][part]), data.targets[part])
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.square()
    return {name: total / len(data) for name, total in zip(names, sums, strict=True)}


def of_the_package(folder: str, method: str, goal: Mapping[str, str], seeds: Sequence[int]) -> str:
    """Mean accuracy of the written files, and the standard deviation over seeds."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as out:
            flags = {
                "model": f"{folder}/resnet_cifar.py:resnet20",
                "data": f"{folder}/cifar.py:tensors('calib')",
                "eval": f"{folder}/cifar.py:tensors('test')",
                **{"method": method, "seed": str(seed), "threads": "1", "out": f"{out}/run"},
                **goal,
            }
            report = pipeline.run_method(
                "prune",
                Path(folder, "cifar10/resnet20-12fca82f.th"),
                settings.resolve(flags, environment={}, folder=None),
                **{"force": False, "dry_run": False, "plan": None, "command": [], "progress": quiet},
            )
        found.append(float(report["metric"]["compressed"]))
        print(f"{method} {dict(goal)}, seed {seed}: {found[-1]:.2f}", file=sys.stderr)
    return _shown(found)


def _shown(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = data_folder("pruning methods")
    if folder is None:
        return
    calibration, test = (
        read_data(f"{folder}/cifar.py:tensors({split!r})", "--data", mean=None, std=None, layout=None)
        for split in ("calib", "test")
    )
    source = load_source(Path(folder, "cifar10/resnet20-12fca82f.th"), f"{folder}/resnet_cifar.py:resnet20", None)
    module = source.module.eval().requires_grad_(True)
    weights = {name: p.detach() for name, p in module.named_parameters() if p.dim() > 1}
    sampled = [calibration.sample(512, seed) for seed in given.seeds]
    diagonals = [fisher_diagonal(module, list(weights), data) for data in sampled]
    rows = [("magnitude", *(f"{_by_size(module, weights, s, test):.2f}" for s in SPARSITIES))]
    of_fisher = [
        [pruned_accuracy(module, {n: w.square() * d[n] for n, w in weights.items()}, s, test) for d in diagonals]
        for s in SPARSITIES
    ]
    rows.append(("diagonal Fisher", *map(_shown, of_fisher)))
    for method in METHODS:
        cells = [of_the_package(folder, method, {"sparsity": str(s)}, given.seeds) for s in SPARSITIES]
        rows.append((f"`{method}`", *cells))
    patterns = [
        (f"`{method}`, `--pattern {pattern}`", of_the_package(folder, method, {"pattern": pattern}, given.seeds))
        for method in METHODS
        for pattern in PATTERNS
    ]
    text = [
        *machine(),
        "",
        f"Accuracy in percent on {len(test):,} test images, dense 91.73; 512 calibration images, no training; mean and",
        f"standard deviation of {len(given.seeds)} seeds. `layerwise` and `obs` are measured on model.onnx.",
        "",
        table(("method", *(f"sparsity {s:g}" for s in SPARSITIES)), rows),
        table(("pattern", "accuracy"), patterns),
        "What others report of ResNet-20 on CIFAR-10:",
        "",
        table(("", "accuracy", "but"), PUBLISHED),
        "```sh",
        "python -m tests.benchmarks.pruning --out docs/benchmarks.md",
        "```",
    ]
    publish(given.out, TITLE, text)


def _by_size(module: nn.Module, weights: Mapping[str, Tensor], sparsity: float, test: Data) -> float:
    return pruned_accuracy(module, {name: weight.abs() for name, weight in weights.items()}, sparsity, test)


if __name__ == "__main__":
    main()
