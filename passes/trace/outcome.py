"""What a call returned and what it changed, in a form that is made anew at another call."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.refusal import refuse
from passes.trace.recipes import recipe_for_kind
from passes.trace.state import (
    Change,
    Path,
    Snapshot,
    Step,
    contents,
    fill,
    is_constant,
    is_container,
    show,
)

Find = Callable[[Path], Any]
"""Returns what another call has at a path."""


@dataclass(frozen=True)
class Handed:
    """An object that the call was handed; at another call it is the one at the same path."""

    path: Path


@dataclass(frozen=True, eq=False)
class Made:
    """An object that the call made, and that holds tensors or objects that the call was handed.

    Attributes:
        blank: A copy without its entries.
        entries: How its entries are made.
    """

    blank: Any
    entries: tuple[tuple[Step, Recipe], ...]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a value is made from a graph's outputs and from what a call was handed.

    Attributes:
        spec: Its structure.
        leaves: Its leaves: `...` for a tensor, `Handed`, `Made`, or a value that stays as it is.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @cached_property
    def _is_tensor(self) -> bool:
        return self.leaves == (...,) and self.spec.is_leaf()

    @property
    def count(self) -> int:
        """How many tensors it takes."""
        return sum(
            sum(recipe.count for _, recipe in leaf.entries)
            if isinstance(leaf, Made)
            else leaf is ...
            for leaf in self.leaves
        )

    @property
    def key(self) -> Any:
        """Equal for values that are made in the same way, from any objects."""
        return self.spec, tuple(map(_key, self.leaves))

    def make(self, tensors: Iterator[Any], find: Find) -> Any:
        """Returns the value.

        Args:
            tensors: Yields the tensors, in order.
            find: Returns what was handed in at a path.
        """
        if self._is_tensor:
            return next(tensors)
        leaves = [_make(leaf, tensors, find) for leaf in self.leaves]
        return leaves[0] if self.spec.is_leaf() else pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True, eq=False)
class Write:
    """One thing a call changed.

    Attributes:
        path: The container that changed, from the roots.
        step: The entry of it that was set.
        value: How its new value is made; None if the entry was removed.
        buffer: Whether it is a registered buffer of a module.
    """

    path: Path
    step: Step
    value: Recipe | None
    buffer: bool = False

    @property
    def place(self) -> Path:
        """Where the new value is."""
        return (*self.path, self.step)

    @property
    def count(self) -> int:
        """How many tensors its value takes."""
        return 0 if self.value is None else self.value.count

    def apply(self, container: Any, value: Any) -> None:
        """Replays it on a live container, with a value that its recipe made."""
        kind, key = self.step
        if self.value is None:
            delattr(container, key) if kind == "attr" else container.pop(key)
        elif self.buffer:
            container._buffers[key] = value  # it may not be registered yet
        elif kind == "attr" and _is_plain(container, key) and type(value) is Tensor:
            object.__setattr__(container, key, value)
        elif kind == "attr":
            setattr(container, key, value)
        elif isinstance(container, (list, deque)) and key == len(container):
            container.append(value)
        else:
            container[key] = value


class Outcome:
    """What a call returned and what it changed.

    Attributes:
        result: How its result is made.
        writes: What it changed.
        results: The tensors of its result, in order.
        written: The tensors that it wrote, in order.
    """

    def __init__(self, snapshot: Snapshot, value: Any, since: Callable[[Path, Any], Any]) -> None:
        """Takes apart what a call returned and changed, before the snapshot is restored.

        Args:
            snapshot: What the call could reach.
            value: What it returned.
            since: What was substituted before it ran.

        Raises:
            RefusedError: FVX001, if a change is of a form that cannot be replayed.
        """
        self._snapshot = snapshot
        self.result, self.results = self._take_apart(value)
        self.written: list[Tensor] = []
        self.writes = tuple(self._write(change) for change in snapshot.changes(since))

    def _write(self, change: Change) -> Write:
        holder, path, step, value, buffer = change
        if change.removed:
            return Write(path, step, None)
        recipe, tensors = self._take_apart(value)
        for leaf in recipe.leaves:
            if not (leaf is ... or isinstance(leaf, (Handed, Made)) or is_constant(leaf)):
                kind, where = type(leaf).__name__, show((*path[1:], step))
                reason = f"the call stored an object of {kind} in {where}"
                refuse("FVX001", reason, advice=recipe_for_kind(holder))
        self.written += tensors
        return Write(path, step, recipe, buffer)

    def _take_apart(self, value: Any, within: frozenset[int] = frozenset()) -> _Parts:
        """Returns how a value is made, and the tensors for it."""
        # pytree keeps this function in a cycle of references, so it must not hold tensors.
        handed = partial(_is_handed, self._snapshot)
        parts, spec = pytree.tree_flatten(value, is_leaf=handed)
        leaves: list[Any] = []
        tensors: list[Tensor] = []
        for part in parts:
            leaf, inside = self._leaf(part, within)
            leaves.append(leaf)
            tensors += inside
        return Recipe(spec, tuple(leaves)), tensors

    def _leaf(self, part: Any, within: frozenset[int]) -> tuple[Any, list[Tensor]]:
        if is_traceable_wrapper_subclass(part):
            refuse("FVX001", f"it returns or stores a {type(part).__name__}, a tensor subclass")
        if isinstance(part, Tensor):
            return ..., [part]
        place = self._snapshot.place_of(part)
        if place is not None:
            return Handed(place), []
        if isinstance(part, (SymInt, SymFloat, SymBool)):
            refuse("FVX001", "it returns or stores a number that depends on one that varies")
        if not is_container(part) or isinstance(part, (nn.Module, Enum)):
            return part, []
        if id(part) in within:
            refuse("FVX001", f"it returns or stores an object of {type(part).__name__} in itself")
        entries, tensors = [], []
        for step, item in contents(part).items():
            recipe, inside = self._take_apart(item, within | {id(part)})
            entries.append((step, recipe))
            tensors += inside
        if not any(isinstance(x, (Handed, Made)) or x is ... for _, r in entries for x in r.leaves):
            return part, []
        blank = copy.copy(part)
        fill(blank, {})
        return Made(blank, tuple(entries)), tensors


_Parts = tuple[Recipe, list[Tensor]]


def _is_handed(snapshot: Snapshot, part: Any) -> bool:
    return snapshot.place_of(part) is not None


def _key(leaf: Any) -> Any:
    if isinstance(leaf, Handed):
        return Handed
    if isinstance(leaf, Made):
        return type(leaf.blank), tuple((step, recipe.key) for step, recipe in leaf.entries)
    return type(leaf), leaf if leaf is ... or is_constant(leaf) else id(leaf)


def _is_plain(container: Any, name: str) -> bool:
    """Whether a module keeps an attribute like any object; its own `__setattr__` is slow."""
    kind: Any = type(container)
    plain = kind.__setattr__ is nn.Module.__setattr__
    return (plain or getattr(kind.__setattr__, "sets_plainly", False)) and name in vars(container)


def _make(leaf: Any, tensors: Iterator[Any], find: Find) -> Any:
    if leaf is ...:
        return next(tensors)
    if isinstance(leaf, Handed):
        return find(leaf.path)
    if isinstance(leaf, Made):
        made = copy.copy(leaf.blank)
        fill(made, {step: recipe.make(tensors, find) for step, recipe in leaf.entries})
        return made
    return leaf
