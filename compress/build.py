"""From decisions to files: what a plan costs on disk, the plan written and read, the model files built."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from . import canonical, figures, store
from .apply import Compressed
from .apply import apply_plan as apply_decisions
from .budget import Budget
from .context import Context, Storage
from .errors import BudgetError, InputError, UsageError
from .export import USUAL, Form, compact_size, form_notes, onnx_model, safetensors_bytes, serialize, write_program
from .float_storage import DTYPES, assemble_stored
from .formats.checkpoint import read_checkpoint
from .formats.onnx_dynamic import dynamic_weights
from .formats.onnx_sparse import expected_bits, expected_bytes
from .formats.planes import packed_size
from .graph.dynamic import integer_linears, round_inputs
from .graph.trace import Graph
from .job import Job, device_of, input_specs, memory_of
from .model import PROGRAM, WEIGHTS, Source
from .plan import Plan, read_plan
from .pruned import Cut, check_cut, prune
from .quantize.points import group_sizes_of
from .registry import find_runtime
from .sensitivity import Sensitivity
from .settings import Settings
from .widths import CHANNEL_BYTES, Width, is_mixed, mean_bits

ONNX, PLAN, SIDECAR = "model.onnx", "plan.json", "plan.safetensors"


@dataclass(frozen=True, slots=True)
class Dense:
    """The dense network's files.

    Attributes:
        onnx: As it is, in float32: what relative budgets mean, and what others are compared with.
        sizes: Bytes of its files, by name, in the form that the run writes, in which what it has beside its weights
            takes what it takes in a compressed network.
    """

    onnx: bytes
    sizes: Mapping[str, int]


def dense_files(job: Job) -> Dense:
    job.progress("export dense", 0, None)
    form, is_cut, module = form_of(job.settings), bool(job.source.cuts), job.source.module
    compressed = Compressed(dict(module.state_dict()), None)
    usual = plain_onnx(job.graph, module, is_cut=is_cut)
    written = usual if form == USUAL else plain_onnx(job.graph, module, is_cut=is_cut, form=form)
    stored, _ = assemble_stored(job.graph, compressed, DTYPES[form.float_storage])
    size = compact_size(written) if _packs(job) else len(written)
    return Dense(usual, {ONNX: size, WEIGHTS: len(safetensors_bytes(stored))})


def plain_onnx(graph: Graph, module: nn.Module, *, is_cut: bool = False, form: Form = USUAL) -> bytes:
    """The ONNX file of a network as it is, which ``graph`` was traced from."""
    compressed = Compressed(dict(module.state_dict()), None)
    stored, assembled = assemble_stored(graph, compressed, DTYPES[form.float_storage])
    return serialize(onnx_model(graph, stored, assembled, is_cut=is_cut, form=form))


def form_of(settings: Settings) -> Form:
    """How a run's files are written."""
    return Form(str(settings["runtime"].value), str(settings["float_storage"].value))


def delivered_name(settings: Settings) -> str:
    return WEIGHTS if settings["for"].value == "safetensors" else ONNX


