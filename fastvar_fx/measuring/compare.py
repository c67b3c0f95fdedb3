"""Times of several runs, and two of them compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fastvar_fx.measuring.runs import Runs

_STEADY: Final = 0.2
"""The largest spread, interquartile range over median, of times that can be used."""
_FEWEST: Final = 3
"""Runs below which a spread is unknown."""


@dataclass(frozen=True)
class Spread:
    """Seconds that several runs of the same thing took.

    Attributes:
        runs: How many there were.
        median: The middle one.
        low: The shortest.
        high: The longest.
        iqr: The distance of the quartiles; None with fewer than 3 runs.
    """

    runs: int
    median: float
    low: float
    high: float
    iqr: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Returns the spread of the seconds of at least one run."""
        iqr = None
        if len(seconds) >= _FEWEST:
            lower, _, upper = quantiles(seconds, method="inclusive")
            iqr = upper - lower
        return cls(len(seconds), median(seconds), min(seconds), max(seconds), iqr)

    @property
    def relative(self) -> float | None:
        """The interquartile range over the median; None with fewer than 3 runs."""
        return self.iqr / self.median if self.iqr and self.median else self.iqr

    @property
    def unusable(self) -> bool:
        """Whether the runs differ by too much for the median to mean anything."""
        return self.relative is not None and self.relative > _STEADY

    @property
    def doubt(self) -> str | None:
        """Why the median is unusable or may be so; None if the runs agree."""
        if self.relative is None:
            return f"spread unknown: fewer than {_FEWEST} timed runs"
        if not self.unusable:
            return None
        return (
            f"interquartile range {self.relative:.0%} of the median, above {_STEADY:.0%}: other "
            f"work was running"
        )

    @property
    def milliseconds(self) -> str:
        """The median as text, with half the range of the runs if they differ."""
        middle, half = 1e3 * self.median, 1e3 * (self.high - self.low) / 2
        digits = 0 if middle >= 100 else 1
        return f"{middle:.{digits}f}" + (f" ±{half:.{digits}f}" if half else "")

    def as_dict(self) -> dict[str, float]:
        """Returns milliseconds as plain data."""
        values = {"median": self.median, "min": self.low, "max": self.high}
        return {name: round(1e3 * value, 3) for name, value in values.items()}


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned time of the same part of a generation.

    Attributes:
        dense: Dense, with all else the same.
        pruned: As the schedule has it.
        limit: The speed-up if time were proportional to the FLOPs of the blocks; None if unknown,
            or if no FLOPs are left.
    """

    dense: Spread
    pruned: Spread
    limit: float | None = None

    @classmethod
    def of_blocks(cls, dense: Runs, pruned: Runs, steps: Iterable[int] | None = None) -> Comparison:
        """Compares the blocks of two counted and timed models.

        Args:
            dense: Runs of the original model.
            pruned: Runs of the transformed model.
            steps: The steps to compare; None for all of them.
        """
        chosen = tuple(range(dense.schedule.steps) if steps is None else steps)
        flops, left = (sum(runs.flops[step] for step in chosen) for runs in (dense, pruned))
        return cls(dense.spread(chosen), pruned.spread(chosen), flops / left if left else None)

    @classmethod
    def of_runs(cls, dense: Runs, pruned: Runs) -> Comparison:
        """Compares whole runs. At the limit, all but the blocks takes as long as in dense runs."""
        blocks = cls.of_blocks(dense, pruned)
        whole = Spread.of(dense.seconds)
        at_limit = blocks.dense.median / blocks.limit if blocks.limit else 0.0
        limit = whole.median / (whole.median - blocks.dense.median + at_limit)
        return cls(whole, Spread.of(pruned.seconds), limit)

    @property
    def speedup(self) -> float:
        """Dense over pruned median."""
        return self.dense.median / self.pruned.median

    @property
    def limit_fraction(self) -> float | None:
        """Speed-up over limit; None without a limit."""
        return None if self.limit is None else self.speedup / self.limit

    @property
    def pays(self) -> bool:
        """Whether pruning makes it faster."""
        return self.speedup > 1

    @property
    def unusable(self) -> bool:
        """Whether one of the times is unusable, and so the speed-up."""
        return self.dense.unusable or self.pruned.unusable

    @property
    def doubt(self) -> str | None:
        """Why the speed-up is unusable or may be so; None if the runs of both agree."""
        times = {"dense": self.dense, "pruned": self.pruned}
        return "; ".join(f"{name}: {t.doubt}" for name, t in times.items() if t.doubt) or None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; times in milliseconds."""
        return {
            "ms_dense": self.dense.as_dict(),
            "ms_pruned": self.pruned.as_dict(),
            "speedup": self.speedup,
            "limit": self.limit,
            "pays": self.pays,
            "unusable": self.unusable,
            "reason": self.doubt,
        }
