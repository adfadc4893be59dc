"""OBS pruning on a small network: exact counts, no harm by the update, and plans on another checkpoint."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.apply import apply_plan, unpack_mask
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.errors import BudgetError, DiskError, UsageError
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.numerics import mfac
from compress.plan import Plan
from compress.prune import magnitude, obs
from compress.prune.fisher import Fisher
from compress.prune.masks import FIRST_SPARSITY, MOST_REMOVED, SEARCH_DENSITY
from compress.task import Calibration, Classification, Regression, divergence

OPTIONS = {"rounds": 2, "scope": "global", "fisher": "ggn", "pattern": "unstructured", "exclude": ()}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5))


def source_of(module: nn.Module) -> Source:
    module.eval().requires_grad_(False)
    return Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())


def patterned_network(inputs: int = 12) -> nn.Module:
    """Input dimensions of 12, 96 and 12, which 2, 4 and 6 divide."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(inputs, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5)
    )


def examples(n: int, channels: int = 2) -> Tensor:
    return torch.randn(n, channels, 6, 6, generator=torch.Generator().manual_seed(1))


def context() -> Context:
    def quiet(stage: str, done: int, total: int | None) -> None:
        """Progress of a test."""

    return Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, lambda choices: 0, [])


def prune(
    module: nn.Module, sparsity: float | None, *, n: int = 24, **options: Any
) -> tuple[Graph, Plan, dict[str, Tensor]]:
    channels = module[0].in_channels  # type: ignore[index]
    graph = trace_graph(module, (examples(2, channels),))
    calibration = Calibration(Classification(), Data((examples(n, channels),), None, "examples"))
    budget = None if sparsity is None else Budget("sparsity", sparsity)
    plan, sidecar = obs.plan(source_of(module), graph, {}, calibration, budget, {**OPTIONS, **options}, context())
    return graph, plan, sidecar


