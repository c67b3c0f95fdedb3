"""How time and memory grow with the resolution, dense and pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log, nan
from statistics import median
from typing import Any, Final

import numpy as np
import torch

from fastvar_fx.bench.presets import (
    PIXELS,
    dtype_on,
    free_bytes,
    needed_bytes,
    preset,
    subject_of,
)
from fastvar_fx.errors import ScheduleError
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import Runs, Subject, peak_bytes
from fastvar_fx.transform import transform

PATIENCE: Final = 30.0
"""Seconds that a generation may take by the growth so far; beyond it is left out."""
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
DENSE, PRUNED = KINDS = ("dense", "pruned")
"""How it is run."""


@dataclass(frozen=True)
class AtResolution:
    """One size of image.

    Attributes:
        pixels: Its side.
        schedule: The maps drawn for it, and the pruning ratios.
        costs: What it costs, by "dense" and "pruned"; what was left out is not there.
        note: Why something was left out; may be empty.
    """

    pixels: int
    schedule: Schedule
    costs: Mapping[str, Cost]
    note: str

    @property
    def tokens(self) -> int:
        """Tokens of the last map."""
        return self.schedule.tokens(self.schedule.steps - 1)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        costs = {kind: vars(cost) for kind, cost in self.costs.items()}
        return {"pixels": self.pixels, "tokens": self.tokens, **costs, "note": self.note}


def schedule_at(schedule: Schedule, pixels: int) -> Schedule:
    """Returns the schedule of an image of another size.

    Maps of the schedule that are smaller than the last one stay, and maps are added that grow by
    at most a half. The cache step stays. A larger map has the ratio that the schedule gives it; one
    that the schedule skips or has not keeps as many tokens per row as the last that it prunes, so
    that their number grows with the side and not with the area. Up to the map of the cache step,
    nothing is pruned.

    Raises:
        ScheduleError: If the size is no multiple of a token's, or below two tokens.

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
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[AtResolution, ...]:
    """Returns what images of several sizes cost, dense and pruned, both run eagerly.

    What does not fit into memory, or would take longer than `PATIENCE`, is left out.

    Args:
        name: A key of `PRESETS`.
        resolutions: Sides of the images in pixels.
        batch: Images per generation, at least 1.
        repeats: Timed runs of each, by turns, at least 1.
        progress: Called with a few words before each resolution.

    Raises:
        ModelError: If there is no such preset.
        ScheduleError: If a resolution is not made of whole tokens.
    """
    chosen, device = preset(name), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {pixels: schedule_at(chosen.schedule, pixels) for pixels in sorted(set(resolutions))}
    found: list[AtResolution] = []
    for pixels, schedule in sizes.items():
        progress(f"{name} at {pixels} x {pixels}")
        sized = replace(chosen.at(schedule), decode=None)
        needed, free = needed_bytes(sized, batch, dtype_on(device)), free_bytes(device)
        if needed > free:
            note = f"needs {needed / _GIB:.1f} GiB, of which {free / _GIB:.1f} GiB are free"
            found.append(AtResolution(pixels, schedule, {}, note))
            continue
        expected = {kind: _expected_seconds(found, kind, pixels) for kind in KINDS}
        too_long = {kind: seconds for kind, seconds in expected.items() if seconds > PATIENCE}
        note = ", ".join(f"{kind} would take {s:.0f} s" for kind, s in too_long.items())
        subject = subject_of(name, sized, batch, device)
        costs = _costs(subject, repeats, expected.keys() - too_long)
        found.append(AtResolution(pixels, schedule, costs, note))
    return tuple(found)


def _expected_seconds(found: Sequence[AtResolution], kind: str, pixels: int) -> float:
    """Returns what a generation takes if time grows with the square of the tokens."""
    known = [(one.pixels, one.costs[kind].ms) for one in found if kind in one.costs]
    before, ms = known[-1] if known else (pixels, 0.0)
    return 1e-3 * ms * (pixels / before) ** 4


def _costs(subject: Subject, repeats: int, kinds: Collection[str]) -> dict[str, Cost]:
    device, runs = subject.weight.device, {}
    if DENSE in kinds:
        runs[DENSE] = Runs(subject, subject.model)
    if PRUNED in kinds:
        fast = transform(subject.model, subject.schedule, on_full="cache")
        subject.generate(fast)  # traces, which is not to be counted
        runs[PRUNED] = Runs(subject, fast)
    peaks = {kind: peak_bytes(run.count, device) for kind, run in runs.items()}
    for _ in range(repeats):
        for run in runs.values():
            run.time()
    return {
        kind: Cost(
            1e3 * median(map(sum, run.step_seconds)), peaks[kind] / _MIB, sum(run.flops) / 1e9
        )
        for kind, run in runs.items()
    }


def growth(rows: Sequence[AtResolution], kind: str, quantity: str) -> float:
    """Returns the e of cost ~ tokens^e, by least squares of logarithms; NaN below two points.

    Args:
        rows: What was measured; those without a pruned step do not count.
        kind: One of `KINDS`.
        quantity: One of `QUANTITIES`.
    """
    points = [
        (row.tokens, getattr(row.costs[kind], quantity))
        for row in rows
        if row.schedule.pruned_steps and kind in row.costs
    ]
    if len(points) < 2:
        return nan
    tokens, costs = np.log(points).T
    return float(np.polyfit(tokens, costs, 1)[0])
