"""How time and memory grow with the resolution, dense and pruned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log, nan
from typing import Any, Final

import numpy as np

from fastvar_fx.errors import ScheduleError
from fastvar_fx.measuring.clock import peak_bytes
from fastvar_fx.measuring.presets import (
    PIXELS,
    default_device,
    dtype_on,
    free_bytes,
    needed_bytes,
    preset,
    subject_of,
)
from fastvar_fx.measuring.runs import Budget, Progress, alternate, no_progress
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.measuring.variants import DENSE, PRUNED, Variant
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import transform

PATIENCE: Final = 30.0
"""Seconds that a generation may take, extrapolated; longer ones are left out."""
_GROWTH: Final = 1.5
"""The most that a side grows from one map to the next where a schedule is continued."""
_MIB: Final = 2**20
_GIB: Final = 2**30


@dataclass(frozen=True)
class Cost:
    """What one generation takes, without image decoder.

    Attributes:
        ms: Time in the transformer blocks, in milliseconds.
        peak_mib: The most memory allocated, without the weights, in MiB.
        gflops: FLOPs of the blocks' matrix products and attention, in 1e9.
    """

    ms: float
    peak_mib: float
    gflops: float


QUANTITIES: Final = ("ms", "peak_mib", "gflops")
"""What grows."""
KINDS: Final = (DENSE, PRUNED)
"""What is run."""


@dataclass(frozen=True)
class AtResolution:
    """One size of image.

    Attributes:
        pixels: Its side.
        schedule: The maps drawn for it, and the pruning ratios.
        costs: The cost of each of `KINDS` that was not left out.
        note: Why something was left out; may be empty.
    """

    pixels: int
    schedule: Schedule
    costs: Mapping[Variant, Cost]
    note: str

    @property
    def tokens(self) -> int:
        """Tokens of the last map."""
        return self.schedule.tokens(self.schedule.steps - 1)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        costs = {str(kind): vars(cost) for kind, cost in self.costs.items()}
        return {"pixels": self.pixels, "tokens": self.tokens, **costs, "note": self.note}


def schedule_at(schedule: Schedule, pixels: int) -> Schedule:
    """Returns the schedule of an image of another size.

    Maps smaller than the new last map stay; maps are added, each at most 1.5 times as wide as the
    one before. The cache step stays, and nothing is pruned up to it. A later map has the ratio of
    the schedule. Where the schedule has no such map, or skips it, the map keeps as many tokens per
    row as the last map that the schedule prunes: the number of kept tokens then grows with the
    side, not with the area.

    Raises:
        ScheduleError: If the size is not a multiple of a token's side, or below two tokens.

    Example:
        >>> made = schedule_at(Schedule((1, 2, 4, 8), (0.75,)), 192)
        >>> made.scales[-2:], made.kept(3), made.kept(4)
        (((8, 8), (12, 12)), 16, 24)
    """
    side, rest = divmod(pixels, PIXELS)
    if rest or side < 2:
        raise ScheduleError(
            f"a resolution is a multiple of {PIXELS} pixels, the side of a token, and at least "
            f"{2 * PIXELS}; found {pixels}"
        )
    sides = [h for h, _ in schedule.scales if h < side]
    more = ceil(log(side / sides[-1]) / log(_GROWTH))
    first = sides[-1]
    sides += [round(first * (side / first) ** (i / more)) for i in range(1, more + 1)]
    ratios = {h: schedule.ratio(step) for step, (h, _) in enumerate(schedule.scales)}
    given = {h: ratio for h, ratio in ratios.items() if 0 < ratio < 1}
    cached = schedule.scales[schedule.cache_step][0]
    widest = max(given)
    per_row = widest * (1 - given[widest])
    late = [n for n in sides if n > cached]
    return Schedule(sides, [given.get(n, 1 - per_row / n) for n in late], layers=schedule.layers)


def measure_resolutions(
    name: str,
    resolutions: Sequence[int],
    *,
    batch: int = 1,
    repeats: int = 1,
    budget: Budget | None = None,
    progress: Progress = no_progress,
) -> tuple[AtResolution, ...]:
    """Returns what images of several sizes cost, dense and pruned, both run eagerly.

    What does not fit into memory, or would take too long, is left out.

    Args:
        name: A key of `PRESETS`.
        resolutions: Sides of the images in pixels.
        batch: Images per generation, at least 1.
        repeats: Timed runs of each, alternating, at least 1.
        budget: Time that all of it may take; None for no bound.
        progress: Called with a few words before each resolution.

    Raises:
        ModelError: If there is no such preset.
        ScheduleError: If a resolution is not made of whole tokens.
    """
    chosen, device = preset(name), default_device()
    budget = budget or Budget()
    sizes = {pixels: schedule_at(chosen.schedule, pixels) for pixels in sorted(set(resolutions))}
    found: list[AtResolution] = []
    for pixels, schedule in sizes.items():
        progress(f"{name} at {pixels} x {pixels}")
        sized = chosen.at(schedule)
        needed, free = needed_bytes(sized, batch, dtype_on(device)), free_bytes(device)
        if needed > free:
            note = f"needs {needed / _GIB:.1f} GiB, of which {free / _GIB:.1f} GiB are free"
            found.append(AtResolution(pixels, schedule, {}, note))
            continue
        expected = {kind: _expected_seconds(found, kind, pixels) for kind in KINDS}
        too_long = {
            kind: seconds
            for kind, seconds in expected.items()
            if seconds > PATIENCE or not budget.allows(seconds)
        }
        note = ", ".join(f"{kind} would take {s:.0f} s" for kind, s in too_long.items())
        subject = subject_of(name, sized, batch, device)
        costs = _costs(subject, repeats, expected.keys() - too_long)
        found.append(AtResolution(pixels, schedule, costs, note))
    return tuple(found)


def _expected_seconds(found: Sequence[AtResolution], kind: Variant, pixels: int) -> float:
    """Returns how long a generation takes if time grows with the square of the tokens."""
    known = [(one.pixels, one.costs[kind].ms) for one in found if kind in one.costs]
    before, ms = known[-1] if known else (pixels, 0.0)
    return 1e-3 * ms * (pixels / before) ** 4


def _costs(subject: Subject, repeats: int, kinds: Collection[Variant]) -> dict[Variant, Cost]:
    device, runs = subject.weight.device, {}
    if DENSE in kinds:
        runs[DENSE] = subject.runs(subject.model)
    if PRUNED in kinds:
        fast = transform(subject.model, subject.schedule, on_full="cache", conditional="first")
        runs[PRUNED] = subject.runs(fast)
        runs[PRUNED].generate()  # traces, which is not to be counted
    peaks = {kind: peak_bytes(run.count, device) / _MIB for kind, run in runs.items()}
    alternate(runs, repeats)
    return {
        kind: Cost(1e3 * run.loop.median, peaks[kind], sum(run.flops) / 1e9)
        for kind, run in runs.items()
    }


def growth(rows: Sequence[AtResolution], kind: Variant, quantity: str) -> float:
    """Returns e in cost ~ tokens^e, by least squares of logarithms; NaN below two points.

    Args:
        rows: What was measured; sizes without a pruned step, or not of both kinds, do not count.
        kind: One of `KINDS`.
        quantity: One of `QUANTITIES`.
    """
    points = [
        (row.tokens, getattr(row.costs[kind], quantity))
        for row in rows
        if row.schedule.pruned_steps and len(row.costs) == len(KINDS)
    ]
    if len(points) < 2:
        return nan
    tokens, costs = np.log(points).T
    return float(np.polyfit(tokens, costs, 1)[0])
