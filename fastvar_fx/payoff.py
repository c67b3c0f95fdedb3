"""Where pruning pays: the time of each pruned step, dense and pruned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.timing import Clock, Spread, StepTimes, per_step, read_around


def time_steps(
    fast: nn.Module, engine: Engine, run: Callable[[Any], object], repeats: int
) -> dict[int, StepTimes]:
    """Returns the time of each pruned step in the blocks, dense and pruned, taken by turns.

    One model runs both, so that all but the pruning is the same, compilation included.

    Args:
        fast: A transformed model.
        engine: Its engine.
        run: Runs one generation.
        repeats: Timed runs of each, after one that is not timed.
    """
    clock = Clock(next(module_at(fast, engine.plan.blocks[0]).parameters()).device)
    seconds: dict[bool, list[list[float]]] = {True: [], False: []}
    for turn in range(1 + repeats):
        for prunes in (False, True):
            with nullcontext() if prunes else engine.generation.running_dense():
                found = _seconds_by_step(fast, engine, run, clock)
            if turn:
                seconds[prunes].append(found)
    return {
        step: StepTimes(*(Spread.of([run[step] for run in seconds[p]]) for p in (False, True)))
        for step in engine.plan.pruned_steps
    }


def _seconds_by_step(
    fast: nn.Module, engine: Engine, run: Callable[[Any], object], clock: Clock
) -> list[float]:
    with read_around(fast, engine.plan.blocks, clock.read) as passes:
        run(fast)
    amounts = [(tokens, clock.seconds(ended, begun)) for tokens, begun, ended in passes]
    return per_step(amounts, engine.plan.schedule, engine.plan.drawn_steps)
