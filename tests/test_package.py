"""What is installed: every package is listed, every data file matches a pattern, versions agree."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import compress

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"compress": "compress", "compress.cli": "cli", "compress.presets": "presets"}


def packages_on_disk() -> set[str]:
    inner = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "compress").rglob("__init__.py")}
    return inner | {"compress.cli", "compress.presets"}


def test_every_package_is_listed() -> None:
    # An unlisted one imports from a checkout and is missing from the wheel.
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_data_file_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package in packages_on_disk():
        folder = ROOT / FOLDERS.get(package, package.replace(".", "/"))
        packaged = {path for pattern in patterns.get(package, []) for path in folder.glob(pattern)}
        files = {path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert files <= packaged, f"{package} lacks {files - packaged}"
        assert all(list(folder.glob(pattern)) for pattern in patterns.get(package, [])), f"{package}: a stale pattern"


def test_versions_agree() -> None:
    assert PROJECT["project"]["version"] == compress.__version__ == metadata.version("hcompress")
    assert (
        f"## {compress.__version__}" in (ROOT / "CHANGELOG.md").read_text()
        or f"[{compress.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    )


@pytest.mark.parametrize("name", ["torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "numpy", "click"])
def test_constraints_pin_what_the_project_requires(name: str) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert name in pinned
    assert metadata.version(name).split("+")[0] == pinned[name], "run make setup"
