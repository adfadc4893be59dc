"""The pages say what the program does: commands, links, snippets, the stand-alone reader and the example method."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch
from compress.cli.main import COMMANDS, PROGRAM, cli, main
from compress.cli.options import FLAGS

from compress import registry, settings, verify
from compress.apply import apply_plan
from compress.budget import Budget, parse_budget
from compress.context import Context
from compress.errors import EXIT_CODES
from compress.formats.checkpoint import read_checkpoint
from compress.formats.packed import QuantizedTensor, decode, encode
from compress.graph.trace import trace_graph
from compress.model import Source
from compress.numerics.rounding import level_ranges
from compress.registry import METHODS, TASKS
from compress.task import load_task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference.md"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
# What may stand before a command: a list item of a workflow, a prompt, a variable.
COMMAND_LINE = re.compile(rf"^(?:- )?(?:run: )?(?:[A-Z_]+=\S+ )*({PROGRAM}(?: .*)?)$")
HOSTS = (
    *("arxiv.org", "github.com", "keepachangelog.com", "semver.org", "onnxruntime.ai", "huggingface.co"),
    *("www.apache.org", "docs.github.com"),
)


@dataclass(frozen=True)
class Block:
    """A code block of a page; ``mark`` is the name that a comment before it gives it."""

    page: Path
    language: str
    text: str
    mark: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        marked = re.search(r"<!-- test: (\S+) -->\s*$", text[: match.start()])
        indent, language, code = match.groups()
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        yield Block(page, language, "\n".join(lines) + "\n", marked.group(1) if marked else "")


BLOCKS = [block for page in PAGES for block in blocks(page)]
SNIPPETS = [block for block in BLOCKS if block.language == "python"]


def marked(mark: str) -> str:
    """The code of the one block with this mark."""
    (found,) = [block.text for block in BLOCKS if block.mark == mark]
    return found


def command_lines() -> list[tuple[str, str]]:
    """Every command line in a code block, with its page."""
    found = []
    for block in BLOCKS:
        # Help has its examples first; below them, a sentence may start with the program's name.
        text = block.text.split("\n\n")[0] if block.text.startswith("Examples:") else block.text
        for line in text.replace("\\\n", " ").splitlines():
            if match := COMMAND_LINE.match(line.strip()):
                found.append((block.page.relative_to(ROOT).as_posix(), match.group(1)))
    return sorted(set(found))


def words(line: str) -> list[str]:
    """The arguments of a command line, up to the first operator of the shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;<>&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    arguments = []
    for word in lexer:
        if set(word) <= set("|;<>&"):
            break
        arguments.append(word)
    return arguments[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_starts_with_its_title(page: Path) -> None:
    assert page.read_text(encoding="utf-8").startswith("# ")


def test_the_reference_is_up_to_date() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_the_reference_is_the_same_at_any_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    generate = load_file(ROOT / "docs" / "generate.py", "docs_generate")
    assert generate.render() == REFERENCE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    assert f"### {PROGRAM} {name}\n" in REFERENCE.read_text(encoding="utf-8")
    assert f"| `{name}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/ci.md", "docs/reference.md"])
