"""Finds the branches whose keys later steps need whole. Analysis only.

What a step drops is missing in the KV cache at the steps after it. Such a branch prunes at the last
step only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.analyse.branches import Branch
from passes.analyse.caches import Growth, find_growing, places_of_caches
from passes.analyse.prunable import gathered
from passes.base import Context, Draft
from passes.graph import bind, computing, plain, reach
from passes.refusal import Refusal, RefusedError
from passes.trace.calls import Call
from passes.trace.capture import capture
from passes.trace.symbols import NOTHING_VARIES


class FindNeededLater:
    """Finds why branches that cache their keys prune at the last step only, if they do."""

    name = "find_needed_later"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with these refusals; there are none at the last step."""
        if context.step is not None and context.step.last:
            return draft
        caching = [b for b in draft.found if b.refusal is None and _caches(b)]
        by_key = {b.index: _value_per_key(b) for b in caching}
        found = {index: refusal for index, refusal in by_key.items() if refusal is not None}
        if len(found) < len(caching):
            placed = _placed_by_caches(context.call, draft)
            if placed is not None:
                found = {b.index: placed for b in caching} | found
        return replace(draft, needed_later=found)


def _caches(branch: Branch) -> bool:
    return any(user.op == "output" for node in branch.region for user in node.users)


def _value_per_key(branch: Branch) -> Refusal | None:
    """Refuses a branch that meets a value per cached key.

    Such a value, a mask say, comes from outside and has entries for all keys of earlier steps.
    Where keys were pruned, it would have to be gathered by what every earlier step kept.
    """
    for node, side, axes in gathered(branch):
        example = side.meta.get("val")
        shape = example.shape if isinstance(example, Tensor) else ()
        pairs = zip(reversed(shape), reversed(axes), strict=False)
        counted = any(size != 1 and any(f.before for f in dim) for size, dim in pairs)
        if counted and _is_given(side):
            reason = "what it meets here has an entry per key, those of earlier steps included"
            return Refusal.at(node, "FVX021", reason)
    return None


def _is_given(node: Node) -> bool:
    """Whether a value is not computed from sizes alone."""
    if node.target is torch.ops.aten.sym_size.int:
        return False
    return node.op != "call_function" or any(map(_is_given, node.all_input_nodes))


def _placed_by_caches(call: Call, draft: Draft) -> Refusal | None:
    """Refuses a block that takes values, such as positions, from the place where its cache ends.

    It is captured again with each cache shorter by an entry. What is computed of neither caches nor
    tokens, and keeps its shape, has to come from the same place as before.
    """
    paths = draft.captured.inputs
    growths = find_growing(draft.source, *places_of_caches(call, paths, draft.captured))
    placeholders = draft.source.graph.find_nodes(op="placeholder")
    grown = {c.input: c.dim for c in growths if isinstance(c, Growth)}
    sizes = {i: int(placeholders[i].meta["val"].shape[dim]) for i, dim in grown.items()}
    if not sizes or not all(sizes.values()) or not _reads(draft.source.graph, set(sizes.values())):
        return None
    cut = {paths[i]: {grown[i]: size - 1} for i, size in sizes.items()}
    try:
        other = capture(replace(call, varying=NOTHING_VARIES, cut=cut)).graph_module
    except RefusedError:  # the caches are not all that has an entry per key
        return None
    nodes, others = computing(draft.source.graph), computing(other.graph)
    if [node.target for node in nodes] != [node.target for node in others]:
        return None
    varying = [placeholders[i] for i, path in enumerate(paths) if i in grown or path == call.stream]
    for node, twin in zip(nodes, others, strict=True):
        alike = _shape(node) == _shape(twin)
        if alike and _whole_numbers(node) != _whole_numbers(twin) and not _of(node, varying):
            reason = (
                "it takes values from where the cache ends, which is too early where keys were "
                "dropped"
            )
            return Refusal.at(node, "FVX021", reason)
    return None


def _reads(graph: Graph, sizes: set[int]) -> bool:
    """Whether some call has the number of a cache's entries among its arguments."""
    return any(not sizes.isdisjoint(_whole_numbers(node)) for node in computing(graph))


def _shape(node: Node) -> list[int] | None:
    """Returns the shape of what a call computes; None for several tensors."""
    value = node.meta["val"]
    return list(value.shape) if isinstance(value, Tensor) else None


def _whole_numbers(node: Node) -> list[int]:
    """Returns the whole numbers among a call's arguments."""
    values = bind(node).values() if node.op == "call_function" else ()
    return list(_flat(plain(list(values))))


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _of(node: Node, sources: Collection[Node]) -> bool:
    """Whether a value is computed of some inputs."""
    return any(n in sources for n in reach([node], lambda n: n.all_input_nodes))
