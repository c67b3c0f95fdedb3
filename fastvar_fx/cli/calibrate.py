"""`fastvar-fx calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from fastvar_fx.calibration.calibrate import LEVELS, calibrate
from fastvar_fx.cli.options import (
    Asked,
    Batch,
    Blocks,
    Conditional,
    MethodName,
    ModelName,
    OnFull,
    OnFullName,
    PresetName,
    Ratios,
    Run,
    ScheduleFile,
    number_list,
)
from fastvar_fx.cli.terminal import headline, new_table, show, show_progress, sides_text, usage
from fastvar_fx.page.html import written_whole
from fastvar_fx.schedule import Schedule, span_text
from passes.analyse.branches import KINDS

_FIRST_SEED: Final = 1000
"""The first seed to draw from: another one than those of `evaluate`."""
_LEVELS: Final = ",".join(map(str, LEVELS))

_OWN: Final = "own"
"""The guidance that a named model draws with."""

SpeedUp = Annotated[
    float | None,
    typer.Option("--speedup", help="Dense FLOPs of the blocks over those of the plan."),
]
Loss = Annotated[
    float | None, typer.Option("--loss", help="What the plan may lose instead, in bits per token.")
]
Levels = Annotated[str, typer.Option("--levels", help="Ratios that a branch may have, besides 0.")]
Logits = Annotated[
    str | None,
    typer.Option("--logits", help="Module path of what returns the logits, such as head."),
]
Guidance = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        help=f"Also find the step at which guidance is best ended. For a model of your own, the "
        f"strength t of guidance in (1 + t) * conditional - t * unconditional logits: a number "
        f"for all steps, or with commas one for each. For a named model: {_OWN}.",
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Generations that are averaged.")]
Out = Annotated[Path, typer.Option("--out", dir_okay=False, help="JSON file of the schedule.")]
Keep = Annotated[
    Path | None,
    typer.Option("--keep", dir_okay=False, help="File that keeps what is measured, to go on from."),
]
Picture = Annotated[
    Path | None, typer.Option("--figure", dir_okay=False, help="Also draw the schedule as a PNG.")
]


def run_calibrate(
    model: ModelName = "demo",
    speedup: SpeedUp = None,
    loss: Loss = None,
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    method: MethodName = "fastvar",
    levels: Levels = _LEVELS,
    logits: Logits = None,
    guidance: Guidance = None,
    conditional: Conditional = None,
    seeds: Seeds = 2,
    blocks: Blocks = None,
    run: Run = None,
    batch: Batch = None,
    on_full: OnFullName = OnFull.SKIP,
    out: Out = Path("schedule.json"),
    keep: Keep = None,
    figure: Picture = None,
) -> None:
    """Find the ratios of each step, layer and kind of branch, and write them as a schedule."""
    asked = Asked(
        model=model,
        preset=preset,
        schedule_file=schedule,
        ratios=ratios,
        blocks=blocks,
        run=run,
        batch=batch,
        conditional=conditional,
    )
    subject = asked.subject()
    with written_whole(out, "a schedule") as file, show_progress() as progress:
        found = calibrate(
            subject.model,
            asked.generations(subject, range(_FIRST_SEED, _FIRST_SEED + seeds)),
            subject.schedule,
            speedup=speedup,
            loss=loss,
            logits=logits or asked.head,
            guidance=_strengths(asked, guidance, subject.model),
            levels=number_list("--levels", levels),
            file=keep,
            progress=progress,
            method=method,
            blocks=blocks,
            on_full=on_full.value,
            conditional=subject.conditional,
        )
        file.write(found.to_json())
    show(headline(subject))
    show(_table(found))
    if found.guidance_until is not None:
        show(f"no guidance from step {found.guidance_until} on")
    show(f"written to {out}; --schedule {out} --method {method} uses it")
    if figure is not None:
        _draw(found, f"{subject.name}, {method}", figure)


def _draw(plan: Schedule, title: str, path: Path) -> None:
    if not plan.pruned_steps:
        show(f"the plan prunes nothing: there are no ratios to draw, and {path} is not written")
        return
    from fastvar_fx.calibration.figure import draw_plan  # it needs matplotlib

    until = plan.guidance_until
    draw_plan(plan, title if until is None else f"{title}; no guidance from step {until} on", path)


def _strengths(asked: Asked, text: str | None, model: Any) -> float | Sequence[float] | None:
    """Returns the strengths of guidance that are asked for."""
    named = asked.run is None
    if text is None:
        return None
    if named != (text == _OWN):
        usage(
            f"--guidance takes {_OWN} for a named model, and the strengths of a model of your own, "
            f"such as 0,0.5,1,1.5; found {text!r} for {asked.model}"
        )
    if named:
        return cast("Sequence[float]", model.guidance_strengths())
    numbers = number_list("--guidance", text)
    return numbers[0] if len(numbers) == 1 else numbers


def _table(schedule: Schedule) -> object:
    table = new_table("step", "scale", *(kind.replace("_", "\n") for kind in KINDS))
    layers = range(schedule.depth or 1)
    for step in schedule.pruned_steps:
        cells = (
            span_text(sorted(schedule.ratio(step, layer, kind) for layer in layers))
            for kind in KINDS
        )
        table.add_row(str(step), sides_text(schedule.scales[step]), *cells)
    return table
