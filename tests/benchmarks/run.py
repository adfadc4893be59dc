"""Measure the methods through the whole pipeline and the parts that set its speed, and write docs/benchmarks.md.

    python -m tests.benchmarks.run --out docs/benchmarks.md

The network that ships with the package always; ResNet-20 and BabyLlama too where HCOMPRESS_TEST_DATA names their
folder.
Cost: about 1 minute, about 5 minutes with the real checkpoints, on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import pipeline, settings
from compress.bench import measure_latency
from compress.formats import planes
from compress.formats.checkpoint import read_checkpoint
from compress.verify import open_session

from .page import machine, put_section, sections, table

NUM_LEVELS = 4_000_000
NUM_LOADS = 15
NUM_RATES = 5
LATENCY_REPEATS = 100


@dataclass(frozen=True, slots=True)
class Network:
    """A checkpoint with its data, as a user names them.

    Attributes:
        shown: The checkpoint and its flags in a command line that anybody can run.
        flags: The same as settings.
    """

    name: str
    checkpoint: Path
    shown: str
    flags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Case:
    """One run: ``job`` with ``flags``, on the checkpoint or on the run called ``after``."""

    name: str
    job: str
    flags: Mapping[str, str]
    after: str | None = None


UNIFORM = {"method": "uniform"}
PRUNE = Case("magnitude, sparsity 0.5", "prune", {"method": "magnitude", "sparsity": "0.5"})
INT8 = Case("uniform, 8 bits, 8-bit activations", "quantize", UNIFORM | {"budget": "8bit", "activations": "8"})
BITS8 = Case("uniform, 8 bits, float activations", "quantize", UNIFORM | {"budget": "8bit", "activations": "float"})
BITS4 = Case("uniform, 4 bits, float activations", "quantize", UNIFORM | {"budget": "4bit", "activations": "float"})
LAYERWISE = Case("layerwise, sparsity 0.5", "prune", {"method": "layerwise", "sparsity": "0.5"})
LAYERWISE8 = Case("layerwise, sparsity 0.8", "prune", {"method": "layerwise", "sparsity": "0.8"})
OBS = Case("obs, sparsity 0.5", "prune", {"method": "obs", "sparsity": "0.5"})
OBS7 = Case("obs, sparsity 0.7", "prune", {"method": "obs", "sparsity": "0.7"})
MAGNITUDE7 = Case("magnitude, sparsity 0.7", "prune", {"method": "magnitude", "sparsity": "0.7"})
OURS8 = Case("output-change, 8 bits on average, 8-bit activations", "quantize", {"budget": "8bit", "activations": "8"})
OURS48 = Case("output-change, 4 bits on average, 8-bit activations", "quantize", {"budget": "4bit", "activations": "8"})
OURS44 = Case("output-change, 4 bits on average, 4-bit activations", "quantize", {"budget": "4bit", "activations": "4"})
OURS4 = Case(
    "output-change, 4 bits on average, float activations", "quantize", {"budget": "4bit", "activations": "float"}
)
OURS3 = Case(
    "output-change, 3 bits on average, float activations", "quantize", {"budget": "3bit", "activations": "float"}
)
BITS3 = Case("uniform, 3 bits, float activations", "quantize", UNIFORM | {"budget": "3bit", "activations": "float"})
HALF = {"method": "structured-obs", "budget": "macs=50%"}
TRAINING = {"recover_steps": "250", "augment": "crop,flip"}
STRUCTURED = Case("structured-obs, half the MACs", "prune", HALF)
RECOVERED = Case(f"{STRUCTURED.name}, 250 steps", "prune", HALF | TRAINING)
HESSO = Case("hesso, half the MACs, 250 steps", "prune", HALF | TRAINING | {"method": "hesso"})
BOTH = Case(f"{PRUNE.name}; then {INT8.name}", INT8.job, INT8.flags, after=PRUNE.name)


def networks(data: str | None) -> Iterator[tuple[Network, tuple[Case, ...]]]:
    """What is measured: each network with its cases."""
    folder = Path(str(resources.files("compress.demo")))
    arrays = {"data": "calibration.npz", "eval": "evaluation.npz"}
    model = {"model": "compress.demo.network:fashion_net", "mean": "0.286", "std": "0.353"}
    shown = f"fashion_net.safetensors {_flags(model | arrays)}"
    flags = model | {name: str(folder / file) for name, file in arrays.items()}
    demo = Network("FashionNet (ships with the package)", folder / "fashion_net.safetensors", shown, flags)
    yield demo, (PRUNE, LAYERWISE, OBS, STRUCTURED, INT8, OURS8, BITS4, OURS4, BOTH)
    if data is None:
        return
    parts = (
        ("ResNet-20, CIFAR-10", "cifar10/resnet20-12fca82f.th", "resnet_cifar.py:resnet20", "cifar.py:tensors", "test"),
        ("BabyLlama", "babyllama/babyllama.safetensors", "babyllama.py:babyllama", "babyllama.py:windows", "eval"),
    )
    cut = (STRUCTURED, RECOVERED, HESSO)
    cases = (
        (PRUNE, LAYERWISE, MAGNITUDE7, OBS7, LAYERWISE8, *cut, INT8, OURS8, OURS48, OURS44, BITS4, OURS4, BITS3, OURS3),
        (BITS8, OURS4),
    )
    for (name, file, factory, function, split), chosen in zip(parts, cases, strict=True):
        named = {"model": factory, "data": f"{function}('calib')", "eval": f"{function}('{split}')"}
        flags = {key: str(Path(data) / value) for key, value in named.items()}
        shown = f"$DATA/{file} {_flags({key: f'$DATA/{value}' for key, value in named.items()})}"
        yield Network(name, Path(data) / file, shown, flags), chosen


def _flags(flags: Mapping[str, str]) -> str:
    # The shell expands $DATA between double quotes only.
    quoted = {key: f'"{value}"' if "(" in value else value for key, value in flags.items()}
    return " ".join(f"{settings.BY_NAME[key].flag} {value}" for key, value in quoted.items())


def _quiet(stage: str, done: int, total: int | None) -> None:
    """The pipeline's progress; nobody watches a benchmark."""


