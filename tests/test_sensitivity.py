"""``hcompress sensitivity`` as a user runs it, on the network that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from compress.cli.main import cli
from safetensors.torch import load_file
from torch import nn

from compress.errors import InputError, UsageError
from compress.graph.trace import Graph, trace_graph
from compress.manifest import check_files, read_manifest
from compress.measuring import network_sha256
from compress.registry import MEASURES, find_measure
from compress.sensitivity import TOGETHER, read_sensitivity

DEMO = Path(str(resources.files("compress.demo")))
NETWORK = [str(DEMO / "fashion_net.safetensors"), "--model", "compress.demo.network:fashion_net"]
DATA = ["--data", str(DEMO / "calibration.npz"), "--num-calibration", "24", "--mean", "0.286", "--std", "0.353"]


def run(*arguments: str) -> Result:
    line = ["sensitivity", *NETWORK, *arguments]
    return CliRunner().invoke(cli, line, obj=line)


@pytest.mark.parametrize("name", [measure.name for measure in MEASURES])
def test_every_measure_gives_each_layer_a_finite_value(name: str, tmp_path: Path) -> None:
    passes = ("--passes", "3") if "passes" in find_measure(name).options else ()
    result = run(*DATA, "--measure", name, *passes, "--out", str(tmp_path / "out"), "--json", "--quiet")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    written = read_sensitivity(tmp_path / "out" / "sensitivity.json")
    assert written.method == name
    layers = {entry["layer"] for entry in record["entries"]}
    assert layers if name == "activation-trace" else layers - {TOGETHER} == set(record["elements"])
    assert len(written.entries) == len(record["entries"])
    sidecar = tmp_path / "out" / "sensitivity.safetensors"
    assert sidecar.exists() == (name in ("fisher", "hessian-diagonal"))
    if sidecar.exists():
        assert {key: value.numel() for key, value in load_file(sidecar).items()} == record["elements"]


def test_the_table_is_sorted_and_has_error_bars() -> None:
    result = run(*DATA, "--passes", "2", "--quiet")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if " +- " in line]
    values = [float(row[1]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert len(values) > 2


def test_one_seed_gives_one_record() -> None:
    line = (*DATA, "--passes", "2", "--cache", "off", "--json", "--quiet")
    first, second = (json.loads(run(*line).stdout) for _ in range(2))
    assert first["entries"] == second["entries"]
    assert not first["cached"] and not second["cached"]


def test_predictors_are_compared_on_random_widths_and_kept_with_the_measure(tmp_path: Path) -> None:
    line = (*DATA, "--measure", "output-change", "--configurations", "4", "--passes", "2", "--quiet")
    result = run(*line, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "out" / "predictors.json").read_text())
    names = ["hawq", "hessian-diagonal", "output-change", "summed changes", "partly run"]
    assert [entry["name"] for entry in kept["predictors"]] == names
    assert len(kept["measured"]) == 4
    assert "predictors: 4 random configurations of 2 to 8 bits a weight" in result.stdout
    assert all(f"\n{name} " in result.stdout for name in names)
    check_files(tmp_path / "out", read_manifest(tmp_path / "out"))


def test_one_configuration_leaves_nothing_to_rank() -> None:
    result = run(*DATA, "--measure", "weight-error", "--configurations", "1", "--quiet")
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == "--configurations 1 leaves nothing to rank"
    assert result.exception.hint == "pass 2 or more; 50 tell predictors apart"


def test_a_comparison_is_refused_where_no_report_is_written() -> None:
    given = (
        "--eval",
        str(DEMO / "evaluation.npz"),
        "--budget",
        "4bit",
        "--configurations",
        "3",
        "--dry-run",
        "--quiet",
    )
    line = ["quantize", *NETWORK, *DATA, *given]
    result = CliRunner().invoke(cli, line, obj=line)
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == "--configurations goes into the report, and --dry-run writes none"


@pytest.mark.slow
def test_a_quantized_run_reports_the_comparison_that_it_is_asked_for(tmp_path: Path) -> None:
    evaluation = ("--eval", str(DEMO / "evaluation.npz"), "--method", "hawq", "--budget", "4bit", "--passes", "2")
    line = [
        "quantize",
        *NETWORK,
        *DATA,
        *evaluation,
        "--configurations",
        "3",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    result = CliRunner().invoke(cli, line, obj=line)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["predictors"]["num_configurations"] == 3
    assert "predictors: 3 random configurations" in result.stdout
    assert '<table id="predictor-table">' in (tmp_path / "out" / "report.html").read_text()
    assert sum(record["onnx_bytes"].values()) == record["files"]["model.onnx"]
    assert record["activations"], "the demo is convolutional"


@pytest.mark.parametrize("name", ["hessian-trace", "fisher"])
def test_a_measure_that_was_taken_before_is_read_from_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    passes = ("--passes", "2", "--rtol", "0.0001") if name == "hessian-trace" else ()
    line = (*DATA, "--measure", name, *passes, "--json")
    results = [run(*line, "--out", str(tmp_path / out)) for out in ("first", "second")]
    fresh, cached = (json.loads(result.stdout) for result in results)
    assert (fresh.pop("cached"), cached.pop("cached")) == (False, True)
    assert f"{name} from the cache: done in" in results[1].stderr
    del fresh["time_s"], cached["time_s"], fresh["forecast"], cached["forecast"]
    assert cached == fresh
    assert any("--passes" in note for note in cached["notes"]) == (name == "hessian-trace")
    for path in (tmp_path / "first").iterdir():
        if path.name not in ("manifest.json", "report.html", "report.md"):  # these have times
            assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    assert not json.loads(run(*line, "--seed", "1").stdout)["cached"]


def test_a_damaged_cache_is_said_so_and_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = (*DATA, "--measure", "fisher", "--json", "--quiet")
    fresh = json.loads(run(*line).stdout)
    (path,) = (tmp_path / "hcompress").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    again = json.loads(run(*line).stdout)
    assert not again["cached"] and again["entries"] == fresh["entries"]
    assert any(str(path) in note and "measured again" in note for note in again["notes"])
    assert json.loads(run(*line).stdout)["cached"]


def test_the_loss_of_the_users_own_code_is_not_cached(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text("from compress.task import Classification\n\nclass Mine(Classification):\n    pass\n")
    line = (*DATA, "--measure", "fisher", "--task", f"{task}:Mine", "--json", "--quiet")
    assert not any(json.loads(run(*line).stdout)["cached"] for _ in range(2))


def trace(*modules: nn.Module) -> Graph:
    torch.manual_seed(0)
    return trace_graph(nn.Sequential(nn.Linear(3, 3), *modules).eval(), (torch.ones(2, 3),))


class Scale(nn.Module):
    """A factor that no state dict holds."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor: torch.Tensor
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_another_network_with_the_same_weights_has_another_key() -> None:
    networks = [(nn.ReLU(),), (nn.GELU(),), (), (Scale(1.0),), (Scale(2.0),), (nn.Softplus(1.0),), (nn.Softplus(2.0),)]
    hashes = [network_sha256(trace(*modules)) for modules in networks]
    assert len(set(hashes)) == len(hashes)
    assert network_sha256(trace(nn.ReLU())) == hashes[0]