def test_every_exit_code_is_documented(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [e.code for e in EXIT_CODES if f"| {e.code} |" not in text] == []


def test_every_method_has_a_page() -> None:
    for method in METHODS:
        page = (ROOT / "docs" / "methods" / f"{method.name}.md").read_text(encoding="utf-8")
        flags = [settings.BY_NAME[name].flag for name in method.options]
        assert page.startswith(f"# {method.name}\n")
        assert [flag for flag in flags if f"`{flag}`" not in page] == []


def test_every_task_is_documented() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert [task.name for task in TASKS if f"| `{task.name}` |" not in text] == []


def test_the_tolerances_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert f"| float | {verify.FLOAT_TOLERANCE} |" in text
    assert f"| 8 bits | {verify.INTEGER_TOLERANCE} | {verify.MEAN_TOLERANCE} |" in text
    assert "batches {}, {} and {}".format(*verify.PARITY_BATCHES) in text


def test_the_layers_are_those_that_are_enforced() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    ranks = load_file(Path(__file__).with_name("test_layers.py"), "documented_layers").RANKS
    for rank, names in enumerate(ranks):
        assert f"| {rank} | {' '.join(f'`{name}`' for name in names)} |" in text


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            if path.split("/")[2] not in HOSTS:
                broken.append(target)
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_names_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pattern = r"(?<![\w.])/(?:work|tmp|root|home|mnt|Users)\b|localhost|file://|http://|index-url|\d+(?:\.\d+){3}"
    assert re.findall(pattern, text) == []


@pytest.mark.parametrize(("page", "line"), command_lines(), ids=[f"{page}: {line}" for page, line in command_lines()])
def test_a_command_line_parses(page: str, line: str) -> None:
    arguments = words(line)
    if not arguments or arguments[0].startswith("-"):
        assert set(arguments) <= {"--help", "--version"}
        return
    context = click.Context(cli, info_name=PROGRAM)
    command = cli.get_command(context, arguments[0])
    assert command is not None, f"no command {arguments[0]}"
    made = command.make_context(arguments[0], arguments[1:], parent=context)
    given = made.meta.get(FLAGS, {})
    chosen = settings.resolve(given, environment={}, folder=None, preset=made.params.get("preset"))
    if not settings.swept(chosen):
        settings.chosen_budget(chosen)
    for name in ("max_bytes", "max_latency"):
        if given.get(name):
            parse_budget(f"latency={given[name]}" if name == "max_latency" else given[name])


def test_command_lines_are_found() -> None:
    pages = {page for page, _ in command_lines()}
    assert pages >= {"README.md", "docs/ci.md", "docs/quickstart.md", "docs/reference.md"}
    assert words('hcompress show "a b" | head > x') == ["show", "a b"]


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda b: f"{b.page.name}: {b.text.strip().splitlines()[0][:40]}")
def test_a_python_snippet_compiles(block: Block) -> None:
    compile(block.text, block.page.name, "exec")


def load_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_text(text: str, path: Path) -> Any:
    """The module of a snippet, by way of a file."""
    path.write_text(text, encoding="utf-8")
    return load_file(path, f"docs_{path.stem}")


# -- the stand-alone reader ------------------------------------------------------------------------------------------


