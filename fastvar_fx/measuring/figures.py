"""Pictures of what the benchmark measured; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastvar_fx.measuring.modules import MODULES, ModuleTimes, late_modules
from fastvar_fx.measuring.resolutions import KINDS, AtResolution, growth
from fastvar_fx.measuring.rows import Result
from fastvar_fx.measuring.variants import PRUNED, Variant, What
from fastvar_fx.schedule import Schedule, span_text

_COLORS: Final[Mapping[What, str]] = {"dense": "#c44e52", "pruned": "#4c72b0"}
_MODULE_COLORS: Final = dict(
    zip(MODULES, ("#4c72b0", "#8da0cb", "#55a868", "#c44e52", "#e5a23c", "#bbbbbb"), strict=True)
)
_BAR: Final = 0.4
"""The width of one of two bars that stand side by side."""
_SIDES: Final[Mapping[What, float]] = {"dense": -_BAR, "pruned": 0.0}
"""Where they begin."""


def draw_rows(result: Result, title: str, caption: str, path: Path) -> None:
    """Writes a PNG with the speed-up of every pruned row, and the limit that the FLOPs set.

    Args:
        result: What `measure_rows` returned.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    pairs = [(row, row.comparison) for row in reversed(result.rows) if row.variant.what != "dense"]
    compared = [(row, found) for row, found in pairs if found is not None]
    figure, ax = _figure(title, caption, height=1.8 + 0.5 * len(compared))
    places = range(len(compared))
    speedups = [found.speedup for _, found in compared]
    ax.barh(places, speedups, 0.6, color=_COLORS["pruned"], label="measured")
    limits = [row.limit for row, _ in compared]
    ax.scatter(limits, places, 500, color="k", marker="|", label="limit: dense FLOPs / its FLOPs")
    for place, (row, found) in zip(places, compared, strict=True):
        share = found.speedup / row.limit
        text = f"   {found.speedup:.2f}x, {share:.0%} of the limit{', unusable' * found.unusable}"
        ax.text(max(found.speedup, row.limit), place, text, va="center")
    ax.axvline(1, color=_COLORS["dense"], lw=1)
    ax.set_yticks(places, [str(row.variant) for row, _ in compared])
    ax.set_xlim(0, 1.45 * max([1.0, *limits, *speedups]))
    ax.set_xlabel("transformer time: speed-up over the dense row of the same kind")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, markerscale=0.5, frameon=False)
    figure.savefig(path)


def draw_steps(result: Result, title: str, caption: str, path: Path) -> None:
    """Writes a PNG with the time in the blocks at each step, dense and pruned.

    Args:
        result: What `measure_rows` returned.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    rows = {row.variant: row for row in result.rows}
    kinds = {"eager": False, "compiled": True}
    shown = {kind: c for kind, c in kinds.items() if all(Variant(w, c) in rows for w in _SIDES)}
    figure, axes = _figures(title, caption, len(shown))
    steps = range(result.subject.schedule.steps)
    for ax, (kind, compiled) in zip(axes, shown.items(), strict=True):
        for what, left in _SIDES.items():
            times = [1e3 * spread.median for spread in rows[Variant(what, compiled)].steps]
            places = [step + left for step in steps]
            ax.bar(places, times, _BAR, align="edge", color=_COLORS[what], label=what)
        ax.set(title=kind, ylabel="transformer time, ms")
        _name_steps(ax, result.subject.schedule, steps)
        ax.legend(loc="upper left")
    figure.savefig(path)


def draw_modules(
    modules: Mapping[Variant, ModuleTimes], schedule: Schedule, title: str, caption: str, path: Path
) -> None:
    """Writes a PNG with the time by module from the cache step on: dense left, pruned right.

    Args:
        modules: What `measure_modules` returned.
        schedule: The steps.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    figure, ax = _figure(title, caption, height=5.2)
    steps = range(schedule.cache_step, schedule.steps)
    for (variant, times), left in zip(modules.items(), (-_BAR, 0.02), strict=True):
        heights = [0.0] * len(steps)
        for module in late_modules(modules, schedule):
            parts = [1e3 * times[step][module] for step in steps]
            label = module.replace("_", "-") if variant == PRUNED else None
            places = [step + left for step in steps]
            color = _MODULE_COLORS[module]
            ax.bar(places, parts, _BAR, heights, align="edge", color=color, label=label)
            heights = [a + b for a, b in zip(heights, parts, strict=True)]
        for step, height in zip(steps, heights, strict=True):
            text = f"{variant.what}\n{height:.1f} ms"
            ax.text(step + left + _BAR / 2, height, text, ha="center", va="bottom")
    ax.set_ylabel("transformer time, eager, ms")
    ax.margins(y=0.15)
    _name_steps(ax, schedule, steps)
    ax.legend(loc="upper left")
    figure.savefig(path)


def draw_resolutions(rows: Sequence[AtResolution], title: str, caption: str, path: Path) -> None:
    """Writes a PNG with time and memory against the size of the image, dense and pruned.

    Args:
        rows: What `measure_resolutions` returned.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    continued = "larger images: maps that keep as many tokens per row as the last pruned one"
    figure, axes = _figures(f"{title}\n{continued}", caption, 2)
    labels = {"ms": "transformer time, ms", "peak_mib": "peak memory without weights, MiB"}
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        for kind, marker in zip(KINDS, "os", strict=True):
            points = [
                (row.tokens, getattr(row.costs[kind], quantity))
                for row in rows
                if kind in row.costs
            ]
            slope = growth(rows, kind, quantity)
            name = kind.what if isnan(slope) else f"{kind.what}: grows as tokens$^{{{slope:.2f}}}$"
            ax.plot(*zip(*points, strict=True), marker=marker, color=_COLORS[kind.what], label=name)
        ax.set(xscale="log", yscale="log", ylabel=label, xlabel="side of the image, pixels")
        measured = [row for row in rows if row.costs]
        ax.set_xticks([r.tokens for r in measured], [f"{r.pixels}" for r in measured])
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right")
    figure.savefig(path)


def _name_steps(ax: Axes, schedule: Schedule, steps: Sequence[int]) -> None:
    """Labels each step with its token map and its kept tokens."""
    maps = ["x".join(map(str, schedule.scales[step])) for step in steps]
    kept = [span_text(schedule.kept_counts(step)) for step in steps]
    names = [f"{map_}\n{count}" for map_, count in zip(maps, kept, strict=True)]
    ax.set_xticks(steps, names, fontsize=9)
    ax.set_xlabel("token map of the step, and number of kept tokens")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _figure(title: str, caption: str, height: float) -> tuple[Figure, Axes]:
    figure, (ax,) = _figures(title, caption, 1, height)
    return figure, ax


def _figures(title: str, caption: str, count: int, height: float = 4.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(max(6 * count, 9), height), dpi=110, layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize=8)
    return figure, figure.subplots(1, count, squeeze=False)[0]
