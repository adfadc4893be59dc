"""Settings with their origins: flag > environment HCOMPRESS_* > config file > preset > default.

The one table ``SETTINGS`` makes the command-line options, the environment names, the keys of hcompress.toml (or
``[tool.hcompress]`` in pyproject.toml) and the keys of presets. Paths in a config file are relative to it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .budget import Budget, parse_budget
from .errors import UsageError
from .plan import GROUP_SIZES
from .registry import RUNTIMES

CONFIG = "hcompress.toml"
DYNAMIC = "dynamic"  # activations that are rounded as they come
MIXED = "mixed"  # activations with widths of their own
TYPES = {
    "str": "a text",
    "int": "a whole number",
    "float": "a finite number",
    "numbers": "a list of finite numbers",
    "words": "a list of words",
    "path": "a path or name",
    "json": "a JSON object",
    "shape": "a list of sizes such as 3,32,32",
    "points": "a number, or numbers such as 0.5,0.7,0.9",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that a user can set.

    Attributes:
        name: Flag without dashes, with underscores; also the environment name after ``HCOMPRESS_``.
        key: Dotted key in a config file.
        type: One of ``TYPES``; ``path`` means that a config file's value is relative to it; ``numbers`` and ``words``
            are separated by commas; ``json`` and ``shape`` are checked, but stay text. ``points`` is a number, or where
            several differ a tuple of them, ascending.
        in_preset: Whether a preset may set it. What names code or data may not: a preset is not the user's own file.
        minimum: Least value of a number; None where any will do.
        maximum: Likewise the largest.
    """

    name: str
    key: str
    type: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    in_preset: bool = False
    metavar: str = ""
    minimum: float | None = None
    maximum: float | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> str:
        return "HCOMPRESS_" + self.name.upper()


