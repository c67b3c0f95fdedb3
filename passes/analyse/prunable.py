"""Refuses the branches that cannot prune at a step, though tokens may be dropped through them."""

from __future__ import annotations

from collections.abc import Iterator

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
                refusal = draft.needed_later.get(branch.index)
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


def gathered(branch: Branch) -> Iterator[tuple[Node, Node, Axes]]:
    """Yields the ops that meet side inputs, with the input and the axes it meets."""
    for node, edits in branch.edits.items():
        for (name, item), edit in edits.items():
            if isinstance(edit, Gather):
                value = bind(node)[name]
                yield node, value if item is None else value[item], edit.axes
