"""The command line without torch: help, errors and their exit codes, JSON, and the commands that only read records.

The pipeline is replaced by a stand-in where a command would call it: its results are printed, its errors reported.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from compress.cli import failure, preflight
from compress.cli.main import COMMANDS, cli, main
from compress.cli.show import find_layer

from compress import __version__, canonical, errors
from compress.budget import Budget
from compress.frontier import Choice, FrontierRecord, Item
from compress.plan import MaskWeights, Plan, Quantize
from compress.settings import SETTINGS

ENTRY = Path(sys.executable).with_name("hcompress")
HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich", "safetensors")
MOST_MODULES = 25  # of --help beyond those of click; 19 as of now
SHA = "0" * 64


def layer(tensor: str, decision: str, error: float | None) -> dict[str, Any]:
    figures = {"elements": 64, "macs": 640, "bits": 4.0, "sparsity": 0.25, "relative_error": error}
    return {"tensor": tensor, "op": "conv2d", "shape": [4, 16], "decision": decision, "why": "it is small", **figures}


REPORT: dict[str, Any] = {
    "schema": "hcompress.report/1",
    "command": "quantize",
    "method": "uniform",
    "seed": 0,
    "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True, "dense": 91.73, "compressed": 91.6}
    | {"num_examples": 10_000, "runtime": "onnxruntime"},
    "files": {"model.onnx": 283_034, "model.safetensors": 280_000},
    "dense_bytes": 1_079_665,
    "average_bits": 8.0,
    "sparsity": 0.25,
    "params": {"dense": 267_696, "compressed": 267_696},
    "macs": {"dense": 40_000_000, "compressed": 40_000_000},
    "latency_ms": {"dense": 2.0, "compressed": 1.0},
    "parity": [{"batch": 3, "max_abs": 1e-5, "argmax_agreement": 1.0}],
    "checks": [{"name": "max_drop", "value": 0.13, "limit": 1.0, "unit": "%", "ok": True}],
    "time_s": 12.34,
    "peak_rss_bytes": 812e6,
    "layers": [
        layer("conv1.weight", "keep", 0.01),
        layer("conv2.weight", "quantize", 0.1),
        layer("fc.weight", "quantize", 0.2),
    ],
    "notes": ["first and last layers included"],
    "source": {"name": "model.pt", "sha256": SHA},
}
REPORT_TEXT = """\
                            dense       compressed  change
accuracy (10,000 examples)  91.73 %     91.6 %      -0.13 points
model.onnx                  1.08 MB     283 KB      26.2 %
model.safetensors           -           280 KB
parameters                  267,696     267,696     100 %
MACs                        40,000,000  40,000,000  100 %
average bits                -           8
sparsity                    -           25 %
latency, batch 1            2 ms        1 ms        2x as fast
parity of ONNX Runtime with torch at batches 3: largest difference 1e-05, same class for 100 % of examples
max_drop: 0.13 % (limit 1 %) ok
took 12.3 s, peak memory 812 MB
note: first and last layers included
"""


class Capture:
    """Runs ``main`` in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, line: str) -> int:
        self.capsys.readouterr()
        code = main(shlex.split(line))
        self.out, self.err = self.capsys.readouterr()
        return code

    def document(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Capture]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").touch()
    before = signal.getsignal(signal.SIGTERM)
    yield Capture(capsys)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for compress.pipeline; its ``calls`` are what the commands asked for."""
    module = types.ModuleType("compress.pipeline")
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    results = {
        "run_method": REPORT,
        "apply_plan": REPORT,
        "export_dense": REPORT,
        "verify_run": {
            "schema": "hcompress.verify/1",
            **{key: REPORT[key] for key in ("metric", "parity", "checks")},
        },
        "bench_run": {"schema": "hcompress.bench/1", "batch": 2, "threads": 1, "repeats": 5, "ratio": 0.5}
        | {"latency_ms": {name: {"median": 2.0, "p10": 1.0, "p90": 3.0} for name in ("dense", "compressed")}},
        "inspect_checkpoint": {
            **{"schema": "hcompress.inspect/1", "path": "model.pt", "format": "torch", "sha256": SHA},
            **{"parameters": 64, "macs": None, "input_shape": None, "dtypes": {"float32": 1}, "notes": ["no --model"]},
            "layers": [
                {"name": "a" * 90, "op": "linear", "shape": [8, 8], "parameters": 64, "macs": None, "dtype": "float32"}
            ],
            "tied": [["a", "b"]],
            "blockers": [{"layer": "lstm", "reason": "recurrent\x1b[31m"}],
        },
        "measure_sensitivity": {
            **{"schema": "hcompress.sensitivity/1", "method": "fisher", "unit": "loss", "num_examples": 8},
            **{
                "cached": True,
                "predictors": None,
                "notes": [],
                "elements": {"conv.weight": 10, "fc.weight": 1, "zero": 1},
            },
            "entries": [
                {"layer": layer, "option": "", "value": value, "stderr": stderr}
                for layer, value, stderr in (("zero", 0.0, 0.0), ("fc.weight", 0.5, 0.0), ("conv.weight", 100.0, 1.0))
            ],
        },
        "run_demo": {
            **{"schema": "hcompress.demo/1", "metric_name": "accuracy", "time_s": 3.0, "runs": {"int8": "demo/int8"}},
            "rows": [
                {"name": "int8", "metric": 90.0, "bytes": 1e5, "macs": 1e6, "latency_ms": 0.5, "sparsity": 0.0}
                | {"average_bits": 8.0}
            ],
        },
    }

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls.append((name, args, keywords))
            keywords["progress"]("work", 1, 2)
            return results[name]

        return call

    sensing = types.ModuleType("compress.sensing")
    for name in (*results, "compare_measures"):
        setattr(sensing if name in ("measure_sensitivity", "compare_measures") else module, name, stand_in(name))
    module.calls = calls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress.pipeline", module)
    monkeypatch.setitem(sys.modules, "compress.sensing", sensing)
    return module


def make_plan(**changes: Any) -> Plan:
    weights = (
        Quantize("conv1.weight", "weight", 8, "symmetric", 0, "mse"),
        MaskWeights("fc", 5, 10, "unstructured", SHA),
    )
    fields: dict[str, Any] = {"method": "uniform", "options": {"range": "mse"}, "seed": 0, "source_sha256": SHA}
    fields |= {"task_sha256": None, "budget": Budget("bits", 8.0), "decisions": weights, "predicted": {}}
    return Plan(**(fields | changes))


def write_run(folder: Path, plan: Plan | None = None, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "plan.json").write_text(canonical.dumps(plan or make_plan()))
    (folder / "report.json").write_text(canonical.dumps(REPORT | changes))
    return folder


# Help


def modules_loaded_by(lines: list[str], folder: Path) -> set[str]:
    """The modules that a process has imported after running ``lines``."""
    words = [line.split() for line in lines]
    return modules_after(f"from compress.cli.main import main; [main(w) for w in {words!r}]", folder)


def modules_after(code: str, folder: Path) -> set[str]:
    code = f"{code}; import sys; print(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return set(done.stdout.splitlines()[-1].split())


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_help_imports_little_more_than_click(tmp_path: Path) -> None:
    """What its time consists of: 0.03 s of CPU beside click's own import, 0.12 to 0.14 s in all, by machine."""
    loaded = modules_loaded_by(["--help"], tmp_path)
    assert not packages(loaded) & set(HEAVY)
    assert len(loaded - modules_after("import click", tmp_path)) <= MOST_MODULES


