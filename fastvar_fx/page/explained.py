"""A page on what a transformed model does and why, made of its report."""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastvar_fx.engine.report import Report, Row
from fastvar_fx.engine.report_text import (
    block_names,
    branch_counts,
    flops_text,
    grouped,
    remarks,
    steps_text,
)
from fastvar_fx.measuring.compare import Comparison
from fastvar_fx.page.data import Bar, BarGroup, Chart, Line, Page, Tile

LIMIT = "The mark is where the time would be in proportion to FLOPs."
"""What a chart of times says on its marks."""


def of_report(report: Report, title: str, subtitle: Sequence[str]) -> Page:
    """Returns a page on a report, without pictures."""
    return Page(
        title=title,
        subtitle=tuple(subtitle),
        lines=lines_of(report),
        remarks=tuple(remarks(report)),
        tiles=tuple(_tiles(report)),
        charts=tuple(chart for chart in _charts(report) if chart.groups),
        doubt=doubt_of(report.step_times.values()),
    )


def lines_of(report: Report) -> tuple[Line, ...]:
    """Returns the rows of a report; blocks that do the same share a line."""
    return tuple(_line(group) for group in grouped(report.rows))


def _line(group: Sequence[Row]) -> Line:
    row = group[0]
    prunes, changes = row.kept < row.tokens, row.flops != row.pruned_flops
    flops = flops_text(row.flops)
    return Line(
        step=row.step,
        blocks=block_names(group),
        branch=row.branch,
        kind=row.kind,
        kept=f"{row.kept} of {row.tokens}" if prunes else f"all {row.tokens}",
        flops=f"{flops}\u00a0→ {flops_text(row.pruned_flops)}" if changes else flops,
        program="" if row.program is None else str(row.program),
        refusal=row.refusal,
        source=_source(row.refusal.where) if row.refusal is not None else "",
    )


def _source(where: str) -> str:
    """Returns the line of code at `file:line`; an empty string if it cannot be read."""
    file, _, number = where.rpartition(":")
    return linecache.getline(file, int(number)).strip() if number.isdecimal() else ""


def _tiles(report: Report) -> Iterable[Tile]:
    pruning = report.pruning
    if pruning.pruned_flops:
        limit = f"{pruning.flops / pruning.pruned_flops:.2f}x"
        change = f"{flops_text(pruning.flops)} → {flops_text(pruning.pruned_flops)} FLOPs"
        yield Tile("FLOP limit, pruned steps", limit, change)
    guidance = report.guidance
    if guidance.unguided_flops:
        limit = f"{guidance.flops / guidance.unguided_flops:.2f}x"
        yield Tile("FLOP limit, guidance off", limit, steps_text(guidance.steps))
    steps = pruning.steps if branch_counts(report)[0] else ()
    yield kept_tile(pruning.tokens, pruning.dropped, steps)
    yield branch_tile(report)
    if report.outside_share is not None:
        share = f"{report.outside_share:.1%}"
        yield Tile("outside the blocks", share, "of the FLOPs of a dense generation")


def kept_tile(tokens: int, dropped: int, steps: Sequence[int]) -> Tile:
    """Returns the share of tokens that are kept at the pruned steps."""
    if not steps:
        return Tile("tokens kept", "all", "no branch prunes")
    note = f"{tokens - dropped} of {tokens}, at step{'s' * (len(steps) > 1)} "
    return Tile("tokens kept", f"{1 - dropped / tokens:.0%}", note + ", ".join(map(str, steps)))


def branch_tile(report: Report) -> Tile:
    """Returns how many branches prune."""
    pruned, branches = branch_counts(report)
    refused = len(report.refusals)
    note = f"{refused} refused: see the table" if refused else "none was refused"
    return Tile("branches that prune", f"{pruned} of {branches}", note)


def _charts(report: Report) -> Iterable[Chart]:
    steps = sorted({row.step for row in report.rows})
    yield flop_chart({f"step {s}": (_tokens(report, s), *report.flops(s)) for s in steps})
    times = {
        f"step {step}": (_tokens(report, step), replace(times, limit=_limit(report, step)))
        for step, times in report.step_times.items()
    }
    yield time_chart("Time in the blocks", times, LIMIT)


def _limit(report: Report, step: int) -> float | None:
    dense, pruned = report.flops(step)
    return dense / pruned if pruned else None


def _tokens(report: Report, step: int) -> str:
    rows = [row for row in report.rows if row.step == step]
    return tokens_text(min(row.kept for row in rows), max(row.tokens for row in rows))


def tokens_text(kept: int, tokens: int) -> str:
    """Returns how many tokens of a step are kept."""
    if kept < tokens:
        return f"{kept} of {tokens} tokens"
    return f"all {tokens} tokens" if tokens > 1 else "1 token"


def doubt_of(times: Iterable[Comparison]) -> str:
    """Returns why some times are unusable or may be so, in a sentence; else an empty string."""
    doubtful = sorted((each for each in times if each.doubt), key=lambda each: not each.unusable)
    if not doubtful:
        return ""
    are = "are" if doubtful[0].unusable else "may be"
    return f"The times {are} unusable: {doubtful[0].doubt}."


def flop_chart(steps: Mapping[str, tuple[str, int, int]]) -> Chart:
    """Returns the FLOPs of steps, given as (note, dense, pruned) by their labels."""
    longest = max([dense for _, dense, _ in steps.values()], default=0) or 1
    return Chart(
        title="FLOPs in the blocks",
        note="Matrix products and attention, of the whole batch.",
        groups=tuple(
            BarGroup(
                label=label,
                note=note,
                result=f"{dense / pruned:.2f}x" if 0 < pruned < dense else "",
                bars=tuple(
                    Bar(name=name, value=f"{flops_text(flops)} FLOPs", length=flops / longest)
                    for name, flops in (("dense", dense), ("pruned", pruned))
                ),
            )
            for label, (note, dense, pruned) in steps.items()
        ),
    )


def time_chart(title: str, parts: Mapping[str, tuple[str, Comparison]], note: str) -> Chart:
    """Returns the times of parts of a generation, given as (note, times) by their labels."""
    every = [time.median for _, c in parts.values() for time in (c.dense, c.pruned)]
    longest = max(every, default=0.0) or 1.0
    return Chart(
        title=title,
        note=note,
        groups=tuple(_time_group(label, *part, longest) for label, part in parts.items()),
    )


def _time_group(label: str, note: str, times: Comparison, longest: float) -> BarGroup:
    limit = None if times.limit is None else times.dense.median / times.limit / longest
    at_most = "" if times.limit is None else f", limit {times.limit:.2f}x"
    return BarGroup(
        label=label,
        note=note,
        result=f"{times.speedup:.2f}x{at_most}",
        bars=(
            Bar(
                name="dense",
                value=f"{times.dense.milliseconds} ms",
                length=times.dense.median / longest,
            ),
            Bar(
                name="pruned",
                value=f"{times.pruned.milliseconds} ms",
                length=times.pruned.median / longest,
                limit=limit,
            ),
        ),
    )
