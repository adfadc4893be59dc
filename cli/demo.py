"""``hcompress demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import settings
from . import options, preflight
from .figures import NOTHING, count, size
from .options import command, force_option, setting_options
from .output import print_json, print_line, print_table
from .progress import Progress

EXAMPLES = """\
hcompress demo
hcompress demo --out hcompress-demo --force --json"""


@command("demo", examples=EXAMPLES)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("hcompress-demo"), show_default=True, help="Folder."
)
@setting_options("seed", "threads")
@force_option
def demo(out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Compress a small network that is shipped with its data, and compare the results. No download."""
    # The user's own config is about another network: its gates and data don't apply here.
    chosen = settings.resolve(options.given_flags(), environment={}, folder=None)
    if force:
        for name in ("pruned", "quantized"):
            preflight.check_out(out / name, force=True)
    else:
        preflight.check_out(out, force=False)

    from ..pipeline import run_demo

    with Progress(quiet=quiet) as progress:
        record = run_demo(out, chosen, force=force, command=options.command_line(), progress=progress)
    if as_json:
        print_json(record)
        return
    head = ("model", record["metric_name"], "size", "MACs", "latency", "sparsity", "average bits")
    print_table(head, [_cells(row) for row in record["rows"]])
    for name, path in record["runs"].items():
        print_line(f"{name}: {path}")
    print_line(f"took {record['time_s']:.1f} s")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    latency, macs = row["latency_ms"], row["macs"]
    return (
        row["name"],
        f"{row['metric']:.4g}",
        size(row["bytes"]),
        NOTHING if macs is None else count(macs),
        NOTHING if latency is None else f"{latency:.3g} ms",
        f"{100 * row['sparsity']:.4g} %",
        f"{row['average_bits']:.4g}",
    )
