"""`fastvar-fx explain`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fastvar_fx.cli.options import (
    Asked,
    Batch,
    Blocks,
    Conditional,
    GuidanceUntil,
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
from fastvar_fx.cli.terminal import environment_line, headline, schedule_line
from fastvar_fx.errors import NothingPrunedError
from fastvar_fx.page.explained import of_report
from fastvar_fx.page.html import html, written_whole
from fastvar_fx.transform import explain, measure, trace, transform

Timed = Annotated[
    bool, typer.Option("--timed", help="Also time the pruned steps, dense and pruned.")
]
Html = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, help="Also write the report as a page.")
]


def run_explain(
    model: ModelName = "demo",
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    guidance_until: GuidanceUntil = None,
    conditional: Conditional = None,
    blocks: Blocks = None,
    run: Run = None,
    batch: Batch = None,
    on_full: OnFullName = OnFull.SKIP,
    method: MethodName = "fastvar",
    timed: Timed = False,
    as_html: Html = None,
    as_json: Json = False,
) -> None:
    """Show what every branch does at the cache step and the pruned steps, and why."""
    asked = Asked(
        model=model,
        preset=preset,
        schedule_file=schedule,
        ratios=ratios,
        guidance_until=guidance_until,
        conditional=conditional,
        blocks=blocks,
        run=run,
        batch=batch,
    )
    subject = asked.subject()
    with nullcontext() if as_html is None else written_whole(as_html) as page:
        fast = transform(
            subject.model,
            subject.schedule,
            blocks=blocks,
            on_full=on_full.value,
            conditional=subject.conditional,
            method=method,
        )
        failure = None
        try:
            report = (measure if timed else trace)(fast, subject.generate)
        except NothingPrunedError as error:  # the page says why
            report, failure = explain(fast), error
        if page is not None:
            about = (schedule_line(subject), f"method {method}; {environment_line(subject)}")
            page.write(html(of_report(report, subject.name, about)))
    if failure is not None:
        raise failure
    print(report.to_json() if as_json else f"{headline(subject)}\n\n{report}")
