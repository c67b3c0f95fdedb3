"""What the branches of a block cost, dense and as they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Final, cast

import torch
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from passes.analyse.axes import Axes, Tag
from passes.analyse.branches import Branch, Kind, counts_flops
from passes.analyse.rules.attention import FLOP_FORMULAS, attention_flops, is_attention, key_count
from passes.base import Context, Draft
from passes.graph import example_values
from passes.refusal import Refusal
from passes.rewrite.prune import Step


@dataclass(frozen=True, kw_only=True)
class BranchReport:
    """How one branch runs, and what it costs.

    Attributes:
        index: Its place along the trunk.
        kind: What it is.
        name: Its module path in the block.
        kept: Tokens it runs on; None where it runs dense.
        flops: Matrix-product FLOPs of its dense form; those of sizes that depend on values, such
            as of the tokens that an expert gets, are not counted.
        pruned_flops: The same of the form it runs in.
        refusal: Why it stays dense, if it was refused.
        attended_flops: The part of `flops` that grows with tokens times keys, products of two
            values of the stream as in self-attention; the rest grows with tokens alone.
        keys: How many keys its self-attention reads, cached ones included; None if unknown.
    """

    index: int
    kind: Kind
    name: str
    kept: int | None
    flops: int
    pruned_flops: int
    refusal: Refusal | None = None
    attended_flops: int = 0
    keys: int | None = None


class CountFlops:
    """Counts what every branch costs, dense and in the form it runs in."""

    name = "count_flops"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with a report on every branch."""
        forms = (draft.forms.get(branch.index) for branch in draft.found)
        reports = map(_report, draft.found, forms, repeat(context.step))
        return replace(draft, branches=tuple(reports))


def _report(branch: Branch, form: Sequence[Node] | None, step: Step | None) -> BranchReport:
    """Returns the report on a branch, which runs dense if it has no pruned form."""
    region = [node for node in branch.region if _has_fixed_sizes(node)]
    attending = [node for node in region if _attends(node, branch)]
    attended = count_flops(attending)
    flops = attended + count_flops([node for node in region if node not in attending])
    return BranchReport(
        index=branch.index,
        kind=branch.kind,
        name=branch.name,
        kept=None if step is None or form is None else step.keeps(branch.kind),
        flops=flops,
        pruned_flops=flops if form is None else count_flops(form),
        refusal=None if step is None else branch.refusal,
        attended_flops=attended,
        keys=_keys(attending, branch),
    )


def _has_fixed_sizes(node: Node) -> bool:
    """Whether a call's sizes are numbers: those of tokens sent to an expert depend on values."""
    values = (each.meta.get("val") for each in (node, *node.all_input_nodes))
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return all(isinstance(size, int) for value in tensors for size in value.shape)


def _attends(node: Node, branch: Branch) -> bool:
    """Whether a call is a product of values that the branch makes, not of one and a weight."""
    operands = [arg for arg in node.all_input_nodes if arg in branch.region]
    return counts_flops(node) and len(operands) > 1


def _keys(attending: Sequence[Node], branch: Branch) -> int | None:
    """Returns the longest token axis that the attention of a branch reads.

    A refused branch has no axes: there it is the last dim of the first product, the scores, or of
    the keys that an attention op reads.
    """
    if branch.refusal is not None:
        if not attending:
            return None
        if is_attention(attending[0]):
            return key_count(attending[0])
        return int(attending[0].meta["val"].shape[-1])
    operands = {arg for node in attending for arg in node.all_input_nodes if arg in branch.axes}
    factors = (f for arg in operands for dim in cast("Axes", branch.axes[arg]) for f in dim)
    return max((f.size for f in factors if f.tag is Tag.TOKEN), default=None)


def count_flops(nodes: Sequence[Node]) -> int:
    """Returns the FLOPs of matrix products and attention, by torch's flop counter."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    attention = sum(attention_flops(node) for node in nodes if is_attention(node))
    with torch.no_grad(), counter:
        for node in nodes:
            if counts_flops(node) and not is_attention(node) and callable(node.target):
                node.target(*example_values(node.args), **example_values(node.kwargs))
    return attention + int(counter.get_total_flops())


def _int_mm_flops(left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


_FORMULAS: Final = {torch.ops.aten._int_mm: _int_mm_flops, **FLOP_FORMULAS}
"""Of ops that torch's counter does not know."""


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Returns the formulas of all ops that have FLOPs, as torch's flop counter calls them."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    return cast("dict[Any, Callable[..., int]]", counter.flop_registry)
