"""`fastvar-fx presets`."""

from __future__ import annotations

import json
from typing import Any

from fastvar_fx.cli.options import Json
from fastvar_fx.cli.terminal import new_table, show, sides_text
from fastvar_fx.schedule import Schedule, presets


def run_presets(as_json: Json = False) -> None:
    """List the named schedules."""
    if as_json:
        print(json.dumps({name: _as_dict(schedule) for name, schedule in presets().items()}))
        return
    names = (
        "preset",
        "scales",
        "ratios",
        "cache\nstep",
        "layers",
        "tokens",
        "late",
        "saved",
        "skipped",
    )
    table = new_table(*names, left=2)
    for name, schedule in presets().items():
        table.add_row(name, *_preset_cells(schedule))
    show(table)
    show(
        "Steps and layers count from 0. tokens: of one image, all steps. late: share of them in "
        "pruned steps. saved: share that the branches of the pruning layers do not compute. "
        "skipped: share of the steps that the loop leaves out."
    )


def _preset_cells(schedule: Schedule) -> tuple[str, ...]:
    data = _as_dict(schedule)
    square = all(len(set(scale)) == 1 for scale in schedule.scales)
    maps = [str(scale[0]) if square else sides_text(scale) for scale in schedule.scales]
    layers = schedule.layers
    return (
        " ".join(maps),
        " ".join(f"{ratio:g}" for ratio in schedule.ratios),
        str(schedule.cache_step),
        "all" if layers is None else f"{layers[0]}..{layers[-1]}",
        str(data["tokens"]),
        f"{data['late_share']:.0%}",
        f"{data['saved_share']:.0%}",
        f"{data['skipped_share']:.0%}",
    )


def _as_dict(schedule: Schedule) -> dict[str, Any]:
    """Returns a schedule with its token counts, as plain data."""
    pruned = [step for step in schedule.pruned_steps if step not in schedule.full_steps]
    late, kept = (sum(map(count, pruned)) for count in (schedule.tokens, schedule.kept))
    skipped = sum(map(schedule.tokens, schedule.full_steps))
    tokens = sum(map(schedule.tokens, range(schedule.steps)))
    data: dict[str, Any] = json.loads(schedule.to_json())
    return data | {
        "tokens": tokens,
        "late_share": late / tokens,
        "saved_share": (late - kept) / tokens,
        "skipped_share": skipped / tokens,
    }
