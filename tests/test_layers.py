"""The layers of docs/architecture.md hold: no file imports from above, nor a stranger beside it.

A new file fails here until it has a rank. Within a rank, a module may import those listed before it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = (
    ("errors", "canonical"),
    ("widths", "budget", "pattern", "plan", "frontier", "sensitivity", "verdict", "manifest", "registry", "settings"),
    ("numerics", "graph", "formats", "demo"),
    ("saliencies", "context", "data", "task", "pruned", "model", "train"),
    ("apply", "float_storage", "curvature", "reconstruct"),
    (
        "measure",
        "prune",
        "quantize",
        "joint",
        "plot",
        "saliency_plot",
        "comparison",
        "report",
        "sweep_report",
        "sensitivity_report",
        "summary",
        "store",
        "cache",
        "export",
        "verify",
        "bench",
        "latency",
        "figures",
        "inspection",
    ),
    (
        "job",
        "build",
        "recovery",
        "finish",
        "measuring",
        "forecast",
        "sensing",
        "equalizing",
        "planning",
        "pipeline",
        "sweep",
    ),
    ("cli", "__main__"),
)
# Folders that know nothing of their neighbours in the same rank, and of which no neighbour knows.
STRANGERS = {"numerics", "graph", "formats", "demo", "measure", "prune", "quantize", "joint"}
# The package itself loads lazily, and presets holds no code.
WITHOUT_IMPORTS = {"__init__", "presets"}
OFFERED = {"prune"}  # by the package itself, to training loops of the user's own
PLACES = {name: (rank, place) for rank, names in enumerate(RANKS) for place, name in enumerate(names)}
RECORDS, CLI = 1, 7


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module; ``unit`` is its first name below ``compress``, or empty for a module of others."""

    unit: str
    module: str
    is_at_top: bool


def files() -> list[Path]:
    found = [*(ROOT / "compress").rglob("*.py"), *(ROOT / "cli").rglob("*.py"), *(ROOT / "presets").rglob("*.py")]
    return sorted(found)


