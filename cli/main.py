"""The ``hcompress`` command: a table of subcommands, each imported when it is used, and the entry point."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from .. import __version__
from ..errors import UsageError
from . import failure

PROGRAM = "hcompress"
COMPLETION_VARIABLE = "_HCOMPRESS_COMPLETE"
# One line of help a command, so that `hcompress --help` imports none of them.
COMMANDS = {
    "prune": "zero weights of a checkpoint within a budget, and prove the result",
    "quantize": "round weights and activations to 2-8 bits, and prove the result",
    "apply": "make the decisions of a plan on a checkpoint",
    "verify": "measure a run folder again and check its gates",
    "bench": "time a run's model against the dense one",
    "inspect": "show what a checkpoint holds and what stands in the way",
    "sensitivity": "measure how the loss reacts to a change of each layer",
    "export": "write the dense model as ONNX and safetensors",
    "demo": "compress a small shipped network, and compare",
    "show": "print a run, or why a layer got its decision",
    "diff": "compare two runs or two plans",
    "methods": "list the methods",
    "presets": "list the presets",
    "settings": "print every setting with its origin",
    "init": "write a checked hcompress.toml",
    "completion": "print the completion script of a shell",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES, OLD_KEPT_BYTES = 2**30, 2**25
EXAMPLES = """\
hcompress demo
hcompress quantize model.pt --model net.py:make --data calibration.npz --budget 4bit --out small
hcompress show small --why layer1.0.conv1"""


class LazyGroup(click.Group):
    """The subcommands of ``COMMANDS``; each is a function of its name, in a module of its name, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f".{cmd_name}", __package__), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"choices: {', '.join(COMMANDS)}"
            raise UsageError(f"no such command {name!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in EXAMPLES.splitlines()))
        formatter.write_paragraph()
        super().format_help(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make trained neural networks small and fast, and prove it."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every error ends here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    # Threads that wait by spinning make small ops 5 to 15 times slower on a machine whose cores others use as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    if not sys.warnoptions:
        # Libraries warn their own developers so; a user of ours can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    try:
        with cli.make_context(PROGRAM, list(arguments), obj=arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except (Exception, KeyboardInterrupt, failure.Terminated) as error:  # noqa: BLE001 a bug becomes exit 1, here only
        return failure.report(error, arguments)
    return 0


def keep_freed_memory() -> None:
    """Let the C library keep what tensors leave: given back, it is mapped and zeroed again for the next batch.

    That takes a seventh of the time of a quantization. Where there is no ``mallopt``, as outside of glibc, all stays as
    it is, and so it does where the user's environment says how memory is kept.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older ones take no threshold above 32 MB. Any that is set ends their own adjusting, so that the first decides.
        if any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in (KEPT_BYTES, OLD_KEPT_BYTES)):
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    failure.note_signal(signum)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    # A second signal must not cut the clean-up of the first short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise failure.Terminated
