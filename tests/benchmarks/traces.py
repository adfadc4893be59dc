"""Measure traces of every layer of ResNet-20: Gauss-Newton probes against a Hutchinson run for each layer.

    HCOMPRESS_TEST_DATA=DIR python -m tests.benchmarks.traces --out docs/benchmarks.md

The peer is straightforward: for each layer random signs, a forward pass, a gradient with its graph and a product, until
the standard error is 5 %. ResNet-20 with fixed batch norms is piecewise linear in each layer's weights, so that the
exact traces of its Hessian's blocks are the Gauss-Newton ones of as many probes as classes; a Hutchinson run agrees.
Cost: half an hour of one core; --rtol 0.1 needs a quarter of it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.curvature.network import Network, open_network
from compress.curvature.traces import CONTROLLED, ggn_traces, hessian_traces
from compress.data import Data, read_data
from compress.graph.trace import trace_graph
from compress.model import load_source
from compress.numerics.ranks import spearman
from compress.numerics.trace import ESTIMATORS, TraceEstimate
from compress.task import Classification

from .page import data_folder, machine, publish, table

TITLE = "Traces of every layer"
PARTS = ("layers", "estimators")
CPU = torch.device("cpu")
FEWEST = 8  # probes before the peer believes its standard error
RELEVANT = 0.01  # of the whole trace: layers whose errors are compared
PRODUCTS = 30  # of a layer, for the estimators of the exact Hessian


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress, for nobody."""


def hutchinson_of_a_layer(
    module: nn.Module, weight: nn.Parameter, images: Tensor, labels: Tensor, *, rtol: float, most: int
) -> tuple[float, float, int]:
    """Mean, standard error and number of probes, each with passes of its own."""
    values: list[float] = []
    generator = torch.Generator().manual_seed(0)
    while True:
        signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) * 2 - 1
        loss = F.cross_entropy(module(images), labels)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        (product,) = torch.autograd.grad(gradient, weight, signs)
        values.append(float((product * signs).sum()))
        if len(values) < FEWEST:
            continue
        error = statistics.stdev(values) / math.sqrt(len(values))
        if error <= rtol * abs(statistics.mean(values)) or len(values) == most:
            return statistics.mean(values), error, len(values)


