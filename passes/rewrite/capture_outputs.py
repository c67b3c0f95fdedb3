"""Makes the graph of the cache step also return what its branches add, for CTR to restore from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from passes.analyse.branches import Branch, is_like_stream
from passes.base import Context, Draft
from passes.graph import copy_graph, memory_owner, outputs_of, placeholder_of, written


class CaptureOutputs:
    """At the cache step, adds the outputs of the branches that prune later."""

    name = "capture_outputs"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft whose graph ends with the outputs of its branches.

        Branches that add in another layout stay dense, and CTR could not read what they add.
        """
        if context.step is not None:
            return draft
        stream = placeholder_of(draft, context.call.stream)
        assert stream is not None
        alike = (branch for branch in draft.added if is_like_stream(branch.out, stream))
        wanted = [branch for branch in alike if branch.kind in context.kinds]
        graph_module = capture_outputs(draft.graph_module, wanted)
        features = tuple(branch.index for branch in wanted)
        return replace(draft, graph_module=graph_module, features=features)


def capture_outputs(graph_module: GraphModule, branches: Iterable[Branch]) -> GraphModule:
    """Returns a copy of a graph whose outputs end with the output of every branch, in order.

    An output that a later op overwrites is cloned first.
    """
    graph, copies = copy_graph(graph_module.graph)
    captured = [_intact(copies[branch.out]) for branch in branches]
    graph.output_node().args = ([*outputs_of(graph), *captured],)
    return GraphModule(graph_module, graph)


def _intact(out: Node) -> Node:
    graph, owner = out.graph, memory_owner(out)
    later = (target for node in graph.nodes if out < node for target in written(node))
    if all(memory_owner(target) is not owner for target in later):
        return out
    with graph.inserting_after(out):
        clone = graph.call_function(torch.ops.aten.clone.default, (out,))
    clone.meta = dict(out.meta)
    return clone
