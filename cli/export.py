"""``hcompress export``."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from . import method_run, options, preflight
from .options import checkpoint_argument, command, force_option, given_flags, setting_options
from .output import print_json, print_line
from .progress import Progress

EXAMPLES = """\
hcompress export model.pt --model net.py:make --input-shape 3,32,32 --out dense
hcompress export model.pt --model net.py:make --eval test.npz --min-metric 90 --out dense
hcompress export small --format compressed-tensors --config llama/config.json --out llama-4bit"""
FORMATS = ("onnx", "compressed-tensors")


@command("export", examples=EXAMPLES)
@checkpoint_argument
@click.option(
    "--format",
    "written_as",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="compressed-tensors: the quantized weights of a run, as vLLM and transformers read them.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="With compressed-tensors: the network's config.json, to which the quantization is added.",
)
@setting_options(
    *method_run.FILE_SETTINGS, *method_run.DATA_SETTINGS, *method_run.GATE_SETTINGS, *method_run.RUN_SETTINGS
)
@force_option
def export(checkpoint: Path, written_as: str, config: Path | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Write the dense model of CHECKPOINT as ONNX and safetensors, compared with torch in the runtime.

    With --format compressed-tensors: write the quantized weights of the run folder CHECKPOINT, decoded nowhere, in the
    layout of Hugging Face folders.
    """
    settings = method_run.with_out(options.resolve(), "export", checkpoint)
    out = Path(settings["out"].value)
    if written_as != FORMATS[0]:
        _export_layout(checkpoint, config, out, force=force, as_json=as_json, quiet=quiet)
        return
    if config is not None:
        raise UsageError("--config has no effect on ONNX files", hint="pass --format compressed-tensors as well")
    preflight.check_inputs(checkpoint, settings)
    preflight.check_out(out, force=force)

    from ..pipeline import export_dense

    with Progress(quiet=quiet) as progress:
        report = export_dense(checkpoint, settings, force=force, command=options.command_line(), progress=progress)
    if as_json:
        print_json(report)
    else:
        method_run.print_run(report, settings)


def _export_layout(run: Path, config: Path | None, out: Path, *, force: bool, as_json: bool, quiet: bool) -> None:
    if unused := sorted(set(given_flags()) - {"out"}):
        flag = "--" + unused[0].replace("_", "-")
        raise UsageError(f"{flag} has no effect with --format compressed-tensors", hint=f"leave {flag} out")
    preflight.check_run(run)
    preflight.check_out(out, force=force)

    from ..pipeline import export_layout

    with Progress(quiet=quiet) as progress:
        record = export_layout(run, config, out, force=force, command=options.command_line(), progress=progress)
    if as_json:
        print_json(record)
        return
    print_line(f"packed: {len(record['packed'])} weights of linear layers")
    if record["floats"]:
        print_line(f"note: left as floats of the same values: {', '.join(record['floats'])}")
    if record["tied"]:
        print_line(f"note: left out, as they are tied to another name: {', '.join(record['tied'])}")
    print_line(f"folder: {out}")
