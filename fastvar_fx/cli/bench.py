"""`fastvar-fx bench`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from fastvar_fx import bench
from fastvar_fx.cli.options import Json
from fastvar_fx.cli.terminal import (
    environment,
    environment_line,
    headline,
    new_table,
    show,
    show_progress,
    sides_text,
)

BenchPreset = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(bench.PRESETS)}.")]
BenchBatch = Annotated[int, typer.Option("--batch", min=1, help="Images at once.")]
BenchRepeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each row.")]
Compiled = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Whether to measure compiled rows too.")
]
Steps = Annotated[bool, typer.Option("--steps", help="Also print the time of every step.")]


def run_bench(
    preset: BenchPreset = "var-tiny",
    batch: BenchBatch = 1,
    repeats: BenchRepeats = 5,
    compiled: Compiled = True,
    steps: Steps = False,
    as_json: Json = False,
) -> None:
    """Measure a model dense and pruned, eager and compiled, by turns in one process."""
    chosen = bench.preset(preset)
    with show_progress(bench.phases(chosen, repeats, compiled=compiled)) as progress:
        result = bench.measure(
            preset, batch=batch, repeats=repeats, compiled=compiled, progress=progress
        )
    if as_json:
        print(json.dumps(_bench_dict(result, with_steps=steps)))
    else:
        _print_bench(result, with_steps=steps)


def _bench_dict(result: bench.Result, *, with_steps: bool) -> dict[str, Any]:
    data = {
        **environment(result.subject),
        "preset": result.subject.name,
        "batch": result.batch,
        "repeats": result.repeats,
        "schedule": json.loads(result.subject.schedule.to_json()),
        "rows": [row.as_dict() for row in result.rows],
        "total_ms": {row.name: 1e3 * row.total.median for row in result.rows},
        "speedup_over_dense_compiled": {row.name: row.compiled_speedup for row in result.rows},
    }
    if with_steps:
        data["step_ms"] = {row.name: [1e3 * s.median for s in row.steps] for row in result.rows}
    return data


def _print_bench(result: bench.Result, *, with_steps: bool) -> None:
    show(headline(result.subject))
    show(environment_line(result.subject, result.batch))
    times = ("ms", "iqr", "total\nms", "x dense\neager", "x dense\ncompiled")
    table = new_table("", *times, "limit", "of\nlimit", "peak\nMiB", "KV\nMiB", left=1)
    for row in result.rows:
        table.add_row(row.name, *_bench_cells(row))
    show(table)
    if with_steps:
        show(_bench_steps(result))
    show(
        f"ms: transformer blocks over one generation, median of {result.repeats} alternating runs "
        f"after warm-up; iqr: distance of the quartiles; total: the whole run, with sampling and, "
        f"for VAR, the image decoder. limit: dense FLOPs / FLOPs of the blocks; of limit: against "
        f"the dense row of the same kind, eager or compiled. peak: of the token loop, without "
        f"weights. skip: steps of ratio 1 are left out, else they run on no tokens. peer: the "
        f"authors' argsort, interpolation and scatter. Random weights."
    )


def _bench_cells(row: bench.Row) -> tuple[str, ...]:
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


def _bench_steps(result: bench.Result) -> Table:
    """Returns the time in the blocks per step, in ms."""
    schedule = result.subject.schedule
    names = [row.name.replace("-", "\n") for row in result.rows]
    table = new_table("step", "scale", "tokens", "kept", *names)
    for step, scale in enumerate(schedule.scales):
        times = [f"{1e3 * row.steps[step].median:.1f}" for row in result.rows]
        counts = (str(schedule.tokens(step)), str(schedule.kept(step)))
        table.add_row(str(step), sides_text(scale), *counts, *times)
    return table
