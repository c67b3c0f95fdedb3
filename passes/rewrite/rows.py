"""Runs some rows of a batch and hands the token map of these to all. Rewrite only.

The graph before is that of the rows that are left. This one takes the inputs of all rows, slices
them, and repeats the token map that it returns. Caches that it returns or writes keep the rows that
are left: a later step reads them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from passes.base import Context, Draft
from passes.graph import copy_graph, outputs_of
from passes.refusal import refuse
from passes.trace.calls import Rows
from passes.trace.state import get


class DropRows:
    """Makes the graph of some rows take and return those of the whole batch."""

    name = "drop_rows"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft, whose graphs slice the inputs in `context.call.rows`."""
        call, buffered = context.call, draft.buffered
        if not call.rows:
            return draft
        rows = {i: call.rows[path] for i, path in enumerate(draft.inputs) if path in call.rows}
        batch, *shape = get(call.roots(), call.stream).shape
        left = call.rows[call.stream].count
        results = range(draft.captured.result_count)
        values = [node.meta["val"].shape for node in outputs_of(draft.graph_module.graph)]
        maps = {i: batch // left for i in results if values[i] == (left, *shape)}
        if not maps:
            refuse("FVX024", f"on {left} rows no result has the shape {(left, *shape)}")
        if buffered is not None:
            growths = tuple(replace(g, taken=rows.get(g.input)) for g in buffered.growths)
            others = {i: r for i, r in rows.items() if i not in {g.input for g in growths}}
            graph_module = drop_rows(buffered.graph_module, others, maps)
            buffered = replace(buffered, graph_module=graph_module, growths=growths)
        graph_module = drop_rows(draft.graph_module, rows, maps)
        return replace(draft, graph_module=graph_module, buffered=buffered)


def drop_rows(
    graph_module: GraphModule, rows: Mapping[int, Rows], maps: Mapping[int, int]
) -> GraphModule:
    """Returns a copy of a graph that takes inputs and returns outputs of more rows.

    Args:
        graph_module: The graph; it stays as it is.
        rows: What it reads of inputs, by position.
        maps: How often outputs are repeated along their first dim, by position.
    """
    graph, _ = copy_graph(graph_module.graph)
    placeholders, outputs = graph.find_nodes(op="placeholder"), outputs_of(graph)
    first = placeholders[-1].next
    for place, part in rows.items():
        _slice(graph, placeholders[place], part, first)
    with graph.inserting_before(graph.output_node()):
        for place, times in maps.items():
            args = ([outputs[place]] * times,)
            made = graph.call_function(torch.ops.aten.cat.default, args)
            made.meta = {k: v for k, v in outputs[place].meta.items() if k != "val"}
            outputs[place] = made
    graph.output_node().args = (outputs,)
    return GraphModule(graph_module, graph)


def _slice(graph: Graph, whole: Node, rows: Rows, before: Node) -> None:
    """Makes all users of an input read some of its rows."""
    end = rows.first + rows.count
    with graph.inserting_before(before):
        part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, rows.dim, rows.first, end))
    part.meta = {key: value for key, value in whole.meta.items() if key == "val"}
    whole.replace_all_uses_with(part, delete_user_cb=lambda user: user is not part)
