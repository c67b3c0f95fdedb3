"""Runs of a model that are counted and timed step by step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import inf
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fastvar_fx.engine.find_blocks import find_blocks, module_at
from fastvar_fx.errors import RunError
from fastvar_fx.schedule import Schedule
from passes.analyse.rules.attention import FLOP_FORMULAS


@dataclass(frozen=True)
class Subject:
    """A model, the schedule it is pruned by and how to run it.

    Attributes:
        name: What to call it.
        model: In eval mode.
        schedule: The scales its loop draws and the pruning ratios.
        run: Runs one generation of the model; the demo needs images (B, 3, H, W) in [0, 1] back.
        blocks: Module path of the transformer blocks; None to find them.
        seed: Seed of torch's global generators for each generation.
        note: What a reader of the pictures has to know; may be empty.
    """

    name: str
    model: nn.Module
    schedule: Schedule
    run: Callable[[Any], Any]
    blocks: str | None = None
    seed: int = 0
    note: str = ""

    @property
    def weight(self) -> Tensor:
        """A parameter of the blocks, which has the model's device and dtype."""
        block = next(iter(find_blocks(self.model, self.blocks).values()))
        return next(block.parameters())

    def generate(self, model: nn.Module) -> Any:
        """Runs one generation from the seed; torch's global generators stay as they were."""
        device = self.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.seed)
            return self.run(model)

    def runs(self, model: nn.Module, drawn: int | None = None) -> Runs:
        """Returns runs of the model or of a transform of it, none made yet.

        Args:
            model: The model to run.
            drawn: How many steps of the schedule it draws; None for all.
        """
        blocks = tuple(find_blocks(self.model, self.blocks))
        return Runs(partial(self.generate, model), model, blocks, self.schedule, drawn)


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
        limit: The speed-up if time followed the FLOPs of the blocks; None if unknown, or if no
            FLOPs are left.
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


# --- measuring --------------------------------------------------------------------------------

Progress = Callable[[str], None]
"""Called with a few words before each part of the work."""


def no_progress(_: str) -> None:
    """Reports nothing."""


class Budget:
    """Wall-clock time that measuring may take, counted from when this is made.

    Attributes:
        seconds: How much there is; infinite by default.
    """

    def __init__(self, seconds: float = inf) -> None:
        self.seconds = seconds
        self._began = perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return perf_counter() - self._began

    def allows(self, seconds: float) -> bool:
        """Whether there is time left for something that takes so long."""
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
        timed: What to time, by what to call it; if time is short, the last ones get fewer runs.
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


class Clock:
    """Reads the time of a device. In the middle of a run, it does not make the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def read(self) -> Any:
        """Returns a reading: the host's time for a CPU, else a mark in the device's own queue."""
        if self.device.type == "cpu":
            return perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def seconds(self, ended: Any, begun: Any) -> float:
        """Returns the seconds between two readings, once the device has come to the later one."""
        if self.device.type == "cpu":
            return ended - begun  # type: ignore[no-any-return]
        ended.synchronize()
        return 1e-3 * begun.elapsed_time(ended)  # type: ignore[no-any-return]


Pass = tuple[int, Any, Any]
"""A pass through all blocks: its tokens, and what was read before and after it."""


@contextmanager
def read_around(
    model: nn.Module, blocks: Sequence[str], read: Callable[[], Any]
) -> Iterator[list[Pass]]:
    """Collects the passes from the first to the last of the blocks at these paths.

    The hooks sit around the call of a block, outside of what is traced or rewritten.
    """
    passes: list[Pass] = []
    begun: Any = None

    def before(*_: object) -> None:
        nonlocal begun
        begun = read()

    def after(_module: nn.Module, _args: object, output: object) -> None:
        passes.append((_tokens(output), begun, read()))

    first, last = module_at(model, blocks[0]), module_at(model, blocks[-1])
    hooks = [first.register_forward_pre_hook(before), last.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(output: object) -> int:
    maps = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.dim() == 3]
    return maps[0].shape[1] if maps else 0


def per_step(
    passes: Sequence[tuple[int, float]], schedule: Schedule, drawn: int | None = None
) -> list[float]:
    """Adds up (tokens, amount) of passes by step.

    Passes of other lengths, such as source tokens, count nowhere; but where a model's first step
    runs on its context tokens, those that came before the second step are the first.

    Args:
        passes: Passes through all blocks, in order.
        schedule: The steps.
        drawn: How many of them have to occur; None for all.

    Raises:
        RunError: If a step did not occur.
    """
    sums = [0.0] * schedule.steps
    step, before = -1, list[float]()
    for tokens, amount in passes:
        if step + 1 < schedule.steps and tokens == schedule.tokens(step + 1):
            step += 1
        elif step < 0 and schedule.steps > 1 and tokens == schedule.tokens(1) and before:
            step, sums[0] = 1, sum(before)
        elif step < 0 or tokens != schedule.tokens(step):
            before.append(amount)
            continue
        sums[step] += amount
    if step < (schedule.steps if drawn is None else drawn) - 1:
        wanted = [schedule.tokens(s) for s in range(schedule.steps)]
        raise RunError(
            f"the schedule has steps of {wanted} tokens, but the blocks ran on "
            f"{[tokens for tokens, _ in passes]}; give the schedule that the loop runs"
        )
    return sums


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Returns the most memory that a run had allocated at a time, without what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    # There is one cycle; torch 2.11 warns of events lost between cycles unless they are kept.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes), default=0)
