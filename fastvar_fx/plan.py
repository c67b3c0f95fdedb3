"""What is fixed for all blocks of a transformed model, and what they noted for the report."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Protocol

from torch import Tensor, nn
from torch.fx import GraphModule

from fastvar_fx import ops
from fastvar_fx.errors import RunError
from fastvar_fx.kv_buffers import KVBuffers
from fastvar_fx.loops import Skipped
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import StepTimes
from passes.analyse.branches import Kind
from passes.analyse.caches import CacheReport, LaterRows
from passes.analyse.costs import BranchReport
from passes.refusal import Refusal

StepOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], int | None]
"""Tells the step of a block call, (block, args, kwargs) -> index; None if it is no step."""

LiveRows = Literal["first", "last"]
"""Which samples of a batch go on where a loop drops the others."""
LIVE_ROWS: Final[tuple[LiveRows, ...]] = ("first", "last")


@dataclass
class StepRecord:
    """What one block does at one step, for the report."""

    layer: int
    block: str
    step: int
    tokens: int
    branches: tuple[BranchReport, ...]
    program: int | None
    refusal: Refusal | None = None
    caches: tuple[CacheReport, ...] = ()


class Executor(Protocol):
    """Runs what the blocks run in another way than eagerly, such as compiled."""

    def run_program(
        self, graph_module: GraphModule, inputs: Sequence[Any], block: str, tokens: int
    ) -> Any:
        """Runs a program on its inputs, for a call of `tokens` tokens of a block."""

    def run_dense(
        self,
        name: str,
        forward: Callable[..., Any],
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
    ) -> Any:
        """Runs the own forward of a block, by its path, on arguments of which x is the map."""

    def anew(self) -> Executor:
        """Returns one for a copy of the model."""


class Holder(Protocol):
    """What holds captured features."""

    @property
    def captured_bytes(self) -> int:
        """Bytes it holds now."""

    def forget(self) -> None:
        """Frees them: the generation was cut off."""


@dataclass
class Plan:
    """What is fixed for all blocks of a transformed model, and what they noted."""

    schedule: Schedule
    skipped: Skipped
    blocks: tuple[str, ...]
    kinds: tuple[Kind, ...]
    step_of: StepOf | None
    strict: bool
    dump_dir: Path | None
    operators: ops.Operators
    live_rows: LiveRows | None = None
    executor: Executor | None = None
    kv_buffers: KVBuffers | None = None
    records: dict[tuple[int, int], StepRecord] = field(default_factory=dict)
    dense_calls: Counter[int] = field(default_factory=Counter)
    early_calls: Counter[int] = field(default_factory=Counter)
    trace_seconds: float = 0.0
    holders: list[Holder] = field(default_factory=list)
    peak_captured_bytes: int = 0
    prunes_now: bool = True
    step_times: dict[int, StepTimes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schedule = self.schedule
        skipped = self.skipped.steps
        self.pruned_steps = tuple(s for s in schedule.pruned_steps if s not in skipped)
        self.last_step = schedule.steps - len(skipped) - 1
        self.cache_tokens = schedule.tokens(schedule.cache_step)
        steps = (schedule.cache_step, *self.pruned_steps) if self.pruned_steps else ()
        self.step_of_tokens = {schedule.tokens(step): step for step in steps}
        self.watch = GenerationWatch(schedule, self.pruned_steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A copy has met no step yet."""
        memo[id(self)] = made = replace(
            self,
            skipped=copy.deepcopy(self.skipped, memo),
            executor=self.executor and self.executor.anew(),
            kv_buffers=None if self.kv_buffers is None else self.kv_buffers.anew(),
            records={},
            dense_calls=Counter(),
            early_calls=Counter(),
            trace_seconds=0.0,
            holders=[],
            peak_captured_bytes=0,
            step_times={},
        )
        return made

    @contextmanager
    def running_dense(self) -> Iterator[None]:
        """Within it, whole generations run dense at every step that the loop draws."""
        self.prunes_now = False
        try:
            yield
        finally:
            self.prunes_now = True

    @property
    def last_layer(self) -> int:
        """The last block that the cache step came to; there may be others that no loop calls."""
        return max(layer for layer, step in self.records if step == self.schedule.cache_step)

    def later_rows(self, step: int) -> LaterRows | None:
        """What branches append to their caches at the steps after `step`; None without buffers.

        A step without a program runs the user's own forward, whose caches are in no buffer.
        """
        if self.kv_buffers is None:
            return None
        after = range(step + 1, self.schedule.steps)
        steps = list(takewhile(self.pruned_steps.__contains__, after))
        pruned, dense = (sum(map(of, steps)) for of in (self.schedule.kept, self.schedule.tokens))
        return LaterRows(pruned, dense)

    @property
    def pruned_anything(self) -> bool:
        """Whether any branch of any block prunes at a step that was met."""
        return any(b.kept is not None for r in self.records.values() for b in r.branches)

    @property
    def captured_bytes(self) -> int:
        """Bytes of captured features that the blocks hold now."""
        return sum(holder.captured_bytes for holder in self.holders)

    def forget(self) -> None:
        """Frees all captured features, after a generation that was cut off."""
        for holder in self.holders:
            holder.forget()

    def note_captured(self) -> None:
        """Notes, after the last block has captured, what is held: the most of a generation."""
        self.peak_captured_bytes = max(self.peak_captured_bytes, self.captured_bytes)


