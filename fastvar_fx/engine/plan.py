"""What is fixed for all blocks of a transformed model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, Literal

from torch import nn

from fastvar_fx.engine.prefix import Around, Within
from fastvar_fx.errors import RunError
from fastvar_fx.methods import Method
from fastvar_fx.schedule import Schedule
from passes import Half
from passes.analyse.branches import KINDS, Kind
from passes.analyse.caches import LaterRows
from passes.rewrite.prune import Step

StepOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], int | None]
"""Returns the step of a block call, (block, args, kwargs) -> index, or None if it is no step."""

LiveRows = Literal["first", "last"]
"""Which samples of a batch stay where a loop drops the others."""
LIVE_ROWS: Final[tuple[LiveRows, ...]] = ("first", "last")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed for all blocks of a transformed model.

    Attributes:
        schedule: The scales and pruning ratios.
        skipped_steps: The last steps, if the loop leaves them out.
        blocks: The module paths of the blocks, in order.
        kinds: Kinds of branches that prune.
        step_of: Returns the step of a call; None if the token count does.
        strict: Whether it is an error if nothing could be pruned.
        dump_dir: Folder for the graphs of each pass.
        method: Selection and restoration.
        live_rows: Which samples stay where the loop drops some; None to find out.
        conditional: Which half of the batch stays at steps without guidance.
        buffers_caches: Whether KV caches grow in buffers.
        on_full: What steps of ratio 1 do, as `transform` was told.
        schedules: How many schedules the model was transformed with.
    """

    schedule: Schedule
    skipped_steps: tuple[int, ...]
    blocks: tuple[str, ...]
    kinds: tuple[Kind, ...]
    step_of: StepOf | None
    strict: bool
    dump_dir: Path | None
    method: Method
    live_rows: LiveRows | None
    buffers_caches: bool
    on_full: str | Callable[..., Any] = "skip"
    conditional: LiveRows | None = None
    schedules: int = 1

    @cached_property
    def pruned_steps(self) -> tuple[int, ...]:
        """The steps that the loop draws and at which a branch of some block prunes."""
        drawn = [step for step in self.schedule.pruned_steps if step not in self.skipped_steps]
        layers = range(len(self.blocks))
        return tuple(step for step in drawn if any(self.kept(step, layer) for layer in layers))

    @cached_property
    def unguided_steps(self) -> tuple[int, ...]:
        """The steps that the loop draws without guidance."""
        return tuple(s for s in range(self.drawn_steps) if not self.schedule.guided(s))

    @cached_property
    def changed_steps(self) -> tuple[int, ...]:
        """The steps that the loop draws and that prune, or have no guidance."""
        return tuple(sorted({*self.pruned_steps, *self.unguided_steps}))

    @property
    def one_of(self) -> str:
        """What an error adds where the loop may run another of the model's schedules."""
        return (
            f". The model was transformed with {self.schedules} schedules, and this is the one of "
            f"scales {self.schedule.scales}: if fastvar_fx.use chose it, call "
            f"fastvar_fx.use(model, schedule) with the one that the loop runs, or use(model, None)"
        ) * (self.schedules > 1)

    @property
    def drawn_steps(self) -> int:
        """How many steps the loop draws."""
        return self.schedule.steps - len(self.skipped_steps)

    def prunes(self, layer: int) -> bool:
        """Whether the block of an index prunes at some step."""
        return any(self.kept(step, layer) for step in self.pruned_steps)

    def kept(self, step: int, layer: int) -> dict[Kind, int]:
        """Returns how many tokens of a step's map a block keeps, by the kinds that it prunes."""
        tokens = self.schedule.tokens(step)
        counts = {kind: self.schedule.kept(step, layer, kind) for kind in self.kinds}
        return {kind: count for kind, count in counts.items() if count < tokens}

    def kinds_at(self, step: int, layer: int) -> tuple[Kind, ...]:
        """Returns the kinds of branches that a block prunes at a step, or captures to prune.

        At the cache step attention may be of another kind, for it may have one token.
        """
        captures = step == self.schedule.cache_step
        return self.kinds if captures else tuple(self.kept(step, layer))

    def half(self, batch: int) -> Half:
        """Returns the conditional half of a batch."""
        count = batch // 2
        return Half(batch, count if self.conditional == "last" else 0, count)

    def first_program(self, *, prunes: bool) -> int:
        """Returns the first step that has a program, for a block that prunes or does not."""
        captures = [self.schedule.cache_step] if prunes else []
        return min(captures + list(self.unguided_steps))

    def around(self, step: int, length: int) -> Around:
        """Returns how many of the `length` tokens that blocks get are before and after the map.

        With `prefix` the map of the step is the last one, unless the blocks get all maps of the
        schedule, those that are not drawn yet included.

        Raises:
            RunError: If the map cannot be among them.
        """
        schedule = self.schedule
        tokens = schedule.tokens(step)
        if length != tokens and (length < tokens or not schedule.prefix):
            raise RunError(
                f"step {step} has a map of {tokens} tokens, but a block got {length}. Give the "
                f"schedule that the loop runs; if its blocks get all maps so far, or all maps, "
                f"with prefix=True"
            )
        all_maps = schedule.prefix and length == schedule.length(schedule.steps - 1)
        after = length - schedule.length(step) if all_maps else 0
        return length - tokens - after, after

    def pruned(
        self, step: int, layer: int, around: Around, captured: Collection[int], *, taken: bool
    ) -> Step:
        """Returns what a block keeps at a pruned step.

        Args:
            step: The step.
            layer: The block's index.
            around: How many tokens come before and after its map, which all stay.
            captured: The lengths of the captured outputs, which are all equal.
            taken: Whether it keeps what another block has selected.
        """
        schedule, cache_step, method = self.schedule, self.schedule.cache_step, self.method
        cached = self.around(cache_step, *captured) if captured else around
        return Step(
            {kind: count + sum(around) for kind, count in self.kept(step, layer).items()},
            schedule.scales[cache_step],
            schedule.scales[step],
            Within(method, around, cached) if any(around + cached) else method,
            last=step == self.drawn_steps - 1,
            selects_once=bool(method.once),
            given={kind: self._given(step, layer, kind) for kind in self.kept(step, layer)},
            selection="own" if method.once != "step" else "taken" if taken else "given",
        )

    def _given(self, step: int, layer: int, kind: Kind) -> dict[str, float]:
        """Returns the numbers that the method asks for, for a kind of branch."""
        schedule = self.schedule
        before = takewhile(step.__gt__, self.pruned_steps)
        shares = [schedule.kept(s, layer, kind) / schedule.tokens(s) for s in before]
        numbers = {
            "step": step,
            "layer": layer,
            "layers": len(self.blocks),
            "kept_before": sum(shares),
        }
        asked = set().union(*self.method.asks.values())
        return {name: number for name, number in numbers.items() if name in asked}

    def key(self, step: int, layer: int) -> tuple[Any, ...]:
        """Returns what programs depend on; those of equal keys may be shared."""
        schedule = self.schedule
        later, guided = self.later_rows(step, layer), schedule.guided(step)
        if step == schedule.cache_step or step not in self.pruned_steps:
            return (later, guided, step == schedule.cache_step)
        shapes = [(schedule.scales[s], schedule.length(s)) for s in (schedule.cache_step, step)]
        whole = schedule.prefix and schedule.length(schedule.steps - 1)  # see `around`
        last = step == self.drawn_steps - 1
        kept = tuple(self.kept(step, layer).items())
        given = tuple(tuple(self._given(step, layer, kind).values()) for kind, _ in kept)
        return (*shapes, whole, kept, last, later, guided, given)

    def later_rows(self, step: int, layer: int) -> LaterRows | None:
        """What branches append to their caches at the steps after `step`; None without buffers.

        A step without a program runs the user's own forward, whose caches are in no buffer.
        """
        if not self.buffers_caches:
            return None
        after = range(step + 1, self.schedule.steps)
        steps = list(takewhile(self.changed_steps.__contains__, after))
        kept = [(self.schedule.tokens(s), self.kept(s, layer)) for s in steps]
        dense = sum(tokens for tokens, _ in kept)
        pruned = ((kind, sum(own.get(kind, n) for n, own in kept)) for kind in KINDS)
        return LaterRows(tuple(pruned), dense)
