"""Axis rules: what an op does to the axes, and that tokens may be dropped through it.

A rule gets one call of its op with at least one operand from inside the branch. It returns the axes
of the result and records what must change when tokens are dropped: size arguments (`Site.resize`)
and side inputs that have an entry per token (`Site.meet`). An op without a rule is refused; so is
every call for which its rule cannot say that dropping tokens is sound.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch.fx import Node

from passes.analyse.axes import (
    Axes,
    AxesError,
    Dim,
    broadcast,
    has_batch,
    has_tokens,
    meets_tokens,
    plain_dim,
    token_dims,
)
from passes.graph import bind, plain
from passes.refusal import refuse

Rule = Callable[["Site"], "Axes | list[Axes]"]


@dataclass(frozen=True)
class Gather:
    """A side input is gathered at the kept tokens of the axes it meets, aligned from the right."""

    axes: Axes


@dataclass(frozen=True)
class Resize:
    """A size argument takes the shape of these axes with the kept token count."""

    axes: Axes


@dataclass(frozen=True)
class Replace:
    """An argument takes another value."""

    value: object


@dataclass(frozen=True)
class Recount:
    """An argument that depends on the token count is computed anew, as compute(value, count).

    The count is that of the kept tokens and of `around` entries that stay.
    """

    compute: Callable[[Any, int], Any]
    around: int = 0


Edit = Gather | Resize | Replace | Recount
Slot = tuple[str, int | None]
"""An argument by name, and the element if it is a list."""


class Site:
    """One call of an op inside a branch, as its rule sees it.

    Attributes:
        node: The call.
        args: Its arguments by name, defaults filled in; tensors are FX nodes.
        edits: What must change when tokens are dropped, as the rule recorded it.
    """

    def __init__(self, node: Node, axes: Mapping[Node, Axes | list[Axes]]) -> None:
        self.node = node
        self.args = {name: plain(value) for name, value in bind(node).items()}
        self.edits: dict[Slot, Edit] = {}
        self._axes = axes

    def axes(self, value: object) -> Axes | None:
        """Returns the axes of a tensor from inside the branch, or None for a side input."""
        if not isinstance(value, Node):
            return None
        found = self._axes.get(value)
        if isinstance(found, list):
            self.refuse("FVX010", "a tuple of tensors is used as a tensor")
        return found

    def tuple_axes(self, value: object) -> list[Axes] | None:
        """Returns the axes of a tuple of tensors from inside the branch."""
        found = self._axes.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, list) else None

    def stream(self, name: str) -> Axes:
        """Returns the axes of an argument that must come from inside the branch."""
        axes = self.axes(self.args[name])
        if axes is None:
            self.refuse("FVX010", f"`{name}` is not computed from the tokens, another operand is")
        return axes

    @property
    def tensors(self) -> list[str]:
        """The names of the arguments that are tensors; lists of tensors are not among them."""
        return [name for name, value in self.args.items() if isinstance(value, Node)]

    @property
    def out_shape(self) -> list[int]:
        """The shape of the result, or of the first of several."""
        value = self.node.meta["val"]
        return list((value[0] if isinstance(value, (tuple, list)) else value).shape)

    def stream_dim(self) -> tuple[Axes, int]:
        """Returns the axes of `self` and the argument `dim`, which is one of them, from 0 on."""
        axes = self.stream("self")
        return axes, self.dim("dim", len(axes))

    def dim(self, name: str, rank: int) -> int:
        """Returns the argument `name` as a dim in [0, rank)."""
        return int(self.args[name]) % rank

    def dims(self, name: str, rank: int) -> list[int]:
        """Returns the argument `name` as dims in [0, rank); None and [] mean all."""
        value = self.args[name]
        listed = [value] if isinstance(value, int) else list(value or range(rank))
        return [d % rank for d in listed]

    def meet(self, name: str, axes: Axes, index: int | None = None) -> None:
        """Records that a side input meets `axes`, aligned from the right."""
        value = self.args[name] if index is None else self.args[name][index]
        if not isinstance(value, Node) or self.axes(value) is not None:
            return
        if meets_tokens(value.meta["val"].shape, axes):
            self.edits[name, index] = Gather(axes)

    def resize(self, name: str, axes: Axes) -> None:
        """Records that the size argument `name` is the shape of `axes`."""
        if token_dims(axes):
            self.edits[name, None] = Resize(axes)

    def replace(self, name: str, value: object) -> None:
        """Records that the argument `name` takes another value when tokens are dropped."""
        self.edits[name, None] = Replace(value)

    def recount(self, name: str, compute: Callable[[Any, int], Any], around: int = 0) -> None:
        """Records that `compute(value, kept)` replaces an argument when tokens are dropped.

        It is for arguments that depend on the token count but have no token axis, such as the
        `cu_seqlens` of a packed attention. A tensor is computed in the graph, by a named function;
        a number now. Entries `around` the tokens, such as cached keys, are counted with the kept
        ones.
        """
        self.edits[name, None] = Recount(compute, around)

    def keep_tokens_whole(self, axes: Axes, dims: Sequence[int], what: str) -> None:
        """Refuses if `dims` hold the samples or the tokens."""
        for d in dims:
            if has_tokens(axes[d]):
                self.refuse("FVX012", f"it {what} the token axis")
            if has_batch(axes[d]):
                self.refuse("FVX013", f"it {what} the batch axis")

    def keep_apart(self, dims: Collection[Dim], verb: str) -> None:
        """Refuses an op that combines the entries of `dims` if they are tokens or samples."""
        if any(map(has_tokens, dims)):
            self.refuse("FVX013", f"it {verb} over the tokens")
        if any(map(has_batch, dims)):
            self.refuse("FVX013", f"it {verb} over the samples of the batch")

    def results(self, first: Axes, others: Axes | None = None) -> Axes | list[Axes]:
        """Returns the axes of one result, or the list of several: the others are like the first."""
        values = self.node.meta["val"]
        if not isinstance(values, (tuple, list)):
            return first
        return [first] + [first if others is None else others] * (len(values) - 1)

    def refuse(self, code: str, reason: str, *, advice: str = "") -> NoReturn:
        """Refuses this call; for the arguments see `passes.refusal.refuse`."""
        refuse(code, reason, self.node, advice=advice)


# --- the table of rules ------------------------------------------------------------------------


class Entry(NamedTuple):
    """What is known of an op: its axis rule, whether it is an attention, and who said so."""

    rule: Rule
    attends: bool = False
    declared: bool = False


_TABLE: dict[object, Entry] = {}


def rule(*targets: object, attends: bool = False, declared: bool = False) -> Callable[[Rule], Rule]:
    """Registers an axis rule.

    Args:
        targets: Ops as `"namespace::name"`, which covers all overloads and the in-place form, or
            functions that appear as call targets in a graph.
        attends: Whether these ops are attentions, whose keys are their second tensor.
        declared: Whether it is the user's rule.
    """

    def register(function: Rule) -> Rule:
        _TABLE.update(dict.fromkeys(targets, Entry(function, attends, declared)))
        return function

    return register


def find_entry(target: Any) -> Entry | None:
    """Returns what is known of an op, the target of a call, if anything."""
    if not isinstance(target, torch._ops.OpOverload):
        return _TABLE.get(target)
    name = target._schema.name
    found = _TABLE.get(name) or _TABLE.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in target.tags:
        return Entry(pointwise)
    return found


def apply_rule(node: Node, axes: Mapping[Node, Axes | list[Axes]]) -> tuple[Any, dict[Slot, Edit]]:
    """Returns the axes of a call's result and its edits.

    Raises:
        RefusedError: If the op has no rule, or its rule refuses the call.
    """
    found = find_entry(node.target)
    if found is None:
        advice = "register an axis rule for the op with axis_rule, or leave this kind dense"
        refuse("FVX010", "no axis rule is registered for this op", node, advice=advice)
    site = Site(node, axes)
    try:
        result = found.rule(site)
    except AxesError as error:
        site.refuse(error.code, str(error))
    return result, site.edits


# --- what rules share --------------------------------------------------------------------------


def pointwise(site: Site) -> Axes | list[Axes]:
    """Broadcasts all tensor operands."""
    inside = [axes for name in site.tensors if (axes := site.axes(site.args[name])) is not None]
    result = broadcast(inside)
    for name in site.tensors:
        site.meet(name, result)
    return site.results(filled(result, site.out_shape))


def declared_advice(nodes: Iterable[Node]) -> str:
    """Returns the advice to check what the user declared for these calls; empty if nothing."""
    entries = ((str(node.target), find_entry(node.target)) for node in nodes)
    names = sorted({name for name, entry in entries if entry is not None and entry.declared})
    return f"check what you declared for {', '.join(names)}: it leaves something out" * bool(names)


def filled(axes: Axes, shape: Sequence[int]) -> Axes:
    """Adds what side inputs broadcast: dims that the operands from inside the branch lack."""
    padded = ((),) * (len(shape) - len(axes)) + axes
    return tuple(dim or plain_dim(size) for dim, size in zip(padded, shape, strict=True))
