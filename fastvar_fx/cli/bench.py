"""`fastvar-fx bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fastvar_fx.bench import figures
from fastvar_fx.bench.modules import ModuleTimes, late_modules, measure_modules, overhead
from fastvar_fx.bench.presets import PRESETS, preset
from fastvar_fx.bench.resolutions import (
    KINDS,
    QUANTITIES,
    AtResolution,
    growth,
    measure_resolutions,
    schedule_at,
)
from fastvar_fx.bench.rows import DENSE, Result, Row, measure, phases
from fastvar_fx.cli.options import Json
from fastvar_fx.cli.terminal import (
    environment,
    environment_line,
    headline,
    make_folder,
    new_table,
    show,
    show_progress,
    sides_text,
    usage,
)

PresetName = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at once.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each row.")]
Compiled = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Whether to measure compiled rows too.")
]
Steps = Annotated[bool, typer.Option("--steps", help="Also print the time of every step.")]
Modules = Annotated[
    bool, typer.Option("--modules", help="Also time attention, feed-forward, PTS and CTR.")
]
Resolutions = Annotated[
    str,
    typer.Option(
        "--resolutions",
        help="Also measure how time and memory grow with the side of the image in pixels, such as "
        "256,512,1024,2048. What takes too long or does not fit is left out.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", file_okay=False, writable=True, help="Folder for pictures of what was measured."
    ),
]


@dataclass(frozen=True)
class _Measured:
    """All that one command measured; what was not asked for is empty."""

    result: Result
    with_steps: bool
    modules: dict[str, ModuleTimes]
    resolutions: tuple[AtResolution, ...]


def run_bench(
    preset_name: PresetName = "var-tiny",
    batch: Batch = 1,
    repeats: Repeats = 5,
    compiled: Compiled = True,
    steps: Steps = False,
    modules: Modules = False,
    resolutions: Resolutions = "",
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure a model dense and pruned, eager and compiled, by turns in one process."""
    chosen, sizes = preset(preset_name), _pixels(resolutions)
    for pixels in sizes:
        schedule_at(chosen.schedule, pixels)  # refuses what has no whole tokens, before all else
    if plot is not None:
        make_folder(plot)
    total = phases(chosen, repeats, compiled=compiled) + modules * 2 * (1 + repeats) + len(sizes)
    with show_progress(total) as progress:
        result = measure(
            preset_name, batch=batch, repeats=repeats, compiled=compiled, progress=progress
        )
        measured = _Measured(
            result,
            steps,
            measure_modules(result.subject, repeats, progress) if modules else {},
            measure_resolutions(preset_name, sizes, batch=batch, progress=progress)
            if sizes
            else (),
        )
    files = [] if plot is None else _draw(measured, plot)
    if as_json:
        print(json.dumps(_as_dict(measured) | {"files": list(map(str, files))}))
        return
    _print(measured)
    if files:
        print(f"wrote {', '.join(map(str, files))}")


def _pixels(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",") if text})
    except ValueError:
        usage(
            f"--resolutions takes sides in pixels with commas, such as 256,512,1024; found {text!r}"
        )


# --- data -------------------------------------------------------------------------------------


def _as_dict(measured: _Measured) -> dict[str, Any]:
    result, rows = measured.result, measured.result.rows
    data = {
        **environment(result.subject),
        "preset": result.subject.name,
        "batch": result.batch,
        "repeats": result.repeats,
        "schedule": json.loads(result.subject.schedule.to_json()),
        "rows": [row.as_dict() for row in rows],
        "total_ms": {row.name: 1e3 * row.total.median for row in rows},
        "speedup_over_dense_compiled": {row.name: row.compiled_speedup for row in rows},
        "slower_steps": result.slower_steps,
    }
    if measured.with_steps:
        data["steps"] = {row.name: [1e3 * step.median for step in row.steps] for row in rows}
    if measured.modules:
        data["modules"] = {
            name: [{module: 1e3 * time for module, time in step.items()} for step in steps]
            for name, steps in measured.modules.items()
        }
    if measured.resolutions:
        data["resolutions"] = [row.as_dict() for row in measured.resolutions]
        data["exponents"] = _exponents(measured.resolutions)
    return data


def _exponents(rows: Sequence[AtResolution]) -> dict[str, dict[str, float | None]]:
    """Returns the e of cost ~ tokens^e; None where too little was measured."""
    found = {name: {kind: growth(rows, kind, name) for kind in KINDS} for name in QUANTITIES}
    return {
        name: {kind: None if isnan(e) else e for kind, e in of_kind.items()}
        for name, of_kind in found.items()
    }


# --- tables -----------------------------------------------------------------------------------


