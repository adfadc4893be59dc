"""Compare the second-order optimizers with SGD: ResNet-20 with most weights at zero, trained on for a few steps.

    HCOMPRESS_TEST_DATA=DIR python -m tests.benchmarks.optimizers --train train.npz --out docs/benchmarks.md

All start from the same network, see the same batches of a seed, and are tried at the same learning rates. Masks are
held, the loss is the labels' alone, the learning rate falls along a cosine. Every training that ends is a line of
--cells, and one that is there already is not made again: stop it at any time, or run the seeds beside each other.
Cost: 45 trainings of 250 steps, 2 hours of one core, minutes with --device cuda. The time of a step is the processor's
in any case, of a few steps of each in one process.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data import Data, read_data
from compress.model import load_source
from compress.train import optimizers
from compress.train.batches import training_batches
from compress.train.optimizers import make_optimizer

from .page import machine, publish, table

NAMES = ("sgd", "adahessian", "mfac")
RATES = (0.015, 0.03, 0.06, 0.12, 0.24)
TITLE = "Optimizers: ResNet-20 from a pruned start"
CLIP = 5.0  # norm of the gradient, as in recovery
CPU = torch.device("cpu")
TIMED = 10  # steps whose processor time is taken


def pruned(module: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Zero the smallest weights in place; masks of those that stay."""
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    sizes = torch.cat([p.detach().abs().flatten() for p in weights.values()])
    least = sizes.kthvalue(max(1, round(sparsity * len(sizes)))).values
    masks = {name: p.detach().abs() > least for name, p in weights.items()}
    with torch.no_grad():
        for name, p in weights.items():
            p.mul_(masks[name])
    return masks


def trained(
    start: nn.Module,
    masks: dict[str, Tensor],
    data: Data,
    name: str,
    lr: float,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: torch.device,
    stop: int | None = None,
) -> tuple[nn.Module, list[float]]:
    """A copy that was trained on, for ``stop`` of the steps, and the processor time of each step in seconds."""
    module = copy.deepcopy(start).to(device).train()
    optimizer = make_optimizer(name, module.parameters(), lr)
    batches = training_batches(data, batch, augment=("crop", "flip"), seed=seed, device=device)
    weights, spent = dict(module.named_parameters()), list[float]()
    masks = {key: mask.to(device) for key, mask in masks.items()}
    for number in range(steps if stop is None else stop):
        examples = batches.at(number)
        assert examples.targets is not None
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * number / steps))
        optimizer.zero_grad(set_to_none=True)
        needs_graph = bool(getattr(optimizer, "needs_graph", False))
        loss = F.cross_entropy(module(*examples.inputs), examples.targets)
        torch.autograd.backward(loss, create_graph=needs_graph)
        if not needs_graph:
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for key, mask in masks.items():
                weights[key].mul_(mask)
        spent.append(time.process_time() - began)
    return module.eval(), spent


@torch.no_grad()
def accuracy(module: nn.Module, data: Data, device: torch.device) -> float:
    """Percent."""
    assert data.targets is not None
    parts = [
        module(*(x[i : i + 500].to(device) for x in data.inputs)).argmax(1).cpu() for i in range(0, len(data), 500)
    ]
    right = int((torch.cat(parts) == data.targets).sum())
    return 100 * right / len(data)


def read_cells(path: Path, settings: dict[str, float]) -> dict[tuple[str, float, int], float]:
    """Accuracies of the trainings that were made with these settings, by optimizer, learning rate and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [json.loads(line) for line in lines]
    return {
        (cell["optimizer"], cell["lr"], cell["seed"]): cell["accuracy"]
        for cell in cells
        if {key: cell[key] for key in settings} == settings
    }


def summary(name: str, cells: dict[tuple[str, float, int], float], rates: Sequence[float]) -> list[tuple[float, str]]:
    """Mean accuracy of each learning rate, and its text with the standard deviation over the seeds."""
    found = []
    for lr in rates:
        values = [accuracy for (optimizer, rate, _), accuracy in cells.items() if (optimizer, rate) == (name, lr)]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        found.append((statistics.mean(values), f"{statistics.mean(values):.2f}{spread}"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="training data; the calibration images where not given")
    parser.add_argument("--optimizers", nargs="+", default=NAMES, choices=tuple(optimizers.RATES))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--num-eval", type=int, default=10_000)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--cells", type=Path, default=Path("optimizers.jsonl"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
    folder = os.environ["HCOMPRESS_TEST_DATA"]
    calibration, test = (
        read_data(f"{folder}/cifar.py:tensors({split!r})", "--data", mean=None, std=None, layout=None)
        for split in ("calib", "test")
    )
    data = calibration if given.train is None else read_data(given.train, "--train", mean=None, std=None, layout=None)
    test = test.every(max(1, len(test) // given.num_eval))
    start = load_source(Path(folder, "cifar10/resnet20-12fca82f.th"), f"{folder}/resnet_cifar.py:resnet20", None).module
    start.requires_grad_(True)
    masks = pruned(start, given.sparsity)
    before = accuracy(start, test, CPU)
    print(f"before: {before:.2f} %", file=sys.stderr)
    training = {"steps": given.steps, "batch": given.batch}
    settings = {**training, "sparsity": given.sparsity, "num_train": len(data), "num_eval": len(test)}
    # All of one seed first, so that what is there after a while is a comparison.
    for seed, lr, name in itertools.product(given.seeds, given.rates, given.optimizers):
        if (name, lr, seed) in read_cells(given.cells, settings):
            continue
        module, _ = trained(start, masks, data, name, lr, seed=seed, device=given.device, **training)
        found = accuracy(module, test, given.device)
        with given.cells.open("a") as file:
            file.write(json.dumps({"optimizer": name, "lr": lr, "seed": seed, "accuracy": found, **settings}) + "\n")
        print(f"{name}, {lr:g}, seed {seed}: {found:.2f}", file=sys.stderr)
    cells = {key: value for key, value in read_cells(given.cells, settings).items() if key[2] in given.seeds}
    times = {
        name: statistics.median(
            trained(start, masks, data, name, given.rates[0], seed=0, device=CPU, stop=TIMED, **training)[1]
        )
        for name in given.optimizers
    }
    rows, best = [], {}
    for name in given.optimizers:
        found_of = summary(name, cells, given.rates)
        best[name] = max(mean for mean, _ in found_of)
        ratio = times[name] / times[given.optimizers[0]]
        rows.append((f"`{name}`", *(text for _, text in found_of), f"{times[name]:.2f} s", f"{ratio:.2f}x"))
    first, *others = given.optimizers
    against = [f"`{name}` {best[name] - best[first]:+.2f} points" for name in others]
    head = ("optimizer", *(f"lr {rate:g}" for rate in given.rates), "CPU time of a step", f"of {first}")
    command = " ".join(
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in vars(given).items()
        if key not in ("train", "out", "cells") and value != parser.get_default(key)
    )
    text = [
        *machine(),
        "",
        f"Test accuracy in percent after {given.steps} steps of {given.batch} images, with crops and flips of "
        f"{len(data):,} training images; mean and standard deviation of {len(given.seeds)} seeds, {len(test):,} test "
        f"images. The start has {given.sparsity:.0%} of its weights at zero, by magnitude: {before:.2f} %. "
        f"Each at its best learning rate, against `{first}` at its: {', '.join(against)}.",
        "",
        table(head, rows),
        "```sh",
        f"python -m tests.benchmarks.optimizers --train train.npz {command}".strip(),
        "```",
    ]
    publish(given.out, TITLE, text)


if __name__ == "__main__":
    main()
