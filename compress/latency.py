"""What each layer costs in time at each bit width, fitted to whole networks that were timed in turns in ONNX Runtime.

Kernels of one network can't be summed: profiling slows them, fusion renames them, and what a float layer costs beside
integer ones is mostly the conversions at its borders. So the network is timed with all layers as integers, and with
a few random shares of them as floats. What each layer adds as a float follows by least squares, drawn towards a share
by multiply-accumulates.

Conversions fall where integer and float layers meet, which no sum over layers says. On 34 other mixtures of ResNet-20
the sum was 5 % off at the median and 10 % at the 90th percentile, on 37 of the demo's network 7 and 13 %. It is exact
with all layers as integers, and 11 and 23 % too long with none, which needs no table.

Cost: ``NUM_MIXTURES + 1`` networks are built, loaded and timed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from . import cache, canonical
from .bench import measure_latency
from .context import Progress
from .frontier import FLOAT_BITS
from .graph.trace import Graph, Layer
from .sensitivity import CostTable, cost_table_from
from .verify import open_session

KIND = "latency"
NUM_MIXTURES = 8
FLOAT_SHARES = (0.5, 0.25, 0.75)  # of the layers of a mixture, in turns
RIDGE = 0.3  # a layer may leave its share of the multiply-accumulates about this reluctantly; 0.1 to 1 predict alike
REPEATS = 40
MAX_TIME_S = 60.0
Build = Callable[[Mapping[str, int]], bytes]
Array = NDArray[np.float64]


def latency_table(
    build: Build,
    layers: Sequence[Layer],
    widths: Sequence[int],
    inputs: tuple[Tensor, ...],
    *,
    threads: int,
    integer_activations: bool,
    progress: Progress,
) -> CostTable:
    """Milliseconds of one call: ``fixed``, and what each layer adds at each width.

    All integer widths cost the same, as they are unpacked into the same kernels when the file is loaded. With float
    activations every width becomes floats there, and nothing is added.

    Args:
        build: The ONNX file with the layers at these bits, by tensor; 32 for floats. It is given every layer.
        layers: Those that have a choice.
        widths: Of the entries; 2 to 8, and 32.
        inputs: What is timed: one example of each input as a rule.
    """
    integer = max((bits for bits in widths if bits < FLOAT_BITS), default=FLOAT_BITS)
    mixtures = _mixtures(len(layers)) if integer_activations and integer < FLOAT_BITS else []
    sessions = {}
    for done, floats in enumerate([(), *mixtures]):
        progress("build for latency", done, 1 + len(mixtures))
        choice = {layer.tensor: FLOAT_BITS if i in floats else integer for i, layer in enumerate(layers)}
        sessions[str(done)] = open_session(build(choice), threads)
    timed = measure_latency(sessions, inputs, REPEATS, progress, max_time_s=MAX_TIME_S)
    whole, *mixed = (latency.median for latency in timed.values())
    added = _added_by_floats(mixtures, np.array(mixed), whole, np.array([float(layer.macs) for layer in layers]))
    # A layer that is slower as integers costs nothing as floats: entries are never negative.
    entries = {
        (layer.tensor, str(bits)): max(0.0, float(extra) if bits == FLOAT_BITS else -float(extra))
        for layer, extra in zip(layers, added, strict=True)
        for bits in widths
    }
    return CostTable("latency", entries, whole - float(np.maximum(-added, 0).sum()))


def _mixtures(num_layers: int) -> list[tuple[int, ...]]:
    """Which layers are floats in each mixture; the same for the same number of layers."""
    generator = np.random.default_rng(0)
    drawn = []
    for i in range(NUM_MIXTURES if num_layers else 0):
        size = max(1, round(num_layers * FLOAT_SHARES[i % len(FLOAT_SHARES)]))
        drawn.append(tuple(sorted(generator.permutation(num_layers)[:size].tolist())))
    return list(dict.fromkeys(drawn))


def _added_by_floats(mixtures: Sequence[tuple[int, ...]], mixed: Array, whole: float, macs: Array) -> Array:
    """Milliseconds that each layer adds where it is a float, shape ``[l]``.

    Ridge regression of the relative error: ``|X (p + s u) - (mixed - whole)|^2 / mixed^2 + RIDGE^2 |u|^2`` over ``u``,
    with ``X`` the mixtures, ``p`` the multiply-accumulates scaled to fit best, and ``s`` the size of a layer.
    """
    if not mixtures:
        return np.zeros(len(macs))
    is_float = np.array([[float(i in floats) for i in range(len(macs))] for floats in mixtures])
    even = np.full(len(macs), 1 / len(macs))
    share = macs / macs.sum() if macs.sum() else even
    rows, target = is_float / mixed[:, None], 1 - whole / mixed
    slope = rows @ share
    prior = share * (slope @ target) / (slope @ slope)
    size = mixed.mean() * (share + even) / 2
    moved = np.linalg.lstsq(
        np.vstack([rows * size, RIDGE * np.eye(len(macs))]),
        np.concatenate([target - rows @ prior, np.zeros(len(macs))]),
    )[0]
    return np.asarray(prior + size * moved)


def cached_latency_table(
    build: Build,
    graph: Graph,
    layers: Sequence[Layer],
    widths: Sequence[int],
    inputs: tuple[Tensor, ...],
    *,
    threads: int,
    activations: str,
    notes: list[str],
    progress: Progress,
) -> CostTable:
    """``latency_table``, read from the cache where a network of this structure was timed on this machine before.

    Args:
        graph: The network that ``layers`` are of.
        activations: Their bits, or ``float``.
        notes: Gets a sentence where the cache was damaged or can't be written.
    """
    key = _key(graph, layers, widths, inputs, threads=threads, activations=activations)
    found = cache.read(KIND, key, notes)
    if found is not None:
        progress("latency from the cache", 1, 1)
        return cost_table_from(found[0], "the cached latency")
    is_integer = activations != "float"
    table = latency_table(
        build, layers, widths, inputs, threads=threads, integer_activations=is_integer, progress=progress
    )
    cache.write(KIND, key, table.to_json(), notes=notes)
    return table


def _key(
    graph: Graph,
    layers: Sequence[Layer],
    widths: Sequence[int],
    inputs: tuple[Tensor, ...],
    *,
    threads: int,
    activations: str,
) -> dict[str, Any]:
    """All that a table depends on: the machine, the programs and the network's structure, but no weight."""
    return {
        "cpu": cpu_name(),
        "num_processors": os.cpu_count(),
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "ops": [str(node.target) for node in graph.program.graph.nodes if node.op == "call_function"],
        "network": canonical.plain(graph.layers),
        "layers": [layer.tensor for layer in layers],
        "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype)} for x in inputs],
        "widths": list(widths),
        "activations": activations,
        **cache.versions(),
    }


def cpu_name() -> str:
    """The processor's model, as Linux names it where it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
