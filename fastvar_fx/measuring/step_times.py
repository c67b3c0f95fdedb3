"""Where pruning pays: the time of each pruned step, dense and pruned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastvar_fx.engine.engine import Engine
from fastvar_fx.measuring.compare import Comparison
from fastvar_fx.measuring.runs import Runs, alternate


def time_steps(
    fast: nn.Module, engine: Engine, run: Callable[[Any], object], repeats: int
) -> dict[int, Comparison]:
    """Returns the blocks' time at each pruned step, from alternating dense and pruned runs.

    One model runs both, so that all but the pruning is the same, compilation included.

    Args:
        fast: A transformed model.
        engine: Its engine.
        run: Runs one generation.
        repeats: Timed runs of each, after one that is not timed.
    """

    def run_dense() -> object:
        with engine.generation.running_dense():
            return run(fast)

    plan = engine.plan
    place = (fast, plan.blocks, plan.schedule, plan.drawn_steps)
    dense, pruned = Runs(run_dense, *place), Runs(partial(run, fast), *place)
    for runs in (dense, pruned):
        runs.generate()
    alternate({"dense": dense, "pruned": pruned}, repeats)
    return {s: Comparison(dense.spread([s]), pruned.spread([s])) for s in plan.pruned_steps}
