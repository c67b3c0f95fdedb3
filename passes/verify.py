"""Runs graphs against the real call; a graph that was not checked is never used.

Translation: the graph, unpruned, returns what the call returned. Permutation: the rewritten graph,
with all tokens in another order, returns every branch's output again; a position that is read and
not gathered shows here. Subset: a branch that does not attend to other tokens returns the same for
the tokens it keeps, however many; a value that depends on the token count shows here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.analyse.branches import Branch, find_branches
from passes.analyse.caches import Buffered, Copied, Growth, new_buffer
from passes.analyse.rules.site import declared_advice
from passes.base import Context, Draft, Pass
from passes.graph import copy_graph, draws_numbers, outputs_of
from passes.refusal import BranchRefusedError, Refusal, RefusedError, refuse
from passes.rewrite.capture_outputs import capture_outputs
from passes.rewrite.prune import ASKS_NOTHING, Operators, Scale, Step, prune
from passes.trace.calls import live_inputs

_TRANSLATION: Final = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest relative difference of a graph that runs the same ops; 4 epsilons for other dtypes."""
_PERMUTATION: Final = {torch.float64: 1e-8, torch.float32: 1e-3}
"""The same where sums run in another order, as over permuted keys; 16 epsilons otherwise."""


_IN_OTHER_ORDER: Final = "with permuted tokens"
_ON_SOME: Final = "on some of the tokens alone, as for a branch that does not attend,"

_FAST_PATH: Final = (
    "torch's own fast path of an nn.TransformerEncoderLayer may return another dtype than the "
    "layer's ops under autocast: call torch.backends.mha.set_fastpath_enabled(False)"
)
_RANDOM: Final = "switch dropout off, or draw the numbers outside the block and hand them in"


class VerifyTranslation:
    """Runs the unpruned graph; it must return what the real call returned and wrote."""

    name = "verify_translation"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with what each branch adds in the real call.

        Raises:
            RefusedError: FVX002, if the graph does not reproduce the call.
        """
        results, written = context.real
        inputs = live_inputs(context.call, draft.inputs)
        outputs = capture_outputs(draft.graph_module, draft.added)(*inputs)
        count = len(outputs) - len(draft.added)
        mismatch = check_translation(outputs[:count], [*results, *written])
        if mismatch is not None:
            raise RefusedError(_explained(mismatch, draft.graph_module))
        indices = (branch.index for branch in draft.added)
        expected = dict(zip(indices, outputs[count:], strict=True))
        return replace(draft, expected=expected, inputs_after=tuple(inputs))


class VerifyPermuted:
    """Rewrites the branches to keep all tokens in another order: each must add the same again."""

    name = "verify_permuted"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft.

        Raises:
            BranchRefusedError: FVX017, if a branch adds something else.
            RefusedError: FVX017, if anything else that the block returns or writes differs.
        """
        wanted = draft.prunable(context.kinds)
        if context.step is None or not wanted:
            return draft
        operators = PermutedTokens()
        tokens = wanted[0].out.meta["val"].shape[1]
        step = Step(tokens, (tokens,), (tokens,), operators)
        pruned = prune(draft.graph_module, wanted, step, lambda branch: branch.out.meta["val"])
        operators.outputs.clear()  # the rewrite ran them on example values
        inputs = live_inputs(context.call, draft.inputs)
        expected = [draft.expected[branch.index] for branch in wanted]
        taken = [inputs[i] for i in pruned.inputs]
        outputs = _attempt(pruned.graph_module, *taken, *expected)
        made = zip(wanted, operators.outputs, strict=True)
        _check_branches(made, draft, pruned.graph_module, _IN_OTHER_ORDER)
        unpruned = _unpruned(context, draft, outputs, inputs)
        wrong = difference(*unpruned, pruned.graph_module, _IN_OTHER_ORDER)
        if wrong is not None:
            raise RefusedError(wrong)
        return draft


