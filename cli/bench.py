"""``hcompress bench``."""

from __future__ import annotations

from pathlib import Path

import click

from . import options, preflight
from .options import command, run_argument, setting_options
from .output import print_json, print_line, print_table
from .progress import Progress

EXAMPLES = """\
hcompress bench small
hcompress bench small --batch 32 --repeats 200 --threads 1 --json"""


@command("bench", examples=EXAMPLES)
@run_argument
@click.option("--repeats", type=click.IntRange(min=1), default=50, show_default=True, help="Timed runs of each model.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Examples a run.")
@setting_options("threads")
def bench(run: Path, repeats: int, batch: int, as_json: bool, quiet: bool) -> None:
    """Time the model of RUN against the dense one, in ONNX Runtime."""
    settings = options.resolve()
    preflight.check_run(run)

    from ..pipeline import bench_run

    with Progress(quiet=quiet) as progress:
        record = bench_run(run, settings, repeats=repeats, batch=batch, progress=progress)
    if as_json:
        print_json(record)
        return
    rows = [
        (name, *(f"{times[key]:.3g} ms" for key in ("median", "p10", "p90")))
        for name, times in record["latency_ms"].items()
    ]
    print_table(("model", "median", "p10", "p90"), rows)
    if "dense" in record["latency_ms"]:
        print_line(f"compressed takes {record['ratio']:.3g} of the dense time")
    print_line(f"batch {record['batch']}, {record['repeats']} repeats, threads {record['threads']}")
