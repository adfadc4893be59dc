"""Training after a cut: a plan's network learns from the dense one, and what it learnt becomes part of the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from .apply import (
    Compressed,
    activation_grids,
    apply_plan,
    levels_keys,
    levels_sha256,
    masks_of,
    moved_values,
    with_values,
)
from .data import Data, check_forward
from .errors import UsageError
from .formats.packed import QuantizedTensor
from .graph.groups import find_channels
from .graph.rewrite import tensor_names
from .graph.trace import Graph
from .job import Job, device_of, read_named
from .plan import Decision, Plan, Quantize, grid_bits
from .pruned import Pruned, prune, trainable_copy
from .settings import Settings
from .task import check_targets
from .train.augment import NAMES, require_images
from .train.features import Features
from .train.journal import delete_journals
from .train.loop import Hooks, train
from .train.masks import hold_masks
from .train.optimizers import RATES
from .train.recipe import Recipe, Training
from .train.step_sizes import StepSizes, learn_step_sizes

DEFAULT_STEPS = 250
ROUNDED_DIVISOR = 1.5  # of the usual learning rate, for rounded networks
ROUNDED_FEATURES = 0.0  # by the usual weight a ResNet-20 of 2 bits falls by 1 to 11 points midway
CHECKED = 2048  # training examples for the checks: 512 said the opposite of 2,000 at 3 bits
SPARSE = 0.8  # from where weights that go while it trains were found to be better
TRAINING_DATA = "training data"  # in the memo of a job


def recipe_of(settings: Settings, examples: int, *, usual_optimizer: str, default: int = 0) -> Recipe | None:
    """How the settings say that a network is trained; None where they don't ask for it.

    Raises:
        UsageError: Both steps and epochs are given, an augmentation is unknown, or a value is out of range.
    """

    def given(name: str) -> Any:
        return settings[name].value

    steps, epochs = int(given("recover_steps") or 0), float(given("recover_epochs") or 0.0)
    if steps and epochs:
        raise UsageError("--recover-steps and --recover-epochs say the same", hint="pass one of them")
    batch_size = int(given("batch_size"))
    steps = steps or math.ceil(epochs * examples / batch_size)
    steps = steps or default
    if not steps:
        return None
    augment = tuple(name for name in given("augment") or () if name != "none")
    unknown = [name for name in augment if name not in NAMES]
    if unknown:
        raise UsageError(f"--augment {unknown[0]!r} is unknown", hint=f"choices: none, {', '.join(NAMES)}")
    lr, patience = given("lr"), given("patience")
    return Recipe(
        steps,
        optimizer=str(given("optimizer") or usual_optimizer),
        lr=None if lr is None else float(lr),
        schedule=str(given("schedule")),
        batch_size=batch_size,
        augment=augment,
        distill=float(given("distill")),
        features=float(given("distill_features")),
        patience=None if patience is None else int(patience),
    )


def _usual_optimizer(graph: Graph) -> str:
    """What networks of the kind are trained with: SGD where there are convolutions, AdamW elsewhere."""
    return "sgd" if any(layer.op.startswith("conv") for layer in graph.layers) else "adamw"


def is_asked(settings: Settings) -> bool:
    """Whether the settings ask for training."""
    return bool(settings["recover_steps"].value or settings["recover_epochs"].value)


def training(job: Job, *, journal: Path | None, resume: bool) -> Training:
    """What a method that trains is handed: by default for ``DEFAULT_STEPS``."""
    data = training_data(job)
    recipe = recipe_of(job.settings, len(data), usual_optimizer=_usual_optimizer(job.graph), default=DEFAULT_STEPS)
    assert recipe is not None
    job.notes.append(described(recipe, data))
    _note_start(job, journal, resume=resume)
    if journal is not None and not resume:
        delete_journals(journal)
    return Training(data, recipe, int(job.value("seed")), journal, resume)


def _note_start(job: Job, journal: Path | None, *, resume: bool) -> None:
    if resume and journal is not None and not journal.is_file():
        job.notes.append(f"--resume found no {journal.name}: the training started anew")


def described(recipe: Recipe, data: Data) -> str:
    """A training in words."""
    return f"{recipe.steps} training steps of {recipe.batch_size} on {len(data):,} examples of {data.name}"


def training_data(job: Job) -> Data:
    """``--train``, or all of ``--data``, read once; checked against the network and the settings.

    Raises:
        UsageError: Neither is given, or they can't be trained on as asked.
    """
    if TRAINING_DATA not in job.memo:
        job.progress("read training data", 0, None)
        name = "train" if job.value("train") is not None else "data"
        data = job.task.prepare(read_named(job.settings, name))
        check_targets(job.task, check_forward(job.source.module, data, f"--{name}"), data)
        require_images(
            data.inputs[0], [augmentation for augmentation in job.value("augment") if augmentation != "none"]
        )
        if data.targets is None and job.value("distill") == 0:
            raise UsageError(
                f"--distill 0 leaves nothing to learn: {data.name} has no labels",
                hint="pass data with y, or --distill 1",
            )
        job.memo[TRAINING_DATA] = data
    found: Data = job.memo[TRAINING_DATA]
    return found


def recovered(
    job: Job, plan: Plan, sidecar: Mapping[str, Tensor], *, journal: Path | None, resume: bool
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of the network after training, and its sidecar.

    Raises:
        NumericsError: The loss is no longer finite.
        UsageError: Nothing to train on.
    """
    data = training_data(job)
    _note_start(job, journal, resume=resume)
    recipe = recipe_of(job.settings, len(data), usual_optimizer=_usual_optimizer(job.graph))
    assert recipe is not None
    if plan.quantized("weight"):
        recipe = _of_rounded(recipe, job.settings)
    pruned = prune(job.graph, plan)
    graph = job.graph if pruned is None else pruned.graph
    compressed = apply_plan(job.source.module, job.graph.tied, plan, sidecar, pruned)
    state = compressed.state()
    module = trainable_copy(graph, state)
    step_sizes = _step_sizes(module, plan, compressed, job)
    teacher = trainable_copy(job.graph, dict(job.source.module.state_dict()))
    masks = masks_of(plan, sidecar, state)
    if masks and plan.predicted.get("sparsity", 0.0) >= SPARSE and not plan.quantized("weight"):
        job.notes.append(f"from sparsity {SPARSE:g} on, --method gradual may keep more: weights go while it trains")
    checked, place = None if job.calibration is None else job.calibration.data, "the calibration data"
    if checked is not None and step_sizes is not None:
        # What it starts from was chosen on the calibration examples, and is nearer on them than on any others.
        checked = data.sample(max(CHECKED, len(checked)), plan.seed + 1)
        place = f"{len(checked):,} training examples"
    trained = train(
        module,
        data,
        job.task,
        recipe,
        teacher=teacher,
        calibration=checked,
        seed=plan.seed,
        device=device_of(job.settings),
        progress=job.progress,
        hooks=Hooks(after=hold_masks(module, masks) if step_sizes is None else step_sizes.hold),
        features=_features(job.graph, pruned),
        journal=journal,
        resume=resume,
    )
    job.notes.append(f"{described(recipe, data)}; {trained.moved(place)}")
    if trained.step == 0:
        job.notes.append("training did not help: its start is the nearest to the dense network, and is kept")
        return plan, dict(sidecar)
    if step_sizes is not None:
        plan, sidecar = _with_levels(plan, sidecar, step_sizes.rounded())
        state = {name: value for name, value in state.items() if name not in step_sizes.stored}
    plan = replace(plan, options={**plan.options, "recover": asdict(recipe)})
    return with_values(plan, sidecar, moved_values(module, state), masks)


