"""`fastvar-fx demo`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from fastvar_fx.cli.options import (
    DEMO,
    NAMES,
    Asked,
    Batch,
    Blocks,
    Conditional,
    GuidanceUntil,
    Json,
    MethodName,
    PresetName,
    Ratios,
    Run,
    ScheduleFile,
)
from fastvar_fx.cli.terminal import (
    environment,
    environment_line,
    headline,
    make_folder,
    new_table,
    schedule_line,
    show,
    show_progress,
    sides_text,
)
from fastvar_fx.engine.report_text import branch_counts
from fastvar_fx.measuring.compare import Comparison
from fastvar_fx.measuring.demo import (
    Measurement,
    StepResult,
    draw_comparison,
    draw_kept_tokens,
    measure_both,
)
from fastvar_fx.measuring.runs import Budget
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.page.data import Page
from fastvar_fx.page.demonstration import of_measurement
from fastvar_fx.page.html import html, written_whole

_REPEATS: Final = 3
_SECONDS: Final = 60.0
"""Time budget in seconds: repeats are left out to meet it, unless --repeats is given."""

DemoModel = Annotated[
    str,
    typer.Option(
        "--model",
        help=f"One of {NAMES}, or package.module:factory.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for the pictures.")]
Repeats = Annotated[
    int | None,
    typer.Option(
        "--repeats",
        min=1,
        help=f"Timed runs of each model; {_REPEATS}, or fewer on a slow machine.",
    ),
]


def run_demo(
    out: Out = Path("demo"),
    model: DemoModel = DEMO,
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    guidance_until: GuidanceUntil = None,
    conditional: Conditional = None,
    blocks: Blocks = None,
    run: Run = None,
    batch: Batch = None,
    method: MethodName = "fastvar",
    seed: Seed = 0,
    repeats: Repeats = None,
    as_json: Json = False,
) -> None:
    """Generate a batch dense and pruned, compare the times, and draw both."""
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
        seed=seed,
    )
    budget = Budget(_SECONDS if repeats is None else inf)
    with show_progress(budget) as progress:
        progress("building the model")
        subject = asked.subject()
        make_folder(out)
        with written_whole(out / "index.html") as page:
            result = measure_both(
                subject,
                method=method,
                repeats=repeats or _REPEATS,
                budget=budget,
                progress=progress,
            )
            progress("drawing")
            files = _draw(subject, result, out)
            page.write(html(_page(subject, result)))
        files.append(out / "index.html")
    if as_json:
        print(json.dumps(_demo_dict(subject, result, files, budget.spent)))
    else:
        _print_demo(subject, result, files, budget.spent)


def _demo_dict(
    subject: Subject, result: Measurement, files: Sequence[Path], seconds: float
) -> dict[str, Any]:
    return {
        "model": subject.name,
        "note": subject.note,
        "seed": subject.seed,
        **environment(subject),
        "schedule": json.loads(subject.schedule.to_json()),
        **result.as_dict(),
        "files": [str(path) for path in files],
        "seconds": round(seconds, 1),
    }


def _print_demo(
    subject: Subject, result: Measurement, files: Sequence[Path], seconds: float
) -> None:
    show(headline(subject))
    show(_about(subject, result))
    show(_step_table(result))
    show(_speedup_table(result))
    for line in _remarks(subject, result):
        show(line)
    print(f"wrote {', '.join(map(str, files))}; {seconds:.0f} s in all")


def _step_table(result: Measurement) -> Table:
    measured = ("ms\ndense", "ms\npruned", "GFLOP\ndense", "GFLOP\npruned")
    table = new_table("step", "scale", "tokens", "kept", *measured, "speed-up", "limit")
    for step in result.steps:
        table.add_row(*_step_cells(step))
    return table


def _step_cells(step: StepResult) -> tuple[str, ...]:
    pruned = step.kept < step.tokens
    return (
        str(step.step),
        sides_text(step.scale),
        str(step.tokens),
        str(step.kept) if pruned else "all",
        step.dense.milliseconds,
        step.pruned.milliseconds,
        f"{step.dense_flops / 1e9:.1f}",
        f"{step.pruned_flops / 1e9:.1f}",
        f"{step.speedup:.2f}x",
        _times(step.limit) if pruned else "",
    )


def _speedup_table(result: Measurement) -> Table:
    table = new_table("", "ms dense", "ms pruned", "speed-up", "limit", "of limit", left=1)
    parts = {
        "transformer, pruned steps": result.pruned_steps,
        "transformer, all steps": result.transformer,
        "whole run with image decoder": result.total,
    }
    for name, part in parts.items():
        table.add_row(name, *_comparison_cells(part))
    return table


def _comparison_cells(part: Comparison) -> tuple[str, ...]:
    share = part.limit_fraction
    return (
        part.dense.milliseconds,
        part.pruned.milliseconds,
        f"{part.speedup:.2f}x",
        _times(part.limit),
        "-" if share is None else f"{share:.0%}",
    )


def _remarks(subject: Subject, result: Measurement) -> Iterator[str]:
    several = f"median of {result.repeats} alternating runs after a warm-up, ± half of max - min"
    yield (
        f"ms: {several if result.repeats > 1 else 'one run after a warm-up'}. "
        f"limit: dense FLOPs / pruned FLOPs of the blocks' matrix products; for the whole run, "
        f"with the same time for all else as in the dense run."
    )
    pruned, branches = branch_counts(result.report)
    refused = "" if pruned == branches else "; fastvar-fx explain says why the others do not"
    yield f"{pruned} of {branches} branches prune{refused}. Step skipping: none."
    if result.transformer.unusable:
        yield f"times and speed-ups are unusable: {result.transformer.doubt}; measure again"
    elif result.transformer.doubt:
        yield f"{result.transformer.doubt}; see --repeats"
    if result.slower_steps:
        yield f"slower than dense at steps {', '.join(map(str, result.slower_steps))}"
    if result.repeat_difference > 0:
        yield (
            f"two dense runs differ by up to {result.repeat_difference:.2g}: the run is not "
            f"deterministic, and the difference picture includes that"
        )
    if subject.note:
        yield subject.note


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}x"


def _about(subject: Subject, result: Measurement) -> str:
    line = environment_line(subject, len(result.dense_images))
    return f"method {result.method}; {line}, seed {subject.seed}"


def _draw(subject: Subject, result: Measurement, out: Path) -> list[Path]:
    comparison, kept = out / "demo.png", out / "kept_tokens.png"
    about = _about(subject, result)
    note = f"{about}; {subject.note}" if subject.note else about
    draw_comparison(result, headline(subject), note, comparison)
    draw_kept_tokens(result, headline(subject), note, kept)
    return [comparison, kept]


def _page(subject: Subject, result: Measurement) -> Page:
    subtitle = (schedule_line(subject), _about(subject, result))
    return of_measurement(result, subject.name, subtitle, tuple(_remarks(subject, result)))
