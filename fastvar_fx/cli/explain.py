"""`fastvar-fx explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastvar_fx.cli.options import (
    Asked,
    Batch,
    Blocks,
    Json,
    MethodName,
    ModelName,
    OnFull,
    OnFullName,
    PresetName,
    Ratios,
    Run,
    ScheduleFile,
)
from fastvar_fx.cli.terminal import headline
from fastvar_fx.transform import measure, trace, transform

Timed = Annotated[
    bool, typer.Option("--timed", help="Also time the pruned steps, dense and pruned.")
]


def run_explain(
    model: ModelName = "tiny",
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    blocks: Blocks = None,
    run: Run = None,
    batch: Batch = None,
    on_full: OnFullName = OnFull.SKIP,
    method: MethodName = "fastvar",
    timed: Timed = False,
    as_json: Json = False,
) -> None:
    """Show what every branch does at the cache step and the pruned steps, and why."""
    asked = Asked(
        model=model,
        preset=preset,
        schedule_file=schedule,
        ratios=ratios,
        blocks=blocks,
        run=run,
        batch=batch,
    )
    subject = asked.subject()
    fast = transform(
        subject.model, subject.schedule, blocks=blocks, on_full=on_full.value, method=method
    )
    report = (measure if timed else trace)(fast, subject.generate)
    print(report.to_json() if as_json else f"{headline(subject)}\n\n{report}")
