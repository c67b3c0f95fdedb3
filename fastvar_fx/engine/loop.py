"""How far a loop is in its generation, block by block."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastvar_fx.engine.guidance import Unguided
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.skipped import SkippedSteps
from fastvar_fx.engine.track import Storages
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
        x: The pruned step and the memory of the token map of the last call that was told apart by
            order alone.
        left: The memory of arguments that only generations read that were left.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = weakref.ref(loop)
        self.cut_off = False
        self.ended = False
        self.left: Storages = set()
        self.reset()

    def reset(self) -> None:
        """Waits for another generation."""
        self.began = False
        self.step: int | None = None
        self.calls = 0
        self.position = -1
        self.rows: dict[tuple[int, int], set[int]] = {}
        self.counted = self.doubted = self.aborted = False
        self.x: tuple[int, StorageWeakRef] | None = None

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

    def fits(self, step: int, layer: int, batch: int) -> bool:
        """Whether it is for a block that comes later in the same step."""
        return self.step == step and self.layer < layer and self.batch == batch


class Pass:
    """A pass of a loop through the blocks: calls of layers in ascending order.

    Attributes:
        number: Which one it is.
        follows: The pass of the cache step that it continues; None if there is nothing to tell.
    """

    def __init__(self) -> None:
        self.number = 0
        self.follows: int | None = None
        self._layer = -1

    def enter(self, layer: int) -> bool:
        """Notes a call of a block, and returns whether another pass begins with it."""
        begins = layer <= self._layer
        self.number += begins
        self._layer = layer
        return begins


class Loop:
    """The user's loop, as far as one thread runs it.

    Attributes:
        places: How far each block is.
        watch: Notices generations that do not run the schedule.
        skipped: The steps that it leaves out.
        selected: The newest selection that blocks share; None for none.
        unguided: The step without guidance that it is at; None for another one.
        captures: Its passes through the blocks at the cache step.
        continues: Those at pruned steps, of calls that are told apart by order alone.
    """

    def __init__(self, plan: Plan, like: Loop | None = None) -> None:
        """Makes a loop in no generation; `like` is that of another thread."""
        self.places = [Place(self) for _ in plan.blocks]
        self.watch: Watch = Watch(plan, like.watch if like else None)
        self.skipped = SkippedSteps(plan)
        self.selected: Selected | None = None
        self.unguided: Unguided | None = None
        self.captures, self.continues = Pass(), Pass()

    def reset(self) -> None:
        """Ends the generation."""
        for place in self.places:
            place.reset()
            place.cut_off = place.ended = False
        self.watch.cut_off()
        self.skipped.forget()
        self.selected = self.unguided = None
