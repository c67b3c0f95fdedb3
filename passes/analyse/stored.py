"""Finds per-token values that a branch stores for others to read. Analysis only.

A pruned branch has values of the kept tokens only. Keys and values that it appends to a cache are
for its own next steps; anything else that it stores, such as an attention map or a value for the
next block, would be read as if it were of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from passes.analyse.axes import has_tokens
from passes.analyse.branches import Branch
from passes.base import Draft
from passes.graph import CATS, inputs_within, joined, op_name, outputs_of, reach
from passes.refusal import Refusal
from passes.trace.state import Path, is_beside, show


def find_stored(branch: Branch, draft: Draft) -> Refusal | None:
    """Returns a refusal if a branch stores a value per token that is no cache."""
    places = [write.place for write in draft.captured.writes for _ in range(write.count)]
    states = outputs_of(draft.source.graph)[draft.captured.result_count :]
    grown = _grown(branch)
    for node, place in zip(states, places, strict=True):
        tokens = _token_dims(node, branch)
        if tokens == 0 or (tokens == 1 and _is_cache(node, place, branch, grown, draft)):
            continue
        reason = f"the block stores it in {show(place[1:])}, and not as a cache of keys or values"
        return Refusal.at(node, "FVX014", reason)
    return None


def _token_dims(node: Node, branch: Branch) -> int:
    """How many dims of a value of the branch have an entry per token."""
    axes = branch.axes.get(node, ()) if node in branch.region else ()
    return sum(map(has_tokens, axes)) if isinstance(axes, tuple) else 0


def _grown(branch: Branch) -> list[Node]:
    """Returns what joins earlier entries to the tokens' and contributes to the branch's output."""
    read = inputs_within([branch.out], set(branch.region))
    cats = (node for node in branch.region if node in read and op_name(node) in CATS)
    return [cat for cat in cats if _has_earlier(cat, branch)]


def _has_earlier(node: Node, branch: Branch) -> bool:
    axes = branch.axes[node]
    assert isinstance(axes, tuple)
    return any(has_tokens(dim) and (f.before or f.after) for dim in axes for f in dim)


def _is_cache(node: Node, place: Path, branch: Branch, grown: list[Node], draft: Draft) -> bool:
    """Whether a stored value is a cache of the branch, or an entry that is joined to earlier ones.

    An entry is one if the branch joins it to others that were stored at its place, or beside it.
    """
    if _has_earlier(node, branch):
        sources = set(reach([node], lambda n: n.all_input_nodes))
        return any(cat in sources for cat in grown)
    placeholders = draft.source.graph.find_nodes(op="placeholder")
    paths = dict(zip(placeholders, draft.captured.inputs, strict=True))
    earlier = {n for n, p in paths.items() if p[: len(place)] == place or is_beside(p, place)}
    for cat in grown:
        chains = [set(_chain(operand)) for operand in joined(cat)]
        if any(node in chain for chain in chains) and any(chain & earlier for chain in chains):
            return True
    return False


def _chain(node: Node) -> Iterator[Node]:
    """Yields a value, and what it is a view, a cast or the like of."""
    while True:
        yield node
        if len(node.all_input_nodes) != 1:
            return
        (node,) = node.all_input_nodes
