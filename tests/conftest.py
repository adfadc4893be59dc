"""What tests share: the zoo of networks, and the real checkpoints where HCOMPRESS_TEST_DATA names them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

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
torch.set_num_threads(1)
# The same examples in every run, and no complaint about a busy machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``network`` runs on every network of the zoo."""
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", zoo.NETWORKS, ids=lambda network: network.name)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real checkpoints."""
    folder = os.environ.get("HCOMPRESS_TEST_DATA")
    if folder is None:
        pytest.skip("HCOMPRESS_TEST_DATA isn't set")
    return Path(folder)
