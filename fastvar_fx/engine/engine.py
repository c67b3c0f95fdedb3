"""All that the blocks of a transformed model share."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from fastvar_fx.engine.call import BlockCall, TokenMaps
from fastvar_fx.engine.executor import EAGER, Executor
from fastvar_fx.engine.generation import Generation
from fastvar_fx.engine.kv_buffers import KVBuffers
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.report import Report
from fastvar_fx.engine.store import Store
from fastvar_fx.errors import ModelError, NothingPrunedError

if TYPE_CHECKING:
    from fastvar_fx.measuring.compare import Comparison

log = logging.getLogger(__name__)

ENGINE: Final = "_fastvar_engine"
"""The attribute of a transformed model that holds its engine."""


class Engine:
    """All that the blocks of a transformed model share.

    Attributes:
        plan: What is fixed.
        generation: Where the model is in a generation.
        store: The programs.
        token_maps: Which argument of a call is the token map.
        buffers: What KV caches grow in; None if they are left as they are.
        lock: Held by a block that runs, because making a program puts stand-ins into the model.
        executor: Runs programs and dense forwards.
        step_times: What `fastvar_fx.measure` found, by pruned step.
    """

    def __init__(self, plan: Plan, executor: Executor = EAGER) -> None:
        self.plan = plan
        self.executor = executor
        self.generation = Generation(plan)
        self.buffers = KVBuffers() if plan.buffers_caches else None
        self.store = Store(plan, self.buffers, self._check_anything_pruned)
        self.token_maps: TokenMaps = {}
        self.lock = threading.RLock()
        self._warned = False
        self.step_times: dict[int, Comparison] = {}

    @classmethod
    def of(cls, fast: nn.Module) -> Engine:
        """Returns the engine of a transformed model.

        Raises:
            ModelError: If it is not transformed.
        """
        engine = getattr(fast, ENGINE, None)
        if not isinstance(engine, Engine):
            raise ModelError(
                f"{type(fast).__name__} is not transformed; pass what fastvar_fx.transform returned"
            )
        return engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """Returns one for a copy of the model: outside any generation, without programs."""
        made = memo[id(self)] = Engine(self.plan, self.executor.anew())
        made.generation = self.generation.copy()
        if self.buffers is not None and made.buffers is not None:
            made.buffers.replayed = self.buffers.replayed
        return made

    def report(self) -> Report:
        """Returns what every block and branch does at every step met so far."""
        return Report.of(self)

    def _check_anything_pruned(self, call: BlockCall, step: int) -> None:
        """After the last block has met the last pruned step, something must have been pruned."""
        plan, store = self.plan, self.store
        if step != plan.pruned_steps[-1] or store.pruned_anything:
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
