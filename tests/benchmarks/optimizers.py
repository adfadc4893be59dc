"""Compare the second-order optimizers with SGD: ResNet-20 with most weights at zero, trained on for a few steps.

    HCOMPRESS_TEST_DATA=DIR python -m tests.benchmarks.optimizers --train train.npz --out docs/benchmarks.md

All start from the same network, see the same batches of a seed, and are tried at the same multiples of their own
learning rate. Masks are held, the loss is the labels' alone, the learning rate falls along a cosine.
Cost: 45 trainings of 250 steps, 3 to 6 hours of one core, minutes with --device cuda; --steps, --seeds, --multiples and
--num-eval make it less. The time of a step is the processor's in any case, of the first few.
"""

from __future__ import annotations

import argparse
import copy
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
from compress.train.batches import training_batches
from compress.train.optimizers import RATES, make_optimizer

from .page import machine, put_section, table

NAMES = ("sgd", "adahessian", "mfac")
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="training data; the calibration images where not given")
    parser.add_argument("--optimizers", nargs="+", default=NAMES, choices=tuple(RATES))
    parser.add_argument("--multiples", nargs="+", type=float, default=MULTIPLES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--num-eval", type=int, default=10_000)
    parser.add_argument("--device", type=torch.device, default=CPU)
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
    rows = []
    for name in given.optimizers:
        settings = {"steps": given.steps, "batch": given.batch}
        _, times = trained(start, masks, data, name, RATES[name], seed=0, device=CPU, stop=TIMED, **settings)
        cells = []
        for multiple in given.multiples:
            found = []
            for seed in range(given.seeds):
                lr = multiple * RATES[name]
                module, _ = trained(start, masks, data, name, lr, seed=seed, device=given.device, **settings)
                found.append(accuracy(module, test, given.device))
            print(f"{name} x {multiple:g}: {found}", file=sys.stderr)
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}")
        rows.append((f"`{name}`, {RATES[name]:g}", *cells, f"{statistics.median(times):.2f} s"))
    head = ("optimizer, learning rate", *(f"x {multiple:g}" for multiple in given.multiples), "CPU time of a step")
    command = " ".join(
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in vars(given).items()
        if key not in ("train", "out") and value != parser.get_default(key)
    )
    text = [
        *machine(),
        "",
        f"Test accuracy in percent after {given.steps} steps of {given.batch} images, with crops and flips of "
        f"{len(data):,} training images; mean and standard deviation of {given.seeds} seeds, {len(test):,} test "
        f"images. "
        f"The start has {given.sparsity:.0%} of its weights at zero, by magnitude: {before:.2f} %.",
        "",
        table(head, rows),
        "```sh",
        f"python -m tests.benchmarks.optimizers --train train.npz {command}".strip(),
        "```",
    ]
    print("\n".join(text))
    if given.out is not None:
        put_section(given.out, TITLE, "\n".join(text))


if __name__ == "__main__":
    main()