def _of_rounded(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe of a rounded network, in what the settings leave open."""
    lr = RATES[recipe.optimizer] / ROUNDED_DIVISOR if recipe.lr is None else recipe.lr
    features = ROUNDED_FEATURES if settings["distill_features"].origin == "default" else recipe.features
    return replace(recipe, lr=lr, features=features)


def _step_sizes(module: fx.GraphModule, plan: Plan, compressed: Compressed, job: Job) -> StepSizes | None:
    """What a quantized network trains with; None where nothing is rounded."""
    choices = {name: d for name, d in plan.quantized("weight").items() if name in tensor_names(module)}
    weights = {name: value for name, value in compressed.tensors.items() if isinstance(value, QuantizedTensor)}
    if not choices:
        return None
    dense = job.source.module.state_dict()
    return learn_step_sizes(
        module,
        {name: weights[name] for name in choices},
        {name: grid_bits(choice.bits, choice.scheme) for name, choice in choices.items()},
        activation_grids(plan.quantized("activation")),
        {name: dense[name] == 0 for name in choices if bool((dense[name] == 0).any())},
    )


def _with_levels(
    plan: Plan, sidecar: Mapping[str, Tensor], weights: Mapping[str, QuantizedTensor]
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with other levels and scales."""
    tensors = dict(sidecar)
    decisions: list[Decision] = []
    for decision in plan.decisions:
        found = weights.get(decision.tensor)
        if isinstance(decision, Quantize) and decision.target == "weight" and found is not None:
            tensors |= dict(zip(levels_keys(decision.tensor), (found.levels, found.scale), strict=True))
            decision = replace(decision, values_sha256=levels_sha256(found.levels, found.scale))
        decisions.append(decision)
    return replace(plan, decisions=tuple(decisions)), tensors


def _features(graph: Graph, pruned: Pruned | None) -> Features:
    return Features(find_channels(graph)) if pruned is None else Features(pruned.channels, lambda: pruned.kept)
