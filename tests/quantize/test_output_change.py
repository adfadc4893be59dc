"""Output changes: budgets kept by widths of single channels, and one width for all taken where it is nearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.apply import apply_plan, assemble
from compress.budget import parse_budget
from compress.context import Context, Storage
from compress.data import Data
from compress.errors import BudgetError
from compress.graph.trace import trace_graph
from compress.model import Source
from compress.plan import Plan
from compress.quantize import correct as correction
from compress.quantize import output_change
from compress.task import Calibration, Classification, divergence
from compress.widths import is_mixed, letters_of, mean_bits

OPTIONS: dict[str, Any] = {
    **{
        "activations": "float",
        "activation_range": "auto",
        "channel_widths": "mixed",
        "reconstruction": "gptq",
        "bias_correction": "on",
    },
    **{"exclude": (), "keep": (), "tie": ()},
}


class Small:
    def __init__(self) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        ).eval()  # fmt: skip
        with torch.no_grad():
            module[3].weight.mul_(torch.logspace(-1.5, 0.5, 16)[:, None, None, None])
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
        self.graph = trace_graph(module, (x[:2],))
        self.calibration = Calibration(Classification(), Data((x,), None, "examples"))
        self.context = Context(torch.Generator().manual_seed(0), torch.device("cpu"), lambda *_: None, self.size, [])

    def size(self, choices: dict[str, Storage]) -> int:
        return 10_000 + sum(round(s.kept * (mean_bits(s.bits) - 32) / 8) for s in choices.values())

    def plan(self, budget: str, **options: Any) -> Plan:
        given = {**OPTIONS, **options}
        context = replace(self.context, frontiers=[])
        plan, _ = output_change.plan(
            self.source, self.graph, {}, self.calibration, parse_budget(budget), given, context
        )
        self.context.frontiers[:] = context.frontiers
        return plan

    def moved(self, plan: Plan, sidecar: dict[str, torch.Tensor]) -> float:
        network = assemble(self.graph, apply_plan(self.source.module, self.graph.tied, plan, sidecar))
        x = self.calibration.data.inputs[0]
        with torch.no_grad():
            return divergence(self.source.module(x), network(x), are_logits=True)


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def average(small: Small, plan: Plan) -> float:
    bits = {name: mean_bits(decision.bits) for name, decision in plan.quantized("weight").items()}
    return sum(la.elements * bits[la.tensor] for la in small.graph.layers) / sum(
        la.elements for la in small.graph.layers
    )


@pytest.mark.parametrize("budget", ["1.5bit", "2.25bit", "3bit", "5bit"])
def test_the_average_keeps_its_budget_and_channels_of_little_weight_get_less(small: Small, budget: str) -> None:
    plan = small.plan(budget)
    assert average(small, plan) <= float(budget.removesuffix("bit")) + 1e-9
    assert average(small, plan) == pytest.approx(plan.predicted["average_bits"])
    width = plan.quantized("weight")["3.weight"].bits
    assert is_mixed(width)
    bits = [mean_bits(int(k) if k.isdecimal() else k) for k in letters_of(width)]
    assert sum(bits[:8]) < sum(bits[8:])


def test_below_the_narrowest_mixture_the_minimum_is_named(small: Small) -> None:
    with pytest.raises(BudgetError, match=r"output-change goes down to 1\.2"):
        small.plan("1bit")


def test_more_bits_lose_less_and_so_do_channels_of_their_own(small: Small) -> None:
    losses = [small.plan(f"{bits}bit").predicted["loss"] for bits in (1.5, 2, 3, 4, 6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.9 * small.plan("3bit", channel_widths="equal").predicted["loss"]


def test_kept_and_tied_weights_have_one_width(small: Small) -> None:
    plan = small.plan("4bit", keep=("0.weight=6",), tie=("[38].weight",))
    bits = {name: decision.bits for name, decision in plan.quantized("weight").items()}
    assert bits["0.weight"] == 6
    assert bits["3.weight"] == bits["8.weight"] and isinstance(bits["3.weight"], int)
    tied = small.plan("4bit", tie=("*",))
    assert len({decision.bits for decision in tied.quantized("weight").values()}) == 1


def test_what_is_made_up_for_is_nearer_than_one_width_for_all(small: Small) -> None:
    plan = small.plan("3bit")
    made, sidecar = output_change.correct(plan, small.source, small.graph, small.calibration, small.context)
    equal = small.plan("3bit", tie=("*",))
    whole, others = correction.correct(equal, small.source, small.graph, small.calibration, small.context)
    assert average(small, whole) == 3
    assert small.moved(made, sidecar) <= small.moved(whole, others)


def test_one_width_for_all_is_taken_where_it_is_nearer(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small.plan("3bit")
    monkeypatch.setattr(output_change, "MUCH_WORSE", 1e9)

    def corrected(plan: Plan, *_: Any) -> correction.Corrected:
        mixed = any(is_mixed(decision.bits) for decision in plan.quantized("weight").values())
        return correction.Corrected(plan, {}, 1.0 if mixed else 0.5)

    monkeypatch.setattr(correction, "corrected", corrected)
    context = replace(small.context, notes=[], frontiers=list(small.context.frontiers))
    made, _ = output_change.correct(plan, small.source, small.graph, small.calibration, context)
    assert {decision.bits for decision in made.quantized("weight").values()} == {3}
    assert {choice.bits for choice in context.frontiers[-1].chosen_choices()} == {3}
    assert "one width for all weights was nearer" in context.notes[-1]
