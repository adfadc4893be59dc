"""What can be plugged in, as strings: names and one-line descriptions are known without importing torch.

A new method, task or measure is one file and one line here; the CLI's choices, ``hcompress methods``, the docs table
and the contract test follow from it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Method:
    """A compression method.

    Attributes:
        job: ``prune`` or ``quantize``: the command that offers it.
        module: Where ``plan(source, graph, sensitivities, calibration, budget, options, context)`` lives.
        options: Settings that it reads, in the order of its docs.
        budgets: Quantities that it can meet.
        measures: Sensitivities that it needs.
        mixed_measures: Those that it needs as well where activations have widths of their own.
        needs_data: Whether it decides on calibration data.
        holds_gradients: Whether it holds a gradient of each example, for which there is ``--memory``.
        searches: Whether it finds the smallest model that passes the gates where no budget is given: by the points of
            its frontier (``at_point``), or by ever smaller ``candidates``.
        trains: Whether it trains the network while it decides, by the settings of recovery.
    """

    name: str
    job: str
    module: str
    summary: str
    source: str
    options: tuple[str, ...]
    budgets: tuple[str, ...]
    measures: tuple[str, ...] = ()
    mixed_measures: tuple[str, ...] = ()
    needs_data: bool = True
    holds_gradients: bool = False
    searches: bool = False
    trains: bool = False


ROUNDING = (  # options of methods that give a whole weight one width
    "activations", "activation_range", "equalization", "range", "group_size", "reconstruction", "bias_correction",
    "exclude",
)  # fmt: skip
METHODS = (
    Method(
        name="layerwise",
        job="prune",
        module="compress.prune.layerwise",
        summary="zero the weights that the outputs miss least, and fit layer by layer what is left; no training",
        source="Frantar et al. 2022, Optimal Brain Compression (arXiv:2208.11580); 2023, SparseGPT (arXiv:2301.00774)",
        options=("sparsity", "scope", "pattern", "exclude"),
        budgets=("sparsity", "bytes", "macs"),
        searches=True,
    ),
    Method(
        name="obs",
        job="prune",
        module="compress.prune.obs",
        summary="zero the weights that the loss misses least, by M-FAC curvature, and move the others to make up",
        source="Frantar et al. 2021, M-FAC (arXiv:2107.03356); Hassibi and Stork 1993, OBS",
        options=(
            "sparsity",
            "scope",
            "pattern",
            "exclude",
            "rounds",
            "fisher",
            "fisher_batch",
            "clip_gradients",
            "block_size",
        ),
        budgets=("sparsity", "bytes", "macs"),
        measures=("weight-error",),
        holds_gradients=True,
        searches=True,
    ),
    Method(
        name="magnitude",
        job="prune",
        module="compress.prune.magnitude",
        summary="zero the smallest weights or blocks: over the whole network, per layer, or n of every m",
        source="Han et al. 2015 (arXiv:1506.02626); n:m: Mishra et al. 2021; blocks: Narang et al. 2017",
        options=("sparsity", "scope", "pattern", "exclude"),
        budgets=("sparsity", "bytes", "macs"),
        measures=("weight-error",),
        needs_data=False,
    ),
    Method(
        name="gradual",
        job="prune",
        module="compress.prune.gradual",
        summary="zero the smallest weights while the network trains; those that grow come back until late",
        source="Zhu and Gupta 2018 (arXiv:1710.01878); Lin et al. 2020, DPF (arXiv:2006.07253)",
        options=("sparsity", "scope", "pattern", "exclude"),
        budgets=("sparsity", "bytes", "macs"),
        trains=True,
    ),
    Method(
        name="structured-obs",
        job="prune",
        module="compress.prune.structured_obs",
        summary="cut the channels that the loss misses least, and fit the layers around them; no training",
        source="Hassibi and Stork 1993, OBS; He et al. 2017 (arXiv:1707.06168)",
        options=("sparsity", "exclude", "multiple_of"),
        budgets=("macs", "params", "bytes", "latency", "sparsity"),
    ),
    Method(
        name="hesso",
        job="prune",
        module="compress.prune.hesso_plan",
        summary="cut channels while the network trains: the least salient ones shrink to zero, the others train on",
        source="Chen et al. 2024, HESSO (arXiv:2409.09085); OTO (arXiv:2107.07467, 2312.09411)",
        options=("sparsity", "exclude", "multiple_of"),
        budgets=("macs", "params", "bytes", "latency", "sparsity"),
        trains=True,
    ),
    Method(
        name="cric",
        job="prune",
        module="compress.prune.cric_plan",
        summary="hesso whose channels are tried at zero, and put back, before any of them goes",
        source="Chen et al. 2024, HESSO-CRIC (arXiv:2409.09085)",
        options=("sparsity", "exclude", "multiple_of"),
        budgets=("macs", "params", "bytes", "latency", "sparsity"),
        trains=True,
    ),
    Method(
        name="output-change",
        job="quantize",
        module="compress.quantize.output_change",
        summary="a width for each channel, by what rounding does to the outputs, on the exact Pareto frontier",
        source="Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), for the frontier; reverse water-filling for the channels",
        options=(
            "activations",
            "activation_range",
            "equalization",
            "channel_widths",
            "group_size",
            "reconstruction",
            "bias_correction",
            "exclude",
            "keep",
            "tie",
        ),
        budgets=("bits", "bytes", "bops", "latency"),
        searches=True,
    ),
    Method(
        name="hawq",
        job="quantize",
        module="compress.quantize.hawq",
        summary="a bit width for each weight, on the exact Pareto frontier of cost and expected loss",
        source="Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852)",
        options=(*ROUNDING, "keep", "tie"),
        budgets=("bits", "bytes", "bops", "latency"),
        measures=("hessian-trace",),
        mixed_measures=("activation-trace",),
        searches=True,
    ),
    Method(
        name="uniform",
        job="quantize",
        module="compress.quantize.uniform",
        summary="the same bit width, 2 to 8, for every weight; activations at 8, 6 or 4, or float",
        source="Jacob et al. 2018 (arXiv:1712.05877); Nagel et al. 2021 (arXiv:2106.08295)",
        options=ROUNDING,
        budgets=("bits", "bytes"),
        measures=("weight-error",),
    ),
)


@dataclass(frozen=True, slots=True)
class Measure:
    """A sensitivity that methods read and reports show.

    Attributes:
        module: Where ``measure(source, graph, calibration, options, context)`` lives, and, where it makes more than one
            pass over the data, ``repeats(options, total)`` (``sensitivity.Repeats``).
        options: Settings that it reads.
        needs_data: Whether it asks for calibration data.
        of_weights: Whether its layers are the network's weights; else they are activations.
    """

    name: str
    module: str
    summary: str
    source: str
    options: tuple[str, ...] = ()
    needs_data: bool = True
    of_weights: bool = True


COMPARED = ("hessian-trace", "hessian-diagonal")  # what predictors of the loss are compared by
MEASURES = (
    Measure(
        name="hessian-trace",
        module="compress.measure.hessian_trace",
        summary="curvature trace of every layer: Gauss-Newton, all layers at once, or the exact Hessian",
        source="Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852)",
        options=("trace", "estimator", "rtol", "passes"),
    ),
    Measure(
        name="activation-trace",
        module="compress.measure.activation_trace",
        summary="curvature trace of every activation that a layer reads, an example's on average",
        source="Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), section 3.3",
        options=("rtol", "passes"),
        of_weights=False,
    ),
    Measure(
        name="fisher",
        module="compress.measure.fisher",
        summary="trace and diagonal of the Fisher matrix, from per-sample gradients",
        source="Frantar et al. 2021, M-FAC (arXiv:2107.03356)",
        options=("fisher",),
    ),
    Measure(
        name="hessian-diagonal",
        module="compress.measure.hessian_diagonal",
        summary="diagonal of the Hessian by Hutchinson's probes, averaged over kernels and blocks",
        source="Yao et al. 2021, AdaHessian (arXiv:2006.00719)",
        options=("rtol", "passes"),
    ),
    Measure(
        name="hessian-eigenvalues",
        module="compress.measure.hessian_eigenvalues",
        summary="largest eigenvalues of every layer's block of the Hessian, and of all layers together",
        source="Dong et al. 2019, HAWQ (arXiv:1905.03696); Ghorbani et al. 2019 (arXiv:1901.10159)",
        options=("eigenvalues", "rtol", "passes"),
    ),
    Measure(
        name="output-change",
        module="compress.quantize.measured_changes",
        summary="how far the outputs move with each weight alone at each bit width",
        source="Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), for the use that is made of it",
        options=("reconstruction",),
    ),
    Measure(
        name="weight-error",
        module="compress.measure.weight_error",
        summary="squared weight change per bit width and sparsity; no data",
        source="Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), equation 10",
        needs_data=False,
    ),
)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A program that model.onnx is written for.

    Attributes:
        packs: Whether weights lie in the file at their bits, to be taken apart when it is loaded.
        has_own_ops: Whether ops of ONNX Runtime's own stand for matrix products that they make faster.
        float_addends: Whether what a convolution adds to a sum stays float: the runtime adds it before it rounds.
    """

    name: str
    summary: str
    packs: bool = True
    has_own_ops: bool = False
    float_addends: bool = False


