"""Refuses the branches that cannot prune at a step, though tokens may be dropped through them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from passes.analyse.axes import Axes
from passes.analyse.branches import Branch
from passes.analyse.rules.site import Gather
from passes.analyse.stored import find_stored
from passes.base import Context, Draft
from passes.graph import bind
from passes.refusal import Refusal


class CheckPrunable:
    """At a pruned step, compares each branch with its captured output and with later steps."""

    name = "check_prunable"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with the branches refused that this step cannot prune."""
        if context.step is None:
            return draft
        for branch in draft.prunable(context.kinds):
            refusal = _misfit(branch, context.captured.get(branch.index))
            if refusal is None:
                refusal = find_stored(branch, draft)
            if refusal is None and not context.step.last:
                refusal = needed_later(branch)
            if refusal is not None:
                draft = draft.refusing(branch.index, refusal)
        return draft


def _misfit(branch: Branch, captured: Tensor | None) -> Refusal | None:
    out = branch.out.meta["val"]
    if captured is None:
        return Refusal("FVX016", "the block ran other branches at the cache step")
    if captured.dtype != out.dtype or captured.shape[::2] != out.shape[::2]:
        found = f"{tuple(captured.shape)} {captured.dtype}, now {tuple(out.shape)} {out.dtype}"
        return Refusal("FVX016", f"its output at the cache step was {found}")
    return None


def needed_later(branch: Branch) -> Refusal | None:
    """Refuses a branch that caches its keys and meets a value per cached key.

    Such a value, a mask say, comes from outside and has entries for all keys of earlier steps.
    Where keys were pruned, it would have to be gathered by what every earlier step kept.
    """
    if not any(user.op == "output" for node in branch.region for user in node.users):
        return None
    for node, side, axes in gathered(branch):
        example = side.meta.get("val")
        shape = example.shape if isinstance(example, Tensor) else ()
        pairs = zip(reversed(shape), reversed(axes), strict=False)
        counted = any(size != 1 and any(f.before for f in dim) for size, dim in pairs)
        if counted and _is_given(side):
            reason = "what it meets here has an entry per key, those of earlier steps included"
            return Refusal.at(node, "FVX021", reason)
    return None


def gathered(branch: Branch) -> Iterator[tuple[Node, Node, Axes]]:
    """Yields the ops that meet side inputs, with the input and the axes it meets."""
    for node, edits in branch.edits.items():
        for (name, item), edit in edits.items():
            if isinstance(edit, Gather):
                value = bind(node)[name]
                yield node, value if item is None else value[item], edit.axes


def _is_given(node: Node) -> bool:
    """Whether a value is not computed from sizes alone."""
    if node.target is torch.ops.aten.sym_size.int:
        return False
    return node.op != "call_function" or any(map(_is_given, node.all_input_nodes))