class GenerationWatch:
    """Notices whole generations that pass without a pruned step, where the schedule has some."""

    def __init__(self, schedule: Schedule, pruned_steps: tuple[int, ...]) -> None:
        self._schedule = schedule
        self._pruned_steps = pruned_steps
        self._known = {schedule.tokens(step) for step in range(schedule.steps)}
        self._structure = {schedule.tokens(step) for step in range(schedule.cache_step)}
        self._current: list[int] = []
        self._ended: list[list[int]] = []
        self._told = False

    def pruned(self) -> None:
        """A pruned step was met: whatever else this generation ran belongs to the loop."""
        self._known.update(self._current, *self._ended)
        self._current, self._ended, self._told = [], [], False

    def saw(self, tokens: int) -> None:
        """A dense call or the cache step was met.

        A length that comes back means that another generation began.

        Raises:
            RunError: If generations end without a pruned step: if their lengths are not the
                schedule's, at the end of the first and within the next ones; else, for they may
                have been cut off, after three alike.
        """
        if tokens not in self._current:
            self._current.append(tokens)
            if self._told and self._strays(self._current):
                self._tell(self._current)
            return
        if tokens == self._current[-1]:
            return
        ended = self._current
        self._ended, self._current = [*self._ended[-2:], ended], [tokens]
        alike = len(self._ended) == 3 and self._ended[0] == self._ended[1] == self._ended[2]
        if self._strays(ended) or ((alike or self._told) and not self._captured(ended)):
            self._tell(ended)

    def _tell(self, seen: list[int]) -> NoReturn:
        self._current, self._ended, self._told = [], [], True
        wanted = [self._schedule.tokens(step) for step in self._pruned_steps]
        raise RunError(
            f"the schedule prunes steps of {wanted} tokens, but a generation had none: its blocks "
            f"saw {seen} tokens. Give the schedule that the loop runs"
        )

    def _strays(self, seen: list[int]) -> bool:
        """Whether a generation of these lengths does not run the schedule."""
        strange = [length for length in self._drawn(seen) if length not in self._known]
        return len(strange) >= (1 if self._captured(seen) else 2)

    def _captured(self, seen: list[int]) -> bool:
        """Whether a generation came to the cache step; it may have been cut off after that."""
        drawn = self._drawn(seen)
        cached = self._schedule.tokens(self._schedule.cache_step)
        return drawn[0] in self._structure and cached in drawn

    def _drawn(self, seen: list[int]) -> list[int]:
        """What comes from the first structure step on; source tokens come before."""
        begun = [i for i, length in enumerate(seen) if length in self._structure]
        return seen[begun[0] :] if begun else seen
