"""All that the blocks of a transformed model share while it runs one schedule."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from torch import nn

from fastvar_fx.engine.call import BlockCall, TokenMaps
from fastvar_fx.engine.executor import EAGER, Executor, Ready
from fastvar_fx.engine.generation import Generation
from fastvar_fx.engine.kv_buffers import KVBuffers
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.report import Report
from fastvar_fx.engine.store import Store
from fastvar_fx.errors import ModelError, NothingPrunedError

if TYPE_CHECKING:
    from fastvar_fx.engine.family import Family
    from fastvar_fx.measuring.compare import Comparison

log = logging.getLogger(__name__)

ENGINE: Final = "_fastvar_engine"
"""The attribute of a transformed model that holds its engines, a `Family`."""


class Engine:
    """All that the blocks of a transformed model share while it runs one schedule.

    Attributes:
        plan: What is fixed.
        generation: Where the model is in a generation.
        store: The programs.
        token_maps: Which argument of a call is the token map.
        buffers: What KV caches grow in; None if they are left as they are.
        executor: Runs programs and dense forwards.
        family: The engines of all schedules of the model, this one among them.
        index: Its index among them.
        lengths: The token counts of the steps, each once.
        step_times: What `fastvar_fx.measure` found, by pruned step.
        outside_share: What `fastvar_fx.trace` found, as in `Report`.
    """

    family: Family
    index: int

    def __init__(self, plan: Plan, executor: Executor = EAGER, like: Engine | None = None) -> None:
        """Makes an engine without programs.

        Args:
            plan: What is fixed.
            executor: Runs programs and dense forwards.
            like: An engine of another schedule of the model, to share programs with.
        """
        self.plan = plan
        self.executor = executor
        self.generation = Generation(plan)
        own = KVBuffers() if plan.buffers_caches else None
        self.buffers: KVBuffers | None = like.buffers if like else own
        shared = like.store if like else None
        self.store: Store = Store(
            plan, self.buffers, self._check_anything_pruned, self._packaged, shared
        )
        self.token_maps: TokenMaps = like.token_maps if like else {}
        steps = range(plan.schedule.steps)
        self.lengths = list(dict.fromkeys(plan.schedule.length(step) for step in steps))
        self._warned = False
        self.step_times: dict[int, Comparison] = {}
        self.outside_share: float | None = None

    @classmethod
    def of(cls, fast: nn.Module) -> Engine:
        """Returns the engine of a transformed model, for the schedule that ran last.

        Raises:
            ModelError: If it is not transformed.
        """
        family: Family | None = getattr(fast, ENGINE, None)
        if family is None:
            raise ModelError(
                f"{type(fast).__name__} is not transformed; pass what fastvar_fx.transform returned"
            )
        return family.current

    def report(self) -> Report:
        """Returns what every block and branch does at every step met so far."""
        return Report.of(self)

    def _packaged(self, call: BlockCall, step: int) -> Ready | None:
        return self.executor.packaged(call, step, self.index)

    def _check_anything_pruned(self, call: BlockCall, step: int) -> None:
        """After the last block has met the last pruned step, something must have been pruned."""
        plan, store = self.plan, self.store
        if step not in plan.pruned_steps[-1:] or store.pruned_anything:
            return
        cache_step = plan.schedule.cache_step
        if call.site.layer != max(layer for layer, met in store.records if met == cache_step):
            return
        message = (
            f"the schedule prunes steps {list(plan.pruned_steps)}, but no branch of any block "
            f"could be pruned:\n{self.report()}"
        )
        if plan.strict:
            raise NothingPrunedError(message)
        if not self._warned:
            log.warning("%s", message)
        self._warned = True