def test_traces_that_are_not_close_enough_are_said_so() -> None:
    result = run(*DATA, "--passes", "2", "--rtol", "0.0001", "--quiet")
    assert "raise --passes for closer ones" in result.stdout


def test_a_measure_without_data_needs_none() -> None:
    result = run("--measure", "weight-error", "--input-shape", "1,28,28", "--quiet")
    assert result.exit_code == 0, result.output


def refused(*arguments: str) -> UsageError:
    error = run(*arguments).exception
    assert isinstance(error, UsageError)
    return error


def test_an_unknown_measure_names_the_choices() -> None:
    assert "hessian-trace" in str(refused(*DATA, "--measure", "hesian").hint)


def test_an_estimator_needs_the_exact_hessian() -> None:
    error = refused(*DATA, "--estimator", "xtrace")
    assert error.message == "--estimator has no effect on Gauss-Newton traces"
    assert "--trace hessian" in str(error.hint)


def test_the_estimators_agree_on_the_exact_hessian() -> None:
    line = (
        *DATA,
        "--num-calibration",
        "8",
        "--trace",
        "hessian",
        "--passes",
        "12",
        "--cache",
        "off",
        "--json",
        "--quiet",
    )
    found = [json.loads(run(*line, "--estimator", name).stdout)["entries"] for name in ("hutch++", "xtrace")]
    for one, other in zip(*found, strict=True):
        assert abs(one["value"] - other["value"]) <= 5 * (one["stderr"] + other["stderr"])


