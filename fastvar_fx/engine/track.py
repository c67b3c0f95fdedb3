"""What a call of the cache step captured, followed through the pruned steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from passes.trace.state import attributes

if TYPE_CHECKING:
    from fastvar_fx.engine.call import BlockCall
    from fastvar_fx.engine.loop import Place

Captured = dict[int, Tensor]
"""Branch outputs (B, L, C) of one call of a block at the cache step, by branch index."""
Live = tuple[int, torch.device, torch.dtype]
"""Batch size, device and dtype of a token map."""
Storages = set[StorageWeakRef]
"""The memory of tensors, which is not kept alive."""


class Track:
    """One call of the cache step: what it captured, and which later calls are its counterparts.

    Attributes:
        outputs: What it captured.
        live: Batch size, device and dtype of its token map.
        place: The block in the loop that made the call.
        x: The memory of its token map.
        drawn: Which pass of the loop through the blocks it was in.
        reads: The memory of its arguments.
        wrote: The memory of what it and its counterparts returned or stored, such as caches.
        caches: Whether it wrote anything.
        position: Which pruned step it met last, counted from 0; -1 for none.
        draws: How many of its counterparts ran at that step.
        followed: Whether a counterpart was found by what it reads.
        parts: Tracks of some of its samples, by the first of them.
        left: Whether the loop began another generation, but may come back to this one.
    """

    def __init__(self, call: BlockCall, place: Place, outputs: Captured) -> None:
        self.outputs = outputs
        self.live = live_of(call.x)
        self.place = place
        self.x: StorageWeakRef | None = None
        self.drawn = 0
        self.reads: Storages = set()
        self.wrote: Storages = set()
        self.caches = False
        self.position = -1
        self.draws = 0
        self.followed = False
        self.parts: dict[int, Track] = {}
        self.left = False

    def part(self, call: BlockCall, first: int) -> Track:
        """Returns the track of the samples of a smaller call, of which `first` comes first."""
        if first not in self.parts:
            last = first + call.x.shape[0]
            rows = {branch: output[first:last] for branch, output in self.outputs.items()}
            made = self.parts[first] = Track(call, self.place, rows)
            made.position, made.caches = self.position, self.caches
            made.x, made.drawn = self.x, self.drawn
        return self.parts[first]

    def met(self, position: int) -> None:
        """Notes that a counterpart ran at a pruned step."""
        self.draws = self.draws + 1 if position == self.position else 1
        self.position = position

    def note_written(self, call: BlockCall, result: Any) -> None:
        """Notes the memory of what a call returned or stored, besides its token map."""
        rest = [] if isinstance(result, Tensor) else _without_map(result, call.x)
        self.wrote |= storages((rest, call.args, call.kwargs), call.x) - call.reads()

    def may_go_on(self) -> bool:
        """Whether something is left of what it wrote, so that its loop may still run."""
        return any(map(exists, self.wrote))

    @property
    def keeps_its_caches(self) -> bool:
        """Whether autograd keeps its caches, so that nobody knows if the loop still has them."""
        return any(output.requires_grad for output in self.outputs.values())

    def ended(self, last: int) -> bool:
        """Whether it met the last pruned step, with all its samples unless the others are gone."""
        whole = not self.parts or sum(part.live[0] for part in self.parts.values()) >= self.live[0]
        return self.position == last and (whole or not self.may_go_on())

    def goes_on(self, last: int) -> bool:
        """Whether a counterpart at the last pruned step is still to come, as far as one can see."""
        return self.position == last - 1 and (self.may_go_on() or not self.caches)

    def reads_alike(self, reads: Storages) -> bool:
        """Whether a call reads all that is left of what this one read, and there is something."""
        left = set(filter(exists, self.reads))
        return bool(left) and left <= reads


def live_of(x: Tensor) -> Live:
    """Returns the batch size, device and dtype of a token map."""
    return (x.shape[0], x.device, x.dtype)


def storages(values: Any, token_map: Tensor) -> Storages:
    """Returns the memory of all tensors in values, at any depth, without that of the token map."""
    found: Storages = set()
    seen: set[int] = set()
    todo = [values]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                found.add(memory(value))
        elif id(value) not in seen:
            seen.add(id(value))
            todo += _inside(value)
    return found - {memory(token_map)}


def memory(tensor: Tensor) -> StorageWeakRef:
    """Returns the memory of a tensor, which is not kept alive."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def exists(storage: StorageWeakRef) -> bool:
    """Whether the tensors of some memory still exist."""
    return not storage.expired()  # type: ignore[no-untyped-call]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, deque)):
        return value
    return (attributes(value) or {}).values()


def _without_map(result: Any, token_map: Tensor) -> list[Any]:
    leaves = pytree.tree_leaves(result)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.shape == token_map.shape:
            return leaves[:i] + leaves[i + 1 :]
    return leaves