def measure_network(network: Network, cases: Sequence[Case], folder: Path) -> list[str]:
    """A section of the page: figures, load times and the commands that make the run folders again."""
    runs: dict[str, tuple[Path, dict[str, Any]]] = {}
    commands = []
    for number, case in enumerate(cases):
        out = folder / f"run{number}"
        source = network.checkpoint if case.after is None else runs[case.after][0]
        flags = {**network.flags, **case.flags, "threads": "1", "out": str(out)}
        chosen = settings.resolve(flags, environment={}, folder=None)
        report = pipeline.run_method(
            case.job, source, chosen, force=False, dry_run=False, plan=None, command=[], progress=_quiet
        )
        runs[case.name] = (out, report)
        first = network.shown if case.after is None else network.shown.replace(network.shown.split()[0], source.name, 1)
        commands.append(f"hcompress {case.job} {first} {_flags(case.flags)} --threads 1 --out {out.name}")
    rows = _figure_rows(runs, {case.name: case.after for case in cases})
    return [
        f"## {network.name}\n",
        table(("model", "metric", "model.onnx", "model.safetensors", "latency", "of dense", "load"), rows),
        "```sh",
        *commands,
        "```\n",
    ]


def _figure_rows(
    runs: Mapping[str, tuple[Path, dict[str, Any]]], after: Mapping[str, str | None]
) -> list[tuple[str, ...]]:
    first, report = next(iter(runs.values()))
    plain = read_checkpoint(first / "model.pt2").program
    assert plain is not None and plain.example_inputs is not None
    inputs = tuple(x[:1] for x in plain.example_inputs[0])
    models = {"dense": first / "dense.onnx", **{name: run / "model.onnx" for name, (run, _) in runs.items()}}
    loads = load_times_ms(models)
    rows = []
    for name, path in models.items():
        metric = (report if name == "dense" else runs[name][1])["metric"]
        value = metric["dense"] if name == "dense" else metric["compressed"]
        weights = path.with_name("model.safetensors")
        # In turns with the dense model: a busy machine slows both alike.
        sessions = {side: open_session(file, 1) for side, file in (("dense", models["dense"]), ("this", path))}
        latency = measure_latency(sessions, inputs, LATENCY_REPEATS, _quiet)
        rows.append(
            (
                name,
                f"{value:.4f} {metric['unit']}" if metric["unit"] != "%" else f"{value:.2f} %",
                f"{path.stat().st_size:,} B",
                "" if name == "dense" else f"{weights.stat().st_size:,} B",
                f"{latency['this'].median:.3g} ms ({latency['this'].p10:.3g} to {latency['this'].p90:.3g})",
                f"{latency['this'].median / latency['dense'].median:.2f}x",
                f"{loads[name]:.1f} ms",
            )
        )
    return rows