def module_name(path: Path) -> str:
    """``compress.graph.trace`` for compress/graph/trace.py, ``compress.cli.main`` for cli/main.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "compress" else ("compress", *parts))


def unit_of(name: str) -> str:
    return name.split(".")[1]


def imports(name: str, source: str) -> Iterator[Import]:
    """Every import of a module: at its top, in function bodies, and for type checkers."""
    tree = ast.parse(source)
    lazy = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types(node)
    ]
    below = {id(inner) for node in lazy for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(name, node)
            # `from .. import canonical` imports a module; `from .. import __version__` only its package.
            targets = [f"{base}.{alias.name}" for alias in node.names] if base == "compress" else [base]
        else:
            continue
        for target in targets:
            ours = target.split(".")[0] == "compress" and target.count(".") > 0
            if not ours or unit_of(target) in PLACES:
                yield Import(unit_of(target) if ours else "", target, id(node) not in below)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _base(name: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    head = name.split(".")[: -node.level]
    return ".".join([*head, *([node.module] if node.module else [])])


def violations(name: str, source: str) -> list[str]:
    """What a module imports and may not, in sentences."""
    unit = unit_of(name)
    if unit not in PLACES and unit not in WITHOUT_IMPORTS:
        return [f"{name} has no rank: give it a rank in tests/test_layers.py and docs/architecture.md"]
    found = list(imports(name, source))
    if unit in WITHOUT_IMPORTS:
        heavy = [i for i in found if i.is_at_top and i.module.split(".")[0] not in sys.stdlib_module_names]
        return [f"{name} imports {i.module} at its top" for i in heavy] + [
            f"{name} imports {i.module}"
            for i in found
            if i.unit and i.unit not in OFFERED and PLACES[i.unit][0] > PLACES["model"][0]
        ]
    return [reason for entry in found for reason in _reasons(name, unit, entry)]


def _reasons(name: str, unit: str, entry: Import) -> list[str]:
    rank, place = PLACES[unit]
    if not entry.unit:
        third_party = entry.module.split(".")[0] not in sys.stdlib_module_names | {"compress"}
        allowed = {"click"} if rank == CLI else set()
        is_bound = rank <= RECORDS or (rank == CLI and entry.is_at_top)
        if third_party and is_bound and entry.module.split(".")[0] not in allowed:
            return [f"{name} imports {entry.module}; rank {rank} answers without it"]
        return []
    other_rank, other_place = PLACES[entry.unit]
    if entry.unit == unit:
        return []
    if rank == CLI and entry.is_at_top and other_rank > RECORDS and unit == "cli":
        return [f"{name} imports {entry.unit} at its top; only ranks 0 and 1 may be, the rest inside functions"]
    if other_rank > rank:
        return [f"{name} (rank {rank}) imports {entry.unit} (rank {other_rank})"]
    if other_rank == rank and {unit, entry.unit} & STRANGERS:
        return [f"{name} imports {entry.unit}, a stranger of its own rank"]
    if other_rank == rank and other_place > place:
        return [f"{name} imports {entry.unit}, which comes after it in rank {rank}"]
    return []


@pytest.mark.parametrize("path", files(), ids=lambda path: module_name(path))
def test_a_file_imports_only_from_below(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


def test_every_unit_has_one_rank() -> None:
    assert len(PLACES) == sum(map(len, RANKS))


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("compress.surprise", "", "compress.surprise has no rank: give it a rank"),
        ("compress.surprise.inner", "", "has no rank"),
        ("compress.plan", "import torch", "imports torch; rank 1 answers without it"),
        ("compress.plan", "def f():\n    import numpy.linalg", "imports numpy.linalg; rank 1"),
        ("compress.errors", "from rich.console import Console", "imports rich.console; rank 0"),
        ("compress.plan", "from .verdict import Check", "imports verdict, which comes after it in rank 1"),
        ("compress.task", "from . import model", "imports model, which comes after it in rank 3"),
        ("compress.graph.trace", "from ..formats import planes", "imports formats, a stranger"),
        ("compress.graph.trace", "from ..formats.planes import pack", "imports formats, a stranger"),
        ("compress.prune.obs", "def f():\n    from compress.quantize import uniform", "imports quantize, a stranger"),
        ("compress.verify", "from .prune.magnitude import plan", "imports prune, a stranger"),
        ("compress.prune.magnitude", "from ..report import headline", "imports report, a stranger"),
        ("compress.apply", "if TYPE_CHECKING:\n    from .pipeline import run", "(rank 4) imports pipeline (rank 6)"),
        ("compress.graph.trace", "from ..cli import main", "(rank 2) imports cli (rank 7)"),
        ("compress.cli.prune", "from ..pipeline import run_method", "imports pipeline at its top"),
        ("compress.cli.prune", "from .. import model", "imports model at its top"),
        ("compress.cli.prune", "from rich.table import Table", "imports rich.table; rank 7"),
        ("compress.__init__", "from .model import load", "imports compress.model at its top"),
        ("compress.__init__", "def f():\n    from .pipeline import run", "imports compress.pipeline"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str, words: str) -> None:
    (found,) = violations(name, source)
    assert words in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("compress.plan", "import json\nfrom . import canonical\nfrom .budget import Budget"),
        (
            "compress.cli.prune",
            "import click\nfrom .. import __version__\nfrom ..plan import Plan\nfrom . import options",
        ),
        ("compress.cli.prune", "def f():\n    from ..pipeline import run_method\n    import rich"),
        ("compress.cli.progress", "if TYPE_CHECKING:\n    from rich.progress import Progress"),
        ("compress.prune.obs", "import torch\nfrom ..apply import pack_mask\nfrom .magnitude import keep"),
        ("compress.graph.rewrite", "from .trace import Graph"),
        ("compress.summary", "from .report import headline"),
        ("compress.__init__", "def f():\n    from .model import load"),
        ("compress.__main__", "from .cli.main import main"),
    ],
)
def test_a_right_import_passes(name: str, source: str) -> None:
    assert violations(name, source) == []