def test_missing_data_are_a_usage_error() -> None:
    assert "no calibration data" in refused("--measure", "fisher").message


def test_an_output_folder_is_not_written_into_without_force(tmp_path: Path) -> None:
    assert "--force" in str(refused(*DATA, "--passes", "2", "--out", str(tmp_path)).hint)
    assert not list(tmp_path.iterdir())


WEIGHT_ERROR = ("--measure", "weight-error", "--input-shape", "1,28,28", "--quiet")


def test_force_replaces_a_whole_folder_of_ours_and_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*DATA, "--measure", "fisher", "--out", str(out)).exit_code == 0
    assert {path.name for path in out.iterdir()} == {
        *("manifest.json", "report.html", "report.md"),
        *("sensitivity.json", "sensitivity.safetensors", "sensitivity.svg"),
    }
    check_files(out, read_manifest(out))
    assert run(*WEIGHT_ERROR, "--out", str(out), "--force").exit_code == 0
    assert {path.name for path in out.iterdir()} == {
        *("manifest.json", "report.html", "report.md", "sensitivity.json", "sensitivity.svg")
    }
    (out / "mine.txt").touch()
    assert "mine.txt" in refused(*WEIGHT_ERROR, "--out", str(out), "--force").message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_measure_of_many_options_is_plotted_for_one(tmp_path: Path) -> None:
    result = run(*WEIGHT_ERROR, "--out", str(tmp_path / "out"))
    svg = (tmp_path / "out" / "sensitivity.svg").read_text()
    record = read_sensitivity(tmp_path / "out" / "sensitivity.json")
    layers = {layer for layer, _ in record.entries}
    assert "weight-error of fashion_net.safetensors, 4 bits for every layer" in svg
    assert svg.count("<g>") == len(layers) < len(record.entries)
    assert all(f"<title>{layer}: {record.entries[layer, '4'].value:.3g}</title>" in svg for layer in layers)
    assert "bars on a logarithmic scale" in result.stdout.splitlines()[0]


def test_an_interrupted_measure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.measure.weight_error.measure", interrupt)
    assert isinstance(run(*WEIGHT_ERROR, "--out", str(tmp_path / "new" / "out")).exception, SystemExit)
    assert not list(tmp_path.iterdir())


def test_two_measures_are_compared_layer_by_layer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = (*DATA, "--passes", "2", "--compare", "hessian-trace", "fisher", "--out", str(out))
    record = json.loads(run(*line, "--json", "--quiet").stdout)
    assert [measure["name"] for measure in record["measures"]] == ["hessian-trace", "fisher"]
    assert -1 <= record["spearman"] <= 1 and record["spearman_stderr"] > 0
    assert {path.name for path in out.iterdir()} == {"comparison.json", "manifest.json", "report.html", "report.md"}
    check_files(out, read_manifest(out))
    kept = json.loads((out / "comparison.json").read_text())
    assert kept["entries"] == record["entries"]
    page = (out / "report.html").read_text()
    assert page.count("<circle") == len(record["entries"]) == page.count("<tr>") - 1
    shown = run(*line, "--force", "--quiet").stdout
    assert shown.startswith("Spearman rho ") and "of hessian-trace and fisher over" in shown


def test_a_measure_is_compared_with_an_earlier_one(tmp_path: Path) -> None:
    old = str(tmp_path / "old")
    assert run(*DATA, "--measure", "fisher", "--out", old).exit_code == 0
    for named in (old, str(tmp_path / "old" / "sensitivity.json")):
        record = json.loads(run(*DATA, "--compare", named, "fisher", "--json", "--quiet").stdout)
        assert record["spearman"] == 1.0 and record["measures"][0]["name"] == named
        assert all(one == other for one, other in (entry["values"] for entry in record["entries"]))
    refusal = run(*DATA, "--compare", "fischer", "fisher", "--quiet").exception
    assert isinstance(refusal, InputError)
    assert refusal.message == "fischer is no measure, and no record of one" and "hessian-trace" in str(refusal.hint)


