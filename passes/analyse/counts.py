"""Refuses branches whose values depend on how many tokens there are.

A pruned branch is the branch run on the kept tokens. A number that the forward makes of the token
count, such as a factor log(L), is fixed in the graph of all tokens. So the block is captured again
as it would run on the kept tokens: it must run the same ops, with the same numbers, on values of
the shapes that the axis rules predict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from passes.analyse.axes import (
    Axes,
    AxesError,
    dim_size,
    has_tokens,
    regroup,
    shape_of,
    stream_axes,
)
from passes.analyse.branches import Branch, is_like_stream
from passes.analyse.prunable import gathered
from passes.analyse.rules.site import declared_advice
from passes.base import Context, Draft
from passes.graph import bind, computing, numbers_of, op_name, reach
from passes.refusal import Refusal, RefusedError
from passes.trace.calls import CUT, Call
from passes.trace.capture import capture
from passes.trace.state import Path, get
from passes.trace.symbols import NOTHING_VARIES
from passes.user_frames import where

log = logging.getLogger(__name__)

_KEPT: Final = "the kept tokens"
_EXPANDS: Final = {"aten::expand", "aten::broadcast_to"}
_VIEWS: Final = {
    "aten::view", "aten::reshape", "aten::unsqueeze", "aten::squeeze", "aten::flatten",
}  # fmt: skip

_FORMED: Final = {"aten::type_as", "aten::expand_as", "aten::view_as", "aten::reshape_as"}
"""Ops that read the values of their first operand alone."""

Cut = Mapping[Path, Mapping[int, int]]
"""The sizes of some dims of inputs, by the path of the input and the dim."""


class _Cuts(NamedTuple):
    """What is shorter where a block runs on the kept tokens.

    Attributes:
        certain: The inputs of which the axes tell it.
        guessed: Those that only have a dim as long as the token map, and from which a branch, or
            what is added to the stream, computes what it reads per token.
        lines: Where the stream meets what is not an input of the block.
        known: Whether each such value of the wanted branches has either. One that has none is cut
            from a table at places that the loop says.
    """

    certain: Cut
    guessed: Cut
    lines: frozenset[str]
    known: bool

    def of(self, call: Call) -> Call:
        """Returns the call with all of it."""
        return replace(call, cut={**self.certain, **self.guessed}, cut_lines=self.lines)


Twins = Mapping[Node, Node]
"""The node of the graph of the kept tokens that runs the same op, by node."""


class CheckCounts:
    """At a pruned step, compares the branches with the block as it runs on the kept tokens."""

    name = "check_counts"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with the branches refused that depend on the token count."""
        step = context.step
        if step is None:
            return draft
        by_count: dict[int, list[Branch]] = {}
        for branch in draft.prunable(context.kinds):
            by_count.setdefault(step.keeps(branch.kind), []).append(branch)
        for kept, wanted in by_count.items():
            (captured,) = {context.captured[branch.index].shape[1] for branch in wanted}
            refused = _refused(context.call, draft, wanted, kept, captured)
            for index, refusal in refused.items():
                draft = draft.refusing(index, refusal)
        return draft


def _refused(
    call: Call, draft: Draft, wanted: list[Branch], kept: int, captured: int
) -> dict[int, Refusal]:
    """Returns why branches are refused that do something else where the block runs on `kept`.

    A block that computes positions of square maps may not run on `kept` tokens. It ran on as many
    as were `captured`, and so it is compared with itself on these.
    """
    if not kept:
        return {}
    cuts = _cuts(call, draft, wanted, kept)
    refused = _checked(call, draft, wanted, captured, cuts)
    if refused is None:
        # It runs other ops on fewer tokens, and fails on them if the stream meets all of a table.
        whole = _cuts(call, draft, wanted, kept, of_stream=False)
        if whole != cuts:
            refused = _checked(call, draft, wanted, captured, whole)
    if refused is None:
        log.debug("%s stays unchecked on %d tokens", call.module, kept)
    return refused or {}