def load_times_ms(models: Mapping[str, Path]) -> dict[str, float]:
    """Median time to open each file in ONNX Runtime, in turns; unpacking is a part of it."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(NUM_LOADS):
        for name, path in models.items():
            samples[name].append(_time_s(lambda path=path: open_session(path, 1)) * 1e3)
    return {name: float(np.median(values)) for name, values in samples.items()}


def _time_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plane_rates() -> list[str]:
    """The section on bit planes: millions of levels a second, numpy's own packing of single bits beside them."""
    generator = np.random.default_rng(0)
    rows = []
    for bits in range(1, 9):
        levels = generator.integers(0, 1 << bits, NUM_LEVELS, dtype=np.uint8)
        packed = planes.pack(levels, bits)
        pack = _rate(lambda levels=levels, bits=bits: planes.pack(levels, bits))
        unpack = _rate(lambda packed=packed, bits=bits: planes.unpack(packed, bits, NUM_LEVELS))
        rows.append((f"{bits} bit{'s' if bits > 1 else ''}", f"{pack:.0f}", f"{unpack:.0f}", f"{packed.size:,} B"))
    ones = generator.integers(0, 2, NUM_LEVELS, dtype=np.uint8)
    packed = np.packbits(ones, bitorder="little")
    pack = _rate(lambda: np.packbits(ones, bitorder="little"))
    unpack = _rate(lambda: np.unpackbits(packed, bitorder="little"))
    rows.append(("1 bit, numpy.packbits", f"{pack:.0f}", f"{unpack:.0f}", f"{packed.size:,} B"))
    head = ("levels", "pack, million a second", "unpack, million a second", "packed")
    text = f"`compress.formats.planes` on {NUM_LEVELS:,} random levels, best of {NUM_RATES}, one thread.\n"
    return ["## Bit planes\n", text, table(head, rows)]


def _rate(call: Callable[[], object]) -> float:
    return NUM_LEVELS / min(_time_s(call) for _ in range(NUM_RATES)) / 1e6


HEAD = """# Benchmarks

Written by `make bench` (`python -m tests.benchmarks.run --out docs/benchmarks.md`, and for the last sections the
commands in them). Every figure of a network comes from a run folder that the command below its table makes. The metric
is measured in ONNX Runtime, on the written file. `$DATA` is the folder that `HCOMPRESS_TEST_DATA` names; without it
only the shipped network is measured.

Latency is the median of {repeats} samples at batch 1 on one thread, in turns with the dense model, with the 10th and
90th percentile. Load is the median time to open the file in ONNX Runtime, which includes unpacking. Both depend on the
machine and on what else it does: compare the columns, not the milliseconds. The dense model is timed against itself:
how far it is from 1.00x is the noise. Its size is that of `dense.onnx`.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    out: Path = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of torch, to its own developers
    started = time.monotonic()
    lines = [HEAD.format(repeats=LATENCY_REPEATS), *machine(), ""]
    for network, cases in networks(os.environ.get("HCOMPRESS_TEST_DATA")):
        print(f"{time.monotonic() - started:.0f} s: {network.name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            lines += measure_network(network, cases, Path(folder))
    lines += plane_rates()
    lines.append(f"Measured in {time.monotonic() - started:.0f} s.")
    own = {line.removeprefix("## ").strip() for line in lines if line.startswith("## ")}
    others = {title: text for title, text in sections(out).items() if title and title not in own}
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for title, text in others.items():
        put_section(out, title, text)


if __name__ == "__main__":
    main()