class VerifySubset:
    """Runs the pruned graph on other tokens: a branch that does not attend adds the same for them.

    The branches after it still get the dense output.
    """

    name = "verify_subset"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft.

        Raises:
            BranchRefusedError: FVX017, if a branch adds something else for a kept token.
        """
        wanted, step = draft.prunable(context.kinds), context.step
        if step is None or not any(step.keeps(branch.kind) for branch in wanted):
            return draft
        operators = SomeTokens()
        inputs = live_inputs(context.call, draft.inputs)
        expected = [draft.expected[branch.index] for branch in wanted]
        _attempt(_with_operators(draft.graph_module, step.operators, operators), *inputs, *expected)
        made = zip(wanted, operators.outputs, strict=True)
        local = ((branch, output) for branch, output in made if branch.kind != "attention")
        _check_branches(local, draft, draft.graph_module, _ON_SOME)
        return draft


class VerifySizes:
    """Repeats analysis and rewrite at another call's sizes; both graphs must be equal."""

    name = "verify_sizes"

    def __init__(self, *rewrites: Pass) -> None:
        self._rewrites = rewrites

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with the graph at the other sizes, if any size varies.

        Raises:
            RefusedError: FVX019, if the graph depends on these sizes other than by computing them.
        """
        earlier = draft.captured.earlier
        if earlier is None:
            return draft
        found = find_branches(earlier, context.call.stream)
        other = replace(
            draft,
            graph_module=earlier.graph_module,
            inputs=earlier.inputs,
            found=tuple(branch for branch in found if branch.index in draft.features),
        )
        for rewrite in self._rewrites:
            other = rewrite.run(context, other)
        _check_equal(draft.graph_module, other.graph_module)
        return replace(draft, at_earlier_sizes=other.graph_module)


class VerifyBuffered:
    """Runs the graph with and without buffers; one that differs is not used."""

    name = "verify_buffered"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft, without buffers if the buffered graph fails."""
        if draft.buffered is None:
            return draft
        reason = _buffered_failure(context, draft, draft.buffered)
        if reason is None:
            return draft
        caches = (Copied(c.input, reason) if isinstance(c, Growth) else c for c in draft.caches)
        return replace(draft, caches=tuple(caches), buffered=None)


class PermutedTokens:
    """Operators that keep every token, each sample in another order, and record the outputs.

    Attributes:
        outputs: Each branch's full output, in the order of the graph.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.asks = ASKS_NOTHING
        self.restores_anew = False

    def select(self, x: Tensor, kept: int) -> Tensor:
        """Returns `kept` tokens, shuffled; the same for the same shape."""
        generator = torch.Generator().manual_seed(kept)
        order = torch.rand(*x.shape[:2], generator=generator, device="cpu").argsort(dim=1)[:, :kept]
        return order.to(x.device) + torch.zeros_like(x[:, :kept, 0], dtype=torch.int64)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Returns x (B, L, C) at `index` (B, L)."""
        return torch.take_along_dim(x, index.unsqueeze(-1), 1)

    def restore(
        self, kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
    ) -> Tensor:
        """Puts the tokens back in order."""
        full = torch.take_along_dim(kept, index.argsort(dim=1).unsqueeze(-1), 1)
        self.outputs.append(full)
        return full


class SomeTokens(PermutedTokens):
    """Operators that keep some tokens, and continue with the dense output of every branch."""

    def restore(
        self, kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
    ) -> Tensor:
        """Records what the branch returned, written over its dense output; returns the latter."""
        place = index.unsqueeze(-1).expand_as(kept)
        self.outputs.append(cached.scatter(1, place, kept))
        return cached.clone()  # the graph may add into it


def _with_operators(pruned: GraphModule, own: Operators, other: PermutedTokens) -> GraphModule:
    """Returns a copy of a pruned graph that calls other operators, which saves a second rewrite."""
    graph, copies = copy_graph(pruned.graph)
    others: dict[Any, Any] = {
        own.select: other.select,
        own.take: other.take,
        own.restore: other.restore,
    }
    for node in copies.values():
        if node.op == "call_function" and node.target in others:
            node.target, node.kwargs = others[node.target], {}
    for item in graph.find_nodes(op="call_function", target=operator.getitem):
        if item.args[0].target == other.select:  # `own.select` returned a tuple
            item.replace_all_uses_with(item.args[0])
    return GraphModule(pruned, graph)