SETTINGS = (
    Setting(
        "model", "model.factory", "path", "Factory of the architecture; it runs as your code.", metavar="FILE.py:FN"
    ),
    Setting("model_args", "model.args", "json", "Arguments of the factory, as a JSON object.", metavar="JSON"),
    Setting(
        "input_shape", "model.input_shape", "shape", "Shape of one example where no data say it.", metavar="3,32,32"
    ),
    Setting("data", "data.calibration", "path", "Calibration data: all that a planner sees.", metavar="DATA"),
    Setting("train", "data.train", "path", "Training data of --recover-steps; --data where not given.", metavar="DATA"),
    Setting("eval", "data.eval", "path", "Evaluation data; no plan depends on them.", metavar="DATA"),
    Setting("mean", "data.mean", "numbers", "Mean per channel that array data are normalised by.", metavar="M,..."),
    Setting("std", "data.std", "numbers", "Standard deviation per channel, likewise.", metavar="S,..."),
    Setting("layout", "data.layout", "str", "Dimension order of image arrays.", choices=("nchw", "nhwc")),
    Setting(
        "num_calibration", "data.num_calibration", "int", "Calibration examples used.", 512, in_preset=True, minimum=1
    ),
    Setting("task", "task.kind", "path", "classification, regression, causal-lm or FILE.py:Task.", metavar="TASK"),
    Setting("method", "run.method", "str", "Method; hcompress methods lists them.", in_preset=True, metavar="NAME"),
    Setting("budget", "run.budget", "str", "Goal: 0.3MB, 25%, 4bit, sparsity=0.5.", in_preset=True, metavar="BUDGET"),
    Setting(
        "sparsity",
        "run.sparsity",
        "points",
        "Share of weights to zero, or channels to cut; several are a sweep.",
        in_preset=True,
        metavar="X[,X...]",
    ),
    Setting("scope", "run.scope", "str", "Where magnitudes compete.", "global", ("global", "layer"), in_preset=True),
    Setting(
        "pattern",
        "run.pattern",
        "str",
        "unstructured; n:m along inputs; or blocks, 4x1.",
        "unstructured",
        in_preset=True,
    ),
    Setting(
        "multiple_of",
        "run.multiple_of",
        "int",
        "Groups keep a multiple of N channels; else 8 where there are many.",
        None,
        in_preset=True,
        minimum=1,
    ),
    Setting(
        "recover_steps",
        "recover.steps",
        "int",
        "Training steps after pruning or rounding.",
        0,
        in_preset=True,
        minimum=0,
    ),
    Setting(
        "recover_epochs",
        "recover.epochs",
        "float",
        "The same in passes over the training data.",
        0.0,
        in_preset=True,
        minimum=0,
    ),
    Setting(
        "optimizer",
        "recover.optimizer",
        "str",
        "Optimizer of the training: sgd of networks with convolutions, adamw of others, where not given.",
        None,
        ("sgd", "adam", "adamw", "adahessian", "mfac"),
        in_preset=True,
    ),
    Setting(
        "lr",
        "recover.lr",
        "float",
        "Its largest learning rate; one of its own where not given.",
        in_preset=True,
        minimum=0,
    ),
    Setting(
        "schedule",
        "recover.schedule",
        "str",
        "Of the learning rate.",
        "one-cycle",
        ("one-cycle", "cosine"),
        in_preset=True,
    ),
    Setting("batch_size", "recover.batch_size", "int", "Examples of a training step.", 128, in_preset=True, minimum=1),
    Setting(
        "augment",
        "recover.augment",
        "words",
        "What is drawn for each training image: crop,flip.",
        (),
        in_preset=True,
        metavar="NAME,...",
    ),
    Setting(
        "distill",
        "recover.distill",
        "float",
        "Share of the training loss that is the dense network's.",
        0.9,
        in_preset=True,
        minimum=0,
        maximum=1,
    ),
    Setting(
        "distill_features",
        "recover.distill_features",
        "float",
        "Weight in the training loss of what layers read, compared with the dense network's.",
        100.0,
        in_preset=True,
        minimum=0,
    ),
    Setting(
        "patience",
        "recover.patience",
        "int",
        "Checks on calibration data without progress before training stops.",
        None,
        in_preset=True,
        minimum=1,
    ),
    Setting("rounds", "run.rounds", "int", "Recomputations of the curvature.", 8, in_preset=True, minimum=1),
    Setting("exclude", "run.exclude", "words", "Weights left alone, by glob.", (), in_preset=True, metavar="GLOB,..."),
    Setting(
        "keep",
        "run.keep",
        "words",
        "Widths that are fixed: conv1*=8,fc*=float.",
        (),
        in_preset=True,
        metavar="GLOB=BITS,...",
    ),
    Setting(
        "tie", "run.tie", "words", "Weights that a glob matches get one width.", (), in_preset=True, metavar="GLOB,..."
    ),
    Setting(
        "activations",
        "run.activations",
        "str",
        "Bits of activations; mixed: each its own; dynamic: 8 with ranges of each batch.",
        None,
        ("8", "6", "4", MIXED, DYNAMIC, "float"),
        in_preset=True,
    ),
    Setting(
        "activation_range",
        "run.activation_range",
        "str",
        "Range of an activation; auto: the one of these that moves the outputs least.",
        "auto",
        ("auto", "minmax", "mse", "p99.99", "p99.9", "kl"),
        in_preset=True,
    ),
    Setting(
        "equalization",
        "run.equalization",
        "str",
        "Whether channels between layers are scaled to one size; auto: where it helps much.",
        "auto",
        ("auto", "on", "off"),
        in_preset=True,
    ),
    Setting(
        "reconstruction",
        "run.reconstruction",
        "str",
        "How levels are chosen: by the layers' outputs, or the nearest.",
        "gptq",
        ("gptq", "none"),
        in_preset=True,
    ),
    Setting(
        "bias_correction",
        "run.bias_correction",
        "str",
        "Whether biases make up for rounding.",
        "on",
        ("on", "off"),
        in_preset=True,
    ),
    Setting(
        "channel_widths",
        "run.channel_widths",
        "str",
        "Whether the channels of a weight may have widths of their own.",
        "mixed",
        ("mixed", "equal"),
        in_preset=True,
    ),
    Setting(
        "group_size",
        "run.group_size",
        "str",
        "Inputs of a linear layer's output that share a scale; all, where not given.",
        None,
        tuple(map(str, GROUP_SIZES)),
        in_preset=True,
    ),
    Setting(
        "range", "run.range", "str", "Range of a weight channel.", "auto", ("auto", "minmax", "mse"), in_preset=True
    ),
    Setting(
        "trace", "measure.trace", "str", "Curvature whose traces are taken.", "ggn", ("ggn", "hessian"), in_preset=True
    ),
    Setting(
        "estimator",
        "measure.estimator",
        "str",
        "How traces of --trace hessian are estimated.",
        "control",
        ("control", "hutchinson", "hutch++", "xtrace"),
        in_preset=True,
    ),
    Setting(
        "fisher",
        "measure.fisher",
        "str",
        "Labels of the Fisher matrix: none needed, drawn, or the data's.",
        "ggn",
        ("ggn", "sampled", "labels"),
        in_preset=True,
    ),
    Setting(
        "fisher_batch",
        "measure.fisher_batch",
        "int",
        "Successive examples whose gradients are one gradient of the Fisher matrix.",
        1,
        in_preset=True,
        minimum=1,
    ),
    Setting(
        "clip_gradients",
        "measure.clip_gradients",
        "float",
        "Quantile of the gradients' norms that larger ones are scaled down to; 1 for none.",
        1.0,
        in_preset=True,
        minimum=0.01,
        maximum=1,
    ),
    Setting(
        "block_size",
        "measure.block_size",
        "int",
        "Weights of a block of the Fisher matrix, which is zero beyond; 0 for the whole matrix.",
        128,
        in_preset=True,
        minimum=0,
        metavar="B",
    ),
    Setting(
        "rtol",
        "measure.rtol",
        "float",
        "Relative standard error at which traces and diagonals are done; of eigenvalues, residual.",
        0.05,
        in_preset=True,
        minimum=0,
    ),
    Setting(
        "eigenvalues",
        "measure.eigenvalues",
        "int",
        "Eigenvalues of each block, of hessian-eigenvalues.",
        1,
        in_preset=True,
        minimum=1,
    ),
    Setting("passes", "measure.passes", "int", "Most passes or probes of a measure.", 20, in_preset=True, minimum=2),
    Setting(
        "configurations",
        "measure.configurations",
        "int",
        "Random widths on which predictors of the loss are compared; 0 for none.",
        0,
        in_preset=True,
        minimum=0,
    ),
    Setting(
        "for", "run.for", "str", "File whose bytes a budget means.", "onnx", ("onnx", "safetensors"), in_preset=True
    ),
    Setting(
        "runtime",
        "run.runtime",
        "str",
        "What model.onnx is written for: its op set.",
        "onnxruntime",
        tuple(runtime.name for runtime in RUNTIMES),
        in_preset=True,
    ),
    Setting(
        "float_storage",
        "run.float_storage",
        "str",
        "How floats lie in the files; networks compute in float32.",
        "fp32",
        ("fp32", "fp16", "bf16"),
        in_preset=True,
    ),
    Setting("max_drop", "gate.max_drop", "float", "Fail if the metric gets worse by more.", in_preset=True),
    Setting("min_metric", "gate.min_metric", "float", "Fail if the metric is worse than this.", in_preset=True),
    Setting("max_bytes", "gate.max_bytes", "str", "Fail if the model file is larger.", in_preset=True, metavar="SIZE"),
    Setting("max_latency", "gate.max_latency", "str", "Fail if batch 1 is slower.", in_preset=True, metavar="5ms"),
    Setting("seed", "run.seed", "int", "Seed of everything random.", 0, in_preset=True, minimum=0),
    Setting("threads", "run.threads", "int", "Threads of torch and of the runtime.", None, minimum=1),
    Setting("device", "run.device", "str", "Where gradients and calibration run.", "cpu"),
    Setting(
        "memory",
        "run.memory",
        "str",
        "Memory that gradients may take; more of them lie in a temporary file.",
        "4GB",
        metavar="SIZE",
    ),
    Setting("cache", "run.cache", "str", "Whether measures on data are kept and read again.", "on", ("on", "off")),
    Setting("out", "output.out", "path", "Run folder to write.", metavar="DIR"),
    Setting("summary", "output.summary", "path", "Append a Markdown job summary to this file.", metavar="FILE"),
    Setting("junit", "output.junit", "path", "Write the checks as JUnit XML.", metavar="FILE"),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}
