"""`fastvar-fx sample`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar

from fastvar_fx.cli import say
from fastvar_fx.cli.options import (
    NAMES,
    Asked,
    Blocks,
    Conditional,
    GuidanceUntil,
    MethodName,
    OnFull,
    OnFullName,
    PresetName,
    Ratios,
    ScheduleFile,
    class_list,
)
from fastvar_fx.cli.source import Source, source_of
from fastvar_fx.cli.terminal import usage
from fastvar_fx.engine.plan import LiveRows
from fastvar_fx.errors import ArgumentError
from fastvar_fx.sampling.drawing import fingerprint
from fastvar_fx.sampling.folder import Folder
from fastvar_fx.sampling.loop import Pace, Sampler
from fastvar_fx.sampling.plan import MOST_IMAGES, Conditions, Plan, read_prompts
from fastvar_fx.sampling.processes import joined
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import transform

_SECONDS_PER_LINE: Final = 10.0
"""Between two lines of progress where there is no terminal."""

Model = Annotated[
    str,
    typer.Argument(
        help=f"One of {NAMES}, or package.module:factory, where factory() returns a model in eval "
        f"mode."
    ),
]
Count = Annotated[int, typer.Option("--count", min=1, max=MOST_IMAGES, help="Number of images.")]
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for the images.")]
BatchSize = Annotated[int, typer.Option("--batch", min=1, max=4096, help="Images drawn at once.")]
Classes = Annotated[
    str | None,
    typer.Option("--classes", help="Classes to draw in turn, such as 0,3 or 0-999."),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", exists=True, dir_okay=False, help="Text file of prompts to draw in turn."
    ),
]
DrawFunction = Annotated[
    str | None,
    typer.Option(
        "--draw",
        help="package.module:function, where function(model, seeds, classes or prompts) returns "
        "images (B, 3, H, W) in [0, 1]. Needed for a model of your own.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**62, help="Seed of image 0; image i has seed + i.")
]
Dense = Annotated[bool, typer.Option("--dense", help="Draw with the model as it is.")]
Npz = Annotated[
    bool, typer.Option("--npz", help="Also write images.npz for the evaluators of ImageNet.")
]


def run_sample(
    model: Model,
    count: Count,
    out: Out = Path("samples"),
    batch: BatchSize = 8,
    classes: Classes = None,
    prompts: Prompts = None,
    draw: DrawFunction = None,
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    guidance_until: GuidanceUntil = None,
    conditional: Conditional = None,
    blocks: Blocks = None,
    on_full: OnFullName = OnFull.SKIP,
    method: MethodName = "fastvar",
    seed: Seed = 0,
    dense: Dense = False,
    npz: Npz = False,
) -> None:
    """Draw many images into a folder, alone or under torchrun; run it again to go on."""
    asked = Asked(
        model=model,
        preset=preset,
        schedule_file=schedule,
        ratios=ratios,
        guidance_until=guidance_until,
        conditional=conditional,
        blocks=blocks,
        run=None,
        batch=batch,
    )
    options = (preset, schedule, ratios, guidance_until, conditional, blocks)
    if dense and (method != "fastvar" or any(option is not None for option in options)):
        usage("--dense prunes nothing: leave out the options of schedule, blocks and method")
    began = time.monotonic()
    with joined() as processes:
        source = source_of(asked, draw, dense=dense)
        conditions = _conditions(source, classes, prompts)
        run = {
            "model": model,
            "draw": draw,
            "weights": fingerprint(*source.parts),
            "device": ", ".join(sorted({p.device.type for p in source.model.parameters()})),
            "images": str(conditions),
            "seed": seed,
            "batch": batch,
            **_pruning(source.schedule, method, on_full, blocks, asked.half),
        }
        if source.schedule is None:
            drawn_by = source.model
        else:
            drawn_by = transform(
                source.model,
                source.schedule,
                blocks=blocks,
                on_full=on_full.value,
                conditional=asked.half,
                method=method,
            )
        with _progress() as show:
            sampler = Sampler(
                plan=Plan(count=count, batch=batch, seed=seed, conditions=conditions),
                model=drawn_by,
                draw=source.draw,
                folder=Folder(out),
                run=run,
                processes=processes,
                show=show,
                tell=say if processes.world == 1 else partial(_say_as, processes.rank),
            )
            drawn = sampler.sample(npz=npz)
    if processes.rank == 0:
        seconds = time.monotonic() - began
        print(f"{count} images in {out}, {drawn} of them drawn now, in {seconds:.0f} s")


# --- what is asked ----------------------------------------------------------------------------


def _conditions(source: Source, classes: str | None, prompts: Path | None) -> Conditions:
    """Returns what the images show: by default all classes of a named model."""
    if classes is not None and prompts is not None:
        usage("--classes and --prompts exclude each other")
    if prompts is not None:
        if source.classes is not None:
            usage("the named models draw classes, not prompts; give --classes")
        return Conditions("prompt", read_prompts(prompts))
    chosen = class_list(classes)
    if source.classes is None:
        return Conditions() if chosen is None else Conditions("class", chosen)
    chosen = list(range(source.classes)) if chosen is None else chosen
    if max(chosen) >= source.classes:
        raise ArgumentError(f"the model has classes 0 to {source.classes - 1}; found {max(chosen)}")
    return Conditions("class", chosen)


def _pruning(
    schedule: Schedule | None,
    method: str,
    on_full: OnFull,
    blocks: str | None,
    conditional: LiveRows | None,
) -> dict[str, Any]:
    """Returns how the model is pruned, as plain data."""
    if schedule is None:
        return {"method": "dense"}
    how = {"method": method, "on_full": on_full.value, "blocks": blocks}
    if schedule.guidance_until is not None:
        how["conditional"] = conditional
    return {**how, **json.loads(schedule.to_json())}


# --- what is shown ----------------------------------------------------------------------------


def _say_as(rank: int, message: str) -> None:
    say(f"rank {rank}: {message}")


@contextmanager
def _progress() -> Iterator[Callable[[Pace], None]]:
    """Shows the pace of this machine on stderr: a bar on a terminal, else a line at times."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (BarColumn(), TextColumn("{task.description}"))
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda pace: bar.update(
            task, description=_pace_text(pace), completed=pace.done, total=pace.total
        )


class _Lines:
    """Prints the pace, but not more often than a log can bear."""

    def __init__(self) -> None:
        self.last = -inf

    def __call__(self, pace: Pace) -> None:
        now = time.monotonic()
        if pace.done == pace.total or now - self.last >= _SECONDS_PER_LINE:
            self.last = now
            say(_pace_text(pace))


def _pace_text(pace: Pace) -> str:
    text = f"{pace.done} of {pace.total} images"
    if pace.per_second is None or pace.seconds_left is None:
        return text
    left = timedelta(seconds=round(pace.seconds_left))
    return f"{text}, {pace.per_second:.3g} images/s, {left} left"