RUNTIMES = (
    Runtime("onnxruntime", "what ONNX Runtime runs fastest; its own ops where they are faster", has_own_ops=True),
    Runtime("openvino", "standard ops that OpenVINO and ONNX Runtime fold when they load the file", float_addends=True),
    Runtime("portable", "plain int8 weights of opset 21, unpacked: any runtime since 2024", packs=False),
)


@dataclass(frozen=True, slots=True)
class TaskKind:
    name: str
    metric: str
    unit: str
    higher_is_better: bool
    summary: str


TASKS = (
    TaskKind("classification", "accuracy", "%", True, "logits [n, classes] against integer labels [n]"),
    TaskKind("regression", "mse", "squared error", False, "outputs against float targets of the same shape"),
    TaskKind("causal-lm", "loss", "nats per token", False, "token ids [n, t]; targets are the ids shifted by one"),
)


def methods_for(job: str) -> tuple[Method, ...]:
    """The methods that ``hcompress JOB`` offers."""
    return tuple(method for method in METHODS if method.job == job)


def find_method(job: str, name: str) -> Method:
    """The method called ``name``.

    Raises:
        UsageError: No such method for this job; prints the choices.
    """
    choices = methods_for(job)
    for method in choices:
        if method.name == name:
            return method
    other = next((m for m in METHODS if m.name == name), None)
    reason = f"is a method of hcompress {other.job}" if other else "is unknown"
    raise UsageError(f"method {name!r} {reason}", hint=f"choices: {', '.join(m.name for m in choices)}")


def find_measure(name: str) -> Measure:
    """The measure called ``name``.

    Raises:
        UsageError: No such measure; prints the choices.
    """
    for measure in MEASURES:
        if measure.name == name:
            return measure
    raise UsageError(f"measure {name!r} is unknown", hint=f"choices: {', '.join(m.name for m in MEASURES)}")


def find_runtime(name: str) -> Runtime:
    """The runtime called ``name``: one of the choices of ``--runtime``."""
    return next(runtime for runtime in RUNTIMES if runtime.name == name)


def load_module(method: Method | Measure) -> Any:
    """Import the module; this is where torch comes in."""
    return importlib.import_module(method.module)
