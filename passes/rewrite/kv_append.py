"""Caches that a block grows by `cat` become buffers that it appends to. Rewrite only.

`cat((past, new), dim)` copies all of `past` at every step, though the schedule fixes how long it
gets. The rewritten graph takes, in the place of `past`, a view of a larger buffer that ends with
room for the new rows, and writes these. The caller provides the view, with `past` in front.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from passes.analyse.caches import SIZE, Buffered, Growth
from passes.base import Context, Draft
from passes.graph import copy_graph, joined, outputs_of


class AppendKV:
    """Makes a second form of the graph, which appends to buffers."""

    name = "append_kv"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with its buffered form, if any cache can be in a buffer."""
        growths = tuple(cache for cache in draft.caches if isinstance(cache, Growth))
        if not growths:
            return draft
        buffered = Buffered(append_in_place(draft.graph_module, growths), growths)
        return replace(draft, buffered=buffered)


def append_in_place(graph_module: GraphModule, growths: Sequence[Growth]) -> GraphModule:
    """Returns a copy of a graph that appends to buffers.

    Args:
        graph_module: The graph; it stays as it is.
        growths: What to rewrite, as found in it. The copy takes at each `input` the grown cache: a
            view, of `rows` more than the cache along `dim`, that starts with the cache's values.
    """
    graph, _ = copy_graph(graph_module.graph)
    placeholders, outputs = graph.find_nodes(op="placeholder"), outputs_of(graph)
    for growth in growths:
        _append(placeholders[growth.input], outputs[growth.output], growth)
    return GraphModule(graph_module, graph)


def _append(grown: Node, cat: Node, growth: Growth) -> None:
    graph = cat.graph
    _, new = joined(cat)
    with graph.inserting_before(cat):
        if growth.rows:
            end = (grown, growth.dim, -growth.rows, sys.maxsize)
            room = graph.call_function(torch.ops.aten.slice.Tensor, end)
            write = graph.call_function(torch.ops.aten.copy_.default, (room, new))
            for node in (room, write):
                node.meta = {key: value for key, value in cat.meta.items() if key != "val"}
    for size in [user for user in grown.users if user.target is SIZE]:
        if size.args[1] == growth.dim:
            with graph.inserting_after(size):
                filled = graph.call_function(operator.sub, (size, growth.rows))
            size.replace_all_uses_with(filled)
            filled.args = (size, growth.rows)
    cat.replace_all_uses_with(grown)
    grown.meta = {**grown.meta, "val": cat.meta["val"]}
    graph.erase_node(cat)