BY_KEY = {setting.key: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Value:
    value: Any
    origin: str


Settings = Mapping[str, Value]


def resolve(
    flags: Mapping[str, Any], *, environment: Mapping[str, str], folder: Path | None, preset: str | None = None
) -> dict[str, Value]:
    """Every setting with its value and origin.

    Args:
        flags: Values given on the command line, by setting name; None means not given.
        environment: The process environment.
        folder: Where hcompress.toml or pyproject.toml is looked for; not in its parents, as a factory runs code.
            None reads no config.
        preset: Name of a preset, or None.

    Raises:
        UsageError: A key that isn't known, a value of the wrong type, or a preset that sets what it may not.
    """
    layers: list[tuple[str, dict[str, Any]]] = [
        ("flag", {name: value for name, value in flags.items() if value is not None}),
        ("environment", _from_environment(environment)),
        *(_from_config(folder) if folder is not None else ()),
    ]
    if preset is not None:
        layers.append((f"preset {preset}", _preset_values(preset)))
    resolved = {}
    for setting in SETTINGS:
        value, origin = setting.default, "default"
        for layer, values in layers:
            if setting.name in values:
                value, origin = values[setting.name], layer
                break
        resolved[setting.name] = Value(_convert(setting, value, origin), origin)
    return resolved


def chosen_budget(settings: Settings) -> Budget | None:
    """The goal of a run, from ``budget`` or ``sparsity``: whichever was set with the higher precedence.

    Raises:
        UsageError: Both were set with the same precedence, or one isn't a budget.
    """
    budget, sparsity = settings["budget"], settings["sparsity"]
    if budget.value is not None and sparsity.value is not None and _rank(budget) == _rank(sparsity):
        raise UsageError(
            f"--budget {budget.value} and --sparsity {sparsity.value} contradict each other", hint="give one of them"
        )
    if budget.value is not None and (sparsity.value is None or _rank(budget) < _rank(sparsity)):
        return parse_budget(str(budget.value))
    if isinstance(sparsity.value, tuple):
        raise UsageError(
            f"{_listed(sparsity.value)} are {len(sparsity.value)} sparsities, and this takes one",
            hint="a list is a sweep, which hcompress prune runs, without --plan",
        )
    return None if sparsity.value is None else parse_budget(f"sparsity={sparsity.value}")


def swept(settings: Settings) -> list[dict[str, Value]]:
    """The settings of each point, if the goal is a list of sparsities: the least sparse first. Else none.

    Raises:
        UsageError: A sparsity is out of range, or ``budget`` says something else.
    """
    budget, sparsity = settings["budget"], settings["sparsity"]
    if not isinstance(sparsity.value, tuple) or (budget.value is not None and _rank(budget) < _rank(sparsity)):
        return []
    points = [dict(settings) | {"sparsity": Value(value, sparsity.origin)} for value in sparsity.value]
    for point in points:
        chosen_budget(point)
    return points


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _rank(value: Value) -> int:
    if value.origin in ("flag", "environment"):
        return ("flag", "environment").index(value.origin)
    return 3 if value.origin.startswith("preset ") else 2


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    return {s.name: environment[s.environment] for s in SETTINGS if environment.get(s.environment)}


def _from_config(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    own = folder / CONFIG
    if own.is_file():
        return [(CONFIG, _table_values(read_toml(own), str(own), own.parent))]
    project = folder / "pyproject.toml"
    if project.is_file():
        table = read_toml(project).get("tool", {}).get("hcompress")
        if table is not None:
            return [("pyproject.toml", _table_values(table, f"{project} [tool.hcompress]", folder))]
    return []


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        UsageError: Not TOML; names the file and the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path}: not readable as TOML ({error})", hint="hcompress init writes a checked one"
        ) from None