def outputs(module: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.func.functional_call(module, state, (x,))
    return result


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_as_many_weights_are_zero_as_asked(sparsity: float, scope: str) -> None:
    module = network()
    graph, plan, sidecar = prune(module, sparsity, scope=scope)
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    zeros = sum(int((state[layer.tensor] == 0).sum()) for layer in graph.layers)
    total = sum(layer.elements for layer in graph.layers)
    assert zeros == pytest.approx(sparsity * total, abs=len(graph.layers))


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_one_round_is_never_worse_than_its_bare_cut(sparsity: float) -> None:
    module, x = network(), examples(24)
    graph, plan, sidecar = prune(module, sparsity, rounds=1)
    moved = apply_plan(module, graph.tied, plan, sidecar).state()
    cut = {key: torch.where(moved[key] == 0, torch.zeros(()), value) for key, value in module.state_dict().items()}
    cut = {key: value if key in plan.masks() else moved[key] for key, value in cut.items()}
    dense = module(x)
    after, before = (divergence(dense, outputs(module, state, x), are_logits=True) for state in (moved, cut))
    assert after < 0.95 * before


def test_the_source_is_left_as_it_was() -> None:
    module = network()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    prune(module, 0.5)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_gradients_of_a_round_are_gone_when_the_next_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = obs.sample_gradients, list[weakref.ref[Tensor]]()

    def sample_gradients(*arguments: Any, **keywords: Any) -> Any:
        assert all(known() is None for known in taken)
        found = real(*arguments, **keywords)
        taken.append(weakref.ref(found))
        return found

    monkeypatch.setattr(obs, "sample_gradients", sample_gradients)
    prune(network(), 0.5, rounds=3)
    assert len(taken) == 3


def test_saliencies_are_those_of_the_round_in_which_a_weight_went() -> None:
    surroundings = context()
    module = network()
    graph = trace_graph(module, (examples(2),))
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    budget, options = Budget("sparsity", 0.5), {**OPTIONS, "rounds": 1}
    obs.plan(source_of(module), graph, {}, calibration, budget, options, surroundings)
    (found,) = surroundings.saliencies
    assert found.removed.most is not None and found.kept.least is not None
    assert found.removed.most <= found.kept.least, "one round parts them at a threshold"
    total = sum(layer.elements for layer in graph.layers)
    assert found.removed.count + found.kept.count == total and found.removed.count == pytest.approx(total / 2, abs=1)
    assert found.unit == "loss" and "F^-1" in found.what


def test_one_seed_gives_one_plan() -> None:
    assert prune(network(), 0.5)[1] == prune(network(), 0.5)[1]


def test_everything_can_be_cut() -> None:
    _, plan, _ = prune(network(), 1 - 1e-9)
    assert sum(mask.kept for mask in plan.masks().values()) == 0


def test_one_example_is_enough_to_run() -> None:
    assert prune(network(), 0.5, n=1)[1].masks()


def test_a_network_without_curvature_is_cut_by_magnitude() -> None:
    module = network()
    with torch.no_grad():
        module[5].weight.zero_()  # type: ignore[index]
    graph, plan, sidecar = prune(module, 0.5)
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    kept = torch.cat([state[layer.tensor].flatten() for layer in graph.layers])
    assert bool(torch.isfinite(kept).all())


def test_another_checkpoint_keeps_the_masks_and_gets_values_of_its_own() -> None:
    graph, plan, sidecar = prune(network(), 0.6)
    other = network(seed=7)
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    masks = {name: apply_plan(network(), graph.tied, plan, sidecar).state()[name] != 0 for name in plan.masks()}
    again, tensors = obs.refit(
        plan, sidecar, source_of(other), trace_graph(other, (examples(2),)), calibration, context()
    )
    state = apply_plan(other, graph.tied, again, tensors).state()
    assert {n: m.mask_sha256 for n, m in again.masks().items()} == {n: m.mask_sha256 for n, m in plan.masks().items()}
    assert again.options == plan.options
    cut = {
        key: torch.where(masks[key], value, 0.0) if key in masks else value for key, value in other.state_dict().items()
    }
    x = examples(24)
    moved, bare = (divergence(other(x), outputs(other, s, x), are_logits=True) for s in (state, cut))
    assert moved < bare


def test_what_is_excluded_stays_and_bounds_the_sparsity() -> None:
    _, plan, _ = prune(network(), 0.05, exclude=("3.*",))
    assert "3.weight" not in plan.masks()
    with pytest.raises(BudgetError, match="--exclude leaves at most"):
        prune(network(), 0.9, exclude=("3.*",))


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:4", "1:4", "5:6"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_m_hold_n(pattern: str, rounds: int) -> None:
    n, m = map(int, pattern.split(":"))
    module = patterned_network()
    graph, plan, sidecar = prune(module, None, pattern=pattern, rounds=rounds)
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    assert list(plan.masks()) == ["0.weight", "3.weight", "5.weight"]
    for name, decision in plan.masks().items():
        groups = state[name].movedim(1, -1).reshape(-1, m)
        assert bool((groups.count_nonzero(1) == n).all())
        assert (decision.pattern, decision.kept) == (pattern, decision.total // m * n)


def test_a_pattern_s_groups_keep_their_most_salient_weights() -> None:
    """With inputs of zero, a weight is worth nothing however large it is."""
    module = nn.Sequential(nn.Linear(4, 3, bias=False)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([2.0, 0.5, 2.0, 0.6]))  # type: ignore[operator]
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.0, 1.0, 0.0, 1.0])
    graph = trace_graph(module, (x[:2],))
    calibration = Calibration(Regression(), Data((x,), None, "examples"))
    plan, sidecar = obs.plan(source_of(module), graph, {}, calibration, None, {**OPTIONS, "pattern": "2:4"}, context())
    mask = unpack_mask(sidecar["0.weight"], plan.masks()["0.weight"], torch.Size([3, 4]))
    assert mask.int().tolist() == [[0, 1, 0, 1]] * 3
    magnitudes, tensors = magnitude.plan(source_of(module), graph, {}, None, None, {"pattern": "2:4"}, context())
    mask = unpack_mask(tensors["0.weight"], magnitudes.masks()["0.weight"], torch.Size([3, 4]))
    assert mask.int().tolist() == [[1, 0, 1, 0]] * 3


def test_a_layer_that_a_pattern_does_not_fit_stays_dense_with_a_note() -> None:
    module, surroundings = patterned_network(inputs=3), context()
    graph = trace_graph(module, (examples(2, channels=3),))
    calibration = Calibration(Classification(), Data((examples(24, channels=3),), None, "examples"))
    options = {**OPTIONS, "pattern": "2:4"}
    plan, sidecar = obs.plan(source_of(module), graph, {}, calibration, None, options, surroundings)
    assert list(plan.masks()) == ["3.weight", "5.weight"]
    assert surroundings.notes == ["2:4 leaves 0.weight dense: the input dimension isn't a multiple of 4"]
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    assert torch.equal(state["0.weight"], module.state_dict()["0.weight"])
    assert plan.predicted["sparsity"] < 0.5


class Shared(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.b(torch.relu(self.a(x)))))
        return y