def _checked(
    call: Call, draft: Draft, wanted: list[Branch], captured: int, cuts: _Cuts
) -> dict[int, Refusal] | None:
    """Returns why branches are refused, with these cuts; None if it is unknown."""
    kept = cuts.certain[call.stream][1]
    call = replace(cuts.of(call), varying=NOTHING_VARIES)
    try:
        refused = _compared(call, draft, wanted, kept)
    except RefusedError as error:
        refused = None
        if cuts.known:
            failed = _failures(error.refusal, draft, wanted, kept)
            other = _on_captured(call, draft, wanted, captured)
            refused = failed if other is None else {b: failed.get(b, other[b]) for b in other}
    if refused and cuts.guessed:
        with suppress(RefusedError):  # what runs with the guessed inputs whole is right too
            uncut = _compared(replace(call, cut=cuts.certain), draft, wanted, kept)
            refused = refused if uncut is None else {b: uncut[b] for b in refused if b in uncut}
    return refused


def _on_captured(
    call: Call, draft: Draft, wanted: list[Branch], captured: int
) -> dict[int, Refusal] | None:
    """Returns what branches do otherwise on as many tokens as were captured; None if unknown."""
    call = _cuts(call, draft, wanted, captured).of(call)
    if captured == get(call.roots(), call.stream).shape[1]:
        return None
    with suppress(RefusedError):
        return _compared(call, draft, wanted, captured, f"{captured} tokens")
    return None


def _compared(
    call: Call, draft: Draft, wanted: list[Branch], kept: int, what: str = _KEPT
) -> dict[int, Refusal] | None:
    """Returns what each branch does otherwise on `kept` tokens; None if it cannot be compared.

    Other ops may run, or, on other tokens than the kept ones, tables that are looked up be others.

    Raises:
        RefusedError: If the block does not run on them.
    """
    other = capture(call)
    ops, others = computing(draft.source.graph), computing(other.graph_module.graph)
    others = [node for node in others if node.target is not CUT or not call.cut_lines]
    if [node.target for node in ops] != [node.target for node in others]:
        return None
    if what != _KEPT and other.inputs != draft.captured.inputs:
        return None
    twins = dict(zip(ops, others, strict=True))
    found = {b.index: next(_differences(b, twins, kept, what), None) for b in wanted}
    return {index: refusal for index, refusal in found.items() if refusal is not None}


def _failures(error: Refusal, draft: Draft, wanted: list[Branch], kept: int) -> dict[int, Refusal]:
    """Returns why branches are refused whose code does not run on the kept tokens."""
    failure = Refusal("FVX023", f"on {kept} tokens: {error.reason}", where=error.where)
    return {branch.index: failure for branch in _failed(error.where, draft, wanted)}


def _failed(line: str, draft: Draft, wanted: list[Branch]) -> list[Branch]:
    """Returns the branches that a line of the user's is in; all if it is in none.

    One that is refused already does not run on the kept tokens, and so its failure means nothing.
    """
    found = [b for b in draft.found if any(where(node) == line for node in b.region)]
    return [b for b in found if b in wanted] if found else wanted


def _cuts(
    call: Call, draft: Draft, wanted: list[Branch], kept: int, *, of_stream: bool = True
) -> _Cuts:
    """Returns the sizes, on the kept tokens, of what has an entry per token.

    The block runs as a whole, and so these are the inputs of all its branches, and, if asked for,
    of the stream between them.
    """
    placeholders = draft.source.graph.find_nodes(op="placeholder")
    paths = dict(zip(placeholders, draft.captured.inputs, strict=True))
    certain: dict[Path, dict[int, int]] = {call.stream: {1: kept}}
    guessed: dict[Path, dict[int, int]] = {}
    lines = set()
    tokens = get(call.roots(), call.stream).shape[1]
    known = True
    stream = placeholders[draft.captured.inputs.index(call.stream)]
    by_stream = _met_by_stream(draft, stream) if of_stream else ()
    by_branches = ((b, *each) for b in draft.found for each in gathered(b))
    for branch, node, side, axes in (*by_stream, *by_branches):
        source, dims = _origin(side, _aligned(axes, side))
        if source in paths:
            sizes = {d: dim_size(dim, kept) for d, dim in enumerate(dims) if has_tokens(dim)}
            certain[paths[source]] = sizes
            continue
        shapes = {n: list(n.meta["val"].shape) for n in _inputs_of(source) if n in paths}
        found = {n: shape.index(tokens) for n, shape in shapes.items() if shape.count(tokens) == 1}
        guessed |= {paths[node]: {dim: kept} for node, dim in found.items()}
        if branch is None:
            lines.add(where(node))
        known = known and bool(found or not shapes or branch not in wanted)
    guessed = {path: sizes for path, sizes in guessed.items() if path not in certain}
    return _Cuts(certain, guessed, frozenset(lines), known)


