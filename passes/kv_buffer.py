"""Caches that a block grows by `cat` become buffers that it appends to.

`cat((past, new), dim)` copies all of `past` at every step, though the schedule fixes how long it
gets. The rewritten graph takes, in the place of `past`, a view of a larger buffer that ends with
room for the new rows, and writes these. Who calls it provides the view, with `past` in front.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graphs import memory_owner, outputs_of, written

_CAT = torch.ops.aten.cat.default
_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Growth:
    """A cache that a graph grows by `cat`.

    Attributes:
        input: Its position among the graph's inputs.
        output: The position of the grown one among the outputs.
        dim: The dim that grows.
        rows: By how many entries.
    """

    input: int
    output: int
    dim: int
    rows: int


@dataclass(frozen=True)
class Copied:
    """A cache that is copied as it grows, and why."""

    input: int
    reason: str


def find_growing(
    graph_module: GraphModule, rewritten: Collection[int], handed_in: Collection[int]
) -> list[Growth | Copied]:
    """Finds the caches that a graph grows by `cat` (analysis only).

    Args:
        graph_module: A captured graph, rewritten by other passes or not.
        rewritten: Positions of the inputs in whose place the call stores something.
        handed_in: Those of the inputs that are caches if the call returns them grown.
    """
    graph = graph_module.graph
    outputs = outputs_of(graph)
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: dict[int, Growth | Copied] = {}
    for cat in graph.find_nodes(op="call_function", target=_CAT):
        caches = {*rewritten, *(handed_in if cat in outputs else ())}
        for past in {memory_owner(operand) for operand in cat.args[0]}:
            if places.get(past) in caches:
                found[places[past]] = _growth(places[past], cat, past, outputs)
    return [found[place] for place in sorted(found)]


def new_buffer(past: Tensor, dim: int, length: int) -> Tensor:
    """Returns a buffer of `length` entries along `dim` that starts with those of `past`."""
    shape = list(past.shape)
    shape[dim] = length
    buffer = past.new_empty(shape)
    buffer.narrow(dim, 0, past.shape[dim]).copy_(past)
    return buffer


def append_in_place(graph_module: GraphModule, growths: Sequence[Growth]) -> GraphModule:
    """Returns a copy of a graph that appends to buffers (rewrite only).

    Args:
        graph_module: The graph; it stays as it is.
        growths: What to rewrite, as found in it. The copy takes at each `input` the grown cache: a
            view, of `rows` more than the cache along `dim`, that starts with the cache's values.
    """
    made = GraphModule(graph_module, type(graph_module.graph)())
    made.graph.output(made.graph.graph_copy(graph_module.graph, {}))
    placeholders = made.graph.find_nodes(op="placeholder")
    outputs = outputs_of(made.graph)
    for growth in growths:
        _append(placeholders[growth.input], outputs[growth.output], growth)
    made.graph.lint()
    made.recompile()
    return made


def _append(grown: Node, cat: Node, growth: Growth) -> None:
    graph, new = cat.graph, cat.args[0][1]  # type: ignore[index, union-attr]
    with graph.inserting_before(cat):
        end = (grown, growth.dim, -growth.rows, sys.maxsize)
        room = graph.call_function(torch.ops.aten.slice.Tensor, end)
        write = graph.call_function(torch.ops.aten.copy_.default, (room, new))
        room.meta, write.meta = ({k: v for k, v in cat.meta.items() if k != "val"} for _ in "rw")
    for size in [user for user in grown.users if user.target is _SIZE]:
        if size.args[1] == growth.dim:
            with graph.inserting_after(size):
                filled = graph.call_function(operator.sub, (size, growth.rows))
            size.replace_all_uses_with(filled, lambda user, filled=filled: user is not filled)
    cat.replace_all_uses_with(grown)
    grown.meta = {**grown.meta, "val": cat.meta["val"]}
    graph.erase_node(cat)


def _growth(place: int, cat: Node, past: Node, outputs: Sequence[Node]) -> Growth | Copied:
    reason = _obstacle(cat, past, outputs)
    if reason is not None:
        return Copied(place, reason)
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    _, new = cat.args[0]  # type: ignore[union-attr, misc]
    shape = new.meta["val"].shape  # type: ignore[union-attr]
    dim %= len(shape)  # type: ignore[operator]
    return Growth(place, outputs.index(cat), dim, shape[dim])


def _obstacle(cat: Node, past: Node, outputs: Sequence[Node]) -> str | None:
    """Returns why a `cat` cannot append to a buffer, if it cannot."""
    operands = cat.args[0]
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2 or operands[0] is not past:
        return "its new entries are not joined to the end of what was stored"
    if cat not in outputs:
        return "what is joined is stored in another form"
    _, new = operands
    assert isinstance(new, Node)
    if len({node.meta["val"].dtype for node in (past, new, cat)}) > 1:
        return "joining changes its dtype"
    if any(user is not cat and user.target is not _SIZE for user in past.users):
        return "its old entries are also read apart from the new ones"
    if any({memory_owner(t) for t in written(n)} & {past, cat} for n in cat.graph.nodes):
        return "the block overwrites it"
    return None

