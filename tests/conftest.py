"""What tests share: the zoo of networks, and the real checkpoints where HCOMPRESS_TEST_DATA names them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings


def load_file(path: Path, name: str) -> ModuleType:
    """A module from its file: tests are no package, so that none shadows an installed one."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


zoo = load_file(Path(__file__).with_name("zoo.py"), "zoo")
for _part in ("zoo_traps", "zoo_sequences", "zoo_families", "command", "onnx_networks", "mixed_integer"):
    load_file(Path(__file__).with_name(f"{_part}.py"), _part)
torch.set_num_threads(1)
# The same examples in every run, and no complaint about a busy machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``network`` runs on every network of the zoo."""
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", zoo.NETWORKS, ids=lambda network: network.name)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Neither the tests nor the processes that they start touch the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def kept_exports() -> dict[Any, Any]:
    """What ``quick_runs`` has exported."""
    return {}


@pytest.fixture(scope="module")
def quick_runs(kept_exports: dict[Any, Any]) -> Iterator[None]:
    """A dense network is exported once, and a network is timed a few times only: half of a small run."""
    pipeline = importlib.import_module("compress.pipeline")
    real = pipeline.dense_files

    def dense_files(job: Any) -> Any:
        form = (job.value("runtime"), job.value("float_storage"))
        key = (job.source.sha256, str(job.graph.program.graph), form)
        kept_exports[key] = kept_exports[key] if key in kept_exports else real(job)
        return kept_exports[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "dense_files", dense_files)
        patch.setattr(importlib.import_module("compress.finish"), "LATENCY_REPEATS", 3)
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real checkpoints."""
    folder = os.environ.get("HCOMPRESS_TEST_DATA")
    if folder is None:
        pytest.skip("HCOMPRESS_TEST_DATA isn't set")
    return Path(folder)