def _table_values(table: Mapping[str, Any], where: str, folder: Path | None) -> dict[str, Any]:
    values = {}
    for section, entries in table.items():
        if not isinstance(entries, dict):
            raise UsageError(f"{where}: {section} must be a table", hint=f"tables: {', '.join(_sections())}")
        for name, value in entries.items():
            setting = BY_KEY.get(f"{section}.{name}")
            if setting is None:
                known = ", ".join(key for key in BY_KEY if key.startswith(section + "."))
                hint = f"keys of [{section}]: {known}" if known else f"tables: {', '.join(_sections())}"
                raise UsageError(f"{where}: unknown key {section}.{name}", hint=hint)
            if setting.type == "path" and folder is not None and isinstance(value, str):
                value = _relative_to(value, folder)
            values[setting.name] = (
                json.dumps(value) if setting.name == "model_args" and isinstance(value, dict) else value
            )
    return values


def _sections() -> list[str]:
    return sorted({key.split(".")[0] for key in BY_KEY})


def _relative_to(text: str, folder: Path) -> str:
    """A config file's path as seen from the current folder; ``pkg.mod:fn`` and task names stay as they are."""
    head = text.split(":", 1)[0]
    names_file = head.endswith(".py") or "/" in head or (folder / head).exists()
    return str(folder / text) if names_file and not Path(head).is_absolute() else text


