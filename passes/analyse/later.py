"""Finds the branches whose keys later steps need whole. Analysis only.

What a step drops is missing in the KV cache at the steps after it. Such a branch prunes at the last
step only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from passes.analyse.branches import Branch
from passes.analyse.caches import ends_of_caches
from passes.analyse.prunable import gathered
from passes.base import Context, Draft
from passes.graph import (
    computing,
    draws_numbers,
    inputs_within,
    is_number,
    numbers_of,
    placeholders_by_path,
    plain,
    reach,
    written,
)
from passes.refusal import Refusal, RefusedError
from passes.trace.calls import Call
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import Path, get
from passes.trace.symbols import NOTHING_VARIES


class FindNeededLater:
    """Finds why branches that cache their keys prune at the last step only, if they do."""

    name = "find_needed_later"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with these refusals; there are none at the last step.

        At the cache step, only those that need no other capture: they say how long caches grow.
        """
        if context.step is not None and context.step.last:
            return draft
        caching = [b for b in draft.found if b.refusal is None and _caches(b)]
        by_key = {b.index: _value_per_key(b) for b in caching}
        found = {index: refusal for index, refusal in by_key.items() if refusal is not None}
        if context.step is not None and len(found) < len(caching):
            placed = _counts_keys(context.call, draft)
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


@dataclass(frozen=True)
class Cut:
    """A cache that is taken to be shorter.

    Attributes:
        path: Where it is read.
        dim: The dim that grows.
        size: How many entries it has.
        dropped: How many of the last ones are left out.
    """

    path: Path
    dim: int
    size: int
    dropped: int

    def of(self, cache: Tensor) -> Tensor:
        """Returns what is left of it."""
        return cache.narrow(self.dim, 0, self.size - self.dropped)


def _counts_keys(call: Call, draft: Draft) -> Refusal | None:
    """Refuses a block that computes values, such as positions, from how long its caches are.

    It is captured again without the last entries of its caches, as if tokens had been dropped. What
    it computes from neither caches nor tokens has to be the same, but for these entries.
    """
    cuts = {cut.path: cut for cut in _cuts(call, draft)}
    if not cuts:
        return None
    shorter = {path: {cut.dim: cut.size - cut.dropped} for path, cut in cuts.items()}
    try:
        other = capture(replace(call, varying=NOTHING_VARIES, cut=shorter))
    except RefusedError:  # the caches are not all that has an entry per key
        return None
    whole = replace(draft.captured, graph_module=draft.source)
    node = _first_difference(call, whole, other, cuts)
    reason = "where its cache is shorter, as after tokens were dropped, it computes other values"
    return None if node is None else Refusal.at(node, "FVX021", reason)


def _cuts(call: Call, draft: Draft) -> Iterator[Cut]:
    """Yields the caches without half as many entries as the map has tokens; two are left."""
    paths = draft.captured.inputs
    tokens = get(call.roots(), call.stream).shape[1]
    placeholders = draft.source.graph.find_nodes(op="placeholder")
    for place, dim in ends_of_caches(draft.source, call, draft.captured).items():
        size = int(placeholders[place].meta["val"].shape[dim])
        if size > 2:
            yield Cut(paths[place], dim, size, min(max(1, tokens // 2), size - 2))


def _first_difference(
    call: Call, whole: BlockProgram, other: BlockProgram, cuts: Mapping[Path, Cut]
) -> Node | None:
    """Returns the first op that differs in what it computes from neither caches nor tokens."""
    nodes, others = (computing(program.graph_module.graph) for program in (whole, other))
    for node, twin in zip_longest(nodes, others):
        if node is None or twin is None or node.target != twin.target:
            return node or nodes[-1]
    inputs, other_inputs = placeholders_by_path(whole), placeholders_by_path(other)
    twins = {inputs[path]: twin for path, twin in other_inputs.items() if path in inputs}
    twins |= dict(zip(nodes, others, strict=True))
    given, of_other = (_given(program, {call.stream, *cuts}) for program in (whole, other))
    for node, twin in twins.items():
        if node not in given and numbers_of(node) != numbers_of(twin):
            return node
    ends = _ends(twins, given)
    if not ends:
        return None
    values = _run(whole, inputs_within(ends, given), call, {})
    other_values = _run(other, inputs_within(map(twins.__getitem__, ends), of_other), call, cuts)
    pairs = ((node, values[node], other_values[twins[node]]) for node in ends)
    return next((n for n, full, cut in pairs if not _agree(full, cut, cuts.values())), None)


def _given(program: BlockProgram, varying: Collection[Path]) -> set[Node]:
    """Returns the nodes that no input of some paths and no random number enters.

    The size of such an input may.
    """
    graph = program.graph_module.graph
    sources = [node for path, node in placeholders_by_path(program).items() if path in varying]
    sources += [node for node in graph.nodes if draws_numbers(node)]
    entered = reach(sources, lambda node: [user for user in node.users if not is_number(user)])
    return set(graph.nodes) - {*entered, graph.output_node()}


def _ends(twins: Mapping[Node, Node], given: set[Node]) -> list[Node]:
    """Returns what may be computed otherwise in the twins and meets other values, or is kept."""
    image = {twin: node for node, twin in twins.items()}
    changed = [n for n, twin in twins.items() if n in given and not _same_call(n, twin, image)]
    affected = set(reach(changed, lambda node: [u for u in node.users if u in given]))
    return [n for n in twins if n in affected and not given.issuperset(n.users)]


def _same_call(node: Node, twin: Node, image: Mapping[Node, Node]) -> bool:
    if node.op == "get_attr":
        one, two = (getattr(n.graph.owning_module, str(n.target)) for n in (node, twin))
        return not isinstance(one, Tensor) or torch.equal(one, two)
    args = map_arg((node.args, node.kwargs), plain)
    twins = map_arg((twin.args, twin.kwargs), lambda n: image.get(n, plain(n)))
    return bool(args == twins)


def _run(
    program: BlockProgram, wanted: set[Node], call: Call, cuts: Mapping[Path, Cut]
) -> dict[Node, Any]:
    """Returns the values of some nodes, and of what they are computed from."""
    graph_module, roots = program.graph_module, call.roots()
    paths = {node: path for path, node in placeholders_by_path(program).items()}
    writes = any(map(written, wanted))
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in (node for node in graph_module.graph.nodes if node in wanted):
            if node.op == "placeholder":
                path = paths[node]
                value = call.taken(path, get(roots, path))
                value = cuts[path].of(value) if path in cuts else value
                values[node] = value.clone() if writes and isinstance(value, Tensor) else value
            elif node.op == "get_attr":
                values[node] = getattr(graph_module, str(node.target))
            elif is_number(node):
                values[node] = node.meta["val"]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def _agree(full: Any, cut: Any, cuts: Iterable[Cut]) -> bool:
    """Whether a value is the same but for the entries of keys that are left out."""
    if not isinstance(full, Tensor):
        return bool(full == cut)
    if full.shape == cut.shape:
        return torch.equal(full, cut)
    left = (_without(full, cut, size.size - size.dropped) for size in cuts)
    return any(each is not None and torch.equal(each, cut) for each in left)


def _without(full: Tensor, cut: Tensor, place: int) -> Tensor | None:
    """Returns a value without the entries from `place` on that another one has fewer of."""
    if full.dim() != cut.dim():
        return None
    for dim, (size, left) in enumerate(zip(full.shape, cut.shape, strict=True)):
        if left < size and place <= left:
            after = place + size - left
            parts = (full.narrow(dim, 0, place), full.narrow(dim, after, size - after))
            full = torch.cat(parts, dim)
    return full if full.shape == cut.shape else None
