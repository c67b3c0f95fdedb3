"""How far a loop is in its generation, block by block."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.skipped import SkippedSteps
from fastvar_fx.engine.watch import Watch


class Place:
    """How far one block is in the generation of a loop.

    Attributes:
        loop: The loop, while its thread runs.
        began: Whether a structure or cache step was met since the last generation ended.
        step: The last structure step, as its index or token count; None for none, or an unknown.
        calls: How many calls that step had.
        position: Which pruned step was met last; -1 for none.
        rows: Which samples came first where calls went on with fewer, by both batch sizes.
        counted: Whether calls of a step were told apart by their order alone.
        doubted: Whether only the number of calls says that the cache step was drawn again.
        aborted: Whether a block raised an exception, so that a step may be drawn again.
        cut_off: Whether a generation that had captured was left before its end.
        ended: Whether the last generation ran to its end, and nothing came after it.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = weakref.ref(loop)
        self.cut_off = False
        self.ended = False
        self.reset()

    def reset(self) -> None:
        """Waits for another generation."""
        self.began = False
        self.step: int | None = None
        self.calls = 0
        self.position = -1
        self.rows: dict[tuple[int, int], set[int]] = {}
        self.counted = self.doubted = self.aborted = False

    @property
    def late(self) -> bool:
        """Whether a pruned step was met."""
        return self.position >= 0


class Selected(NamedTuple):
    """What a block has selected, for the blocks after it.

    Attributes:
        step: At which pruned step.
        layer: The index of the block.
        batch: The number of samples.
        tensors: The selection.
    """

    step: int
    layer: int
    batch: int
    tensors: tuple[Tensor, ...]


class Loop:
    """The user's loop, as far as one thread runs it.

    Attributes:
        places: How far each block is.
        watch: Notices generations that do not run the schedule.
        skipped: The steps that it leaves out.
        selected: The newest selection that blocks share; None for none.
    """

    def __init__(self, plan: Plan, like: Loop | None = None) -> None:
        """Makes a loop in no generation; `like` is that of another thread."""
        self.places = [Place(self) for _ in plan.blocks]
        self.watch: Watch = Watch(plan, like.watch if like else None)
        self.skipped = SkippedSteps(plan)
        self.selected: Selected | None = None

    def reset(self) -> None:
        """Ends the generation."""
        for place in self.places:
            place.reset()
            place.cut_off = place.ended = False
        self.watch.cut_off()
        self.skipped.forget()
        self.selected = None