def _met_by_stream(draft: Draft, stream: Node) -> Iterator[tuple[None, Node, Node, Axes]]:
    """Yields where the stream meets something per token between branches, and the axes it meets."""
    within = {node for branch in draft.found for node in branch.region}
    inside = set(reach([stream], _readers))
    for node in draft.source.graph.nodes:
        if node in inside - within and _joins_by_token(node) and is_like_stream(node, stream):
            axes = stream_axes(node.meta["val"].shape)
            for side in node.all_input_nodes:
                if side not in inside and isinstance(side.meta["val"], Tensor):
                    if any(map(has_tokens, _aligned(axes, side))):
                        yield None, node, side, axes


def _readers(node: Node) -> list[Node]:
    """Returns the calls that read the values of another one, and not its form alone."""
    return [n for n in node.users if op_name(n) not in _FORMED or n.args[0] is node]


def _joins_by_token(node: Node) -> bool:
    """Whether a call joins the values of several operands for each token."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or (op_name(node) == "aten::cat" and bind(node)["dim"] in (2, -1))


def _inputs_of(side: Node) -> Iterator[Node]:
    """Yields the tensors that a value is computed from."""
    computed = reach([side], lambda n: n.all_input_nodes)
    return (n for n in computed if n.op == "placeholder" and isinstance(n.meta["val"], Tensor))


def _aligned(axes: Axes, side: Node) -> Axes:
    """Returns the axes of a side input, of those that it meets aligned from the right."""
    shape = side.meta["val"].shape
    padded = ((),) * (len(shape) - len(axes)) + axes[-len(shape) or len(axes) :]
    return tuple(() if size == 1 else dim for size, dim in zip(shape, padded, strict=True))


def _origin(side: Node, axes: Axes) -> tuple[Node, Axes]:
    """Follows a side input back through views, casts and the like, to where it is handed in."""
    while len(side.all_input_nodes) == 1:
        (source,) = side.all_input_nodes
        if op_name(source) == "aten::unbind":
            removed = source.args[1] if len(source.args) > 1 else 0
            (side,) = source.all_input_nodes
            place = removed % side.meta["val"].dim()
            axes = (*axes[:place], (), *axes[place:])
            continue
        if not isinstance(source.meta["val"], Tensor):  # one of several results
            break
        shape, name = list(source.meta["val"].shape), op_name(side)
        if name in _EXPANDS:
            axes = _aligned(axes, source)
        elif name in _VIEWS:
            try:
                axes = regroup(axes, shape)
            except AxesError:
                break
        elif shape != list(side.meta["val"].shape):
            break
        side = source
    return side, axes


def _differences(branch: Branch, twins: Twins, kept: int, what: str) -> Iterator[Refusal]:
    """Yields what a branch does otherwise where the block runs on `kept` tokens."""
    for node in (node for node in branch.region if node in twins):
        for wanted, found in _shapes(node, twins[node], branch, kept):
            if wanted != found:
                reason = f"on {what} it gives {found}, where these are {wanted}"
                yield Refusal.at(node, "FVX012", reason)
        edits = branch.edits.get(node, {})
        for source in (node, *_common_sides(node, branch, twins)):
            edited = {name for name, _ in edits} if source is node else set()
            values, others = (numbers_of(n, edited) for n in (source, twins[source]))
            for value, other in zip_longest(values, others):
                if value != other:
                    reason = f"{value} would be {other} for {what}"
                    yield Refusal.at(node, "FVX022", reason, advice=declared_advice([node]))


def _shapes(
    node: Node, twin: Node, branch: Branch, kept: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the shapes of a call's results, as predicted and as found."""
    axes, value = branch.axes[node], twin.meta["val"]
    pairs = zip(axes, value, strict=False) if isinstance(axes, list) else [(axes, value)]
    for each, result in pairs:
        if isinstance(result, Tensor):
            yield shape_of(each, kept), list(result.shape)


def _common_sides(node: Node, branch: Branch, twins: Twins) -> Iterator[Node]:
    """Yields what computes the operands from outside the branch that have no entry per token."""
    edits = branch.edits.get(node, {})
    for name, value in bind(node).items():
        for index, side in (
            enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        ):
            if isinstance(side, Node) and side not in branch.axes and (name, index) not in edits:
                computed = reach([side], lambda n: n.all_input_nodes)
                yield from (n for n in computed if n in twins and n not in branch.axes)
