"""``hcompress sensitivity``: a measure of every layer, or two of them side by side, with what they are to take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import canonical, measuring, store
from .build import sidecar_bytes
from .comparison import by_layer, compare_records, comparison_svg, require_common
from .context import Progress
from .errors import InputError
from .finish import write_manifest
from .forecast import Forecast, forecast
from .job import Job, open_job, out_folder
from .registry import MEASURES, find_measure
from .saliencies import saliency_histogram
from .sensitivity import Sensitivity, read_sensitivity
from .sensitivity_report import render_comparison, render_sensitivity
from .settings import Settings

RECORD, COMPARISON = "sensitivity.json", "comparison.json"
Announce = Callable[[str, Forecast], None]


def measure_sensitivity(
    checkpoint: Path,
    settings: Settings,
    name: str,
    *,
    force: bool,
    dry_run: bool,
    command: list[str],
    progress: Progress,
    announce: Announce,
) -> dict[str, Any]:
    """One measure of every layer; ``out`` takes the record, its tensors, plots and a report.

    Args:
        dry_run: Whether to say only what it would take.
        announce: Called with the measure's name and what it is expected to take, before it is made.

    Raises:
        UsageError: An unknown measure, missing data, or an output folder that exists.
    """
    measure = find_measure(name)
    with _staged(checkpoint, settings, force=force, dry_run=dry_run) as stage:
        job = open_job(checkpoint, settings, progress, needs_data=measure.needs_data)
        count = measuring.num_configurations(job)
        expected = _expected(job, name, announce, always=dry_run)
        if dry_run:
            if count:
                job.notes.append("the time of --configurations is not in it")
            return {"method": name, "forecast": expected, "notes": job.notes, "time_s": time.monotonic() - job.started}
        taken = measuring.take(job, name, measuring.measure_context(job))
        predictors = measuring.compare(job, count) if count else None
        record = {
            **taken.record.to_json(),
            "elements": {layer.tensor: layer.elements for layer in job.graph.layers},
            "num_examples": 0 if job.calibration is None else len(job.calibration.data),
            "cached": taken.is_cached,
            "forecast": expected,
            "predictors": predictors,
            "saliencies": _saliencies(job, taken.record, taken.tensors),
            "notes": job.notes,
            "time_s": time.monotonic() - job.started,
        }
        if stage is not None:
            store.write_file(stage / RECORD, canonical.dumps(taken.record.to_json()))
            if predictors is not None:
                store.write_file(stage / "predictors.json", canonical.dumps(predictors))
            if taken.tensors:
                store.write_file(stage / "sensitivity.safetensors", sidecar_bytes(taken.tensors))
            bars = measuring.sensitivity_svg(taken.record, checkpoint.absolute().name)
            store.write_file(stage / "sensitivity.svg", bars)
            _publish(stage, job, render_sensitivity(record, bars, checkpoint.absolute().name, command), command)
    return record


def compare_measures(
    checkpoint: Path,
    settings: Settings,
    names: Sequence[str],
    *,
    force: bool,
    dry_run: bool,
    command: list[str],
    progress: Progress,
    announce: Announce,
) -> dict[str, Any]:
    """Two measures of the same layers and the correlation of their ranks.

    Args:
        names: Of measures, or paths of records that were written before.
        dry_run: As for ``measure_sensitivity``.

    Raises:
        UsageError: Missing data, an output folder that exists, or too few layers in common.
        InputError: A path that isn't that of a record.
    """
    known = {measure.name for measure in MEASURES}
    kept = {name: read_named(name) for name in names if name not in known}
    made = [name for name in names if name in known]
    with _staged(checkpoint, settings, force=force, dry_run=dry_run) as stage:
        job = open_job(checkpoint, settings, progress, needs_data=any(find_measure(name).needs_data for name in made))
        layers = [_layers(job, name, kept.get(name)) for name in names]
        if None not in layers or len({find_measure(name).of_weights for name in made}) > 1:
            require_common(names, [found or () for found in layers])  # before a long measure, not after it
        expected = {name: _expected(job, name, announce, always=dry_run) for name in made}
        expected |= dict.fromkeys(kept)
        if dry_run:
            took = time.monotonic() - job.started
            return {"method": list(names), "forecast": expected, "notes": job.notes, "time_s": took}
        taken = kept | {name: measuring.take(job, name, measuring.measure_context(job)).record for name in made}
        for name, found in kept.items():
            if found.source_sha256 != job.source.sha256:
                job.notes.append(f"{name} was measured on another checkpoint")
        record = {
            **compare_records(names, [taken[name] for name in names]),
            "num_examples": 0 if job.calibration is None else len(job.calibration.data),
            "forecast": expected,
            "notes": job.notes,
            "time_s": time.monotonic() - job.started,
        }
        if stage is not None:
            plain = {key: value for key, value in record.items() if key not in ("forecast", "time_s")}
            store.write_file(stage / COMPARISON, canonical.dumps(plain))
            page = render_comparison(record, comparison_svg(record), checkpoint.absolute().name, command)
            _publish(stage, job, page, command)
    return record


def _layers(job: Job, name: str, kept: Sensitivity | None) -> set[str] | None:
    """The layers that a record has, or that a measure of weights will have; None of activations, not known before."""
    if kept is not None:
        return set(by_layer(kept))
    return {layer.tensor for layer in job.graph.layers} if find_measure(name).of_weights else None


def read_named(name: str) -> Sensitivity:
    """The record in a file or in a folder of ours.

    Raises:
        InputError: There is none; lists the measures, as it may be a misspelt one.
    """
    path = Path(name)
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        choices = ", ".join(measure.name for measure in MEASURES)
        raise InputError(
            f"{name} is no measure, and no record of one",
            hint=f"measures: {choices}; or pass an --out folder of hcompress sensitivity, or its {RECORD}",
        )
    return read_sensitivity(path)


@contextmanager
def _staged(checkpoint: Path, settings: Settings, *, force: bool, dry_run: bool) -> Iterator[Path | None]:
    """The folder that ``out`` is made in, if it is asked for."""
    if settings["out"].value is None or dry_run:
        yield None
        return
    with store.staged(out_folder(settings), force, [checkpoint]) as stage:
        yield stage


def _publish(stage: Path, job: Job, pages: tuple[str, str], command: list[str]) -> None:
    """The pages, the manifest, and the folder in its place."""
    for name, text in zip(("report.html", "report.md"), pages, strict=True):
        store.write_file(stage / name, text)
    write_manifest(stage, command, job.parents(), int(job.value("seed")))
    store.publish(stage, out_folder(job.settings))


def _expected(job: Job, name: str, announce: Announce, *, always: bool) -> dict[str, float] | None:
    """What a measure will take, as plain JSON; None of one that is quick, or in the cache."""
    if measuring.is_kept(job, name):
        return None
    found = forecast(job, name, always=always)
    if found is None:
        return None
    announce(name, found)
    return found.to_json()


def _saliencies(job: Job, record: Sensitivity, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """What zeroing each weight alone would cost by the diagonal that a measure holds, as a histogram."""
    if not tensors:
        return None
    state = job.source.module.state_dict()
    values = torch.cat(
        [
            (state[name].detach().double().square() * diagonal.double() / 2).flatten()
            for name, diagonal in tensors.items()
        ]
    )
    what = f"half the squared weight times its entry of {record.method}"
    return asdict(saliency_histogram(values, torch.ones_like(values, dtype=torch.bool), what=what, unit="loss"))
