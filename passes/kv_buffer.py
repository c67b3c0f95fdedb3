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
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graphs import memory_owner, op_name, outputs_of, written
from passes.rules import bind

_CATS: Final = {"aten::cat", "aten::concat", "aten::concatenate"}
_SIZE: Final = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Growth:
    """A cache that a graph grows by `cat`.

    Attributes:
        input: Its position among the graph's inputs.
        output: The position of the grown one among the outputs.
        dim: The dim that grows.
        rows: By how many entries.
        spare: How many more later steps will append.
    """

    input: int
    output: int
    dim: int
    rows: int
    spare: int = 0

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
        pruned: The tokens it keeps, if it prunes.
        dense: All tokens of these steps.
    """

    pruned: int
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


@dataclass(frozen=True)
class CacheReport:
    """A cache that a program grows: where it is, and why it is copied, if it is."""

    name: str
    copied: str | None


def find_growing(
    graph_module: GraphModule, rewritten: Collection[int], handed_in: Collection[int]
) -> list[Growth | Copied]:
    """Finds the caches that a graph grows by `cat` (analysis only).

    Args:
        graph_module: A captured graph, rewritten by other passes or not.
        rewritten: Positions of the inputs in whose place the call stores something.
        handed_in: Those of the inputs that are caches if the call returns them grown.
    """
    nodes = graph_module.graph.nodes
    outputs = outputs_of(graph_module.graph)
    places = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
    found: dict[int, Growth | Copied] = {}
    for cat in [node for node in nodes if op_name(node) in _CATS]:
        caches = {*rewritten, *(handed_in if cat in outputs else ())}
        for past in {memory_owner(operand) for operand in _operands(cat)}:
            if places.get(past) in caches:
                found[places[past]] = _growth(places[past], cat, past, outputs)
    return [found[place] for place in sorted(found)]


def new_buffer(past: Tensor, growth: Growth) -> Tensor:
    """Returns a buffer of the final length that starts with the entries of `past`."""
    shape = list(past.shape)
    shape[growth.dim] = growth.final(past)
    buffer = past.new_empty(shape)
    buffer.narrow(growth.dim, 0, past.shape[growth.dim]).copy_(past)
    return buffer


def append_in_place(graph_module: GraphModule, growths: Sequence[Growth]) -> GraphModule:
    """Returns a copy of a graph that appends to buffers (rewrite only).

    Args:
        graph_module: The graph; it stays as it is.
        growths: What to rewrite, as found in it. The copy takes at each `input` the grown cache: a
            view, of `rows` more than the cache along `dim`, that starts with the cache's values.
    """
    graph = type(graph_module.graph)()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    placeholders, outputs = graph.find_nodes(op="placeholder"), outputs_of(graph)
    for growth in growths:
        _append(placeholders[growth.input], outputs[growth.output], growth)
    graph.lint()
    return GraphModule(graph_module, graph)


def _append(grown: Node, cat: Node, growth: Growth) -> None:
    graph = cat.graph
    _, new = _operands(cat)
    with graph.inserting_before(cat):
        if growth.rows:
            end = (grown, growth.dim, -growth.rows, sys.maxsize)
            room = graph.call_function(torch.ops.aten.slice.Tensor, end)
            write = graph.call_function(torch.ops.aten.copy_.default, (room, new))
            for node in (room, write):
                node.meta = {key: value for key, value in cat.meta.items() if key != "val"}
    for size in [user for user in grown.users if user.target is _SIZE]:
        if size.args[1] == growth.dim:
            with graph.inserting_after(size):
                filled = graph.call_function(operator.sub, (size, growth.rows))
            size.replace_all_uses_with(filled)
            filled.args = (size, growth.rows)
    cat.replace_all_uses_with(grown)
    grown.meta = {**grown.meta, "val": cat.meta["val"]}
    graph.erase_node(cat)


def _growth(place: int, cat: Node, past: Node, outputs: Sequence[Node]) -> Growth | Copied:
    reason = _obstacle(cat, past, outputs)
    if reason is not None:
        return Copied(place, reason)
    _, new = _operands(cat)
    shape = new.meta["val"].shape
    dim = bind(cat)["dim"] % len(shape)
    return Growth(place, outputs.index(cat), dim, shape[dim])


def _obstacle(cat: Node, past: Node, outputs: Sequence[Node]) -> str | None:
    """Returns why a `cat` cannot append to a buffer, if it cannot."""
    operands = _operands(cat)
    if len(operands) != 2 or operands[0] is not past:
        return "its new entries are not joined to the end of what was stored"
    if any({memory_owner(t) for t in written(n)} & {past, cat} for n in cat.graph.nodes):
        return "the block overwrites it"
    if cat not in outputs:
        return "what is joined is stored in another form"
    if len({node.meta["val"].dtype for node in (*operands, cat)}) > 1:
        return "joining changes its dtype"
    if any(user is not cat and user.target is not _SIZE for user in past.users):
        return "its old entries are also read apart from the new ones"
    return None


def _operands(cat: Node) -> list[Node]:
    return list(bind(cat)["tensors"])
