"""Runs of a model that are counted and timed step by step."""

from __future__ import annotations

import json
import operator
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fastvar_fx.blocks import find_blocks, module_at
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
        run: Runs one generation of the model; `measure` needs images (B, 3, H, W) in [0, 1] back.
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
        """A parameter of the blocks; tells device and dtype."""
        block = next(iter(find_blocks(self.model, self.blocks).values()))
        return next(block.parameters())

    def generate(self, model: nn.Module) -> Any:
        """Runs one generation from the seed; torch's global generators stay as they were."""
        device = self.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.seed)
            return self.run(model)


@dataclass(frozen=True)
class Spread:
    """Seconds that the same thing took in several runs.

    Attributes:
        median: The middle one.
        low: The shortest.
        high: The longest.
        iqr: The distance of the quartiles; 0 for a single run.
    """

    median: float
    low: float
    high: float
    iqr: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Returns the spread of the seconds of at least one run."""
        lower, _, upper = quantiles(seconds, method="inclusive") if len(seconds) > 1 else (0, 0, 0)
        return cls(median(seconds), min(seconds), max(seconds), upper - lower)

    def as_dict(self) -> dict[str, float]:
        """Returns milliseconds as plain data."""
        values = {"median": self.median, "min": self.low, "max": self.high}
        return {name: round(1e3 * value, 3) for name, value in values.items()}


@dataclass(frozen=True)
class StepTimes:
    """The blocks' time at one step, run dense and pruned.

    Attributes:
        dense: Dense, with all else the same.
        pruned: As the schedule has it.
    """

    dense: Spread
    pruned: Spread

    @property
    def speedup(self) -> float:
        """Dense over pruned median."""
        return self.dense.median / self.pruned.median

    @property
    def pays(self) -> bool:
        """Whether pruning makes the step faster."""
        return self.speedup > 1

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; times in milliseconds."""
        times = {"ms_dense": self.dense.as_dict(), "ms_pruned": self.pruned.as_dict()}
        return times | {"speedup": self.speedup, "pays": self.pays}


@dataclass
class Runs:
    """Runs a model, original or transformed, and keeps what it measured per step.

    Attributes:
        subject: The original model and how to run it.
        model: The one that runs.
        drawn: How many steps it draws; None for all of the schedule.
        flops: FLOPs of the blocks' matrix products and attention per step.
        step_seconds: Seconds in the blocks per step, for each timed run.
        seconds: Seconds of each timed run as a whole.
    """

    subject: Subject
    model: nn.Module
    drawn: int | None = None
    flops: list[int] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def count(self) -> Any:
        """Counts FLOPs per step; returns what the run returns."""
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            result, passes = self._run(counter.get_total_flops)
        self.flops = [int(value) for value in self._by_step(passes, operator.sub)]
        return result

    def time(self) -> Any:
        """Times the run and its steps; returns what the run returns."""
        clock = Clock(self.subject.weight.device)
        started = clock.read()
        result, passes = self._run(clock.read)
        self.seconds.append(clock.seconds(clock.read(), started))
        self.step_seconds.append(self._by_step(passes, clock.seconds))
        return result

    def _run(self, read: Callable[[], Any]) -> tuple[Any, list[Pass]]:
        names = list(find_blocks(self.subject.model, self.subject.blocks))
        with read_around(self.model, names, read) as passes:
            result = self.subject.generate(self.model)
        return result, passes

    def _by_step(
        self, passes: Sequence[Pass], difference: Callable[[Any, Any], float]
    ) -> list[float]:
        amounts = [(tokens, difference(ended, begun)) for tokens, begun, ended in passes]
        return per_step(amounts, self.subject.schedule, self.drawn)

    @property
    def loop(self) -> Spread:
        """The blocks' time over all steps."""
        return self.spread(range(self.subject.schedule.steps))

    @property
    def by_step(self) -> tuple[Spread, ...]:
        """The blocks' time at each step."""
        return tuple(self.spread([step]) for step in range(self.subject.schedule.steps))

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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate(change for _, change in changes), default=0)
