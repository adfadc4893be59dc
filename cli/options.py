"""Command options out of the settings table, and what every command shares: examples first, ``--json``, ``--debug``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import settings
from ..settings import Setting, Value

FLAGS = "compress.cli.flags"
METAVARS = {"int": "N", "float": "X"}
Function = TypeVar("Function", bound=Callable[..., Any])

checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path))
run_argument = click.argument("run", type=click.Path(path_type=Path))
force_option = click.option("--force", is_flag=True, help="Replace the --out folder if it exists.")


class ExamplesCommand(click.Command):
    """A command whose help starts with its examples, one a line in ``epilog``."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in (self.epilog or "").splitlines()))
        formatter.write_paragraph()
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_options(ctx, formatter)


def command(name: str, *, examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command with ``examples`` and the common options; its function takes ``as_json`` and ``quiet``."""

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(name, cls=ExamplesCommand, epilog=examples)(function)
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document, failures included."),
            click.Option(["--quiet", "-q"], is_flag=True, help="No progress on stderr."),
            # main reads --debug from the command line, as an error may come before options are parsed.
            click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
        ]
        return made

    return decorate


def setting_options(*names: str) -> Callable[[Function], Function]:
    """Options for the settings ``names``; ``resolve`` finds what was given."""

    def decorate(function: Function) -> Function:
        for name in reversed(names):
            function = _option(settings.BY_NAME[name])(function)
        return function

    return decorate


def _option(setting: Setting) -> Callable[[Function], Function]:
    shown = _default_text(setting)
    return click.option(
        setting.flag,
        setting.name,
        type=click.Choice(setting.choices) if setting.choices else str,
        metavar=setting.metavar or METAVARS.get(setting.type),
        default=None,  # No default here: settings.resolve settles the precedence.
        expose_value=False,
        callback=_remember,
        help=f"{setting.help}{shown}",
    )


def _default_text(setting: Setting) -> str:
    return f" [default: {setting.default}]" if setting.default not in (None, ()) else ""


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if param.name is not None and value is not None:
        ctx.meta.setdefault(FLAGS, {})[param.name] = value


def given_flags() -> dict[str, str]:
    """The settings given as flags on this command line."""
    flags: dict[str, str] = click.get_current_context().meta.get(FLAGS, {})
    return flags


def resolve(preset: str | None = None) -> dict[str, Value]:
    """Every setting for this command line: flag > environment > config > preset > default."""
    return settings.resolve(given_flags(), environment=os.environ, folder=Path(), preset=preset)


def command_line() -> list[str]:
    """The arguments as given, for the manifest."""
    return ["hcompress", *click.get_current_context().find_root().obj]