def planning_context(job: Job, dense: Dense, overhead: int) -> Context:
    """What planners are handed; sizes follow from the dense file, each weight's storage and a measured overhead."""
    elements = {layer.tensor: layer.elements for layer in job.graph.layers}
    channels = {layer.tensor: 1 if layer.axis is None else layer.shape[layer.axis] for layer in job.graph.layers}
    sizes = {"group_size": job.value("group_size")}
    groups = {t: -(-job.graph.layer(t).shape[1] // size) for t, size in group_sizes_of(job.graph.layers, sizes).items()}
    state = job.source.module.state_dict()
    delivered = delivered_name(job.settings)
    is_safetensors, base = delivered == WEIGHTS, dense.sizes[delivered]
    packs, float_bytes = is_safetensors or _packs(job), _float_bytes(job)

    def size(count: int, bits: Width) -> int:
        if bits == 32:
            return float_bytes * count
        return packed_size(count, bits if packs else 8)

    def stored(name: str, storage: Storage) -> int:
        if is_mixed(storage.bits) and packs:
            return packed_size(elements[name], storage.bits) + (4 + CHANNEL_BYTES) * channels[name]
        whole = size(elements[name], storage.bits)
        scales = 0 if storage.bits == 32 else (2 * groups[name] if name in groups else 4) * channels[name]
        if not packs or storage.kept == elements[name]:
            return whole + scales
        if is_safetensors:
            return min(whole, size(storage.kept, storage.bits) + packed_size(elements[name], 1)) + scales
        bits = survivor_bits(name) if storage.bits == 32 else mean_bits(storage.bits)
        return min(whole, expected_bytes(elements[name], storage.kept, bits)) + scales

    @functools.cache
    def survivor_bits(name: str) -> float:
        dtype = DTYPES[form_of(job.settings).float_storage]
        return expected_bits(state[name].to(dtype).float().cpu().numpy(), 1 - round(math.log2(torch.finfo(dtype).eps)))

    def model_bytes(choices: Mapping[str, Storage]) -> int:
        now = sum(stored(name, Storage(int(torch.count_nonzero(state[name])), 32)) for name in choices)
        return base + (overhead if choices else 0) - now + sum(stored(n, storage) for n, storage in choices.items())

    generator = torch.Generator().manual_seed(int(job.value("seed")))
    return Context(
        generator,
        device_of(job.settings),
        job.progress,
        model_bytes,
        [],
        overhead=overhead,
        memory=memory_of(job.settings),
    )


def _packs(job: Job) -> bool:
    """Whether model.onnx takes weights at their bits and without their zeros."""
    return find_runtime(form_of(job.settings).runtime).packs


def _float_bytes(job: Job) -> int:
    """Bytes of a float in the files."""
    return DTYPES[form_of(job.settings).float_storage].itemsize


def absolute_budget(budget: Budget | None, dense: Dense) -> Budget | None:
    """A byte budget relative to the dense ONNX file, whatever file is delivered, as an absolute one."""
    if budget is None or budget.quantity != "bytes":
        return budget
    return Budget("bytes", budget.absolute(len(dense.onnx)))


def overhead_of(job: Job, built: Built, plan: Plan, budget: Budget | None, dense: Dense, known: int) -> int | None:
    """None if the written file keeps a byte budget; else the bytes to expect of a file beyond what its weights predict.

    Args:
        known: Of those, what the plan was made with. Survivors take more in one file and less in the next: each pass
            expects at least as much more as the last file had too much, so that passes come to an end.
    """
    limit = absolute_budget(budget, dense)
    written = built.sizes[delivered_name(job.settings)]
    if limit is None or limit.quantity != "bytes" or written <= limit.limit:
        return None
    return max(written - _predicted_bytes(job, plan, dense), known + written - math.floor(limit.limit))


def _predicted_bytes(job: Job, plan: Plan, dense: Dense) -> int:
    """Bytes of the delivered file as the storage of the weights predicts them."""
    if plan.channels():
        whole = sum(parameter.numel() for parameter in job.source.module.parameters())
        return planning_context(job, dense, 0).model_bytes({}) - round(
            _float_bytes(job) * (whole - plan.predicted["params"])
        )
    state = job.source.module.state_dict()
    choices = {name: Storage(mask.kept, 32) for name, mask in plan.masks().items()}
    for name, choice in plan.quantized("weight").items():
        choices[name] = Storage(int(torch.count_nonzero(state[name])), choice.bits)
    return planning_context(job, dense, 0).model_bytes(choices)


def infeasible(job: Job, built: Built, budget: Budget | None) -> BudgetError:
    """The method has no smaller plan: what it wrote is the feasible minimum."""
    name = delivered_name(job.settings)
    size = built.sizes[name]
    return BudgetError(
        f"{budget} is out of reach: the smallest {name} of this method has {size} bytes",
        hint=f"raise --budget to at least {size}B, or combine methods: a run folder is a checkpoint like any other",
    )


def sealed(plan: Plan, tensors: dict[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with the hash of its sidecar."""
    if not tensors:
        return plan, {}
    return replace(plan, sidecar=canonical.sha256_of_bytes(sidecar_bytes(tensors))), tensors


def sidecar_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file whose bytes depend on nothing but the tensors."""
    return safetensors.torch.save({name: tensors[name] for name in sorted(tensors)})


def write_plan(stage: Path, plan: Plan, sidecar: dict[str, Tensor]) -> None:
    if sidecar:
        store.write_file(stage / SIDECAR, sidecar_bytes(sidecar))
    store.write_file(stage / PLAN, canonical.dumps(plan))


def read_plan_files(path: Path) -> tuple[Plan, dict[str, Tensor]]:
    path = path / PLAN if path.is_dir() else path
    plan = read_plan(path)
    if plan.sidecar is None:
        return plan, {}
    sidecar = path.parent / SIDECAR
    if not sidecar.is_file():
        raise InputError(f"{sidecar}: no such file, though {path.name} names it", hint="keep the two files together")
    if canonical.sha256_of_file(sidecar) != plan.sidecar:
        raise InputError(
            f"{sidecar}: not the sidecar that {path.name} was written with", hint="keep the two files together"
        )
    return plan, read_checkpoint(sidecar).state


def dry_run_record(job: Job, plan: Plan, built: Built) -> dict[str, Any]:
    """What a run would decide; the files were built, measured and thrown away."""
    parameters = sum(t.numel() * t.element_size() for t in job.source.module.state_dict().values())
    calibration = (
        0 if job.calibration is None else sum(x.numel() * x.element_size() for x in job.calibration.data.inputs)
    )
    activations = sum(
        4 * value.numel() // len(job.graph.example_inputs[0]) * 64
        for node in job.graph.program.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and not isinstance(value.numel(), torch.SymInt)
    )
    return {
        "schema": "hcompress.dry-run/1",
        "method": plan.method,
        "predicted": {**plan.predicted, **{f"{n}_bytes": s for n, s in built.sizes.items()}},
        "decisions": canonical.plain(plan.decisions),
        # Weights: source, trace, compressed copy, ONNX twice. torch and onnxruntime themselves take about 400 MB.
        "memory_bytes": 400_000_000 + 5 * parameters + calibration + activations,
        "notes": job.notes,
    }


@dataclass(frozen=True, slots=True)
class Built:
    """A compressed network with its files written.

    Attributes:
        graph: What is left of the job's; the same one where no channels were cut.
        original: The source's state dict, less what was cut.
        group_sparsity: Share of the channels that the plan cuts; None where it cuts none.
        notes: What the report says of the files.
    """

    compressed: Compressed
    module: fx.GraphModule
    onnx: bytes
    sizes: dict[str, int]
    graph: Graph
    original: Mapping[str, Tensor]
    group_sparsity: float | None
    notes: list[str]


def build(job: Job, plan: Plan | None, sidecar: Mapping[str, Tensor], stage: Path) -> Built:
    """Apply the plan and write the files that a budget may be of into the stage; ``with_program`` adds the other.

    Raises:
        GateError: The network without the plan's channels isn't what it is with them at zero.
    """
    job.progress("apply", 0, None)
    original, graph, cuts = dict(job.source.module.state_dict()), job.graph, job.source.cuts
    group_sparsity = None
    if plan is None:
        compressed = Compressed(original, None)
    else:
        pruned = prune(job.graph, plan)
        if pruned is not None:
            job.progress("prove the cut", 0, None)
            check_cut(job.graph, pruned.channels, pruned.kept, seed=plan.seed)
            original, graph = pruned.sliced(original, job.graph.tied), pruned.graph
            group_sparsity = 1 - int(pruned.kept.sum()) / len(pruned.kept)
            cuts = (*cuts, Cut(tuple(plan.channels().values()), input_specs(job.graph.example_inputs)))
        compressed = apply_decisions(job.source.module, job.graph.tied, plan, sidecar, pruned)
    form = form_of(job.settings)
    compressed, module = assemble_stored(
        graph, compressed, DTYPES[form.float_storage], float_addends=form.float_addends
    )
    job.progress("export", 0, None)
    dynamic = _dynamic_layers(module) if plan is not None and figures.is_dynamic(plan) else set()
    model = onnx_model(graph, compressed, module, is_cut=bool(cuts), form=form, dynamic=dynamic)
    if rounded := dynamic_weights(model):
        round_inputs(module, rounded)
    onnx = serialize(model)
    store.write_file(stage / ONNX, onnx)
    weights = None if plan is None else unchanged_bytes(job.source, compressed, plan)
    store.write_file(stage / WEIGHTS, safetensors_bytes(compressed, cuts) if weights is None else weights)
    sizes = {name: (stage / name).stat().st_size for name in (ONNX, WEIGHTS)}
    return Built(compressed, module, onnx, sizes, graph, original, group_sparsity, form_notes(model, dynamic))


def unchanged_bytes(source: Source, compressed: Compressed, plan: Plan) -> bytes | None:
    """The bytes of a checkpoint in safetensors of which a plan leaves every bit; None where it is something else.

    So that what comes out is what went in, metadata and order of tensors included. With a budget of bytes the file is
    written anew, as our own form may take fewer.
    """
    state = source.module.state_dict()
    is_file = source.format in ("safetensors", "run") and source.example_inputs is None
    is_small = plan.budget is not None and plan.budget.quantity == "bytes"
    if not is_file or is_small or plan.options.get("equalization") or compressed.tensors.keys() != state.keys():
        return None
    for name, value in compressed.tensors.items():
        if not isinstance(value, Tensor) or not _same_bits(value, state[name]):
            return None
    data = (source.path / WEIGHTS if source.path.is_dir() else source.path).read_bytes()
    return data if canonical.sha256_of_bytes(data) == source.sha256 else None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(one, other)


def with_program(job: Job, built: Built, stage: Path) -> Built:
    """Write model.pt2 too, of the network that is decided: searches build many."""
    job.progress("export program", 0, None)
    path = stage / PROGRAM
    try:
        write_program(built.module, built.graph.example_inputs, path)
    except OSError as error:
        raise store.disk_error(path, error) from error
    return replace(built, sizes={**built.sizes, PROGRAM: path.stat().st_size})


def _dynamic_layers(module: fx.GraphModule) -> set[str]:
    """The levels of the weights whose products round their activations as they come.

    Raises:
        UsageError: There are none.
    """
    found = integer_linears(module)
    if not found:
        raise UsageError(
            "--activations dynamic rounds the inputs of linear layers, and none has a quantized weight of its own",
            hint="--activations 8 rounds those of convolutions as well; float rounds none",
        )
    return found


def write_sensitivities(stage: Path, sensitivities: Mapping[str, Sensitivity]) -> None:
    """The first record as sensitivity.json, further ones under their measure's name."""
    for number, (name, record) in enumerate(sensitivities.items()):
        store.write_file(stage / f"{name if number else 'sensitivity'}.json", canonical.dumps(record.to_json()))
