"""`fastvar-fx bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from fastvar_fx.cli.options import GuidanceUntil, Json, with_guidance
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
from fastvar_fx.measuring import figures
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.measuring.modules import ModuleTimes, late_modules, measure_modules, overhead
from fastvar_fx.measuring.presets import PRESETS, preset
from fastvar_fx.measuring.resolutions import (
    KINDS,
    QUANTITIES,
    AtResolution,
    growth,
    measure_resolutions,
    schedule_at,
)
from fastvar_fx.measuring.rows import Result, Row, check_variants, default_variants, measure_rows
from fastvar_fx.measuring.runs import Budget
from fastvar_fx.measuring.variants import DENSE, Variant
from fastvar_fx.schedule import Schedule, span_text

_UNUSABLE: Final = " !"
"""Behind a figure that is unusable."""

PresetName = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at once.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each row.")]
Seconds = Annotated[
    float,
    typer.Option(
        "--seconds",
        min=0,
        help="Time budget of the whole command. Repeats, then rows are left out to meet it; what "
        "was measured is printed.",
    ),
]
Rows = Annotated[
    str | None,
    typer.Option(
        "--rows",
        help="What to measure, such as dense-eager,pruned-eager: (dense|pruned|skip|peer)-"
        "(eager|compiled), with -graph for CUDA graphs.",
    ),
]
Compiled = Annotated[
    bool,
    typer.Option("--compile/--no-compile", help="Whether the default rows include compiled ones."),
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
    modules: dict[Variant, ModuleTimes]
    resolutions: tuple[AtResolution, ...]


def run_bench(
    preset_name: PresetName = "var-tiny",
    batch: Batch = 1,
    repeats: Repeats = 5,
    seconds: Seconds = 290.0,
    rows: Rows = None,
    guidance_until: GuidanceUntil = None,
    compiled: Compiled = True,
    steps: Steps = False,
    modules: Modules = False,
    resolutions: Resolutions = "",
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure a model dense and pruned, eager and compiled, in alternating runs."""
    budget = Budget(seconds)
    chosen, sizes = preset(preset_name), _pixels(resolutions)
    schedule = with_guidance(chosen.schedule, guidance_until)
    for pixels in sizes:
        schedule_at(chosen.schedule, pixels)  # refuses what has no whole tokens, before all else
    variants = _variants(rows, schedule, compiled=compiled)
    if plot is not None:
        make_folder(plot)
    with show_progress(budget) as progress:
        result = measure_rows(
            preset_name,
            variants,
            schedule=schedule,
            batch=batch,
            repeats=repeats,
            budget=budget,
            progress=progress,
        )
        measured = _Measured(
            result,
            steps,
            measure_modules(result.subject, repeats, budget=budget, progress=progress)
            if modules
            else {},
            measure_resolutions(preset_name, sizes, batch=batch, budget=budget, progress=progress),
        )
    files = [] if plot is None else _draw(measured, plot)
    if as_json:
        print(json.dumps(_as_dict(measured) | {"files": list(map(str, files))}))
    else:
        _print(measured)
        if files:
            print(f"wrote {', '.join(map(str, files))}")
    if result.failed:
        raise typer.Exit(1)


def _variants(names: str | None, schedule: Schedule, *, compiled: bool) -> tuple[Variant, ...]:
    if names is None:
        return default_variants(schedule, compiled=compiled)
    if not compiled:
        usage("--rows and --no-compile exclude each other; name the rows without -compiled")
    return check_variants([Variant.parse(name.strip()) for name in names.split(",")], schedule)


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
        "saved_ms": {
            str(variant): {"ratio_1_steps": 1e3 * skipped, "pruned_steps": 1e3 * pruned}
            for variant, (skipped, pruned) in result.saved.items()
        },
        "slower_steps": {str(variant): s for variant, s in result.slower_steps.items()},
        "savings": result.savings,
        "left_out": list(map(str, result.left_out)),
        "failed": {str(variant): error for variant, error in result.failed.items()},
    }
    if measured.with_steps:
        data["steps"] = {
            str(row.variant): [1e3 * step.median for step in row.steps] for row in rows
        }
    if measured.modules:
        data["modules"] = {
            str(variant): [{name: 1e3 * time for name, time in step.items()} for step in steps]
            for variant, steps in measured.modules.items()
        }
    if measured.resolutions:
        data["resolutions"] = [row.as_dict() for row in measured.resolutions]
        data["exponents"] = _exponents(measured.resolutions)
    return data


def _exponents(rows: Sequence[AtResolution]) -> dict[str, dict[str, float | None]]:
    """Returns e in cost ~ tokens^e; None where too few sizes were measured."""
    found = {name: {str(kind): growth(rows, kind, name) for kind in KINDS} for name in QUANTITIES}
    return {
        name: {kind: None if isnan(e) else e for kind, e in of_kind.items()}
        for name, of_kind in found.items()
    }


# --- tables -----------------------------------------------------------------------------------


def _print(measured: _Measured) -> None:
    result = measured.result
    show(headline(result.subject))
    show(environment_line(result.subject, result.batch))
    names = ("runs", "ms", "iqr", "total\nms", "x dense", "limit", "of\nlimit", "peak\nMiB")
    table = new_table("", *names, "KV\nMiB", left=1)
    for row in result.rows:
        table.add_row(str(row.variant), *_row_cells(row))
    show(table)
    if measured.with_steps:
        show(_step_table(result))
    for line in _remarks(result):
        show(line)
    if measured.modules:
        _print_modules(measured)
    if measured.resolutions:
        _print_resolutions(measured.resolutions)


