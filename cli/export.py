"""``hcompress export``."""

from __future__ import annotations

from pathlib import Path

from . import method_run, options, preflight
from .options import checkpoint_argument, command, force_option, setting_options
from .output import print_json
from .progress import Progress

EXAMPLES = """\
hcompress export model.pt --model net.py:make --input-shape 3,32,32 --out dense
hcompress export model.pt --model net.py:make --eval test.npz --min-metric 90 --out dense"""


@command("export", examples=EXAMPLES)
@checkpoint_argument
@setting_options(
    *method_run.FILE_SETTINGS, *method_run.DATA_SETTINGS, *method_run.GATE_SETTINGS, *method_run.RUN_SETTINGS
)
@force_option
def export(checkpoint: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write the dense model of CHECKPOINT as ONNX and safetensors, compared with torch in the runtime."""
    settings = method_run.with_out(options.resolve(), "export", checkpoint)
    preflight.check_inputs(checkpoint, settings)
    preflight.check_out(Path(settings["out"].value), force=force)

    from ..pipeline import export_dense

    with Progress(quiet=quiet) as progress:
        report = export_dense(checkpoint, settings, force=force, command=options.command_line(), progress=progress)
    if as_json:
        print_json(report)
    else:
        method_run.print_run(report, settings)