def test_a_weight_with_two_names_is_pruned_once() -> None:
    torch.manual_seed(0)
    module, x = Shared(), torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    graph = trace_graph(module.eval(), (x[:2],))
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    options = {**OPTIONS, "pattern": "2:4"}
    plan, sidecar = obs.plan(source_of(module), graph, {}, calibration, None, options, context())
    assert list(plan.masks()) == ["a.weight", "out.weight"]
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert bool((state["a.weight"].reshape(-1, 4).count_nonzero(1) == 2).all())


def test_a_pattern_that_fits_no_layer_is_said() -> None:
    with pytest.raises(UsageError, match="--pattern 2:7 fits no weight: no input dimension is a multiple of 7"):
        prune(network(), None, pattern="2:7")


@pytest.mark.parametrize(
    ("sparsity", "pattern", "error", "words"),
    [
        (0.7, "2:4", BudgetError, r"pattern 2:4 gives sparsity 0\.5000, less than 0\.7"),
        (None, "4:2", UsageError, "keeps 4 of 2"),
        (None, "0:4", UsageError, "keeps 0 of 4"),
        (None, "half", UsageError, "is not a pattern"),
    ],
)
def test_a_pattern_that_is_none_or_leaves_too_much_is_refused(
    sparsity: float | None, pattern: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        prune(patterned_network(), sparsity, pattern=pattern)


def test_a_pattern_s_update_is_never_worse_than_its_bare_cut() -> None:
    module, x = patterned_network(), examples(24, channels=12)
    graph, plan, sidecar = prune(module, None, pattern="2:4", rounds=1)
    moved = apply_plan(module, graph.tied, plan, sidecar).state()
    cut = {key: torch.where(moved[key] == 0, 0.0, value) for key, value in module.state_dict().items()}
    cut = {key: value if key in plan.masks() else moved[key] for key, value in cut.items()}
    after, before = (divergence(module(x), outputs(module, state, x), are_logits=True) for state in (moved, cut))
    assert after < before


def test_the_predicted_loss_is_the_measured_one_where_the_curvature_is_exact() -> None:
    """A linear network with one output and squared errors: its loss is a parabola, that the gradients span."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(12, 1)).eval(), torch.randn(40, 12)
    graph = trace_graph(module, (x[:2],))
    calibration = Calibration(Regression(), Data((x,), None, "examples"))
    plan, sidecar = obs.plan(
        source_of(module), graph, {}, calibration, Budget("sparsity", 0.5), {**OPTIONS, "rounds": 1}, context()
    )
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    measured = float((outputs(module, state, x) - module(x)).double().square().mean())
    assert plan.predicted["loss"] == pytest.approx(measured, rel=1e-4)
    assert plan.predicted["sparsity"] == 0.5


def test_more_sparsity_is_expected_to_lose_more() -> None:
    losses = [prune(network(), sparsity)[1].predicted["loss"] for sparsity in (0.2, 0.5, 0.8)]
    assert 0 < losses[0] < losses[1] < losses[2]


def found_candidates(module: nn.Module, **options: Any) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
    graph = trace_graph(module, (examples(2),))
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    return obs.candidates(source_of(module), graph, {}, calibration, {**OPTIONS, **options}, context())


def test_candidates_grow_in_sparsity_until_little_is_left() -> None:
    module = network()
    graph = trace_graph(module, (examples(2),))
    expected, total = 1 - FIRST_SPARSITY, sum(layer.elements for layer in graph.layers)
    masks: dict[str, Tensor] = {}
    for plan, sidecar in found_candidates(module, exclude=()):
        kept = sum(mask.kept for mask in plan.masks().values())
        assert kept == pytest.approx(expected * total, abs=1)
        assert plan.budget is None
        shapes = {layer.tensor: torch.Size(layer.shape) for layer in graph.layers}
        found = {name: unpack_mask(sidecar[name], mask, shapes[name]) for name, mask in plan.masks().items()}
        assert all(bool((found[name] <= mask).all()) for name, mask in masks.items()), "a weight came back"
        apply_plan(module, graph.tied, plan, sidecar)
        masks, expected = found, expected * SEARCH_DENSITY
    assert expected <= 1 - MOST_REMOVED < expected / SEARCH_DENSITY


def test_a_candidate_is_computed_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    real = obs.sample_gradients

    def counted(*arguments: Any, **options: Any) -> Tensor:
        rounds.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(obs, "sample_gradients", counted)
    found = found_candidates(network())
    assert not rounds
    for number in (1, 2, 3):
        next(found)
        assert len(rounds) == number


def test_a_candidate_keeps_its_values_when_the_next_is_made() -> None:
    module = network()
    graph, found = trace_graph(module, (examples(2),)), found_candidates(module)
    plan, sidecar = next(found)
    before = {key: value.clone() for key, value in sidecar.items()}
    next(found)
    assert all(torch.equal(before[key], value) for key, value in sidecar.items())
    apply_plan(module, graph.tied, plan, sidecar)


def test_what_is_excluded_is_in_no_candidate() -> None:
    plan, _ = next(found_candidates(network(), exclude=("3.*",)))
    assert set(plan.masks()) == {"0.weight", "5.weight"}


@pytest.mark.parametrize("block_size", [None, 16])
def test_gradients_in_a_file_give_the_same_plan(block_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "block_size": block_size}
    monkeypatch.setattr(mfac, "PIECE", 2000)
    graph = trace_graph(network(), (examples(2),))
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    (plan, sidecar), (filed_plan, filed_sidecar) = (
        obs.plan(
            source_of(network()), graph, {}, calibration, Budget("sparsity", 0.6), options, replace(context(), memory=m)
        )
        for m in (10**9, 1000)
    )
    assert filed_plan == plan
    assert all(torch.equal(filed_sidecar[key], value) for key, value in sidecar.items())


def test_a_full_disk_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    graph = trace_graph(network(), (examples(2),))
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    with pytest.raises(DiskError, match=r"no room for .* of gradients"):
        obs.plan(source_of(network()), graph, {}, calibration, None, OPTIONS, replace(context(), memory=1000))


def test_the_predicted_loss_is_the_gauss_newton_form_of_the_whole_move() -> None:
    module, x = network(), examples(24)
    graph = trace_graph(module, (x[:2],))
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    plan, sidecar = obs.plan(
        source_of(module), graph, {}, calibration, Budget("sparsity", 0.3), {**OPTIONS, "rounds": 3}, context()
    )
    start = dict(module.state_dict())
    end = apply_plan(module, graph.tied, plan, sidecar).state()
    move = {key: end[key] - value for key, value in start.items()}
    logits, slope = torch.func.jvp(lambda state: outputs(module, state, x), (start,), (move,))
    p = logits.softmax(1)
    form = (p * slope.square()).sum(1) - (p * slope).sum(1).square()
    assert plan.predicted["loss"] == pytest.approx(float(form.mean()) / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("fisher", "outputs_of_one", "most"), [("ggn", 5, obs.MOST_DRAWS), ("sampled", 5, obs.MOST_DRAWS), ("labels", 5, 1)]
)
def test_gradients_grow_in_number_as_weights_get_fewer_and_not_in_memory(
    monkeypatch: pytest.MonkeyPatch, fisher: str, outputs_of_one: int, most: int
) -> None:
    taken = []
    real = obs.sample_gradients

    def counted(*arguments: Any, **options: Any) -> Tensor:
        rows = real(*arguments, **options)
        taken.append((len(rows), int(options["keep"].sum())))
        return rows

    monkeypatch.setattr(obs, "sample_gradients", counted)
    module, n = network(), 300
    graph = trace_graph(module, (examples(2),))
    labels = torch.arange(n) % outputs_of_one
    calibration = Calibration(Classification(), Data((examples(n),), labels, "examples"))
    options = {**OPTIONS, "rounds": 8, "fisher": fisher}
    obs.plan(source_of(module), graph, {}, calibration, Budget("sparsity", 0.95), options, context())
    rows = [count for count, _ in taken]
    assert rows == sorted(rows)
    assert rows[0] == n // 2 and rows[-1] == most * n
    d = taken[0][1]
    assert all(count * kept <= n * d for count, kept in taken)


def test_a_large_gradient_is_clipped_and_said_so() -> None:
    module, x = network(), examples(24).clone()
    x[5] *= 30
    graph, own = trace_graph(module, (examples(2),)), context()
    calibration = Calibration(Regression(), Data((x,), None, "examples"))
    options = {**OPTIONS, "clip_gradients": 0.9}
    plan, _ = obs.plan(source_of(module), graph, {}, calibration, Budget("sparsity", 0.5), options, own)
    figures = plan.predicted
    assert figures["clipped_rows"] == 3
    assert 0.9 < figures["clipped_share"] < 1
    assert own.notes == [
        f"gradients were clipped: in the last round 3 of them, at the norm {figures['clipped_norm']:.3g}, "
        f"which took {figures['clipped_share']:.0%} of the Fisher matrix's trace"
    ]
    assert plan.options["clip_gradients"] == 0.9


def test_nothing_is_clipped_unless_asked() -> None:
    _, plain, _ = prune(network(), 0.5)
    _, same, _ = prune(network(), 0.5, clip_gradients=1.0, fisher_batch=1)
    assert set(plain.predicted) == set(same.predicted)
    assert {n: m.mask_sha256 for n, m in plain.masks().items()} == {n: m.mask_sha256 for n, m in same.masks().items()}


def test_batches_of_gradients_give_fewer_rows_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mean: a sum of b independent draws is as long as the root of b of them."""
    found: list[Tensor] = []
    real = obs.fisher_of

    def kept(gradients: Tensor, block_size: int | None) -> Fisher:
        found.append(gradients.double().square().sum(1))
        return real(gradients, block_size)

    monkeypatch.setattr(obs, "fisher_of", kept)
    prune(network(), 0.1, n=250, rounds=1)
    prune(network(), 0.1, n=250, rounds=1, fisher_batch=16)
    assert [len(squares) for squares in found] == [250, 16]
    assert float(found[1].mean()) == pytest.approx(float(found[0].mean()), rel=0.3)


def test_a_block_of_the_whole_network_gives_the_plan_of_the_whole_matrix() -> None:
    graph, whole, values = prune(network(), 0.6)
    assert whole.options["block_size"] is None
    _, block, others = prune(network(), 0.6, block_size=10**6)
    assert block.options["block_size"] == 10**6
    masks = [{name: mask.mask_sha256 for name, mask in plan.masks().items()} for plan in (whole, block)]
    assert masks[0] == masks[1]
    states = [apply_plan(network(), graph.tied, *plan).state() for plan in ((whole, values), (block, others))]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 10, 100])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.6, "unstructured"), (0.6, "4x1"), (0.6, "1x4"), (None, "2:4")])
