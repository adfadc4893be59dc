"""``hcompress completion``."""

from __future__ import annotations

import click

from .options import command
from .output import print_json

EXAMPLES = """\
eval "$(hcompress completion bash)"
hcompress completion zsh > ~/.zfunc/_hcompress
hcompress completion fish > ~/.config/fish/completions/hcompress.fish"""
SCHEMA = "hcompress.completion/1"


@command("completion", examples=EXAMPLES)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), metavar="bash|zsh|fish")
def completion(shell: str, as_json: bool, quiet: bool) -> None:
    """Print the script that completes hcompress's commands and options in SHELL."""
    from click.shell_completion import get_completion_class

    from .main import COMPLETION_VARIABLE, PROGRAM, cli

    found = get_completion_class(shell)
    if found is None:
        raise RuntimeError(f"click knows no completion for {shell}")
    script = found(cli, {}, PROGRAM, COMPLETION_VARIABLE).source()
    if as_json:
        print_json({"schema": SCHEMA, "shell": shell, "script": script})
    else:
        click.echo(script)
