"""Each preset, as a user runs it, on the network that ships with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(str(resources.files("compress.demo")))
HCOMPRESS = Path(sys.executable).with_name("hcompress")
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
DATA = ("--data", DEMO / "calibration.npz", "--eval", DEMO / "evaluation.npz", "--num-calibration", "64")
PRESETS = sorted(path.stem for path in Path(str(resources.files("compress.presets"))).glob("*.toml"))


def report_of(preset: str, folder: Path) -> dict[str, Any]:
    command = [HCOMPRESS, "quantize", DEMO / "fashion_net.safetensors", *NETWORK, *DATA, "--preset", preset]
    done = subprocess.run(
        [str(part) for part in (*command, "--out", folder / preset, "--json")],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert (folder / preset / report["delivered"]).stat().st_size == report["files"][report["delivered"]]
    assert all(check["ok"] for check in report["checks"])
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("presets")
    return {preset: report_of(preset, folder) for preset in PRESETS}


def lost(report: dict[str, Any]) -> float:
    return float(report["metric"]["dense"] - report["metric"]["compressed"])


def test_the_gate_of_a_job_is_a_check_of_the_drop(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["ci-gate"]
    (gate,) = [check for check in report["checks"] if check["name"] == "max_drop"]
    assert gate["limit"] == 1.0
    assert lost(report) <= 1.0
    assert report["average_bits"] <= 8


def test_small_devices_get_integers_in_and_out_of_each_layer(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["edge-int8"]
    assert report["average_bits"] <= 8
    assert {layer["decision"] for layer in report["layers"]} == {"quantize"}
    assert [check for check in report["checks"] if check["name"] == "budget"]
    # Integer parity has a tolerance of its own: it is only checked where activations are rounded.
    assert {check["limit"] for check in report["checks"] if check["name"].startswith("parity_batch")} == {0.1}


def test_the_smallest_file_is_smaller_than_the_others_and_within_a_point(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["smallest-file"]
    assert report["delivered"] == "model.safetensors"
    assert lost(report) <= 1.0
    sizes = {preset: found["files"]["model.safetensors"] for preset, found in reports.items()}
    assert sizes["smallest-file"] < 0.6 * min(size for preset, size in sizes.items() if preset != "smallest-file")
