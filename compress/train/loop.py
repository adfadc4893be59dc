"""The one training loop: a compressed network learns from the data and from the dense network that it came from.

All that is random follows from the seed and the number of the step, so that a run that is interrupted and resumed gives
the bytes of one that wasn't.
Cost: of a step, a forward pass of the dense network, and a forward and a backward pass of the one that is trained.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..context import Progress
from ..data import Data
from ..errors import NumericsError, UsageError
from ..graph.rewrite import move, on_device
from ..task import Task
from .batches import CPU, DROPOUT, Batches, step_seed, training_batches
from .distill import divergence_from as divergence_from
from .distill import first_tensor, loss_of, run
from .features import Features, Values, tapped
from .interruption import signals_held
from .journal import read_journal, training_digest, write_journal
from .mode import training_mode, unguarded
from .optimizers import make_optimizer
from .recipe import Recipe as Recipe

STAGE = "recover"  # as progress calls it
CHECKS = 10  # of the divergence from the dense network, over the run
NOISE = 0.05  # of a divergence: checks that are nearer to one another can't be told apart
JOURNAL_EVERY_S = 20.0
CLIP = 5.0  # norm of the gradient

Network = Callable[..., Any]


@dataclass(slots=True)
class Hooks:
    """What a method does while its network trains.

    Attributes:
        step: Called in place of the optimizer's step, with the optimizer and the number of the step from zero. The
            gradients are there, clipped; parameters are changed in place.
        after: Called before the first step and after each: puts masks back.
        state: What the hooks keep from step to step, tensors and plain values, for the journal.
        restore: Takes that state back.
        may_keep: Whether the weights of now may be those that are kept; always where None.
        settings: Plain values that the hooks follow: a journal of others is one of another training.
    """

    step: Callable[[torch.optim.Optimizer, int], None] | None = None
    after: Callable[[], None] | None = None
    state: Callable[[], dict[str, Any]] | None = None
    restore: Callable[[dict[str, Any]], None] | None = None
    may_keep: Callable[[], bool] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Trained:
    """What a training did.

    Attributes:
        losses: Of every step.
        divergences: ``(step, divergence from the dense network on the calibration data)`` of every check; the first is
            before any step. None where there is no calibration data or no dense network.
        step: Whose weights were kept: the number of steps that they had. Those of the check with the least divergence,
            the first one included; the last ones where nothing is compared.
        precision: Of forward and backward passes.
        time_s: Over all runs of a training that was resumed.
    """

    losses: list[float] = field(default_factory=list)
    divergences: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0
    precision: str = "float32"
    time_s: float = 0.0

    @property
    def divergence_before(self) -> float | None:
        return self.divergences[0][1] if self.divergences else None

    def moved(self, place: str = "the calibration data") -> str:
        """How far it came, in words; ``place`` is where the checks were made."""
        before, after = self.divergence_before, self.divergence_after
        if before is None or after is None:
            return "there was no dense network to compare it with"
        whose = "" if self.step == len(self.losses) else f", those of step {self.step} being the nearest"
        return f"divergence from the dense network on {place} {before:.3g} before, {after:.3g} after{whose}"

    @property
    def divergence_after(self) -> float | None:
        """Of the weights that were kept."""
        return next((value for step, value in reversed(self.divergences) if step == self.step), None)


def train(
    module: nn.Module,
    data: Data,
    task: Task,
    recipe: Recipe,
    *,
    teacher: Network | None,
    calibration: Data | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress,
    hooks: Hooks | None = None,
    features: Features | None = None,
    journal: Path | None = None,
    resume: bool = False,
) -> Trained:
    """Train a network in place.

    Args:
        module: Its tensors are its own: an unlifted program shares them with the program, a cut or a copy doesn't. Of
            an exported network all float parameters learn, of any other those that require gradients.
        data: Prepared by the task. Without targets, the dense network's outputs are all that is learnt.
        teacher: The dense network, in evaluation mode. Without it, the task's loss is all.
        calibration: Where the divergence from it is checked.
        seed: Of batches, augmentation and dropout.
        features: What is compared inside both networks, where both are exported and the recipe distils.
        journal: A file for the state while it runs, written every 20 seconds, at the end, and on SIGINT or SIGTERM.
        resume: Go on from the journal, where there is one.

    Raises:
        NumericsError: The loss or a tensor is no longer finite; names the step or the tensor.
        UsageError: Nothing to learn from, augmentation of what are no images, an unknown optimizer, or a journal of
            another training.
        InputError: The journal is damaged.
        DiskError: The journal can't be written.
    """
    if teacher is None and data.targets is None:
        raise UsageError(
            f"{data.name} has no labels to train with", hint="pass data with y, or train towards the dense network"
        )
    device, digest, hooks = device or CPU, "", hooks or Hooks()
    trained = Trained(precision=recipe.precision or ("bfloat16" if device.type == "cuda" else "float32"))
    if journal is not None:
        surroundings = [seed, task.name, trained.precision, hooks.settings]
        digest = training_digest(
            module, recipe, data=data, calibration=calibration, teacher=teacher, surroundings=surroundings
        )
    with ExitStack() as stack:
        stack.enter_context(_placed(module, device))
        dense = on_device(teacher, device) if isinstance(teacher, nn.Module) else teacher
        for network in (module, dense):
            stack.enter_context(unguarded(network))
        parameters = stack.enter_context(_learning(module))
        optimizer = make_optimizer(
            recipe.optimizer, parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        batches = training_batches(data, recipe.batch_size, augment=recipe.augment, seed=seed, device=device)
        inner = None
        if features is not None and recipe.features > 0 and (recipe.distill > 0 or data.targets is None):
            inner = _Inner(features, stack.enter_context(tapped(dense)), stack.enter_context(tapped(module)))
        going = _Run(module, task, recipe, dense, calibration, batches, hooks, optimizer, trained, inner)
        if journal is not None and resume and journal.is_file():
            going.restore(read_journal(journal, digest))
        # Dropout draws from the global generator, which is seeded in each step; the caller's comes back.
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        return _train(going, progress, _Journal(journal, digest))


def _train(going: _Run, progress: Progress, journal: _Journal) -> Trained:
    started, before = time.monotonic(), going.trained.time_s
    with signals_held(lambda: journal.save(going, at_once=True)) as release:

        def go_on() -> None:
            """What may happen where a state is whole."""
            journal.save(going)
            release()
            progress(STAGE, going.number, going.recipe.steps)

        if going.number == 0:
            if going.hooks.after is not None:
                going.hooks.after()
            going.check()
        while not going.is_over():
            until = going.next_check()
            with training_mode(going.module):
                while going.number < until:
                    going.step()
                    going.trained.time_s = before + time.monotonic() - started
                    if going.number < until:  # a state is whole after the check
                        go_on()
            going.check()
            go_on()
        journal.save(going, at_once=True)
    going.keep_best()
    _require_finite(going.module)
    return going.trained


@dataclass(slots=True)
class _Journal:
    """Where the state is kept; without a path, nowhere."""

    path: Path | None
    digest: str
    saved: float = field(default_factory=time.monotonic)

    def save(self, going: _Run, *, at_once: bool = False) -> None:
        if self.path is not None and (at_once or time.monotonic() - self.saved > JOURNAL_EVERY_S):
            write_journal(self.path, self.digest, going.state())
            self.saved = time.monotonic()


@dataclass(slots=True)
class _Inner:
    """Features, and their values in the dense network and in the one that is trained."""

    features: Features
    dense: Values
    small: Values


@dataclass(slots=True)
class _Run:
    """A training that is under way.

    Attributes:
        number: Of steps made.
        best: Tensors of the check with the least divergence, of those that may be kept.
        best_step: Steps before it.
        stale: Checks since then.
    """

    module: nn.Module
    task: Task
    recipe: Recipe
    teacher: Network | None
    calibration: Data | None
    batches: Batches
    hooks: Hooks
    optimizer: torch.optim.Optimizer
    trained: Trained
    inner: _Inner | None = None
    number: int = 0
    best: dict[str, Tensor] | None = None
    best_step: int = 0
    least: float = math.inf
    stale: int = 0

    def is_over(self) -> bool:
        patience = self.recipe.patience
        return self.number >= self.recipe.steps or (patience is not None and self.stale >= patience)

    def next_check(self) -> int:
        """The step that a check follows."""
        every = math.ceil(self.recipe.steps / CHECKS)
        return min(self.recipe.steps, (self.number // every + 1) * every)

    def check(self) -> None:
        """Measure how far the network is from the dense one: where it may be kept, and before any step."""
        self.trained.step = self.number
        may_keep = self.hooks.may_keep is None or self.hooks.may_keep()
        if self.teacher is None or self.calibration is None or not (may_keep or self.number == 0):
            return
        found = divergence_from(self.teacher, self.module, self.calibration, self.task, self.batches.device)
        self.trained.divergences.append((self.number, found))
        if not may_keep:
            return
        self.stale += 1
        if found < self.least:
            self.least, self.best_step, self.stale = found, self.number, 0
            self.best = {name: value.detach().clone() for name, value in _tensors(self.module).items()}

    def keep_best(self) -> None:
        """Keep the end, where the learning rate has come down, unless a check was nearer by more than noise."""
        end = self.trained.divergences[-1][1] if self.trained.divergences else math.inf
        if self.best is not None and (self.recipe.patience is not None or self.least < (1 - NOISE) * end):
            _copy(self.best, self.module)
            self.trained.step = self.best_step

    def step(self) -> None:
        recipe = self.recipe
        batch = self.batches.at(self.number)
        torch.manual_seed(step_seed(self.batches.seed, self.number, DROPOUT))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * recipe.rate(self.number)
        self.optimizer.zero_grad(set_to_none=True)
        needs_graph = bool(getattr(self.optimizer, "needs_graph", False))
        loss = self._loss(batch, needs_graph=needs_graph)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericsError(
                f"the loss of training step {self.number + 1} of {recipe.steps} is {value}",
                hint=f"lower --lr (now {self.optimizer.param_groups[0]['initial_lr']:g}), or check the training data",
            )
        _backward(loss, needs_graph=needs_graph)
        if not needs_graph:
            nn.utils.clip_grad_norm_((p for group in self.optimizer.param_groups for p in group["params"]), CLIP)
        if self.hooks.step is None:
            self.optimizer.step()
        else:
            self.hooks.step(self.optimizer, self.number)
        if self.hooks.after is not None:
            self.hooks.after()
        self.trained.losses.append(value)
        self.number += 1

    def _loss(self, batch: Data, *, needs_graph: bool) -> Tensor:
        is_mixed = self.trained.precision == "bfloat16"
        is_learnt = self.recipe.distill > 0 or batch.targets is None
        wanted = None
        with torch.autocast(self.batches.device.type, torch.bfloat16, enabled=is_mixed):
            if self.teacher is not None and is_learnt:
                with torch.no_grad():
                    wanted = first_tensor(run(self.teacher, batch, self.batches.device))
            # Only the plain kernel of attention can be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH) if needs_graph else nullcontext():
                outputs = run(self.module, batch, self.batches.device)
        recipe = self.recipe
        loss = loss_of(
            self.task, outputs, batch.targets, wanted, distill=recipe.distill, temperature=recipe.temperature
        )
        if self.inner is not None and wanted is not None:
            apart = self.inner.features.distance(self.inner.dense, self.inner.small)
            loss = loss if apart is None else loss + recipe.features * apart
            self.inner.dense.clear()
            self.inner.small.clear()
        if not loss.requires_grad:
            raise UsageError(
                f"the loss of task {self.task.name} doesn't depend on any parameter that is trained",
                hint="its outputs may be detached in the network's forward or in the task's loss",
            )
        return loss

    def state(self) -> dict[str, Any]:
        return {
            "module": _tensors(self.module),
            "optimizer": self.optimizer.state_dict(),
            "hooks": {} if self.hooks.state is None else self.hooks.state(),
            "number": self.number,
            "best": self.best,
            "best_step": self.best_step,
            "least": self.least,
            "stale": self.stale,
            "trained": asdict(self.trained),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        _copy(state["module"], self.module)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.hooks.restore is not None:
            self.hooks.restore(state["hooks"])
        self.number, self.least, self.stale = state["number"], state["least"], state["stale"]
        self.best_step = state["best_step"]
        self.best = None if state["best"] is None else dict(state["best"])
        self.trained = Trained(**state["trained"])


def _backward(loss: Tensor, *, needs_graph: bool) -> None:
    with warnings.catch_warnings():
        # A gradient that keeps its graph makes a reference cycle: zero_grad breaks it in the next step.
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        torch.autograd.backward(loss, create_graph=needs_graph)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _copy(state: Mapping[str, Tensor], module: nn.Module) -> None:
    with torch.no_grad():
        for name, value in _tensors(module).items():
            value.copy_(state[name])


@contextmanager
def _placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """On the device, and back where it was."""
    home = next((tensor.device for tensor in module.parameters()), device)
    move(module, device)
    try:
        yield
    finally:
        move(module, home)


@contextmanager
def _learning(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters that are trained, whose flags and gradients are put back."""
    # A cut or a quantized network's parameters need no gradients, whatever the user's did.
    is_exported = any(isinstance(part, fx.GraphModule) for part in module.modules())
    found = [(p, p.requires_grad, p.grad) for p in module.parameters() if p.is_floating_point()]
    chosen = [p for p, needed, _ in found if needed or is_exported]
    if not chosen:
        raise UsageError("the network has no float parameters to train", hint="set requires_grad on some")
    try:
        for p in chosen:
            p.requires_grad_(True)
            p.grad = None
        yield chosen
    finally:
        for p, needed, gradient in found:
            p.requires_grad_(needed)
            p.grad = gradient


def _require_finite(module: nn.Module) -> None:
    """A last step may spoil what no loss was computed of; a buffer may hold infinities on purpose, as masks do."""
    found = [(name, torch.isfinite(value).all()) for name, value in module.named_parameters()]
    found += [(name, ~torch.isnan(value).any()) for name, value in module.named_buffers() if value.is_floating_point()]
    bad = next((name for name, is_right in found if not is_right), None)
    if bad is not None:
        raise NumericsError(f"{bad} holds NaN or Inf after the training", hint="lower --lr")