def test_measures_without_common_layers_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.measuring.take", lambda *_: pytest.fail("a measure was made"))
    message = "weight-error and activation-trace have 0 layers in common, and 3 are the fewest to compare"
    assert refused(*DATA, "--compare", "weight-error", "activation-trace").message == message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--measure", "fisher"), "--measure and --compare contradict each other"),
        (("--configurations", "4"), "--configurations has no effect with --compare"),
    ],
)
def test_a_comparison_leaves_no_option_without_effect(more: tuple[str, ...], message: str) -> None:
    assert refused(*DATA, "--compare", "fisher", "hessian-trace", *more).message == message


def test_a_dry_run_says_what_a_measure_would_take_and_writes_nothing(tmp_path: Path) -> None:
    line = (*DATA, "--measure", "hessian-diagonal", "--dry-run", "--out", str(tmp_path / "out"))
    record = json.loads(run(*line, "--json", "--quiet").stdout)
    expected = record["forecast"]
    assert 0 < expected["least_s"] < expected["most_s"] < 600 and expected["memory_bytes"] > 10**7
    result = run(*line)
    assert result.stdout.startswith("hessian-diagonal: ") and result.stdout.endswith("B\n")
    assert not list(tmp_path.iterdir())
    nothing = run("--measure", "weight-error", "--input-shape", "1,28,28", "--dry-run", "--quiet")
    assert nothing.stdout == "weight-error: no time to speak of\n"


def test_a_long_measure_says_before_what_it_will_take() -> None:
    result = run(*DATA, "--num-calibration", "512", "--measure", "fisher", "--json")
    said = next(line for line in result.stderr.splitlines() if "is expected to take" in line)
    assert said.startswith("fisher is expected to take ")
    record = json.loads(result.stdout)
    assert record["forecast"]["most_s"] > 0 and record["time_s"] > 0


def test_the_report_has_the_bars_the_table_and_the_saliencies_of_single_weights(tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = json.loads(run(*DATA, "--measure", "fisher", "--out", str(out), "--json", "--quiet").stdout)
    page, text = ((out / name).read_text() for name in ("report.html", "report.md"))
    assert record["saliencies"]["kept"]["count"] == sum(record["elements"].values())
    assert record["saliencies"]["removed"]["count"] == 0
    assert page.count('class="bar"') == len(record["entries"])
    assert "Saliency: half the squared weight times its entry of fisher (loss)" in page
    for entry in record["entries"]:
        assert f"<td>{entry['layer']}</td>" in page and f"| {entry['value']:.4g} " in text
    assert 'class="kept"' in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--measure", "fisher", "--passes", "7"), "fisher has no --passes"),
        (("--measure", "hessian-diagonal", "--trace", "hessian"), "hessian-diagonal has no --trace"),
        (("--measure", "hessian-diagonal", "--estimator", "xtrace"), "hessian-diagonal has no --estimator"),
        (("--compare", "fisher", "weight-error", "--eigenvalues", "2"), "fisher, weight-error has no --eigenvalues"),
    ],
)
def test_an_option_of_another_measure_is_refused(line: tuple[str, ...], message: str) -> None:
    error = refused(*DATA, *line)
    assert error.message == message
    assert str(error.hint).startswith("measures that take it: ")


def test_a_setting_that_is_no_flag_does_not_stand_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCOMPRESS_CONFIGURATIONS", "5")
    monkeypatch.setenv("HCOMPRESS_EIGENVALUES", "5")
    result = run(*DATA, "--compare", "fisher", "hessian-trace", "--quiet")
    assert result.exit_code == 0, result.output


def test_all_layers_together_are_no_layer_of_a_comparison(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run(*DATA, "--measure", "hessian-eigenvalues", "--passes", "4", "--out", out).exit_code == 0
    record = json.loads(run(*DATA, "--compare", out, out, "--json", "--quiet").stdout)
    layers = [entry["layer"] for entry in record["entries"]]
    assert TOGETHER not in layers and len(layers) == len(read_sensitivity(Path(out, "sensitivity.json")).entries) - 1
    again = run(*DATA, "--compare", out, "weight-error", "--dry-run", "--quiet")
    assert again.stdout.splitlines()[:2] == ["weight-error: no time to speak of", f"{out}: no time to speak of"]