def worst(found: Mapping[str, TraceEstimate], exact: Mapping[str, float]) -> float:
    """The largest relative error of a layer with more than ``RELEVANT`` of the whole trace."""
    total = sum(exact.values())
    return max(abs(found[n].mean / value - 1) for n, value in exact.items() if value > RELEVANT * total)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--estimators", nargs="+", default=(*ESTIMATORS, CONTROLLED))
    parser.add_argument("--rtol", type=float, default=0.05)
    parser.add_argument("--num-examples", type=int, default=64)
    parser.add_argument("--most", type=int, default=2000, help="probes of a layer that the peer ends at")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = data_folder("traces")
    if folder is None:
        return
    data = read_data(f"{folder}/cifar.py:tensors('calib')", "--data", mean=None, std=None, layout=None)
    data = data.first(given.num_examples)
    module = load_source(
        Path(folder, "cifar10/resnet20-12fca82f.th"), f"{folder}/resnet_cifar.py:resnet20", None
    ).module.eval()
    network = open_network(trace_graph(module, (data.inputs[0][:2],)), device=CPU)
    names = [layer.tensor for layer in network.layers]

    text = [
        *machine(),
        "",
        f"ResNet-20, {given.num_examples} images, one thread, processor time. Ratios are of one process; tables may be",
        "of different ones (--parts). Errors are the largest of the layers with over 1 % of the whole trace.",
        "",
    ]
    exact = {name: e.mean for name, e in gauss_newton(network, data, 0.0, (0,))[0][0].items()}
    if "layers" in given.parts:
        ours, spent = gauss_newton(network, data, given.rtol, given.seeds)
        theirs, their_s = per_layer(module, names, data, rtol=given.rtol, most=given.most)
        rho = spearman([exact[n] for n in names], [theirs[n][0] for n in names])
        rhos = [spearman([found[n].mean for n in names], [exact[n] for n in names]) for found in ours]
        late = sum(error > given.rtol * abs(mean) for mean, error, _ in theirs.values())
        probes = [count for _, _, count in theirs.values()]
        not_done = f"{late} layers ended at {given.most} probes before that." if late else ""
        worst_of_peer = worst({n: TraceEstimate(*v) for n, v in theirs.items()}, exact)
        text += [
            f"To a standard error of {given.rtol:.0%} in every layer: **{their_s / spent:.0f} times** less.",
            f"{not_done} Spearman's rho with the exact traces: of the probes' {min(rhos):.3f} or more",
            f"over {len(given.seeds)} seeds, of the Hutchinson run's {rho:.3f}.",
            "",
            table(
                ("", "CPU time", "worst error"),
                [
                    (
                        "Gauss-Newton probes, all layers at once",
                        f"{spent:.2f} s",
                        f"{max(worst(f, exact) for f in ours):.1%}",
                    ),
                    (
                        f"Hutchinson, a run a layer: {min(probes)} to {max(probes)} probes",
                        f"{their_s:.0f} s",
                        f"{worst_of_peer:.1%}",
                    ),
                ],
            ),
        ]
    if "estimators" in given.parts:
        products = {CONTROLLED: FEWEST}
        rows = [
            estimator_row(network, data, name, products.get(name, PRODUCTS), given.seeds, exact)
            for name in given.estimators
        ]
        text += [
            f"Estimators of the exact Hessian's traces, {len(given.seeds)} seeds:",
            "",
            table(("`--estimator`", "products a layer", "CPU time", "worst error of each seed"), rows),
        ]
    text += ["```sh", "python -m tests.benchmarks.traces --out docs/benchmarks.md", "```"]
    publish(given.out, TITLE, text)


def gauss_newton(
    network: Network, data: Data, rtol: float, seeds: Sequence[int]
) -> tuple[list[dict[str, TraceEstimate]], float]:
    """The traces of each seed, and the median processor time."""
    found, times = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        start = time.process_time()
        found.append(
            ggn_traces(network, Classification(), data, rtol=rtol, max_passes=100, generator=generator, progress=quiet)
        )
        times.append(time.process_time() - start)
    return found, statistics.median(times)


def per_layer(
    module: nn.Module, names: Sequence[str], data: Data, *, rtol: float, most: int
) -> tuple[dict[str, tuple[float, float, int]], float]:
    """The peer's traces, and its processor time."""
    weights = dict(module.named_parameters())
    assert data.targets is not None
    start, found = time.process_time(), {}
    for name in names:
        module.requires_grad_(False)
        weights[name].requires_grad_(True)
        found[name] = hutchinson_of_a_layer(module, weights[name], data.inputs[0], data.targets, rtol=rtol, most=most)
        print(f"{name}: {found[name]}", file=sys.stderr)
    return found, time.process_time() - start


def estimator_row(
    network: Network, data: Data, name: str, products: int, seeds: Sequence[int], exact: Mapping[str, float]
) -> tuple[str, ...]:
    """Processor time and worst error of each seed."""
    times, errors = [], []
    for seed in seeds:
        start = time.process_time()
        found = hessian_traces(
            network,
            Classification(),
            data,
            estimator=name,
            rtol=0.0,
            max_probes=products,
            generator=torch.Generator().manual_seed(seed),
            progress=quiet,
        )
        times.append(time.process_time() - start)
        errors.append(worst(found, exact))
    print(f"{name}: {errors}", file=sys.stderr)
    return (
        f"`{name}`",
        str(products),
        f"{statistics.median(times):.0f} s",
        ", ".join(f"{error:.1%}" for error in errors),
    )


if __name__ == "__main__":
    main()
