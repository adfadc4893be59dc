"""The training loop: it learns, repeats itself byte for byte, goes on after an interruption, and says what is wrong."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from zoo import named

from compress.data import Data
from compress.errors import DiskError, InputError, NumericsError, UsageError
from compress.graph.cut import cut, kept_channels
from compress.graph.groups import find_channels
from compress.graph.rewrite import unlift
from compress.graph.trace import trace_graph
from compress.task import CausalLM, Classification, Regression
from compress.train import loop
from compress.train.distill import divergence_from
from compress.train.journal import state_digest
from compress.train.loop import Hooks, Trained, train
from compress.train.masks import hold_masks
from compress.train.recipe import Recipe

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution, a norm and a dropout: one of each thing that a training changes or draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.1)
        self.hidden, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.hidden(F.relu(self.norm(self.conv(x)))))
        out: Tensor = self.fc(self.drop(y.mean((2, 3))))
        return out


def quiet(*_: Any) -> None:
    pass


def images(count: int = 96) -> Data:
    """Bright columns, rows or squares."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    x[y == 0, :, :, ::2] += 1
    x[y == 1, :, ::2, :] += 1
    x[y == 2] += 0.5
    return Data((x,), y, "images")


def exported(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph = trace_graph(module.eval(), inputs)
    return copy.deepcopy(unlift(graph.program, graph.tied))


def dense() -> fx.GraphModule:
    torch.manual_seed(0)
    return exported(Net(), images().first(4).inputs[0])


@pytest.fixture(scope="module")
def taught() -> fx.GraphModule:
    """A network that knows the images."""
    module = dense()
    train(module, images(), Classification(), recipe(60, lr=0.1), teacher=None, progress=quiet)
    return module


def smaller(taught: fx.GraphModule) -> fx.GraphModule:
    """Half of its channels cut out."""
    graph = trace_graph(taught, images().first(4).inputs)
    channels = find_channels(graph)
    keep = {group.name: list(range(0, group.size, 2)) for group in channels.groups}
    return cut(channels, channels.module, kept_channels(channels, keep))


def recipe(steps: int = 12, **options: Any) -> Recipe:
    return Recipe(steps, **{"batch_size": 16, "augment": ("crop", "flip"), **options})


def accuracy(module: Callable[[Tensor], Tensor], data: Data) -> float:
    assert data.targets is not None
    with torch.no_grad():
        return float((module(data.inputs[0]).argmax(1) == data.targets).float().mean())


def test_a_cut_network_recovers(taught: fx.GraphModule) -> None:
    small, data, shown = smaller(taught), images(), list[tuple[str, int, int | None]]()
    assert accuracy(taught, data) > 0.95 > accuracy(small, data)
    before = copy.deepcopy(small.state_dict())
    found = train(
        small, data, Classification(), recipe(60), teacher=taught, calibration=data.first(24),
        progress=lambda *done: shown.append(done),
    )  # fmt: skip
    assert accuracy(small, data) > 0.95
    assert shown == [("recover", step, 60) for step in range(1, 61)]
    assert len(found.losses) == 60
    assert found.step == 60
    assert found.divergence_before is not None
    assert found.divergence_after is not None
    assert found.divergence_after < 0.5 * found.divergence_before
    assert found.divergence_after == divergence_from(taught, small, data.first(24), Classification(), CPU)
    after = small.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} <= {"norm.num_batches_tracked"}
    assert not any(p.requires_grad or p.grad is not None for p in small.parameters()), "as they were found"
    assert "True" not in " ".join(str(node.args) for node in small.graph.nodes if "norm" in str(node.target))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adahessian", "mfac"])
def test_the_same_seed_gives_the_same_bytes(taught: fx.GraphModule, optimizer: str) -> None:
    def made(seed: int) -> str:
        module = smaller(taught)
        torch.manual_seed(seed + 77)  # the caller's generator doesn't matter
        how = recipe(5, optimizer=optimizer)
        train(module, images(), Classification(), how, teacher=taught, seed=seed, progress=quiet)
        return state_digest(module)

    assert made(0) == made(0)
    assert made(0) != made(1)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adahessian", "mfac"])
def test_every_optimizer_lowers_the_loss(taught: fx.GraphModule, optimizer: str) -> None:
    found = train(
        smaller(taught), images(), Classification(), recipe(40, optimizer=optimizer, lr=0.02), teacher=taught,
        progress=quiet,
    )  # fmt: skip
    assert sum(found.losses[-5:]) < 0.7 * sum(found.losses[:5])


def test_the_callers_generator_and_teacher_stay(taught: fx.GraphModule) -> None:
    before, state = state_digest(taught), torch.get_rng_state()
    train(smaller(taught), images(), Classification(), recipe(2), teacher=taught, progress=quiet)
    assert state_digest(taught) == before
    assert torch.equal(torch.get_rng_state(), state)


