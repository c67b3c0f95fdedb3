"""Makes a captured graph also return what its branches add: the features that CTR restores from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from passes.branches import FoundBranch
from passes.graphs import mutated, outputs_of


def capture_features(graph_module: GraphModule, branches: Iterable[FoundBranch]) -> GraphModule:
    """Returns a copy of a graph whose outputs end with the output of every branch, in order.

    An output that a later op overwrites is cloned first.
    """
    source = graph_module.graph
    copy = type(source)()
    made: dict[Node, Node] = {}
    outs = [branch.out for branch in branches]
    features: dict[Node, Node] = {}
    for node in source.nodes:
        if node.op == "output":
            continue
        made[node] = copy.node_copy(node, made.__getitem__)
        if node in outs:
            features[node] = made[node]
            if any(mutated(user) is node for user in node.users):
                features[node] = copy.call_function(torch.ops.aten.clone.default, (made[node],))
                features[node].meta = dict(node.meta)
    results = [made[value] for value in outputs_of(source)]
    copy.output(results + [features[out] for out in outs])
    copy.lint()
    return GraphModule(graph_module, copy)