def presets() -> dict[str, dict[str, Any]]:
    """The shipped presets by name, as their TOML tables."""
    found = {}
    for entry in sorted(resources.files("compress.presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            found[entry.name.removesuffix(".toml")] = tomllib.loads(entry.read_text(encoding="utf-8"))
    return found


def _preset_values(name: str) -> dict[str, Any]:
    known = presets()
    if name not in known:
        raise UsageError(f"preset {name!r} is unknown", hint=f"choices: {', '.join(known)}")
    table = {section: entries for section, entries in known[name].items() if isinstance(entries, dict)}
    values = _table_values(table, f"preset {name}", None)
    for setting_name in values:
        if not BY_NAME[setting_name].in_preset:
            raise UsageError(
                f"preset {name} sets {setting_name}, which only your own config or a flag may set",
                hint=f"remove it from the preset, and pass {BY_NAME[setting_name].flag}",
            )
    return values


def _convert(setting: Setting, value: Any, origin: str) -> Any:
    if value is None:
        return None
    where = f"{setting.flag} (from {origin})"
    try:
        converted = _to_type(setting.type, value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{where}: {value!r} is not {TYPES[setting.type]}", hint=setting.help) from None
    if setting.choices and converted not in setting.choices:
        raise UsageError(f"{where}: {value!r} is not a choice", hint=f"choices: {', '.join(setting.choices)}")
    low, high = setting.minimum, setting.maximum
    allowed = f"{low:g} to {high:g}" if low is not None and high is not None else f"{low} or more"
    numbers = converted if isinstance(converted, tuple) else (converted,)
    if low is not None and any(number < low for number in numbers):
        raise UsageError(f"{where}: {value!r} is below {low:g}", hint=f"it is {allowed}")
    if high is not None and any(number > high for number in numbers):
        raise UsageError(f"{where}: {value!r} is above {high:g}", hint=f"it is {allowed}")
    return converted


def _to_type(kind: str, value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError
    if kind == "int":
        if int(value) != float(value):
            raise ValueError
        return int(value)
    if kind == "float":
        return _finite(value)
    if kind == "points":
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        numbers = sorted({_finite(item) for item in items if not isinstance(item, bool)})
        if not numbers or any(isinstance(item, bool) for item in items):
            raise ValueError
        return tuple(numbers) if len(numbers) > 1 else numbers[0]
    if kind in ("numbers", "words"):
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
        return tuple(map(_finite, items)) if kind == "numbers" else tuple(str(item) for item in items if item != "")
    if kind == "json" and not isinstance(json.loads(value), dict):
        raise ValueError
    if kind == "shape":
        sizes = [int(part) for part in (value.split(",") if isinstance(value, str) else value)]
        if not sizes or min(sizes) < 1:
            raise ValueError
        return ",".join(map(str, sizes))
    if not isinstance(value, str | int | float) or value == "":
        raise TypeError
    return str(value)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number
