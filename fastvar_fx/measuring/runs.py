"""Runs of a model that are counted and timed step by step, alternating with others."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Any, Protocol

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.measuring.clock import Clock, Pass, per_step, read_around
from fastvar_fx.measuring.compare import Spread
from fastvar_fx.schedule import Schedule
from passes.analyse.rules.attention import FLOP_FORMULAS

Progress = Callable[[str], None]
"""Called with a few words before each part of the work."""


def no_progress(_: str) -> None:
    """Reports nothing."""


class Budget:
    """Wall-clock time that measuring may take, counted from when this is made.

    Attributes:
        seconds: The whole of it; infinite by default.
    """

    def __init__(self, seconds: float = inf) -> None:
        self.seconds = seconds
        self._began = perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return perf_counter() - self._began

    def allows(self, seconds: float) -> bool:
        """Whether this much time is left."""
        return self.spent + seconds <= self.seconds


class Timed(Protocol):
    """What can be timed again and again.

    Attributes:
        seconds: Seconds of each timed run so far.
    """

    seconds: list[float]

    def time(self) -> object:
        """Times one run, and adds its seconds."""


def alternate(
    timed: Mapping[Any, Timed],
    repeats: int,
    *,
    budget: Budget | None = None,
    progress: Progress = no_progress,
) -> None:
    """Times each of several things in turn until all have `repeats` runs.

    Alternating runs meet the same conditions. Runs that were made before count.

    Args:
        timed: What to time, by name; if time is short, the last ones get fewer runs.
        repeats: Timed runs of each, at least 1.
        budget: Time that all of it may take: a run beyond the first of each begins only if there is
            time for the longest one so far. None for no bound.
        progress: Called before each run.
    """
    for turn in range(repeats):
        for name, each in timed.items():
            done = len(each.seconds)
            if done > turn or (done and budget and not budget.allows(max(each.seconds))):
                continue
            progress(f"{name}, run {done + 1} of {repeats}")
            each.time()


@dataclass
class Runs:
    """Runs of one model that are counted and timed, step by step.

    Attributes:
        generate: Runs one generation.
        model: The model that it runs, original or transformed.
        blocks: Module paths of its transformer blocks.
        schedule: The steps.
        drawn: How many of them it draws; None for all.
        flops: FLOPs of the blocks' matrix products and attention per step.
        step_seconds: Seconds in the blocks per step, for each timed run.
        seconds: Seconds of each timed run as a whole.
        result: What the latest run returned.
    """

    generate: Callable[[], Any]
    model: nn.Module
    blocks: Sequence[str]
    schedule: Schedule
    drawn: int | None = None
    flops: list[int] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    result: Any = None

    def count(self) -> None:
        """Runs once and counts FLOPs per step."""
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            passes = self._run(counter.get_total_flops)
        self.flops = [int(value) for value in self._by_step(passes, operator.sub)]

    def time(self) -> None:
        """Runs once and times the run and its steps."""
        clock = Clock(next(module_at(self.model, self.blocks[0]).parameters()).device)
        started = clock.read()
        passes = self._run(clock.read)
        self.seconds.append(clock.seconds(clock.read(), started))
        self.step_seconds.append(self._by_step(passes, clock.seconds))

    def _run(self, read: Callable[[], Any]) -> list[Pass]:
        with read_around(self.model, self.blocks, read) as passes:
            self.result = self.generate()
        return passes

    def _by_step(
        self, passes: Sequence[Pass], difference: Callable[[Any, Any], float]
    ) -> list[float]:
        amounts = [(tokens, difference(ended, begun)) for tokens, begun, ended in passes]
        return per_step(amounts, self.schedule, self.drawn)

    @property
    def loop(self) -> Spread:
        """The blocks' time over all steps."""
        return self.spread(range(self.schedule.steps))

    @property
    def by_step(self) -> tuple[Spread, ...]:
        """The blocks' time at each step."""
        return tuple(self.spread([step]) for step in range(self.schedule.steps))

    def spread(self, steps: Iterable[int]) -> Spread:
        """Returns the blocks' time over some steps."""
        chosen = tuple(steps)
        return Spread.of([sum(run[s] for s in chosen) for run in self.step_seconds])
