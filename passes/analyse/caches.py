"""Finds the caches that a block grows by `cat`, and how they grow. Analysis only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.analyse.branches import KINDS, Kind
from passes.base import Context, Draft
from passes.graph import CATS, bind, joined, memory_owner, op_name, outputs_of, written
from passes.trace.calls import Call, Rows
from passes.trace.capture import BlockProgram
from passes.trace.state import Path

SIZE: Final = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Growth:
    """A cache that a graph grows by `cat`.

    Attributes:
        input: Its position among the graph's inputs.
        output: The position of the grown one among the outputs.
        dim: The dim that grows.
        rows: By how many entries.
        spare: How many more later steps will append.
        taken: The rows of the batch that are left from now on; None for all of the input.
    """

    input: int
    output: int
    dim: int
    rows: int
    spare: int = 0
    taken: Rows | None = None

    def past(self, cache: Tensor) -> Tensor:
        """Returns what grows of a cache."""
        return cache if self.taken is None else self.taken.of(cache)

    def final(self, past: Tensor) -> int:
        """Returns how many entries `past` has after the last step."""
        return past.shape[self.dim] + self.rows + self.spare

    def front(self, buffer: Tensor, past: Tensor) -> Tensor:
        """Returns the view of a buffer that is `past` grown by this step."""
        return buffer.narrow(self.dim, 0, past.shape[self.dim] + self.rows)


@dataclass(frozen=True)
class Copied:
    """A cache that is copied as it grows, and why."""

    input: int
    reason: str


@dataclass(frozen=True)
class LaterRows:
    """What a branch appends to its cache at the steps to come.

    Attributes:
        pruned: The tokens it keeps if it prunes, by its kind.
        dense: All tokens of these steps.
    """

    pruned: tuple[tuple[Kind, int], ...]
    dense: int


@dataclass(frozen=True)
class Buffered:
    """A program that appends to buffers.

    Attributes:
        graph_module: Takes the grown caches in the place of the caches; see `append_in_place`.
        growths: What it appends to.
    """

    graph_module: GraphModule
    growths: tuple[Growth, ...]


class FindCaches:
    """Finds the caches that the graph grows, and what later steps append to each."""

    name = "find_caches"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with its caches."""
        later = context.later
        if later is None:
            return draft
        places = places_of_caches(context.call, draft.inputs, draft.captured)
        found = find_growing(draft.graph_module, *places)
        earlier = draft.at_earlier_sizes
        if earlier is not None and find_growing(earlier, *places) != found:
            found = [Copied(cache.input, "the number of its new entries varies") for cache in found]
        # A branch that prunes at the last step only has all its tokens cached before.
        prunable = (b for b in draft.prunable(KINDS) if b.index not in draft.needed_later)
        rows = dict(later.pruned)
        kept = {node: rows[branch.kind] for branch in prunable for node in branch.region}
        outputs = outputs_of(draft.source.graph)

        def spare(cache: Growth) -> int:
            return kept.get(outputs[cache.output], later.dense)

        caches = (replace(c, spare=spare(c)) if isinstance(c, Growth) else c for c in found)
        return replace(draft, caches=tuple(caches))


def places_of_caches(
    call: Call, inputs: Sequence[Path], captured: BlockProgram
) -> tuple[list[int], list[int]]:
    """Returns which inputs may be caches: `rewritten` and `given` of `find_growing`."""
    stored = [write.place for write in captured.writes]
    rewritten = [i for i, path in enumerate(inputs) if any(path[: len(s)] == s for s in stored)]
    given = [i for i, p in enumerate(inputs) if p[0][1] != "module" and p != call.stream]
    return rewritten, given


def find_growing(
    graph_module: GraphModule, rewritten: Collection[int], given: Collection[int]
) -> list[Growth | Copied]:
    """Finds the caches that a graph grows by `cat`.

    Args:
        graph_module: A captured graph, rewritten by other passes or not.
        rewritten: Positions of the inputs in whose place the call stores something.
        given: Positions of the caller's inputs, which are caches if the call returns them grown.
    """
    graph = graph_module.graph
    outputs = outputs_of(graph)
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: dict[int, Growth | Copied] = {}
    for cat in [node for node in graph.nodes if op_name(node) in CATS]:
        caches = {*rewritten, *(given if cat in outputs else ())}
        for past in {memory_owner(operand) for operand in joined(cat)}:
            if places.get(past) in caches:
                found[places[past]] = _growth(places[past], cat, past, outputs)
    return [found[place] for place in sorted(found)]


def ends_of_caches(graph_module: GraphModule, call: Call, captured: BlockProgram) -> dict[int, int]:
    """Returns the inputs that hold the newest keys, by position, and the dim that has them.

    The block joins them with its new ones, and keeps what it joined or the new ones beside them.
    """
    graph = graph_module.graph
    rewritten, given = places_of_caches(call, captured.inputs, captured)
    appended = [write.place for write in captured.writes if isinstance(write.place[-1][1], int)]
    lists = [(place[:-1], len(place) - 1) for place in appended]
    chunks = [i for i, p in enumerate(captured.inputs) if any(p[:n] == at for at, n in lists)]
    caches = {*rewritten, *given, *chunks}
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    kept = {memory_owner(n) for out in outputs_of(graph) for n in (out, *out.all_input_nodes)}
    found = {}
    for cat in [node for node in graph.nodes if op_name(node) in CATS]:
        operands = [_uncast(operand) for operand in joined(cat)]
        past = [places[o] for o in operands if places.get(o) in caches]
        new = {memory_owner(o) for o in operands if o not in places}
        if past and new and not kept.isdisjoint({cat, *new}):
            found[past[-1]] = bind(cat)["dim"] % cat.meta["val"].dim()
    return found


def _uncast(node: Node) -> Node:
    """Follows a tensor back through casts and copies."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        before, after = source.meta.get("val"), node.meta["val"]
        if not isinstance(before, Tensor) or before.shape != after.shape:
            break
        node = source
    return node


def new_buffer(past: Tensor, growth: Growth) -> Tensor:
    """Returns a buffer of the final length that starts with the entries of `past`."""
    shape = list(past.shape)
    shape[growth.dim] = growth.final(past)
    buffer = past.new_empty(shape)
    buffer.narrow(growth.dim, 0, past.shape[growth.dim]).copy_(past)
    return buffer


def _growth(place: int, cat: Node, past: Node, outputs: Sequence[Node]) -> Growth | Copied:
    reason = _obstacle(cat, past, outputs)
    if reason is not None:
        return Copied(place, reason)
    _, new = joined(cat)
    shape = new.meta["val"].shape
    dim = bind(cat)["dim"] % len(shape)
    return Growth(place, outputs.index(cat), dim, shape[dim])


def _obstacle(cat: Node, past: Node, outputs: Sequence[Node]) -> str | None:
    """Returns why a `cat` cannot append to a buffer, if it cannot."""
    operands = joined(cat)
    if len(operands) != 2 or operands[0] is not past:
        return "its new entries are not joined to the end of what was stored"
    if any({memory_owner(t) for t in written(n)} & {past, cat} for n in cat.graph.nodes):
        return "the block overwrites it"
    if cat not in outputs:
        return "what is joined is stored in another form"
    if len({node.meta["val"].dtype for node in (*operands, cat)}) > 1:
        return "joining changes its dtype"
    if any(user is not cat and user.target is not SIZE for user in past.users):
        return "its old entries are also read apart from the new ones"
    return None