def packed_examples() -> dict[str, torch.Tensor | QuantizedTensor]:
    """Every width, with and without a mask and an axis; sparse, tied, plain and empty tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor | QuantizedTensor] = {}
    for bits in range(2, 9):
        half = 2 ** (bits - 1)
        levels = torch.randint(-half, half, (5, 3, 3), generator=generator, dtype=torch.int8)
        tensors[f"dense{bits}"] = QuantizedTensor(levels, bits, torch.rand(3, generator=generator), 1)
        few = levels * (torch.rand(levels.shape, generator=generator) < 0.2)
        tensors[f"few{bits}"] = QuantizedTensor(few, bits, torch.tensor(-0.25), None)
    for axis, width in ((0, "channels:0t2s3"), (1, "channels:8t4"), (0, "channels:abdfi"), (1, "channels:kmb")):
        low, high = level_ranges(width, axis, 3)
        levels = (low + torch.rand(5, 3, 3, generator=generator) * (high - low + 1)).floor().to(torch.int8)
        scale = torch.rand(levels.shape[axis], generator=generator)
        tensors[width] = QuantizedTensor(levels, width, scale, axis)
        few = levels * (torch.rand(levels.shape, generator=generator) < 0.2)
        tensors[f"few {width}"] = QuantizedTensor(few, width, scale, axis)
    for size in (2, 3):
        levels = torch.randint(-8, 8, (5, 7), generator=generator, dtype=torch.int8)
        scale = torch.randn(5, -(-7 // size), generator=generator).bfloat16().float()
        tensors[f"groups{size}"] = QuantizedTensor(levels, 4, scale, 0, size)
    sparse = torch.randn(40, 7, generator=generator) * (torch.rand(40, 7, generator=generator) < 0.3)
    tensors |= {
        "sparse": sparse,
        "tied": sparse,
        "plain": torch.randn(4, generator=generator),
        "empty": torch.zeros(0, 3),
    }
    tensors |= {"counts": torch.tensor([0, 0, 0, 0, 0, 0, 0, 7]), "flag": torch.tensor(True), "double": sparse.double()}
    return tensors


def test_the_readers_of_the_page_and_of_the_package_agree(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(packed_examples(), {"format": "pt"}))
    found = load_text(marked("packed-reader"), tmp_path / "packed_reader.py").read_packed(path)
    checkpoint = read_checkpoint(path)
    expected = decode(checkpoint.state, checkpoint.metadata)
    assert set(found) == set(expected) == set(packed_examples())
    for name, tensor in expected.items():
        value = (tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor).numpy()
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# -- the example method and the example task -------------------------------------------------------------------------


@pytest.fixture
def example_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The method of docs/add-a-method.md in its place, and its line in the registry."""
    importing = "from compress.registry import Method\n\nline = "
    line = load_text(importing + marked("method-line"), tmp_path / "registry_line.py").line
    importlib.import_module("compress.prune")
    monkeypatch.setitem(sys.modules, line.module, ModuleType(line.module))  # gone again after the test
    path = tmp_path / "random_weights.py"
    path.write_text(marked("method-file"), encoding="utf-8")
    load_file(path, line.module)
    monkeypatch.setattr(registry, "METHODS", (*registry.METHODS, line))
    plan: Callable[..., Any] = registry.load_module(line).plan
    return plan


def test_the_example_method_plans_and_applies(example_method: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    graph = trace_graph(module, (torch.randn(2, 8),))

    def planned(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        context = Context(generator, torch.device("cpu"), lambda *_: None, lambda _: 0, [])
        return example_method(source, graph, {}, None, Budget("sparsity", 0.75), {}, context)

    made, sidecar = planned(1)
    compressed = apply_plan(module, graph.tied, made, sidecar).state()
    zeros = [int((compressed[layer.tensor] == 0).sum()) / layer.elements for layer in graph.layers]
    assert zeros == [0.75, 0.75]
    assert planned(1)[0] == made
    assert planned(2)[0] != made


@pytest.mark.slow
@pytest.mark.usefixtures("example_method")
def test_the_example_method_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = next(block for block in SNIPPETS if block.page.name == "quickstart.md")
    load_text(first.text, tmp_path / "step1.py")
    flags = ["--model", "compress.demo.network:fashion_net", "--data", "calibration.npz", "--eval", "evaluation.npz"]
    flags += ["--mean", "0.286", "--std", "0.353", "--method", "random", "--sparsity", "0.5", "--out", "random", "-q"]
    assert main(["prune", "fashion_net.safetensors", *flags]) == 0
    assert "50 %" in capsys.readouterr().out


def test_the_example_task_scores(tmp_path: Path) -> None:
    path = tmp_path / "tasks.py"
    path.write_text(marked("custom-task"), encoding="utf-8")
    task = load_task(f"{path}:TopTwo", None)
    outputs = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert task.score(outputs, torch.tensor([1, 0])).tolist() == [100.0, 0.0]


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and snippet of docs/quickstart.md, in the page's order; the last command fails its gate."""
    monkeypatch.chdir(tmp_path)
    codes = {}
    for number, block in enumerate(block for block in BLOCKS if block.page.name == "quickstart.md"):
        if block.language == "python":
            load_text(block.text, tmp_path / f"step{number}.py")
        for line in block.text.splitlines() if block.language == "sh" else ():
            codes[line] = main([*words(line), "--quiet"])
    failing = [line for line, code in codes.items() if code]
    assert len(codes) >= 10
    assert [codes[line] for line in failing] == [4]
    assert "--budget 2bit" in failing[0]