class Interrupted:
    """A progress callback that interrupts at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 7),
        ({"optimizer": "adamw", "schedule": "cosine"}, 1),
        ({"optimizer": "adahessian"}, 5),
        ({"optimizer": "mfac"}, 5),
        ({"patience": 9}, 6),  # right after a check
        ({"patience": 9}, 7),
        ({"patience": 9}, 12),  # all is done but the return
    ],
)
def test_a_resumed_run_gives_the_same_bytes(
    taught: fx.GraphModule, options: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "JOURNAL_EVERY_S", -1)  # after every step
    start = smaller(taught)

    def go(module: fx.GraphModule, progress: Any, journal: Path | None, *, resume: bool = False) -> Trained:
        hooks = Counting(module)
        found = train(
            module, images(), Classification(), recipe(**options), teacher=taught, calibration=images(24),
            progress=progress, hooks=hooks.hooks(), journal=journal, resume=resume,
        )  # fmt: skip
        assert hooks.calls == 12
        return found

    whole, journal = copy.deepcopy(start), tmp_path / "journal"
    expected = go(whole, quiet, None)
    stopped = copy.deepcopy(start)
    with pytest.raises(KeyboardInterrupt):
        go(stopped, Interrupted(step), journal)
    assert not any(p.requires_grad for p in stopped.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    again = copy.deepcopy(start)
    steps: list[int] = []
    found = go(again, lambda stage, done, total: steps.append(done), journal, resume=True)
    assert state_digest(again) == state_digest(whole)
    assert (found.losses, found.divergences, found.step) == (expected.losses, expected.divergences, expected.step)
    assert steps == list(range(step + 1, 13)), "no step is made twice"
    third = copy.deepcopy(start)
    assert go(third, Interrupted(1), journal, resume=True).step == expected.step, "a finished run isn't made again"
    assert state_digest(third) == state_digest(whole)


class Counting:
    """A method with a state of its own: the number of steps, which scales them."""

    def __init__(self, module: nn.Module) -> None:
        self.calls, self.module = 0, module

    def hooks(self) -> Hooks:
        return Hooks(step=self.step, state=lambda: {"calls": self.calls}, restore=self.restore)

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        assert number == self.calls
        optimizer.step()
        with torch.no_grad():
            for p in self.module.parameters():
                p.mul_(1 - 1e-4 * self.calls)
        self.calls += 1

    def restore(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def journalled(taught: fx.GraphModule, path: Path, *, resume: bool = False, **options: Any) -> None:
    train(
        smaller(taught), options.pop("data", images()), Classification(), recipe(3, **options.pop("recipe", {})),
        teacher=taught, progress=quiet, journal=path, resume=resume, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"data": images(64)}, {"recipe": {"lr": 0.01}}, {"hooks": Hooks(settings={"budget": "macs=30%"})}],
)
def test_a_journal_of_another_training_is_refused(
    taught: fx.GraphModule, tmp_path: Path, changed: dict[str, Any]
) -> None:
    journalled(taught, tmp_path / "journal")
    with pytest.raises(UsageError, match="the journal is of another training") as caught:
        journalled(taught, tmp_path / "journal", resume=True, **changed)
    assert "leave --resume out" in caught.value.hint
    journalled(taught, tmp_path / "journal", **changed)  # which starts anew


def test_a_damaged_journal_is_refused(taught: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journalled(taught, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for spoilt in (whole[: len(whole) // 2], b"", b"text", flipped):
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match="the journal can't be read"):
            journalled(taught, path, resume=True)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="isn't a journal of a training"):
        journalled(taught, path, resume=True)
    torch.save({"module": Net()}, path)
    with pytest.raises(InputError, match="the journal can't be read"):
        journalled(taught, path, resume=True)


def test_a_journal_without_a_place_is_said(taught: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="the journal can't be written"):
        journalled(taught, tmp_path / "absent" / "journal")


def test_masks_hold(taught: fx.GraphModule) -> None:
    module = copy.deepcopy(taught)
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    masks = {name: torch.arange(p.numel()).reshape(p.shape) % 3 > 0 for name, p in weights.items()}
    seen = []

    def after() -> None:
        put_back()
        seen.append(all(int(p[~masks[name]].count_nonzero()) == 0 for name, p in weights.items()))

    put_back = hold_masks(module, masks)
    train(
        module, images(), Classification(), recipe(4, optimizer="adamw"), teacher=taught, progress=quiet,
        hooks=Hooks(after=after),
    )  # fmt: skip
    assert seen == [True] * 5, "before the first step and after each"
    assert all(bool(p[masks[name]].all()) for name, p in weights.items())


def test_the_best_check_is_kept_and_patience_ends_the_run(taught: fx.GraphModule) -> None:
    module, data = smaller(taught), images()
    numbers: list[int] = []

    def spoiling(optimizer: torch.optim.Optimizer, number: int) -> None:
        numbers.append(number)
        optimizer.step()
        if number >= 8:
            with torch.no_grad():
                module.get_parameter("fc.weight").mul_(1.5)

    found = train(
        module, data, Classification(), recipe(40, patience=2), teacher=taught, calibration=data,
        progress=quiet, hooks=Hooks(step=spoiling),
    )  # fmt: skip
    values = dict(found.divergences)
    assert len(numbers) == found.divergences[-1][0] < 40, "it stopped early"
    assert values[found.step] == min(values.values()) == found.divergence_after
    assert found.step == found.divergences[-3][0], "two checks without progress"
    assert divergence_from(taught, module, data, Classification(), CPU) == found.divergence_after


@pytest.mark.parametrize("patience", [3, None])
def test_the_start_is_kept_where_training_only_harms(taught: fx.GraphModule, patience: int | None) -> None:
    module = copy.deepcopy(taught)
    before = state_digest(module)
    data, how = images(), recipe(10, patience=patience, lr=1.0)
    found = train(module, data, Classification(), how, teacher=taught, calibration=data, progress=quiet)
    assert found.step == 0
    assert state_digest(module) == before
    assert "those of step 0 being the nearest" in found.moved()


def test_the_end_is_kept_where_no_check_was_nearer_by_more_than_noise(
    taught: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before_the_end, kept in ((0.98, 10), (0.9, 9)):
        values = iter([2.0] * 9 + [before_the_end, 1.0])
        monkeypatch.setattr(loop, "divergence_from", lambda *_, values=values: next(values))
        module, data = smaller(taught), images()
        found = train(module, data, Classification(), recipe(10), teacher=taught, calibration=data, progress=quiet)
        assert found.step == kept


def test_only_what_a_method_allows_is_kept(taught: fx.GraphModule) -> None:
    module, data = copy.deepcopy(taught), images()
    steps: list[int] = []

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.step()
        steps.append(number)

    found = train(
        module, data, Classification(), recipe(10, lr=1.0), teacher=taught, calibration=data, progress=quiet,
        hooks=Hooks(step=step, may_keep=lambda: len(steps) >= 7),
    )  # fmt: skip
    assert [step for step, _ in found.divergences] == [0, 7, 8, 9, 10]
    assert found.divergence_after == min(value for step, value in found.divergences if step)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step_and_the_state_is_saved(
    taught: fx.GraphModule, tmp_path: Path, signum: signal.Signals
) -> None:
    class Stopped(Exception):
        pass

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped

    def go(module: fx.GraphModule, *, stops: bool, resume: bool = False) -> str:
        made: list[int] = []

        def step(optimizer: torch.optim.Optimizer, number: int) -> None:
            if stops and number == 4:
                os.kill(os.getpid(), signum)
            optimizer.step()
            made.append(number)

        train(
            module, images(), Classification(), recipe(), teacher=taught, calibration=images(24), progress=quiet,
            hooks=Hooks(step=step), journal=tmp_path / "journal", resume=resume,
        )  # fmt: skip
        assert made == list(range(5 if resume else 0, 12))
        return state_digest(module)

    before = signal.signal(signum, stop)
    try:
        with pytest.raises(Stopped):
            go(smaller(taught), stops=True)
        assert signal.getsignal(signum) is stop
    finally:
        signal.signal(signum, before)
    assert go(smaller(taught), stops=False, resume=True) == go(smaller(taught), stops=False)


def test_nothing_stops_early_without_calibration_data(taught: fx.GraphModule) -> None:
    found = train(smaller(taught), images(), Classification(), recipe(12, patience=1), teacher=taught, progress=quiet)
    assert (found.step, found.divergence_before, found.divergence_after) == (12, None, None)


def test_a_loss_that_is_not_finite_stops_with_its_step(taught: fx.GraphModule) -> None:
    with pytest.raises(NumericsError, match=r"the loss of training step \d+ of 50 is (nan|inf)") as caught:
        train(smaller(taught), images(), Classification(), recipe(50, lr=1e9), teacher=taught, progress=quiet)
    assert "lower --lr (now 1e+09)" in caught.value.hint


def test_a_last_step_that_spoils_a_tensor_is_found(taught: fx.GraphModule) -> None:
    module = smaller(taught)

    def spoil(optimizer: torch.optim.Optimizer, number: int) -> None:
        module.get_parameter("fc.bias").data.fill_(float("inf"))

    with pytest.raises(NumericsError, match=r"fc.bias holds NaN or Inf after the training"):
        train(module, images(), Classification(), recipe(1), teacher=taught, progress=quiet, hooks=Hooks(step=spoil))


def test_nothing_to_learn_from_is_refused() -> None:
    unlabelled = Data(images().inputs, None, "images")
    with pytest.raises(UsageError, match="images has no labels to train with"):
        train(dense(), unlabelled, Classification(), recipe(), teacher=None, progress=quiet)


def test_a_loss_without_parameters_is_refused() -> None:
    class Detached(Classification):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().loss(outputs.detach(), targets)

    with pytest.raises(UsageError, match="the loss of task accuracy doesn't depend on any parameter"):
        train(dense(), images(), Detached(), recipe(), teacher=None, progress=quiet)


def test_unlabelled_data_teach_through_the_dense_network(taught: fx.GraphModule) -> None:
    module = smaller(taught)
    unlabelled = Data(images().inputs, None, "images")
    train(module, unlabelled, Classification(), recipe(60, distill=0.0), teacher=taught, progress=quiet)
    assert accuracy(module, images()) > 0.95


def test_an_ordinary_module_learns_what_it_marks() -> None:
    torch.manual_seed(0)
    module = Net().eval()
    module.conv.requires_grad_(False)
    frozen, head = module.conv.weight.clone(), module.fc.weight.clone()
    train(module, images(), Classification(), recipe(3), teacher=None, progress=quiet)
    assert torch.equal(module.conv.weight, frozen)
    assert not torch.equal(module.fc.weight, head)
    assert not module.training
    assert module.fc.weight.requires_grad
    assert not module.conv.weight.requires_grad


@pytest.mark.parametrize(
    "name", ["TwoInputs", "spatial_flatten", "transformer_encoder", "Recurrent", "InplaceResidual"]
)
def test_regression_towards_the_dense_network(name: str) -> None:
    network = named(name)
    graph = trace_graph(network.make(), network.inputs(2))
    teacher, module = (copy.deepcopy(unlift(graph.program, graph.tied)) for _ in range(2))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        targets = teacher(*(x.clone() for x in network.inputs(32)))
    data = Data(network.inputs(32), targets, "zoo")
    found = train(
        module, data, Regression(), Recipe(20, optimizer="adam", batch_size=16, patience=20), teacher=teacher,
        calibration=data, progress=quiet,
    )  # fmt: skip
    assert found.divergence_after < found.divergence_before  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", ["adam", "adahessian", "mfac"])
def test_tied_weights_stay_tied(optimizer: str) -> None:
    network = named("Gpt")
    graph = trace_graph(network.make(), network.inputs(2))
    teacher, module = (copy.deepcopy(unlift(graph.program, graph.tied)) for _ in range(2))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    task, (ids,) = CausalLM(), network.inputs(24)
    data = Data((ids,), ids.roll(-1, 1), "windows")
    before = module.state_dict()["tokens.weight"].clone()
    found = train(
        module, data, task, Recipe(10, optimizer=optimizer, lr=0.01, batch_size=8), teacher=teacher, calibration=data,
        progress=quiet,
    )  # fmt: skip
    state = module.state_dict()
    assert not torch.equal(state["tokens.weight"], before)
    assert torch.equal(state["tokens.weight"], state["output.weight"])
    assert found.divergence_after < found.divergence_before  # type: ignore[operator]


@pytest.mark.parametrize("name", ["DictOutput", "TupleOutput"])
def test_of_several_outputs_the_first_is_learnt(name: str) -> None:
    network = named(name)
    graph = trace_graph(network.make(), network.inputs(2))
    teacher, module = (copy.deepcopy(unlift(graph.program, graph.tied)) for _ in range(2))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.8)
    data = Data(network.inputs(32), None, "zoo")
    found = train(module, data, Classification(), Recipe(20), teacher=teacher, calibration=data, progress=quiet)
    assert found.divergence_after < found.divergence_before  # type: ignore[operator]


def test_bfloat16_is_asked_for(taught: fx.GraphModule) -> None:
    module = smaller(taught)
    found = train(module, images(), Classification(), recipe(30, precision="bfloat16"), teacher=taught, progress=quiet)
    assert found.precision == "bfloat16"
    assert all(p.dtype is torch.float32 for p in module.parameters())
    assert found.losses[-1] < found.losses[0]
    plain = train(smaller(taught), images(), Classification(), recipe(1), teacher=taught, progress=quiet)
    assert plain.precision == "float32"


def test_more_than_all_examples_in_a_step(taught: fx.GraphModule) -> None:
    found = train(smaller(taught), images(5), Classification(), recipe(3), teacher=taught, progress=quiet)
    assert len(found.losses) == 3