@pytest.mark.parametrize(
    "line", ["methods", "presets", "settings", "show run", "diff run run", "completion zsh", "init --json"]
)
def test_commands_on_records_import_nothing_heavy(line: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert not packages(modules_loaded_by([line], tmp_path)) & set(HEAVY)


def test_help_of_the_group_starts_with_examples_and_lists_every_command(run: Capture) -> None:
    assert run("--help") == 0
    assert run.out.startswith("Examples:\n  hcompress demo\n")
    assert all(f"\n  {name} " in run.out for name in COMMANDS)
    text = run.out
    assert run("") == 0
    assert run.out == text
    assert run("-h") == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_examples_before_usage_and_options(name: str, run: Capture) -> None:
    assert run(f"{name} --help") == 0
    assert run.out.startswith("Examples:\n  ")
    assert run.out.index(f"hcompress {name}") < run.out.index(f"Usage: hcompress {name}") < run.out.index("Options:")
    for option in ("--json", "--quiet", "--debug", "--help"):
        assert option in run.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_a_command_parses(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.epilog
    for line in command.epilog.splitlines():
        words = shlex.split(line.split(" > ")[0].removeprefix('eval "$(').removesuffix(')"'))
        words = words[words.index("hcompress") + 1 :]
        assert words[0] == name
        command.make_context(name, words[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_described(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.help and command.name == name


def test_the_installed_entry_point_knows_its_version() -> None:
    done = subprocess.run([ENTRY, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hcompress, version {__version__}\n"


# Wrong command lines

WRONG = [
    ("prnue model.pt", 2, "no such command 'prnue'", "did you mean prune?"),
    ("frobnicate", 2, "no such command 'frobnicate'", "choices: prune, quantize, apply"),
    ("--verison", 2, "no such option '--verison'", "did you mean --version?"),
    ("prune model.pt --spasity 1", 2, "no such option '--spasity'", "did you mean --sparsity?"),
    ("prune", 2, "missing argument 'CHECKPOINT'", "hcompress prune --help shows examples and options"),
    ("prune model.pt --scope all", 2, "'all' is not one of 'global', 'layer'", "hcompress prune --help"),
    ("bench run --batch 0", 2, "0 is not in the range x>=1", "hcompress bench --help"),
    ("completion tcsh", 2, "'tcsh' is not one of 'bash', 'zsh', 'fish'", "hcompress completion --help"),
    (
        "prune model.pt --method nope --plan here",
        2,
        "method 'nope' is unknown",
        "choices: layerwise, obs, magnitude, gradual, structured-obs, hesso, cric",
    ),
    (
        "prune model.pt --method nope",
        2,
        "method 'nope' is unknown",
        "choices: layerwise, obs, magnitude, gradual, structured-obs, hesso, cric",
    ),
    (
        "prune model.pt --preset edge-int8",
        2,
        "method 'output-change' is a method of hcompress quantize",
        "choices: layerwise, obs, magnitude, gradual, structured-obs, hesso, cric",
    ),
    ("prune model.pt --budget zonk", 2, "budget 'zonk' is not understood", "examples: 0.3MB"),
    ("prune model.pt --sparsity 1.5", 2, "budget 'sparsity=1.5' is out of range", "between 0 and 1"),
    (
        "prune model.pt --budget 4bit",
        2,
        "hcompress prune has no bits budget",
        "it takes bytes, latency, macs, params, sparsity",
    ),
    (
        "quantize model.pt --method uniform --budget macs=50%",
        2,
        "method uniform has no macs budget",
        "it takes bits, bytes",
    ),
    ("quantize model.pt --budget macs=50%", 2, "hcompress quantize has no macs budget", "bits, bops, bytes, latency"),
    (
        "prune model.pt --budget 25% --sparsity 0.5",
        2,
        "--budget 25% and --sparsity 0.5 contradict each other",
        "give one",
    ),
    ("sensitivity model.pt --measure hesian", 2, "measure 'hesian' is unknown", "choices: hessian-trace, "),
    ("sensitivity model.pt --cache maybe", 2, "'maybe' is not one of 'on', 'off'", "sensitivity --help shows"),
    ("sensitivity model.pt --out here", 2, "here already exists", "choose another --out, or pass --force"),
    ("quantize model.pt --seed x", 2, "--seed (from flag): 'x' is not a whole number", "Seed of everything random."),
    ("quantize model.pt --preset none", 2, "preset 'none' is unknown", "choices: ci-gate"),
    ("quantize absent.pt", 3, "absent.pt: no such file", "pass a checkpoint"),
    ("quantize model.pt --data absent.npz", 3, "--data absent.npz: absent.npz does not exist", "as seen from here"),
    ("export model.pt --model absent.py:make", 3, "absent.py does not exist", "Factory of the architecture"),
    ("verify here --eval absent.npz", 3, "--eval absent.npz: absent.npz does not exist", "Evaluation data"),
    ("inspect absent.pt", 3, "absent.pt: no such file", "pass a checkpoint"),
    ("prune model.pt --out here", 2, "here already exists", "choose another --out, or pass --force"),
    (
        "prune model.pt --out model.pt --force",
        2,
        "model.pt is a file",
        "choose another",
    ),
    ("export model.pt --out model.pt/x", 7, "model.pt is not a folder", "choose another --out"),
    ("demo --out here", 2, "here already exists", "choose another --out, or pass --force"),
    ("apply model.pt --plan absent.json", 3, "absent.json: no such file", "pass a run folder that hcompress wrote"),
    ("prune model.pt --plan model.pt", 3, "model.pt: not readable as JSON", "write it again with hcompress"),
    ("verify absent", 3, "absent: no such run folder", "pass the --out folder of a finished run"),
    ("bench model.pt", 3, "model.pt: is a file, not a run folder", "pass the --out folder"),
    ("show failed", 3, "failed: the run failed a gate", "hcompress show failed.rejected prints its figures"),
    ("show here", 3, "report.json: no such file", "pass a run folder that hcompress wrote"),
    ("show here --frontier", 3, "here: the run has no frontier.json", "only a method that weighs each layer's options"),
    ("show here --frontier --why a", 2, "--why and --frontier are two questions", "one at a time"),
    ("diff here here", 3, "plan.json: no such file", "pass a run folder that hcompress wrote"),
    ("presets nope", 2, "preset 'nope' is unknown", "choices: ci-gate, edge-int8, smallest-file"),
    ("settings --preset nope", 2, "preset 'nope' is unknown", "choices: ci-gate"),
    ("init --out model.pt", 2, "--out model.pt exists", "pass --force to replace it"),
    ("init --model net.py:make", 3, "--model net.py:make: net.py does not exist", "as seen from here"),
    ("init --eval test.npz", 3, "--eval test.npz: test.npz does not exist", "as seen from here"),
    ("init --max-drop much", 2, "--max-drop (from flag): 'much' is not a finite number", "Fail if the metric"),
]


@pytest.mark.parametrize(("line", "code", "message", "hint"), WRONG, ids=[case[0] for case in WRONG])
def test_a_wrong_command_line_gets_two_lines_and_its_code(
    line: str, code: int, message: str, hint: str, run: Capture, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "failed.rejected").mkdir()
    assert run(line) == code
    first, second = run.err.splitlines()
    assert first.startswith("error: ") and message in first
    assert second.startswith("hint: ") and hint in second
    assert run.out == ""
    assert run(f"{line} --json") == code
    document = run.document()
    assert document["schema"] == "hcompress.error/1"
    assert document["error"]["code"] == code
    assert f"error: {document['error']['message']}\nhint: {document['error']['hint']}\n" == run.err


def test_wrong_command_lines_are_answered_without_torch(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    (tmp_path / "here").mkdir()
    assert not packages(modules_loaded_by([line for line, *_ in WRONG], tmp_path)) & set(HEAVY)


def test_json_after_two_dashes_is_an_argument(run: Capture) -> None:
    assert run("inspect -- --json") == 3
    assert run.out == ""
    assert run.err.startswith("error: --json: no such file")


def test_a_parent_that_takes_no_files_is_exit_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(errors.DiskError, match="can't be written"):
        preflight.check_out(tmp_path / "new" / "run", force=False)


# Errors of the pipeline


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


FAILURES = [
    (errors.InputError("bad file", hint="fix it"), 3, "unreadable or unsafe input", "bad file", "fix it"),
    (errors.GateError("too bad"), 4, "gate failed", "too bad", ""),
    (errors.BudgetError("at least 1 KB"), 5, "infeasible budget", "at least 1 KB", ""),
    (errors.LockedError("busy"), 6, "locked", "busy", ""),
    (OSError(errno.ENOSPC, "full", "out/x"), 7, "disk", "out/x: no space left on the device", "free some space"),
    (OSError(errno.EDQUOT, "quota"), 7, "disk", "no space left on the device", "free some space"),
    (PermissionError(errno.EACCES, "no", "out/x"), 7, "disk", "out/x: permission denied", "check its owner and mode"),
    (OSError(errno.EROFS, "no", "out/x"), 7, "disk", "out/x: read-only file system", "check its owner and mode"),
    (MemoryError(), 8, "out of memory", "not enough memory", "lower --num-calibration"),
    (OutOfMemoryError("CUDA"), 8, "out of memory", "not enough memory (CUDA)", "lower --num-calibration"),
    (RuntimeError("can't allocate memory: 9 bytes"), 8, "out of memory", "9 bytes", "lower --num-calibration"),
    (errors.NumericsError("conv1 is NaN"), 9, "numerical failure", "conv1 is NaN", ""),
    (KeyboardInterrupt(), 130, "interrupted", "interrupted; nothing was written", ""),
    (failure.Terminated(), 143, "terminated", "terminated; nothing was written", ""),
    (errors.InputError("two\n  lines"), 3, "unreadable or unsafe input", "two lines", ""),
]


@pytest.mark.parametrize(
    ("error", "code", "kind", "message", "hint"), FAILURES, ids=[repr(case[0]) for case in FAILURES]
)
def test_an_error_of_the_pipeline_gets_its_code_and_no_traceback(
    error: BaseException,
    code: int,
    kind: str,
    message: str,
    hint: str,
    run: Capture,
    pipeline: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "inspect_checkpoint", fail)
    assert run("inspect model.pt") == code
    assert run.err.startswith("error: ") and message in run.err and hint in run.err
    assert len(run.err.splitlines()) == (2 if hint else 1)
    assert run("inspect model.pt --json") == code
    assert run.document()["error"]["kind"] == kind
    assert run("inspect model.pt --debug") == code
    assert run.err.startswith("Traceback") and message in run.err


def test_a_failed_verification_prints_what_it_measured(
    run: Capture, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = {"schema": "hcompress.verify/1"} | {key: REPORT[key] for key in ("metric", "parity", "checks")}

    def fail(*args: Any, **keywords: Any) -> None:
        raise errors.GateError("max_drop failed", report=record)

    monkeypatch.setattr(pipeline, "verify_run", fail)
    assert run(f"verify {write_run(tmp_path / 'small')}") == 4
    assert run.out.startswith("accuracy: 91.6 % (dense 91.73 %)\n")
    assert "max_drop: 0.13 % (limit 1 %) ok\n" in run.out


def test_the_demo_does_not_read_the_config_beside_it(run: Capture, pipeline: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "hcompress.toml").write_text("[gate]\nmax_bytes = '1KB'\n")
    assert run("demo --seed 2") == 0
    settings = pipeline.calls[0][1][1]
    assert (settings["max_bytes"].value, settings["seed"].value) == (None, 2)


def test_a_plan_needs_no_budget_that_its_method_meets(run: Capture, pipeline: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "hcompress.toml").write_text("[run]\nbudget = '4bit'\n")
    write_run(tmp_path / "small")
    assert run("prune model.pt") == 2
    assert run("prune model.pt --sparsity 0.5") == 0, "a flag goes before the config"
    assert run("prune model.pt --plan small --force --quiet") == 0


def test_names_that_are_no_files_are_left_to_the_pipeline(run: Capture, pipeline: types.ModuleType) -> None:
    assert run("inspect model.pt --model some.package:make") == 0
    assert run("quantize model.pt --data some.package:batches") == 0


def test_what_libraries_deprecate_is_not_told_to_users(tmp_path: Path) -> None:
    program = STAND_IN.format(body="import warnings; warnings.warn('old', FutureWarning); warnings.warn('odd')")
    (tmp_path / "model.pt").touch()
    command = [sys.executable, "-c", program, "inspect", "model.pt", "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "old" not in done.stderr
    assert "odd" in done.stderr


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    run: Capture, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise ValueError("oops")

    monkeypatch.setattr(pipeline, "inspect_checkpoint", fail)
    assert run("inspect model.pt --json") == 1
    assert run.err.startswith("Traceback (most recent call last):")
    assert "error: ValueError: oops\nhint: this is a bug in hcompress" in run.err
    assert "please report it" in run.document()["error"]["hint"]


def test_a_failed_gate_prints_its_report(
    run: Capture, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise errors.GateError("max_drop failed", hint="allow more", report=REPORT)

    monkeypatch.setattr(pipeline, "run_method", fail)
    assert run("quantize model.pt") == 4
    assert run.out == REPORT_TEXT
    assert run("quantize model.pt --json") == 4
    assert run.document()["report"] == REPORT
    assert run.document()["error"]["code"] == 4


STAND_IN = """
import sys, time, types
module = types.ModuleType("compress.pipeline")
def inspect_checkpoint(*args, progress, channels=False):
    progress("work", 1, 4)
    try:
        print("ready", file=sys.stderr, flush=True)
        {body}
    finally:
        print("cleaned up", file=sys.stderr, flush=True)
module.inspect_checkpoint = inspect_checkpoint
sys.modules["compress.pipeline"] = module
from compress.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 143, "terminated; nothing was written"),
        (signal.SIGINT, 130, "interrupted; nothing was written"),
    ],
)
def test_a_signal_cleans_up_and_gets_its_code(number: signal.Signals, code: int, words: str, tmp_path: Path) -> None:
    program = STAND_IN.format(body="time.sleep(60)")
    command = [sys.executable, "-c", program, "inspect", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert json.loads(out)["error"] == {"code": code, "kind": words.split(";")[0], "message": words, "hint": ""}
    assert err.splitlines() == ["cleaned up", "work: stopped after 0.0 s", f"error: {words}"]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "prune model.pt --method structured-obs --pattern 2:4",
            "method structured-obs has no --pattern",
            "obs, magnitude",
        ),
        (
            "prune model.pt --method magnitude --multiple-of 8",
            "method magnitude has no --multiple-of",
            "structured-obs",
        ),
        ("quantize model.pt --method uniform --tie a*", "method uniform has no --tie", "hawq"),
        ("prune model.pt --train model.pt", "--train has no effect without training", "--recover-steps"),
        ("prune model.pt --patience 2", "--patience has no effect without training", "--recover-steps"),
        ("prune model.pt --resume", "--resume has no effect without training", "--recover-steps"),
        ("prune model.pt --plan small --method hesso --lr 1", "--lr has no effect without training", "--recover-steps"),
        ("prune model.pt --plan small --exclude a*", "--exclude has no effect with --plan", "leave --exclude out"),
    ],
)
def test_an_option_without_effect_is_refused(
    line: str, message: str, hint: str, run: Capture, pipeline: types.ModuleType, tmp_path: Path
) -> None:
    write_run(tmp_path / "small")
    assert run(f"{line} --out new --json") == 2
    error = json.loads(run.out)["error"]
    assert message in error["message"] and hint in error["hint"]
    assert not pipeline.calls


@pytest.mark.parametrize(
    "line",
    [
        "prune model.pt --method hesso --train model.pt --lr 1 --resume",
        "prune model.pt --recover-epochs 1 --augment flip --resume",
        "prune model.pt --plan small --recover-steps 2 --lr 1 --sparsity 0.5",
        "prune model.pt --method obs --fisher labels --rounds 2 --exclude a*",
    ],
)
def test_an_option_with_an_effect_is_not(line: str, run: Capture, pipeline: types.ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "small")
    assert run(f"{line} --out new") == 0


def test_an_interruption_names_the_journal_of_the_training(
    run: Capture, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **keywords: Any) -> None:
        Path("small.journal").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_method", stop)
    assert run("prune model.pt --out small --json") == 130
    error = json.loads(run.out)["error"]
    assert error["message"] == "interrupted; the state of the training is in small.journal"
    assert error["hint"] == "the same command with --resume goes on from there"
    Path("small.journal").unlink()
    assert run("prune model.pt --out other") == 130 and "nothing was written" in run.err


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(str(ENTRY))} settings --json | true; exit ${{PIPESTATUS[0]}}"
    # The pipe may close before or after the write; both are quiet.
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_under_stdout_is_exit_7() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([ENTRY, "methods"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 7
    assert done.stderr.splitlines()[0] == "error: no space left on the device"
    assert len(done.stderr.splitlines()) == 2


# What the pipeline is asked for, and how its results are printed


def test_a_run_hands_over_everything_and_prints_before_and_after(run: Capture, pipeline: types.ModuleType) -> None:
    assert run("quantize model.pt --budget 4bit --force --seed 3") == 0
    assert run.out == REPORT_TEXT + "run folder: model-quantized\n"
    assert run.err == "work: done in 0.0 s\n"
    ((name, args, keywords),) = pipeline.calls
    job, checkpoint, settings = args
    assert (name, job, checkpoint) == ("run_method", "quantize", Path("model.pt"))
    assert {key: settings[key].value for key in ("budget", "seed", "out")} == {
        "budget": "4bit",
        "seed": 3,
        "out": "model-quantized",
    }
    assert settings.keys() == {setting.name for setting in SETTINGS}
    assert keywords["command"] == ["hcompress", "quantize", "model.pt", "--budget", "4bit", "--force", "--seed", "3"]
    assert (keywords["force"], keywords["dry_run"], keywords["plan"]) == (True, False, None)


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        ("prune model.pt --sparsity 0.5", "run_method", "run folder: model-pruned"),
        ("apply model.pt --plan small", "apply_plan", "run folder: model-applied"),
        ("export model.pt --out dense", "export_dense", "run folder: dense"),
        ("verify small", "verify_run", "accuracy: 91.6 % (dense 91.73 %)\nparity of ONNX Runtime"),
        (
            "bench small --batch 2",
            "bench_run",
            "model       median  p10   p90\ndense       2 ms    1 ms  3 ms\ncompressed  2 ms    1 ms  3 ms\n"
            "compressed takes 0.5 of the dense time\nbatch 2, 5 repeats, threads 1\n",
        ),
        ("inspect model.pt", "inspect_checkpoint", "64 parameters, MACs unknown; tensors: 1 float32"),
        (
            "sensitivity model.pt",
            "measure_sensitivity",
            "fisher, loss; 8 calibration examples, from the cache; bars on a logarithmic scale, 1e-1 to 1e2\n"
            "layer        value     weights  per weight\n"
            "conv.weight  100 +- 1  10       10          ########################\n"
            "fc.weight    0.5       1        0.5         ######\n"
            "zero         0         1        0\n",
        ),
        ("demo", "run_demo", "int8   90        100 KB  1,000,000  0.5 ms   0 %       8\nint8: demo/int8\ntook 3.0 s"),
    ],
)
def test_a_command_prints_text_or_the_record(
    line: str, name: str, words: str, run: Capture, pipeline: types.ModuleType, tmp_path: Path
) -> None:
    write_run(tmp_path / "small")
    assert run(line) == 0
    assert words in run.out
    assert run(f"{line} --json --quiet") == 0
    assert run.document()["schema"].startswith("hcompress.")
    assert run.err == ""
    assert [call[0] for call in pipeline.calls] == [name, name]


def test_names_are_neither_cut_nor_let_loose_on_a_terminal(run: Capture, pipeline: types.ModuleType) -> None:
    assert run("inspect model.pt") == 0
    assert "a" * 90 in run.out
    assert "blocked: lstm: recurrent\\x1b[31m" in run.out
    assert "tied: a, b" in run.out


def test_a_plan_may_be_a_run_folder(run: Capture, pipeline: types.ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "small")
    assert run("apply model.pt --plan small") == 0
    assert pipeline.calls[0][1][1] == Path("small/plan.json")
    assert run("quantize model.pt --plan small/plan.json") == 0
    assert pipeline.calls[1][2]["plan"] == Path("small/plan.json")


def test_a_dry_run_prints_the_prediction_and_needs_no_free_folder(
    run: Capture, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = {
        "schema": "hcompress.dry-run/1",
        "method": "magnitude",
        "predicted": {"sparsity": 0.5},
        "decisions": [1, 2],
    }
    record |= {"memory_bytes": 2e6, "notes": ["be careful"]}
    monkeypatch.setattr(pipeline, "run_method", lambda *args, **keywords: record)
    (tmp_path / "model-pruned").mkdir()
    assert run("prune model.pt --sparsity 0.5 --dry-run") == 0
    assert run.out == (
        "method magnitude: 2 decisions; nothing was written\npredicted sparsity: 0.5\n"
        "memory needed: about 2 MB\nnote: be careful\n"
    )


def test_a_setting_may_come_from_the_environment(
    run: Capture, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCOMPRESS_OUT", "there")
    assert run("export model.pt") == 0
    assert "run folder: there" in run.out


@pytest.mark.parametrize(
    ("environment", "is_bar"),
    [({"TERM": "xterm", "NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)],
)
def test_progress_at_a_terminal_is_a_bar(environment: dict[str, str], is_bar: bool, tmp_path: Path) -> None:
    program = STAND_IN.format(body="progress('work', 4, 4); raise MemoryError")
    parent, child = os.openpty()
    command = [sys.executable, "-c", program, "inspect", str(tmp_path)]
    subprocess.run(command, stderr=child, stdout=subprocess.DEVNULL, env=os.environ | environment)
    text = os.read(parent, 100_000).decode()
    os.close(parent)
    os.close(child)
    assert ("100%" in text) == is_bar
    assert ("\x1b[" in text) == is_bar
    assert "\x1b[3" not in text, "NO_COLOR leaves no colour"
    assert "error: not enough memory" in text


def test_a_table_at_a_terminal_keeps_every_word(tmp_path: Path) -> None:
    parent, child = os.openpty()
    subprocess.run(
        [ENTRY, "presets"], stdout=child, env=os.environ | {"COLUMNS": "40", "NO_COLOR": "1", "TERM": "xterm"}
    )
    text = os.read(parent, 100_000).decode()
    os.close(parent)
    os.close(child)
    assert "smallest-file" in text
    assert "…" not in text


# Commands on records


def test_show_prints_figures_and_layers(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "small")
    assert run("show small") == 0
    assert run.out.startswith("small: uniform, seed 0\n" + REPORT_TEXT)
    assert "conv2.weight  conv2d  4 x 16  4     25 %      0.1    quantize" in run.out
    assert run("show small --json") == 0
    assert run.document() == REPORT


def test_show_reads_the_current_folder(run: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_run(tmp_path / "small"))
    assert run("show .") == 0


def test_show_reads_a_rejected_run_and_one_without_figures(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "small.rejected", metric=None, latency_ms=None, layers=[layer("a", "kept", None)])
    assert run("show small.rejected") == 0
    assert "accuracy" not in run.out and "latency" not in run.out
    assert "a      conv2d  4 x 16  4     25 %      -      kept" in run.out


def test_show_names_a_key_that_the_report_lacks(run: Capture, tmp_path: Path) -> None:
    (write_run(tmp_path / "small") / "report.json").write_text('{"schema": "hcompress.report/1"}')
    assert run("show small") == 3
    assert "report.json: key 'method' is missing" in run.err


def test_why_says_the_decision_its_reason_and_what_others_got(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "small")
    assert run("show small --why conv1") == 0
    assert run.out == (
        "conv1.weight: keep.\n"
        "Why: it is small.\n"
        "It is a conv2d of 4 x 16 with 64 weights, 33.3 % of all, at 4 bits and 25 % zeros.\n"
        "Its relative error is 0.01: 2 of 3 layers have a larger one.\n"
        "0 of 2 other layers got the same decision.\n"
        "Instead, quantize to 4 bits: conv2.weight, fc.weight.\n"
    )
    assert run("show small --why fc.weight --json") == 0
    assert run.document()["layer"]["tensor"] == "fc.weight"
    assert "Its relative error is 0.2: no other of 3 is larger." in run.document()["text"]


def test_why_of_a_layer_like_all_others(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "small", layers=[layer("a", "keep", None) | {"why": ""}])
    assert run("show small --why a") == 0
    assert "Why: the method gave no reason.\n" in run.out
    assert run.out.endswith("0 of 0 other layers got the same decision.\n")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("conv", "--why conv fits 2 layers", "one of conv1.weight, conv2.weight"),
        ("cnov1.weight", "--why cnov1.weight: no such layer", "one of conv1.weight"),
        ("zzz", "--why zzz: no such layer", "one of conv1.weight, conv2.weight, fc.weight"),
    ],
)
def test_why_of_no_single_layer_lists_close_ones(
    name: str, message: str, hint: str, run: Capture, tmp_path: Path
) -> None:
    write_run(tmp_path / "small")
    assert run(f"show small --why {name}") == 2
    assert run.err.startswith(f"error: {message}\nhint: {hint}")


def test_a_module_name_means_its_weight_even_if_others_hold_it() -> None:
    layers = [layer("fc.weight", "keep", 0.0), layer("big_fc.weight", "keep", 0.0)]
    assert find_layer(layers, "fc")["tensor"] == "fc.weight"


def test_a_report_without_its_model_says_what_was_measured(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "small.rejected", files={})
    assert run("show small.rejected") == 0
    assert "model.onnx                  1.08 MB     -\n" in run.out


def option(bits: int, loss: float, *, chosen: bool = False) -> dict[str, Any]:
    return {"option": f"{bits} bits", "cost": 1000.0 * bits, "unit": "bytes", "loss": loss, "chosen": chosen}


def test_why_says_the_sensitivity_and_what_each_alternative_would_cost_and_lose(run: Capture, tmp_path: Path) -> None:
    measured = {"measure": "hessian-trace", "value": 12.4, "stderr": 0.3, "unit": "loss per squared weight"}
    layers = [
        layer("a", "quantize", 0.1) | {"sensitivity": measured | {"value": value}, "alternatives": []}
        for value in (20.0, 12.4, 3.0)
    ]
    layers[1] |= {"tensor": "b", "alternatives": [option(2, 0.0084), option(4, 0.0021, chosen=True), option(8, 0.0)]}
    layers[2] |= {"tensor": "c", "why": f"channels:{'mms' * 1000}", "alternatives": [option(2, 0.5)]}
    layers.append(layer("d", "keep", 0.1))
    write_run(tmp_path / "small", layers=layers, frontier={"loss_unit": "nats"})
    assert run("show small --why b") == 0
    assert run.out.splitlines()[4:8] == [
        "Its sensitivity is 12.4 +- 0.3 loss per squared weight (hessian-trace): 1 of 3 layers have a larger one.",
        "Chosen: 4 bits costs 4 KB; if no other layer changed, the loss would rise by 0.0021 nats.",
        "2 bits would cost 2 KB and lose 0.0084 nats, 4 times as much.",
        "8 bits would cost 8 KB and lose 0 nats.",
    ]
    assert run("show small --why c") == 0
    assert "2 bits would cost 2 KB and lose 0.5 nats.\n" in run.out and "Chosen" not in run.out
    assert max(map(len, run.out.splitlines())) < 120
    assert run("show small --why d") == 0
    assert "sensitivity" not in run.out and "cost" not in run.out


PREDICTION = """\
frontier: point 3 of 9: 4 average bits, expected to lose 0.0021 nats
loss: measured 0.003 nats (KL divergence\\x1b; 512 examples)
"""


def test_show_prints_the_point_of_the_frontier_and_the_measured_loss(run: Capture, tmp_path: Path) -> None:
    frontier = {"unit": "average bits", "loss_unit": "nats", "num_points": 9, "index": 3, "cost": 4.0, "loss": 0.0021}
    loss = {"predicted": None, "measured": 0.003, "unit": "nats", "what": "KL divergence\x1b", "num_examples": 512}
    table, proofs = REPORT_TEXT.split("parity")
    write_run(tmp_path / "small", frontier=frontier | {"points": [], "rivals": []}, loss=loss)
    assert run("show small") == 0
    assert run.out.startswith(f"small: uniform, seed 0\n{table}{PREDICTION}parity{proofs}")
    write_run(tmp_path / "old", frontier=None, loss=None)
    assert run("show old") == 0
    assert run.out.startswith(f"old: uniform, seed 0\n{REPORT_TEXT}")


def write_frontier(folder: Path, **changes: Any) -> FrontierRecord:
    """Three items of two widths: the four points that assign 2 or 4 bits by cost, and 2 bits and 4 bits everywhere."""
    choices = (Choice(2, 200, 0.3, ("mse",)), Choice(4, 400, 0.0, ("mse",)))
    values: dict[str, Any] = {
        **{"method": "hawq", "quantity": "bytes", "scale": 10.0, "fixed": 50, "loss_unit": "nats"},
        **{"dense_amount": 100_000.0, "activations": {}},
        **{"items": tuple(Item((name,), choices) for name in "abc"), "index": 1, "chosen": (1, 0, 0)},
        **{"costs": (600, 800, 1000, 1100), "losses": (0.5, 0.2, 0.1, 0.0)},
    }
    record = FrontierRecord(**values | changes)
    (folder / "frontier.json").write_text(canonical.dumps(record))
    return record


def test_show_prints_a_frontier_with_the_chosen_point_and_its_rivals(run: Capture, tmp_path: Path) -> None:
    record = write_frontier(write_run(tmp_path / "a b"))
    assert run("show 'a b' --frontier") == 0
    assert run.out == (
        "a b: hawq, point 1 of 4, counted from 0\n"
        "point  bytes    loss (nats)\n"
        "0      6.5 KB   0.5\n"
        "-      6.5 KB   0.9          2 bits everywhere\n"
        "1      8.5 KB   0.2          chosen\n"
        "2      10.5 KB  0.1\n"
        "3      11.5 KB  0\n"
        "-      12.5 KB  0            4 bits everywhere\n"
        "another point: hcompress quantize CHECKPOINT --plan 'a b' --pick N --out DIR\n"
    )
    assert run("show 'a b' --frontier --json") == 0
    assert run.document() == canonical.plain(record)


def test_a_width_everywhere_may_be_a_point_of_the_frontier(run: Capture, tmp_path: Path) -> None:
    write_frontier(write_run(tmp_path / "small"), costs=(600, 1200), losses=(0.9, 0.0), quantity="bits", scale=0.01)
    assert run("show small --frontier") == 0
    assert run.out.splitlines()[1:4] == [
        "point  average bits  loss (nats)",
        "0      6.5           0.9          2 bits everywhere",
        "1      12.5          0            chosen, 4 bits everywhere",
    ]


@pytest.mark.parametrize(("num_points", "num_rows"), [(1, 1), (20, 20), (5321, 21)])
def test_a_long_frontier_is_thinned_to_a_page(num_points: int, num_rows: int, run: Capture, tmp_path: Path) -> None:
    costs, losses = tuple(range(num_points)), tuple(1 / (n + 1) for n in range(num_points))
    changes = {"items": (), "costs": costs, "losses": losses, "index": num_points // 3, "chosen": ()}
    write_frontier(write_run(tmp_path / "small"), **changes)
    assert run("show small --frontier") == 0
    rows = run.out.splitlines()[2:-1]
    assert len(rows) == num_rows
    assert rows[0].startswith("0 ") and rows[-1].startswith(f"{num_points - 1} ")
    (chosen,) = [row for row in rows if row.endswith("chosen")]
    assert chosen.startswith(f"{num_points // 3} ")


@pytest.mark.parametrize("changes", [{"index": 4}, {"index": -1}, {"losses": (0.5, 0.2)}, {"costs": (), "losses": ()}])
def test_a_frontier_that_is_not_whole_is_refused(changes: dict[str, Any], run: Capture, tmp_path: Path) -> None:
    write_frontier(write_run(tmp_path / "small"), **changes)
    assert run("show small --frontier") == 3
    assert "frontier.json" in run.err and "hint: make the run again" in run.err


def test_names_of_a_frontier_are_escaped(run: Capture, tmp_path: Path) -> None:
    hostile = "a\u202e\n\x07"
    write_frontier(write_run(tmp_path / "small"), method=hostile, quantity=hostile, loss_unit=hostile)
    assert run("show small --frontier") == 0
    assert "\u202e" not in run.out and "\x07" not in run.out
    assert len(run.out.splitlines()) == 9


def test_a_range_for_each_channel_does_not_flood_a_diff(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    wide = Quantize("wide", "weight", 4, "symmetric", 0, f"channels:{'ms' * 1000}")
    write_run(tmp_path / "b", make_plan(decisions=(wide,)))
    assert run("diff a b") == 0
    assert "wide: only in B: 4 bits, symmetric, a scale for each index of dimension 0, range channels:" in run.out
    assert max(map(len, run.out.splitlines())) < 200


def test_show_needs_no_torch(tmp_path: Path) -> None:
    write_frontier(write_run(tmp_path / "small", frontier=None, loss=None))
    lines = ["show small", "show small --why conv1", "show small --frontier"]
    assert not modules_loaded_by(lines, tmp_path) & {*HEAVY, "jinja2"}


def test_diff_shows_settings_decisions_and_figures(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    decisions = (Quantize("conv1.weight", "weight", 4, "symmetric", 0, "mse"),)
    decisions += (Quantize("relu", "activation", 8, "asymmetric", None, (0.0, 6.0)),)
    plan = make_plan(decisions=decisions, budget=Budget("bits", 4.0), options={"range": "mse", "activations": "8"})
    write_run(tmp_path / "b", plan, average_bits=4.0, files={"model.onnx": 150_000}, metric=None)
    assert run("diff a b") == 0
    lines = run.out.splitlines()
    assert lines[0].split() == ["a", "b"]
    cells = {tuple(line.split()) for line in lines}
    assert {("budget", "8bit", "4bit"), ("option", "activations", "-", "8"), ("average_bits", "8", "4")} <= cells
    assert {("bytes", "of", "model.onnx", "283034", "150000"), ("accuracy", "(%)", "91.6", "-")} <= cells
    assert lines[-3:] == [
        "conv1.weight: bits 8 -> 4",
        "fc: only in A: keeps 5 of 10, unstructured",
        "relu: only in B: 8 bits, asymmetric, one scale, range 0 to 6",
    ]
    assert run("diff a b/plan.json --json") == 0
    document = run.document()
    assert document["figures"] == {}, "a plan alone has no figures"
    assert document["plan"]["budget"] == {"a": "8bit", "b": "4bit"}
    assert document["decisions"][0]["text"] == "bits 8 -> 4"


def test_diff_of_equal_runs_says_so(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    assert run("diff a a") == 0
    assert run.out == "a and a do not differ\n"


def test_diff_shortens_hashes(run: Capture, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", make_plan(source_sha256="f" * 64))
    assert run("diff a b") == 0
    assert run.out.splitlines()[1].split() == ["source", "0" * 12, "f" * 12]


def test_methods_lists_the_registry(run: Capture) -> None:
    assert run("methods") == 0
    assert "magnitude       hcompress prune " in run.out
    assert run("methods --json") == 0
    assert {entry["name"] for entry in run.document()["methods"]} == {
        "layerwise",
        "obs",
        "magnitude",
        "gradual",
        "structured-obs",
        "hesso",
        "cric",
        "output-change",
        "hawq",
        "uniform",
    }


def test_presets_lists_them_or_prints_one(run: Capture) -> None:
    assert run("presets") == 0
    assert run.out.splitlines()[1].startswith("ci-gate        the gate of a CI job")
    assert run("presets edge-int8") == 0
    assert "run.activations  8" in run.out
    assert run("presets edge-int8 --json") == 0
    assert list(run.document()["presets"]) == ["edge-int8"]


def test_settings_prints_values_with_their_origins(
    run: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hcompress.toml").write_text("[data]\nmean = [0.5, 0.25]\n")
    monkeypatch.setenv("HCOMPRESS_THREADS", "1")
    assert run("settings --preset ci-gate") == 0
    cells = {tuple(line.split(maxsplit=3)) for line in run.out.splitlines()}
    assert ("data.mean", "--mean", "0.5,0.25", "hcompress.toml") in cells
    assert ("run.threads", "--threads", "1", "environment") in cells
    assert ("gate.max_drop", "--max-drop", "1.0", "preset ci-gate") in cells
    assert ("run.exclude", "--exclude", "-", "default") in cells
    assert run("settings --json") == 0
    assert {entry["name"] for entry in run.document()["settings"]} == {setting.name for setting in SETTINGS}


def test_init_writes_what_settings_reads(run: Capture, tmp_path: Path) -> None:
    (tmp_path / "net.py").touch()
    flags = {
        "model": "net.py:make",
        "model_args": '{"name": "a\\"b", "width": 16}',
        "mean": "0.5,0.25",
        "max_drop": "1",
    }
    words = " ".join(f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in flags.items())
    assert run(f"init {words}") == 0
    assert run.out == "wrote hcompress.toml; hcompress settings prints what is in force\n"
    assert run("settings --json") == 0
    found = {entry["name"]: entry for entry in run.document()["settings"]}
    assert found["mean"]["value"] == [0.5, 0.25]
    assert found["max_drop"]["value"] == 1.0
    assert {name: found[name]["value"] for name in ("model", "model_args")} == {
        name: flags[name] for name in ("model", "model_args")
    }
    assert all(found[name]["origin"] == "hcompress.toml" for name in flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hcompress.toml", "model.pt", "net.py"]


def test_init_explains_every_setting_and_replaces_only_when_forced(run: Capture, tmp_path: Path) -> None:
    assert run("init --json") == 0
    assert run.document() == {"schema": "hcompress.init/1", "path": "hcompress.toml", "settings": {}}
    text = (tmp_path / "hcompress.toml").read_text()
    assert all(setting.help in text for setting in SETTINGS)
    assert run("init --max-drop 1") == 2
    assert (tmp_path / "hcompress.toml").read_text() == text
    assert run("init --max-drop 1 --force") == 0
    assert "\nmax_drop = 1.0  # " in (tmp_path / "hcompress.toml").read_text()


def test_init_refuses_what_toml_would_change(run: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.cli import init

    monkeypatch.setattr(init, "_toml", lambda value: '"other"')
    assert run("init --budget 4bit") == 2
    assert "--budget '4bit' does not survive TOML" in run.err
    assert not (tmp_path / "hcompress.toml").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell: str, run: Capture) -> None:
    assert run(f"completion {shell}") == 0
    assert "_HCOMPRESS_COMPLETE" in run.out
    script = run.out
    assert run(f"completion {shell} --json") == 0
    assert run.document()["script"].strip() == script.strip()


def test_the_completion_script_gets_commands_and_options() -> None:
    environment = os.environ | {
        "_HCOMPRESS_COMPLETE": "bash_complete",
        "COMP_WORDS": "hcompress prune --spa",
        "COMP_CWORD": "2",
    }
    done = subprocess.run([ENTRY], capture_output=True, text=True, env=environment)
    assert done.stdout == "plain,--sparsity\n"


# Memory


@pytest.mark.parametrize(
    ("name", "most", "kept"),
    [
        (None, 2**40, [(-3, 2**30), (-1, 2**30)]),
        (None, 2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**30)]),
        (None, 0, [(-3, 2**30), (-3, 2**25)]),
        ("MALLOC_ARENA_MAX", 2**40, []),
    ],
)
def test_freed_memory_stays_where_the_library_lets_it(
    name: str | None, most: int, kept: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(parameter: int, size: int) -> int:
        calls.append((parameter, size))
        return int(parameter == -1 or size <= most)

    library = types.SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    monkeypatch.setattr("sys.platform", "linux")
    for known in [known for known in os.environ if known.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(known)
    if name is not None:
        monkeypatch.setenv(name, "1")
    main_module = importlib.import_module("compress.cli.main")
    main_module.keep_freed_memory()
    assert calls == kept
    del library.mallopt
    main_module.keep_freed_memory()
