"""`fastvar-fx evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fastvar_fx.cli.options import (
    GuidanceUntil,
    Json,
    MethodName,
    PresetName,
    Ratios,
    ScheduleFile,
    chosen_schedule,
    class_list,
    with_guidance,
)
from fastvar_fx.cli.terminal import (
    environment,
    environment_line,
    headline,
    new_table,
    show,
    show_progress,
    sides_text,
)
from fastvar_fx.quality.evaluate import METRICS, Evaluation, Score, Speed, check_metrics, evaluate
from fastvar_fx.quality.subjects import DEMO, case, case_names, own_schedule
from fastvar_fx.schedule import span_text

_ALL = ",".join(METRICS)

CaseName = Annotated[str, typer.Argument(help=f"One of {', '.join(case_names())}.")]
Metrics = Annotated[str, typer.Option("--metrics", help=f"Any of {_ALL}.")]
Classes = Annotated[
    str | None,
    typer.Option("--classes", help="Classes to draw, such as 0,3 or 0-4; one image each."),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        help="Folder of held-out images, of the size that the model draws; 3-lake.jpg has class 3, "
        "lake.jpg has none.",
    ),
]
HeldOutCount = Annotated[
    int, typer.Option("--held-out", min=1, help="Number of held-out images, without --images.")
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds to draw from.")]
Repeats = Annotated[
    int, typer.Option("--repeats", min=0, help="Timed runs of each model; 0 to time nothing.")
]

_UNITS = {"psnr": "dB", "spectrum": "dB", "bits": "bits/token"}
_DIGITS = {"psnr": 2, "ssim": 4, "agreement": 3, "spectrum": 3, "frechet": 3, "bits": 4}


def run_evaluate(
    model: CaseName = DEMO,
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    guidance_until: GuidanceUntil = None,
    method: MethodName = "fastvar",
    metrics: Metrics = _ALL,
    classes: Classes = None,
    images: Images = None,
    held_out: HeldOutCount = 8,
    seeds: Seeds = 4,
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """Compare the pruned model with the dense one and with held-out images: quality and speed."""
    wanted = check_metrics([name for name in metrics.split(",") if name])
    chosen = with_guidance(
        chosen_schedule(model, preset, schedule, ratios, own_schedule(model)), guidance_until
    )
    with show_progress() as progress:
        progress("building the model")
        asked = class_list(classes)
        subject = case(model, chosen, classes=asked, folder=images, held_out=held_out)
        result = evaluate(
            subject,
            method=method,
            metrics=wanted,
            seeds=seeds,
            repeats=repeats,
            progress=progress,
        )
    if as_json:
        print(json.dumps(_as_dict(result)))
    else:
        _print(result)


def _as_dict(result: Evaluation) -> dict[str, Any]:
    subject = result.case.subject(0)
    return {
        **environment(subject),
        "model": result.case.name,
        "note": result.case.note,
        "method": result.method,
        "schedule": json.loads(result.case.schedule.to_json()),
        "seeds": result.seeds,
        "scores": [score.as_dict() for score in result.fidelity.scores],
        "steps": [vars(step) for step in result.fidelity.steps],
        "speed": result.speed and result.speed.as_dict(),
        "left_out": result.left_out,
    }


def _print(result: Evaluation) -> None:
    subject = result.case.subject(0)
    show(headline(subject))
    show(environment_line(subject, result.batch))
    show(f"method: {result.method}")
    show(_score_table(result))
    show(_step_table(result))
    if result.speed is not None:
        show(_speed_table(result.speed))
    for line in _remarks(result):
        show(line)


def _score_table(result: Evaluation) -> Table:
    table = new_table("", "against", "dense", "pruned", "pruned - dense", left=2)
    for score in result.fidelity.scores:
        table.add_row(*_score_cells(score))
    return table


def _score_cells(score: Score) -> tuple[str, ...]:
    digits = _DIGITS[score.metric]
    unit = _UNITS.get(score.metric)
    return (
        f"{score.metric}, {unit}" if unit else score.metric,
        score.against,
        "" if score.dense is None else score.dense.text(digits),
        score.pruned.text(digits),
        "" if score.difference is None else score.difference.text(digits, "+"),
    )


def _step_table(result: Evaluation) -> Table:
    names = ("tokens\nagree", "bits/token\ndense", "bits/token\npruned", "ms\ndense", "ms\npruned")
    table = new_table("step", "scale", "tokens", "kept", *names)
    schedule = result.case.schedule
    times: Any = result.speed.steps if result.speed else ((None, None),) * schedule.steps
    for step, (dense, pruned) in zip(result.fidelity.steps, times, strict=True):
        skipped = step.step in schedule.full_steps
        table.add_row(
            str(step.step),
            sides_text(schedule.scales[step.step]),
            str(schedule.tokens(step.step)),
            "skipped" if skipped else span_text(schedule.kept_counts(step.step)),
            _number(step.agreement, 3),
            _number(step.bits_dense, 3),
            _number(step.bits_pruned, 3),
            _number(dense and 1e3 * dense.median, 1),
            _number(pruned and 1e3 * pruned.median, 1),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _speed_table(speed: Speed) -> Table:
    table = new_table("", "ms dense", "ms pruned", "speed-up", "limit", left=1)
    for name, part in (("transformer", speed.transformer), ("whole run", speed.total)):
        table.add_row(
            name,
            f"{1e3 * part.dense.median:.1f}",
            f"{1e3 * part.pruned.median:.1f}",
            f"{part.speedup:.2f}x",
            "-" if part.limit is None else f"{part.limit:.2f}x",
        )
    return table


def _remarks(result: Evaluation) -> Iterator[str]:
    for score in dict.fromkeys(score.metric for score in result.fidelity.scores):
        yield f"{score}: {METRICS[score]}."
    yield (
        f"±: 95 % confidence interval of the mean by Student's t over {len(result.seeds)} seeds, "
        f"of {result.batch} images each; for bits over images. Dense and pruned share the seeds."
    )
    if result.speed is not None:
        yield (
            f"ms: median of {result.speed.repeats} alternating runs; limit: the speed-up if time "
            f"were proportional to the FLOPs of the blocks."
        )
    for metric, reason in result.left_out.items():
        yield f"{metric} does not apply: {reason}."
    if result.case.note:
        yield result.case.note
