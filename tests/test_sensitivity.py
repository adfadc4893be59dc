"""``hcompress sensitivity`` as a user runs it, on the network that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from compress.cli.main import cli
from safetensors.torch import load_file

from compress.errors import UsageError
from compress.registry import MEASURES
from compress.sensitivity import read_sensitivity

DEMO = Path(str(resources.files("compress.demo")))
NETWORK = [str(DEMO / "fashion_net.safetensors"), "--model", "compress.demo.network:fashion_net"]
DATA = ["--data", str(DEMO / "calibration.npz"), "--num-calibration", "24", "--mean", "0.286", "--std", "0.353"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["sensitivity", *NETWORK, *arguments])


@pytest.mark.parametrize("name", [measure.name for measure in MEASURES])
def test_every_measure_gives_each_layer_a_finite_value(name: str, tmp_path: Path) -> None:
    result = run(*DATA, "--measure", name, "--passes", "2", "--out", str(tmp_path / "out"), "--json", "--quiet")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    written = read_sensitivity(tmp_path / "out" / "sensitivity.json")
    assert written.method == name
    assert {entry["layer"] for entry in record["entries"]} == set(record["elements"])
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
    first, second = (json.loads(run(*DATA, "--passes", "2", "--json", "--quiet").stdout) for _ in range(2))
    assert first["entries"] == second["entries"]


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


def test_missing_data_are_a_usage_error() -> None:
    assert "no calibration data" in refused("--measure", "fisher").message


def test_an_output_folder_is_not_written_into_without_force(tmp_path: Path) -> None:
    assert "--force" in str(refused(*DATA, "--passes", "2", "--out", str(tmp_path)).hint)
    assert not list(tmp_path.iterdir())
