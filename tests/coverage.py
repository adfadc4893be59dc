"""Cut channels out of every network of the zoo, reload and export what is left, and write docs/coverage.md.

    python -m tests.coverage --out docs/coverage.md

Cost: about 20 minutes on 2 cores. Needs the packages of ``pip install '.[zoo]'``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

# The zoo's files are one another's by these names, as in conftest.py.
sys.path.insert(0, str(Path(__file__).parent))
import zoo
import zoo_families
from zoo import Network

from compress.apply import Compressed, assemble
from compress.errors import HCompressError, InputError
from compress.export import onnx_model, serialize, write_program
from compress.formats import pt2
from compress.graph.channel_cost import channel_costs, total
from compress.graph.cut import cut, kept_channels, worst_difference
from compress.graph.graph_forward import why_graph
from compress.graph.groups import Channels, find_channels
from compress.graph.reload import sliced
from compress.graph.trace import Graph, trace_graph
from compress.pruned import pruned
from compress.verify import open_session, runtime_forward

TOLERANCE = 1e-9
FLOAT_TOLERANCE = 1e-4  # of the largest output, where two kernels sum in float32
YES = "yes"
GRAPH = "graph: "  # and why
REQUIRED = {"reload": 0.8, "program": 0.95, "onnx": 0.95}  # of the networks that are cut
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
        reload: ``yes``; or ``graph: ``, and why an instance of the network's own class runs the cut graph; or why there
            is none. Empty where little was cut.
        program: The same of the exported program.
        onnx: And of the ONNX file.
    """

    name: str
    kind: str
    num_groups: int
    removed: float
    difference: float
    time_s: float
    reasons: str
    reload: str = ""
    program: str = ""
    onnx: str = ""


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
    found = Outcome(network.name, kind, len(channels.groups), removed, difference, time_s, named)
    return replace(found, **delivered(network, module, graph, channels, kept)) if kind == "cut" else found


def delivered(network: Network, module: nn.Module, graph: Graph, channels: Channels, kept: Tensor) -> dict[str, str]:
    """Whether the cut network comes out of the user's class, an exported program and an ONNX file as it went in."""
    small = cut(channels, channels.module, kept)
    inputs = network.inputs(3)

    instances: list[nn.Module] = []

    def reloaded() -> Callable[..., Any]:
        instances.append(sliced(module, graph, channels, kept))
        return instances[0]

    assembled: list[tuple[Graph, Compressed, fx.GraphModule]] = []

    def files() -> tuple[Graph, Compressed, fx.GraphModule]:
        if not assembled:
            made = pruned(graph, channels, kept)
            compressed = Compressed(made.sliced(module.state_dict(), graph.tied), None)
            assembled.append((made.graph, compressed, assemble(made.graph, compressed)))
        return assembled[0]

    def program() -> Callable[..., Any]:
        left, _, whole = files()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            write_program(whole, left.example_inputs, path)
            return pt2.read(path).module(check_guards=False)

    def onnx() -> Callable[..., Any]:
        return runtime_forward(open_session(serialize(onnx_model(*files(), is_cut=True)), 1))

    ways = {"reload": reloaded, "program": program, "onnx": onnx}
    found = {name: compared(make, small, inputs) for name, make in ways.items()}
    why = why_graph(instances[0]) if instances else ""
    return {**found, "reload": GRAPH + why} if why and found["reload"] == YES else found


def compared(make: Callable[[], Callable[..., Any]], small: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """``yes``, or what went wrong."""
    small = copy.deepcopy(small)  # one that keeps a state goes on from where it is
    try:
        forward = make()
        with torch.no_grad():
            expected, found = ([t for t in tree_leaves(f(*inputs)) if isinstance(t, Tensor)] for f in (small, forward))
    except HCompressError as error:
        return error.message
    # The page has a line for every network, whatever a converter raises.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if [t.shape for t in expected] != [t.shape for t in found]:
        return f"WRONG: outputs {[list(t.shape) for t in found]}"
    worst = max(map(difference, expected, found))
    return YES if worst <= FLOAT_TOLERANCE else f"WRONG: differs by {worst:.1e} of the largest output"


def difference(expected: Tensor, found: Tensor) -> float:
    """In units of the largest output; none where both are the same infinity, as a masked logit is."""
    if not expected.numel():
        return 0.0
    e, f = expected.double(), found.double()
    largest = e[e.isfinite()].abs().max().clamp(min=1e-30) if e.isfinite().any() else torch.tensor(1.0)
    return float(torch.where(e == f, 0.0, (e - f).abs()).max() / largest)


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

What is left of those that are cut is then written to the files that a run writes, and read again: in float32 the
exported program and ONNX Runtime have to give what the cut graph gives, within 1e-4 of the largest output. The
network's own class, with its tensors sliced and its attributes made to fit, has to do so too, after its proof in
float64: by its own code, or, where that has a size in it that no attribute holds, with the cut graph as its forward.

| of the {cut} that are cut | | required | wrong |
| --- | --- | --- | --- |
{deliveries}

"""
TITLES = {"reload": "in its own class", "program": ".pt2", "onnx": "ONNX"}


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
        deliveries="\n".join(delivery(outcomes, way) for way in REQUIRED),
    )
    titles = " | ".join(TITLES.values())
    rows = [f"| network | | groups | cut | difference | analysis | {titles} | |", "| --- " * 10 + "|"]
    for o in outcomes:
        figures = f"{o.num_groups} | {o.removed:.0%} | {o.difference:.0e} | {o.time_s:.2f} s"
        ways = {way: getattr(o, way) for way in REQUIRED}
        marks = " | ".join(mark(text) for text in ways.values())
        named = [f"{TITLES[way]}: {text}" for way, text in ways.items() if text not in ("", YES)]
        reasons = "; ".join([o.reasons, *named] if o.reasons else named).replace("|", " ")
        rows.append(f"| {o.name} | {o.kind} | {figures if o.kind != 'refused' else ' | | | '} | {marks} | {reasons} |")
    return head + "\n".join(rows) + "\n"


def mark(text: str) -> str:
    if text.startswith(GRAPH):
        return "graph"
    return "no" if text not in ("", YES) else text


def delivery(outcomes: Sequence[Outcome], way: str) -> str:
    """A row of the head table."""
    texts = [getattr(o, way) for o in outcomes if o.kind == "cut"]
    wrong, graphs = (sum(text.startswith(start) for text in texts) for start in ("WRONG", GRAPH))
    good = texts.count(YES) + graphs
    share = good / max(1, len(texts))
    of_them = f"; {graphs} by the cut graph" if way == "reload" else ""
    return f"| {TITLES[way]} | {good} ({share:.0%}{of_them}) | {REQUIRED[way]:.0%} | {wrong} |"


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
        ways = ", ".join(f"{way} {getattr(outcomes[-1], way)}" for way in REQUIRED)
        print(f"{network.name}: {outcomes[-1].kind}; {ways}", file=sys.stderr, flush=True)
    out.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