def _print(measured: _Measured) -> None:
    result = measured.result
    show(headline(result.subject))
    show(environment_line(result.subject, result.batch))
    times = ("ms", "iqr", "total\nms", "x dense\neager", "x dense\ncompiled")
    table = new_table("", *times, "limit", "of\nlimit", "peak\nMiB", "KV\nMiB", left=1)
    for row in result.rows:
        table.add_row(row.name, *_row_cells(row))
    show(table)
    if measured.with_steps:
        show(_step_table(result))
    show(
        f"ms: transformer blocks over one generation, median of {result.repeats} alternating runs "
        f"after warm-up; iqr: distance of the quartiles; total: the whole run, with sampling and, "
        f"for VAR, the image decoder. limit: dense FLOPs / FLOPs of the blocks; of limit: against "
        f"the dense row of the same kind, eager or compiled. peak: of the token loop, without "
        f"weights. skip: steps of ratio 1 are left out, else they run on no tokens. peer: the "
        f"authors' argsort, interpolation and scatter. Random weights."
    )
    if any(not row.steps for row in result.rows):
        show("graph: a replayed CUDA graph of the token loop, all of which counts as ms.")
    for name, steps in result.slower_steps.items():
        for step in steps:
            show(
                f"step {step}: {name} is no faster than dense: pruning does not pay here; "
                f"schedule.without({step}) leaves the step dense"
            )
    if measured.modules:
        _print_modules(measured)
    if measured.resolutions:
        _print_resolutions(measured.resolutions)


def _row_cells(row: Row) -> tuple[str, ...]:
    return (
        f"{1e3 * row.transformer.median:.1f}",
        f"{1e3 * row.transformer.iqr:.1f}",
        f"{1e3 * row.total.median:.1f}",
        f"{row.speedup:.2f}",
        "-" if row.compiled_speedup is None else f"{row.compiled_speedup:.2f}",
        f"{row.limit:.2f}",
        f"{row.limit_fraction:.0%}",
        f"{row.peak_mib:.1f}",
        f"{row.kv_mib:.1f}",
    )


def _step_table(result: Result) -> Table:
    """Returns the time in the blocks per step, in ms."""
    schedule = result.subject.schedule
    rows = [row for row in result.rows if row.steps]
    names = [row.name.replace("-", "\n") for row in rows]
    table = new_table("step", "scale", "tokens", "kept", *names)
    for step, scale in enumerate(schedule.scales):
        times = [f"{1e3 * row.steps[step].median:.1f}" for row in rows]
        counts = (str(schedule.tokens(step)), str(schedule.kept(step)))
        table.add_row(str(step), sides_text(scale), *counts, *times)
    return table


def _print_modules(measured: _Measured) -> None:
    schedule, modules = measured.result.subject.schedule, measured.modules
    names = late_modules(modules, schedule)
    table = new_table("step", "kept", "", *(name.replace("_", "\n") for name in names), "all")
    table.columns[2].justify = "left"
    for step in range(schedule.cache_step, schedule.steps):
        for row, steps in modules.items():
            kept = schedule.tokens(step) if row == DENSE else schedule.kept(step)
            times = [1e3 * steps[step][name] for name in names]
            cells = [f"{time:.2f}" for time in (*times, sum(times))]
            table.add_row(str(step), str(kept), row, *cells)
    show(table)
    shares = [f"{overhead(modules, s):.1%} at step {s}" for s in schedule.pruned_steps]
    show(
        f"ms by module, summed over the blocks, from the cache step on. Both run eagerly, by "
        f"graphs that read the clock between modules. PTS: scores, selection and gathers; rest: "
        f"between the branches. PTS + CTR over the dense branches: {', '.join(shares)}."
    )


def _print_resolutions(rows: Sequence[AtResolution]) -> None:
    kinds = [f"{what}\n{kind}" for what in ("ms", "peak MiB", "GFLOP") for kind in KINDS]
    table = new_table("pixels", "tokens", "kept", *kinds)
    for row in rows:
        costs = [
            f"{getattr(row.costs[kind], quantity):.1f}" if kind in row.costs else "-"
            for quantity in QUANTITIES
            for kind in KINDS
        ]
        kept = row.schedule.kept(row.schedule.steps - 1)
        table.add_row(str(row.pixels), str(row.tokens), str(kept), *costs)
    grown = [
        "-" if exponent is None else f"^{exponent:.2f}"
        for of_kind in _exponents(rows).values()
        for exponent in of_kind.values()
    ]
    table.add_section()
    table.add_row("", "tokens", "", *grown)
    show(table)
    show(
        "tokens, kept: of the last map. ms: transformer blocks, eager; peak: without weights. Last "
        "line: the e of cost ~ tokens^e, over the sizes with a pruned step that were measured both "
        "ways. Maps beyond the schedule keep as many tokens per row as its last pruned one."
    )
    for row in rows:
        if row.note:
            show(f"left out at {row.pixels} x {row.pixels}: {row.note}")


# --- pictures ---------------------------------------------------------------------------------


def _draw(measured: _Measured, folder: Path) -> list[Path]:
    result = measured.result
    title = headline(result.subject)
    about = f"{environment_line(result.subject, result.batch)}, random weights"
    drawn: dict[str, Callable[..., None]] = {
        "rows": partial(figures.draw_rows, result),
        "steps": partial(figures.draw_steps, result),
    }
    if measured.modules:
        schedule = result.subject.schedule
        drawn["modules"] = partial(figures.draw_modules, measured.modules, schedule)
    if measured.resolutions:
        drawn["resolutions"] = partial(figures.draw_resolutions, measured.resolutions)
    files = {name: folder / f"{name}.png" for name in drawn}
    for name, draw in drawn.items():
        draw(title, about, files[name])
    return list(files.values())
