"""A picture of the ratios of a schedule; it needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from fastvar_fx.schedule import ByKind, Schedule
from passes.analyse.branches import KINDS, Kind

_CELL: Final = 0.34
"""Inches of a branch."""
_MARGIN: Final = 2.4
"""Inches beside and around the branches of a step."""


def draw_plan(schedule: Schedule, title: str, path: Path) -> None:
    """Writes a PNG with the ratio of each branch at each step that prunes.

    Args:
        schedule: The schedule.
        title: Line above.
        path: File to write.
    """
    steps = [step for step in schedule.pruned_steps if step not in schedule.full_steps]
    layers = range(schedule.depth or 1)
    kinds = _kinds(schedule)
    size = (_MARGIN + _CELL * len(layers), (_MARGIN / 2 + _CELL * len(kinds)) * max(len(steps), 1))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    for ax, step in zip(figure.subplots(len(steps), squeeze=False).flat, steps, strict=True):
        ratios = [[schedule.ratio(step, layer, kind) for layer in layers] for kind in kinds]
        shown = ax.imshow(ratios, cmap="viridis", vmin=0, vmax=1, aspect="equal")
        for row, of_kind in enumerate(ratios):
            for layer, ratio in enumerate(of_kind):
                color = "black" if ratio > 0.6 else "white"
                ax.text(layer, row, f"{ratio:.2g}", ha="center", va="center", size=7, color=color)
        ax.set_yticks(range(len(kinds)), [kind.replace("_", "-") for kind in kinds])
        ax.set_xticks(layers, [*map(str, layers)] if schedule.depth else ["all"])
        map_ = " x ".join(map(str, schedule.scales[step]))
        ax.set_title(f"step {step}: {map_}", size=10)
        ax.set_xlabel("layer")
    figure.colorbar(shown, ax=figure.axes, label="pruning ratio")
    figure.savefig(path, dpi=120)


def _kinds(schedule: Schedule) -> list[Kind]:
    """Returns the kinds that prune somewhere; all where no ratio is of one kind."""
    entries = [
        e for entry in schedule.ratios for e in (entry if isinstance(entry, tuple) else (entry,))
    ]
    apart = [entry for entry in entries if isinstance(entry, ByKind)]
    return [kind for kind in KINDS if not apart or any(getattr(entry, kind) for entry in apart)]
