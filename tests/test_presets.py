"""Each preset, as a user runs it, on the network that ships with the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from command import record

DEMO = Path(str(resources.files("compress.demo")))
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
DATA = ("--data", DEMO / "calibration.npz", "--eval", DEMO / "evaluation.npz", "--num-calibration", "64")
PRESETS = sorted(path.stem for path in Path(str(resources.files("compress.presets"))).glob("*.toml"))
pytestmark = pytest.mark.usefixtures("quick_runs")


def report_of(preset: str, folder: Path) -> dict[str, Any]:
    command = ("quantize", DEMO / "fashion_net.safetensors", *NETWORK, *DATA, "--preset", preset)
    report = record(*command, "--out", folder / preset)
    assert (folder / preset / report["delivered"]).stat().st_size == report["files"][report["delivered"]]
    assert all(check["ok"] for check in report["checks"])
    return report


Reports = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The report of a preset's run, which is made once."""
    folder = tmp_path_factory.mktemp("presets")
    return functools.cache(lambda preset: report_of(preset, folder))


def lost(report: dict[str, Any]) -> float:
    return float(report["metric"]["dense"] - report["metric"]["compressed"])


def test_the_gate_of_a_job_is_a_check_of_the_drop(report: Reports) -> None:
    found = report("ci-gate")
    (gate,) = [check for check in found["checks"] if check["name"] == "max_drop"]
    assert gate["limit"] == 1.0
    assert lost(found) <= 1.0
    assert found["average_bits"] <= 8


@pytest.mark.slow
def test_small_devices_get_integers_in_and_out_of_each_layer(report: Reports) -> None:
    found = report("edge-int8")
    assert found["average_bits"] <= 8
    assert {layer["decision"] for layer in found["layers"]} == {"quantize"}
    assert [check for check in found["checks"] if check["name"] == "budget"]
    # Integer parity has a tolerance of its own: it is only checked where activations are rounded.
    assert {check["limit"] for check in found["checks"] if check["name"].startswith("parity_batch")} == {0.1}


@pytest.mark.slow
def test_the_smallest_file_is_smaller_than_the_others_and_within_a_point(report: Reports) -> None:
    found = report("smallest-file")
    assert found["delivered"] == "model.safetensors"
    assert lost(found) <= 1.0
    sizes = {preset: report(preset)["files"]["model.safetensors"] for preset in PRESETS}
    assert sizes["smallest-file"] < 0.6 * min(size for preset, size in sizes.items() if preset != "smallest-file")
