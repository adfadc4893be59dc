"""``hcompress init``."""

from __future__ import annotations

import json
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from .. import settings
from ..errors import UsageError
from ..settings import CONFIG, SETTINGS, Setting
from .method_run import DATA_SETTINGS, GATE_SETTINGS
from .options import command, given_flags, setting_options
from .output import print_json, print_line
from .preflight import check_files

EXAMPLES = """\
hcompress init
hcompress init --model net.py:make --data calibration.npz --eval test.npz --max-drop 1
hcompress init --model net.py:make --model-args '{"width": 16}' --task classification --force"""
SCHEMA = "hcompress.init/1"
OFFERED = (*DATA_SETTINGS, "method", "budget", *GATE_SETTINGS)
TITLES = {
    "model": "The architecture that a state dict belongs to. The factory runs as your code.",
    "data": "Planners see the calibration data only; no plan depends on the evaluation data.",
    "task": "What the model is for: classification, regression, causal-lm or FILE.py:Task.",
    "run": "How to compress; each of these is a flag of prune and quantize, too.",
    "recover": "Training after pruning or rounding, or meanwhile; each of these is a flag of prune and quantize, too.",
    "measure": "How hcompress sensitivity measures.",
    "gate": "Limits that turn a figure into exit code 4.",
    "output": "Where results go; paths are relative to this file.",
}


@command("init", examples=EXAMPLES)
@setting_options(*OFFERED)
@click.option("--out", type=click.Path(path_type=Path), default=Path(CONFIG), show_default=True, help="File to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def init(out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write a commented hcompress.toml with the settings given as flags, read back before it is put in place.

    hcompress reads the file in the current folder only, since the factory that it names is code.
    """
    if out.exists() and not force:
        raise UsageError(f"--out {out} exists", hint="pass --force to replace it, or another --out")
    flags = given_flags()
    check_files(settings.resolve(flags, environment={}, folder=None))
    write_checked(out, flags)
    if as_json:
        print_json({"schema": SCHEMA, "path": str(out), "settings": flags})
    else:
        print_line(f"wrote {out}; hcompress settings prints what is in force")


def write_checked(out: Path, flags: dict[str, str]) -> None:
    """Write the file beside ``out``, read it back, and put it in place; ``out`` is whole or untouched."""
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".hcompress-init-") as name:
        folder = Path(name)
        given = settings.resolve(flags, environment={}, folder=None)
        staged = folder / CONFIG
        staged.write_text(render({key: given[key].value for key in flags}), encoding="utf-8")
        back = settings.resolve({}, environment={}, folder=folder)
        for key in flags:
            if back[key].value not in (given[key].value, str(folder / str(given[key].value))):
                raise UsageError(
                    f"{settings.BY_NAME[key].flag} {flags[key]!r} does not survive TOML", hint="spell it plainly"
                )
        staged.replace(out)


def render(values: dict[str, Any]) -> str:
    """The file: every setting with its help, those without a value as comments."""
    lines = ["# Settings of hcompress in this folder. A flag or an environment variable HCOMPRESS_* goes before them."]
    ordered = sorted(SETTINGS, key=lambda setting: list(TITLES).index(_section(setting)))
    for section, entries in groupby(ordered, key=_section):
        lines += ["", f"# {TITLES[section]}", f"[{section}]"]
        lines += [_line(setting, values.get(setting.name)) for setting in entries]
    return "\n".join(lines) + "\n"


def _section(setting: Setting) -> str:
    return setting.key.split(".")[0]


def _line(setting: Setting, value: Any) -> str:
    key = setting.key.split(".")[1]
    allowed = f" One of {', '.join(setting.choices)}." if setting.choices else ""
    if value is not None:
        return f"{key} = {_toml(value)}  # {setting.help}{allowed}"
    example = _toml(setting.default) if setting.default not in (None, ()) else "..."
    return f"# {key} = {example}  # {setting.help}{allowed}"


def _toml(value: Any) -> str:
    # A TOML basic string is written like a JSON one.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