def _attempt(graph_module: GraphModule, *inputs: Any) -> Sequence[Tensor]:
    """Runs a pruned graph.

    Raises:
        RefusedError: FVX017, if it fails: a kernel may not accept the shapes of kept tokens.
    """
    try:
        outputs: Sequence[Tensor] = graph_module(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"it fails on the kept tokens: {type(error).__name__}: {error}"
        refuse("FVX017", reason, advice=declared_advice(graph_module.graph.nodes))
    return outputs


def _check_branches(
    made: Iterable[tuple[Branch, Tensor]], draft: Draft, graph_module: GraphModule, where: str
) -> None:
    """Compares what branches of a rewritten graph add with what they add in the real call."""
    for branch, output in made:
        wrong = difference([output], [draft.expected[branch.index]], graph_module, where)
        if wrong is not None:
            raise BranchRefusedError(branch.index, wrong)


def _unpruned(
    context: Context, draft: Draft, outputs: Sequence[Tensor], inputs: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what does not depend on the order of the tokens, as computed and as expected.

    That is what the block returns, except keys and values, and the inputs it overwrote.
    """
    results, _ = context.real
    regions = {node for branch in draft.prunable(context.kinds) for node in branch.region}
    pairs = [
        (output, result)
        for node, output, result in zip(
            outputs_of(draft.source.graph), outputs, results, strict=False
        )
        if node not in regions
    ]
    pairs += [(a, b) for a, b in zip(inputs, draft.inputs_after, strict=True) if a is not b]
    return [made for made, _ in pairs], [real for _, real in pairs]


def _check_equal(made: GraphModule, other: GraphModule) -> None:
    if len(made.graph.nodes) != len(other.graph.nodes):
        refuse("FVX019", "other branches prune at other sizes")
    for a, b in zip(made.graph.nodes, other.graph.nodes, strict=True):
        if a.format_node() != b.format_node():
            refuse("FVX019", f"`{a.format_node()}` has been `{b.format_node()}`", a)


def _buffered_failure(context: Context, draft: Draft, buffered: Buffered) -> str | None:
    """Returns why the graph with buffers fails, or None."""
    taken = draft.features if context.step is not None else ()
    captured = [context.captured[index] for index in taken]
    expected = draft.graph_module(*live_inputs(context.call, draft.inputs), *captured)
    inputs = live_inputs(context.call, draft.inputs)
    for growth in buffered.growths:
        past = inputs[growth.input]
        inputs[growth.input] = growth.front(new_buffer(past, growth), past)
    try:
        outputs = buffered.graph_module(*inputs, *captured)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an op that does not accept a view with gaps
        return f"the block does not run on a view: {type(error).__name__}: {error}"
    wrong = check_translation(outputs, expected)
    return None if wrong is None else f"the block returns other values on a view: {wrong.reason}"


def check_translation(made: Sequence[Tensor], expected: Sequence[Tensor]) -> Refusal | None:
    """Compares a captured graph's outputs with the real call's."""
    if len(made) != len(expected):
        return Refusal("FVX002", f"{len(made)} outputs, the block returns {len(expected)}")
    for place, (a, b) in enumerate(zip(made, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            text = f"output {place} is {_meta(a)}, the block returns {_meta(b)}"
            return Refusal("FVX002", text, advice=_FAST_PATH if a.dtype != b.dtype else "")
        error = largest_difference(a, b)
        if not error <= _tolerance([b.dtype], _TRANSLATION, 4):
            text = f"output {place} differs by {error:.1e} (relative) at {_place(a, b)}"
            return Refusal("FVX002", text)
    return None


def _explained(mismatch: Refusal, graph_module: GraphModule) -> Refusal:
    """Adds to a mismatch that the block draws random numbers, if it does."""
    drawing = next(filter(draws_numbers, graph_module.graph.nodes), None)
    if drawing is None:
        return mismatch
    reason = f"{mismatch.reason}: it draws random numbers"
    return Refusal.at(drawing, mismatch.code, reason, advice=_RANDOM)


def difference(
    made: Sequence[Tensor], expected: Sequence[Tensor], graph_module: GraphModule, where: str
) -> Refusal | None:
    """Compares what a rewritten graph computes with the real call.

    Args:
        made: What the graph computed.
        expected: The same values of the real call.
        graph_module: The graph; its least precise dtype sets the tolerance.
        where: What the graph was run on, for the reason of a refusal.
    """
    computed = (node for node in graph_module.graph.nodes if node.op != "placeholder")
    values = (node.meta.get("val") for node in computed)
    dtypes = [value.dtype for value in values if isinstance(value, Tensor)]
    limit = _tolerance(dtypes, _PERMUTATION, 16)
    for a, b in zip(made, expected, strict=True):
        error = largest_difference(a, b)
        if not error <= limit:
            text = f"{where} it differs by {error:.1e} (relative) at {_place(a, b)}"
            return Refusal("FVX017", text, advice=declared_advice(graph_module.graph.nodes))
    return None


def _tolerance(
    dtypes: Sequence[torch.dtype], known: dict[torch.dtype, float], epsilons: int
) -> float:
    rounded = [dtype for dtype in dtypes if dtype.is_floating_point or dtype is torch.int8]
    return max((known.get(d, epsilons * _epsilon(d)) for d in rounded), default=0.0)


def _epsilon(dtype: torch.dtype) -> float:
    """Returns the relative rounding; quantised activations are integers of 7 bits and a sign."""
    return 2**-7 if dtype is torch.int8 else torch.finfo(dtype).eps


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference relative to the largest value of b."""
    if not b.numel():
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return float(not torch.equal(a, b))
    a, b = a.detach(), b.detach()
    wide = torch.float32 if b.itemsize == 1 else torch.promote_types(b.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    quick = float((a - b).abs().amax() / b.abs().amax())
    if math.isfinite(quick):
        return quick
    difference, scale = _differences(a, b)
    return float(difference.amax() / scale)


def _differences(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all differences, none where both are NaN or equal, and the largest finite b."""
    wide = torch.complex128 if b.is_complex() else torch.float64
    difference = (a.to(wide) - b.to(wide)).abs()
    both_nan = a.isnan() & b.isnan()
    difference = torch.where(both_nan | (a == b), torch.zeros_like(difference), difference)
    scale = b.to(wide).abs().nan_to_num(0.0, 0.0).amax()
    return difference, scale.clamp_min(torch.finfo(torch.float64).tiny)


def _place(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Returns where two tensors differ most."""
    difference, _ = _differences(a.detach(), b.detach())
    return tuple(int(i) for i in torch.unravel_index(difference.argmax().cpu(), b.shape))


def _meta(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
