"""Cut channels out of every network of the zoo, and write docs/coverage.md.

    python -m tests.coverage --out docs/coverage.md

Cost: about 8 minutes on 2 cores. Needs the packages of ``pip install '.[zoo]'``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# The zoo's files are one another's by these names, as in conftest.py.
sys.path.insert(0, str(Path(__file__).parent))
import zoo
import zoo_families
from zoo import Network

from compress.errors import InputError
from compress.graph.channel_cost import channel_costs, total
from compress.graph.cut import kept_channels, worst_difference
from compress.graph.groups import Channels, find_channels
from compress.graph.trace import trace_graph

TOLERANCE = 1e-9
ENOUGH = 0.15  # of the parameters
SHARE = 0.5  # of each group's channels that stay
MOST_REASONS = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one network.

    Attributes:
        kind: ``refused``, ``wrong``, ``little`` (less than ``ENOUGH`` could be cut) or ``cut``.
        removed: Share of the parameters.
        difference: In float64, of the largest output.
    """

    name: str
    kind: str
    num_groups: int
    removed: float
    difference: float
    time_s: float
    reasons: str


def outcome(network: Network) -> Outcome:
    module, inputs = network.make(), network.inputs(2)
    try:
        graph = trace_graph(module, inputs)
    except InputError as error:
        return Outcome(network.name, "refused", 0, 0.0, 0.0, 0.0, error.message)
    started = time.process_time()
    channels = find_channels(graph)
    time_s = time.process_time() - started
    kept = half(channels)
    costs = channel_costs(channels, len(inputs[0]))
    removed = 1 - total(costs.params, kept) / max(1, total(costs.params, torch.ones_like(kept)))
    difference = worst_difference(channels, kept, network.inputs(3))
    kind = "wrong" if not difference <= TOLERANCE else "cut" if removed >= ENOUGH else "little"
    reasons = Counter(frozen.reason for frozen in channels.frozen).most_common(MOST_REASONS)
    named = "; ".join(reason for reason, _ in reasons) if kind == "little" else ""
    return Outcome(network.name, kind, len(channels.groups), removed, difference, time_s, named)


def half(channels: Channels) -> torch.Tensor:
    """A random half of each group's channels, one at least."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in channels.groups:
        count = max(1, round(group.size * SHARE))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()
    return kept_channels(channels, keep)


HEAD = """# Coverage

Written by `make coverage`. A random half of the channels of each group is cut out of each of {count} networks with
random weights: small ones written for what real networks do, and families of timm and transformers with few layers.
The smaller network has to compute what the whole one computes with those channels at zero, in float64 within 1e-9 of
the largest output, with every parameter and buffer random.

| | networks |
| --- | --- |
| traced | {traced} of {count} |
| cut by {enough:.0%} of the parameters or more, and equal | {cut} |
| less could be cut, and equal | {little} |
| wrong | {wrong} |

"""


def page(outcomes: Sequence[Outcome]) -> str:
    kinds = Counter(o.kind for o in outcomes)
    traced = len(outcomes) - kinds["refused"]
    head = HEAD.format(
        count=len(outcomes),
        traced=traced,
        enough=ENOUGH,
        cut=kinds["cut"],
        little=kinds["little"],
        wrong=kinds["wrong"],
    )
    rows = ["| network | | groups | cut | difference | analysis | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for o in outcomes:
        figures = f"{o.num_groups} | {o.removed:.0%} | {o.difference:.0e} | {o.time_s:.2f} s"
        reasons = o.reasons.replace("|", " ")
        rows.append(f"| {o.name} | {o.kind} | {figures if o.kind != 'refused' else ' | | | '} | {reasons} |")
    return head + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Try every network, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    out: Path = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes = []
    for network in [*zoo.NETWORKS, *zoo_families.FAMILIES]:
        outcomes.append(outcome(network))
        print(f"{network.name}: {outcomes[-1].kind}", file=sys.stderr)
    out.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
