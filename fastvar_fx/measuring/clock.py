"""Reads the time of a device around the blocks, and the memory that a run takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.errors import RunError
from fastvar_fx.schedule import Schedule


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
        """Returns the seconds between two readings, after the device has reached the later one."""
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

    Passes of other lengths, such as source tokens, are not counted. If a model's first step runs on
    its context tokens, the passes before the second step are the first step.

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
        if step + 1 < schedule.steps and tokens == schedule.length(step + 1):
            step += 1
        elif step < 0 and schedule.steps > 1 and tokens == schedule.length(1) and before:
            step, sums[0] = 1, sum(before)
        elif step < 0 or tokens != schedule.length(step):
            before.append(amount)
            continue
        sums[step] += amount
    if step < (schedule.steps if drawn is None else drawn) - 1:
        wanted = [schedule.length(s) for s in range(schedule.steps)]
        raise RunError(
            f"the schedule has steps of {wanted} tokens, but the blocks ran on "
            f"{[tokens for tokens, _ in passes]}; give the schedule that the loop runs"
        )
    return sums


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Returns the peak of the memory that a run allocates, in bytes."""
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