def _row_cells(row: Row) -> tuple[str, ...]:
    time, compared = row.transformer, row.comparison
    return (
        str(time.runs),
        _marked(f"{1e3 * time.median:.1f}", time),
        "?" if time.iqr is None else f"{1e3 * time.iqr:.1f}",
        _marked(f"{1e3 * row.total.median:.1f}", row.total),
        "-" if compared is None else _marked(f"{compared.speedup:.2f}", compared),
        f"{row.limit:.2f}",
        "-" if compared is None else _marked(f"{compared.speedup / row.limit:.0%}", compared),
        f"{row.peak_mib:.1f}",
        f"{row.kv_mib:.1f}",
    )


def _marked(figure: str, of: Spread | Comparison) -> str:
    """Marks a figure that is unusable."""
    return figure + _UNUSABLE * of.unusable


def _remarks(result: Result) -> Iterator[str]:
    yield (
        "ms: transformer blocks over one generation, median of alternating runs after a warm-up; "
        "iqr: distance of the quartiles; total: the token loop, with sampling, and, for VAR, the "
        "image decoder. x dense: speed-up over the dense row of the same kind; limit: dense FLOPs "
        "/ FLOPs of the blocks. peak: of the token loop, without weights. Random weights."
    )
    what = {row.variant.what for row in result.rows}
    if "skip" in what:
        yield "skip: steps of ratio 1 are left out; elsewhere they run on no tokens."
    if "peer" in what:
        yield "peer: the authors' argsort, interpolation and scatter."
    if any(row.variant.graph for row in result.rows):
        yield "graph: a replayed CUDA graph of the token loop, all of which counts as ms."
    yield from _doubts(result)
    yield from _savings(result)
    yield from result.savings
    for variant, steps in result.slower_steps.items():
        for step in steps:
            yield (
                f"step {step}: {variant} is no faster than dense: pruning does not pay here; "
                f"schedule.without({step}) leaves the step dense"
            )


def _doubts(result: Result) -> Iterator[str]:
    """Yields what is wrong with the figures, and what is missing."""
    times = {str(row.variant): row.transformer for row in result.rows}
    unusable = {name: time.doubt for name, time in times.items() if time.unusable}
    for name, doubt in unusable.items():
        yield f"{_UNUSABLE.strip()} unusable: {name}: {doubt}; measure again"
    unknown = {time.doubt for time in times.values() if time.doubt and not time.unusable}
    yield from sorted(unknown)
    if result.left_out:
        yield f"left out for lack of time: {', '.join(map(str, result.left_out))}; see --seconds"
    for variant, error in result.failed.items():
        yield f"failed: {variant}: {error}"


def _savings(result: Result) -> Iterator[str]:
    """Yields what skipping and pruning save, apart, where the schedule has both."""
    full = result.subject.schedule.full_steps
    for variant, (skipped, pruned) in result.saved.items() if full else ():
        yield (
            f"{variant} saves {1e3 * skipped:.1f} ms at the steps of ratio 1 "
            f"({', '.join(map(str, full))}) and {1e3 * pruned:.1f} ms by pruning tokens"
        )


def _step_table(result: Result) -> Table:
    """Returns the time in the blocks per step, in ms."""
    schedule = result.subject.schedule
    rows = [row for row in result.rows if row.steps]
    names = [str(row.variant).replace("-", "\n") for row in rows]
    table = new_table("step", "scale", "tokens", "kept", *names)
    for step, scale in enumerate(schedule.scales):
        times = [f"{1e3 * row.steps[step].median:.1f}" for row in rows]
        counts = (str(schedule.tokens(step)), span_text(schedule.kept_counts(step)))
        table.add_row(str(step), sides_text(scale), *counts, *times)
    return table


def _print_modules(measured: _Measured) -> None:
    schedule, modules = measured.result.subject.schedule, measured.modules
    names = late_modules(modules, schedule)
    table = new_table("step", "kept", "", *(name.replace("_", "\n") for name in names), "all")
    table.columns[2].justify = "left"
    for step in range(schedule.cache_step, schedule.steps):
        for variant, steps in modules.items():
            tokens = (schedule.tokens(step),)
            kept = span_text(tokens if variant == DENSE else schedule.kept_counts(step))
            times = [1e3 * steps[step][name] for name in names]
            cells = [f"{time:.2f}" for time in (*times, sum(times))]
            table.add_row(str(step), kept, str(variant), *cells)
    show(table)
    shares = [f"{overhead(modules, s):.1%} at step {s}" for s in schedule.pruned_steps]
    show(
        f"ms by module, summed over the blocks, from the cache step on. Both run eagerly, in "
        f"graphs that read the clock between modules. PTS: scores, selection and gathers; rest: "
        f"between the branches. PTS + CTR over the dense branches: {', '.join(shares)}."
    )


def _print_resolutions(rows: Sequence[AtResolution]) -> None:
    kinds = [f"{what}\n{kind.what}" for what in ("ms", "peak MiB", "GFLOP") for kind in KINDS]
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
        "line: e in cost ~ tokens^e, over the sizes with a pruned step that were measured in both "
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
    drawn: dict[str, Callable[..., None]] = {}
    if any(row.comparison for row in result.rows):
        drawn["rows"] = partial(figures.draw_rows, result)
    if any(row.variant.what == "pruned" for _, row in result.pairs()):
        drawn["steps"] = partial(figures.draw_steps, result)
    if measured.modules:
        schedule = result.subject.schedule
        drawn["modules"] = partial(figures.draw_modules, measured.modules, schedule)
    if measured.resolutions:
        drawn["resolutions"] = partial(figures.draw_resolutions, measured.resolutions)
    files = {name: folder / f"{name}.png" for name in drawn}
    for name, draw in drawn.items():
        draw(title, about, files[name])
    return list(files.values())