def test_blocks_of_curvature_go_with_every_pattern(block_size: int, sparsity: float | None, pattern: str) -> None:
    module = patterned_network()
    graph, plan, sidecar = prune(module, sparsity, pattern=pattern, rounds=1, block_size=block_size)
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    zeros = sum(int((state[layer.tensor] == 0).sum()) for layer in graph.layers)
    assert zeros >= (sparsity or 0.5) * sum(layer.elements for layer in graph.layers)
    x = examples(24, channels=12)
    cut = {key: torch.where(state[key] == 0, 0.0, value) for key, value in module.state_dict().items()}
    cut = {key: value if key in plan.masks() else state[key] for key, value in cut.items()}
    after, before = (divergence(module(x), outputs(module, s, x), are_logits=True) for s in (state, cut))
    assert after < before or (block_size == 1 and after == before), "a block of one weight has no other to move"


def test_a_plan_of_blocks_is_followed_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, sidecar = prune(network(), 0.6, block_size=32)
    sizes = []
    real = obs.fisher_of

    def seen(gradients: Tensor, block_size: int | None) -> Fisher:
        sizes.append(block_size)
        return real(gradients, block_size)

    monkeypatch.setattr(obs, "fisher_of", seen)
    other = network(seed=7)
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    again, _ = obs.refit(plan, sidecar, source_of(other), trace_graph(other, (examples(2),)), calibration, context())
    assert sizes == [32, 32]
    assert again.options == plan.options
    assert {n: m.mask_sha256 for n, m in again.masks().items()} == {n: m.mask_sha256 for n, m in plan.masks().items()}


def test_a_plan_from_before_there_were_blocks_is_followed_with_the_whole_matrix() -> None:
    _, plan, sidecar = prune(network(), 0.6)
    old = replace(plan, options={name: value for name, value in plan.options.items() if name != "block_size"})
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    module = network()
    again, _ = obs.refit(old, sidecar, source_of(module), trace_graph(module, (examples(2),)), calibration, context())
    assert again.options["block_size"] is None


@pytest.mark.parametrize(
    ("block_size", "expected"), [(None, 150), (150, 150), (151, 300), (301, 600), (1200, 1200), (1201, 150)]
)
def test_there_are_as_many_gradients_as_a_block_has_weights(
    block_size: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where four of an example, which are the most, are enough."""
    rows = []
    real = obs.fisher_of

    def seen(gradients: Tensor, block_size: int | None) -> Fisher:
        rows.append(len(gradients))
        return real(gradients, block_size)

    monkeypatch.setattr(obs, "fisher_of", seen)
    prune(network(), 0.1, n=300, rounds=1, block_size=block_size)
    assert rows == [expected]
