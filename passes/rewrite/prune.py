"""Rewrites branches into PTS -> branch -> CTR. Rewrite only: what to change was found before.

The graph is built anew, node by node. Every node is copied in its dense form, those of a pruned
branch also in a form that reads the trunk at the kept tokens; then dead code is dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.analyse.axes import Axes, dim_size, shape_of
from passes.analyse.branches import Branch
from passes.analyse.rules.site import Edit, Gather, Recount, Replace, Resize, Slot
from passes.base import Context, Draft
from passes.graph import (
    bind,
    drop_unread_inputs,
    example_values,
    has_effect,
    inputs_within,
    outputs_of,
)
from passes.refusal import BranchRefusedError, RefusedError, refuse
from passes.rewrite.side_input import SideLayout, take_side
from passes.user_frames import first_line

Scale = tuple[int, ...]
"""A token map, as the operators read it; the compiler only passes it on."""


class Operators(Protocol):
    """The runtime functions that the rewritten graph calls; all take and return real tensors."""

    @property
    def select(self) -> Callable[[Tensor, int], Any]:
        """(x (B, L, C), kept) -> indices of the kept tokens (B, kept), int64.

        Or a tuple that starts with them; `take` and `restore` then get the tuple.
        """

    @property
    def restores_anew(self) -> bool:
        """Whether `restore` returns newly allocated memory, which may be overwritten."""

    @property
    def take(self) -> Callable[[Tensor, Any], Tensor]:
        """(x (B, L, C), what `select` returned) -> what the branch runs on, (B, kept, C)."""

    @property
    def restore(self) -> Callable[[Tensor, Any, Tensor, Scale, Scale], Tensor]:
        """(kept (B, kept, C), selection, cached (B, Lc, C), its scale, scale) -> (B, L, C)."""


@dataclass(frozen=True)
class Step:
    """What a pruned step keeps.

    Attributes:
        kept: How many tokens.
        cached_scale: The scale it restores from.
        scale: Its own scale.
        last: Whether no step comes after it.
        selects_once: Whether all branches of a block keep the tokens that the first one selects.
    """

    kept: int
    cached_scale: Scale
    scale: Scale
    last: bool = True
    selects_once: bool = False


class Prune:
    """At a pruned step, makes the branches run on the kept tokens."""

    name = "prune"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft whose graph takes the captured outputs and prunes."""
        if context.step is None or context.operators is None:
            return draft
        wanted = draft.prunable(context.kinds)
        pruned = prune(
            draft.graph_module,
            wanted,
            context.step,
            context.operators,
            lambda branch: branch.out.meta["val"].new_empty(context.captured[branch.index].shape),
        )
        return replace(
            draft,
            graph_module=pruned.graph_module,
            inputs=tuple(draft.inputs[i] for i in pruned.inputs),
            features=tuple(branch.index for branch in wanted),
            forms=pruned.forms,
        )


@dataclass(frozen=True)
class PrunedGraph:
    """A rewritten graph.

    Attributes:
        graph_module: Takes the original inputs that it still reads, then one captured output per
            pruned branch; returns what the original returns.
        inputs: Positions of the original inputs that it still reads.
        forms: The nodes that compute each pruned branch, by its index.
    """

    graph_module: GraphModule
    inputs: tuple[int, ...]
    forms: Mapping[int, Sequence[Node]]


def prune(
    graph_module: GraphModule,
    branches: Iterable[Branch],
    step: Step,
    operators: Operators,
    captured: Callable[[Branch], Tensor],
) -> PrunedGraph:
    """Rewrites `branches` to run on the kept tokens of a step.

    Args:
        graph_module: The captured graph; it stays as it is.
        branches: Branches found in it, in the order of the captured inputs.
        step: How many tokens each branch keeps, in [0, L], and the scales.
        operators: Selection and restoration.
        captured: Returns an example (a fake tensor) of a branch's captured output.

    Raises:
        BranchRefusedError: FVX018 if a rewritten op does not run on the kept tokens.
    """
    return _Rewriter(graph_module, list(branches), step, operators).run(captured)


class _Rewriter:
    def __init__(
        self, graph_module: GraphModule, branches: list[Branch], step: Step, operators: Operators
    ) -> None:
        self._source = graph_module
        self._operators = operators
        self._graph = Graph()
        self._dense: dict[Node, Node] = {}
        selected: dict[int, Node] = {}
        self._emitters = [
            _BranchEmitter(self._graph, branch, step, operators, self._dense, selected)
            for branch in branches
        ]

    def run(self, captured: Callable[[Branch], Tensor]) -> PrunedGraph:
        inputs = [self._copy(node) for node in self._source.graph.find_nodes(op="placeholder")]
        caches = [self._cache_input(e.branch, captured(e.branch)) for e in self._emitters]
        adds = {e.branch.add: (e, c) for e, c in zip(self._emitters, caches, strict=True)}
        for node in self._source.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in adds:
                emitter, cache = adds[node]
                self._add(node, emitter.branch.out, emitter.restored(cache))
            else:
                self._copy(node)
            for emitter in self._emitters:
                emitter.emit(node)
        self._output()
        self._graph.eliminate_dead_code(is_impure_node=partial(has_effect, random=False))
        read = [place for place in drop_unread_inputs(self._graph) if place < len(inputs)]
        return PrunedGraph(GraphModule(self._source, self._graph), tuple(read), self._forms())

    def _cache_input(self, branch: Branch, example: Tensor) -> Node:
        node = self._graph.placeholder(f"captured_{branch.index}")
        node.meta = {"val": example, "fastvar": {"input": f"captured {branch.name}"}}
        return node

    def _copy(self, node: Node) -> Node:
        self._dense[node] = self._graph.node_copy(node, self._dense.__getitem__)
        return self._dense[node]

    def _add(self, node: Node, out: Node, restored: Node) -> None:
        """Emits the residual add, into the restored output where that saves an allocation."""
        plain = node.target is torch.ops.aten.add.Tensor and len(node.args) == 2 and not node.kwargs
        same = restored.meta["val"].dtype == node.meta["val"].dtype
        if not (plain and same and self._operators.restores_anew):
            self._copy(node).replace_input_with(self._dense[out], restored)
            return
        (trunk,) = [self._dense[arg] for arg in node.all_input_nodes if arg is not out]
        add = self._graph.call_function(torch.ops.aten.add_.Tensor, (restored, trunk))
        add.meta = dict(node.meta)
        self._dense[node] = add

    def _output(self) -> None:
        made = dict(self._dense)
        for emitter in reversed(self._emitters):
            made |= emitter.emitted
        self._graph.output([made[value] for value in outputs_of(self._source.graph)])

    def _forms(self) -> dict[int, list[Node]]:
        forms = {}
        for emitter in self._emitters:
            dense = [self._dense[node] for node in emitter.branch.region]
            both = {*dense, *emitter.emitted.values()}
            forms[emitter.branch.index] = [node for node in self._graph.nodes if node in both]
        return forms


class _BranchEmitter:
    """Emits one branch on the kept tokens.

    `selected` holds the selections of all branches of the block, by the branch that made them.
    """

    def __init__(
        self,
        graph: Graph,
        branch: Branch,
        step: Step,
        operators: Operators,
        dense: dict[Node, Node],
        selected: dict[int, Node],
    ) -> None:
        self.branch = branch
        self._graph = graph
        self.emitted: dict[Node, Node] = {}
        self._step = step
        self._kept = step.kept
        self._operators = operators
        self._dense = dense
        self._selected = selected
        self._selector = 0 if step.selects_once else branch.index
        self._taken: dict[Node, Node] = {}
        self._gathered: dict[tuple[Node, Axes], Node] = {}
        self._region = set(branch.region)
        if not step.kept:  # ops may fail on no tokens, so only what becomes new state is emitted
            states = [node for node in branch.region if any(u.op == "output" for u in node.users)]
            self._region = inputs_within(states, self._region)

    def emit(self, node: Node) -> None:
        """Emits the pruned form of a node, if it is one of the branch.

        Raises:
            BranchRefusedError: FVX018, if it does not run on the kept tokens.
        """
        if node in self._region:
            try:
                self._emit(node)
            except RefusedError as error:
                raise BranchRefusedError(self.branch.index, error.refusal) from error

    def _emit(self, node: Node) -> None:
        edits = self.branch.edits.get(node, {})
        args = {key: self._argument(key, value, edits, node) for key, value in bind(node).items()}
        names = list(args)
        positional = tuple(args[name] for name in names[: len(node.args)])
        keyword = {
            name: args[name]
            for name in names[len(node.args) :]
            if name in node.kwargs or (name, None) in edits
        }
        self.emitted[node] = self._call(node.target, positional, keyword, node)
        self._check(node)

    def restored(self, cache: Node) -> Node:
        """Emits the restoration of the branch's full output."""
        out, scales = self.branch.out, (self._step.cached_scale, self._step.scale)
        if self._kept:
            kept, selection = self.emitted[out], self._selection(out)
        else:
            kept = self._call(torch.ops.aten.slice.Tensor, (cache, 1, 0, 0), {}, out)
            selection = self._call(_no_tokens, (cache,), {}, out)
        return self._call(self._operators.restore, (kept, selection, cache, *scales), {}, out)

    def _argument(self, name: str, value: Any, edits: Mapping[Slot, Edit], like: Node) -> Any:
        edit = edits.get((name, None))
        if isinstance(edit, Replace):
            return edit.value
        if isinstance(edit, Recount):
            return self._recount(value, edit, like)
        if isinstance(edit, Resize):
            return self._resized(value, edit.axes, like)
        if isinstance(value, (list, tuple)):
            return [self._operand(item, edits.get((name, i))) for i, item in enumerate(value)]
        return self._operand(value, edit)

    def _operand(self, value: Any, edit: object) -> Any:
        if not isinstance(value, Node):
            return value
        if value in self.emitted:
            return self.emitted[value]
        if value in self.branch.entries:
            return self._take(value)
        if isinstance(edit, Gather):
            return self._gather(value, edit.axes)
        return self._dense[value]

    def _resized(self, sizes: Iterable[Any], axes: Axes, like: Node) -> list[Any]:
        """The size argument of these axes; one that is computed loses the dropped tokens."""
        resized: list[Any] = []
        for size, dim in zip(sizes, axes, strict=True):
            kept = dim_size(dim, self._kept)
            if isinstance(size, Node):
                dropped, dense = dim_size(dim) - kept, self._dense[size]
                resized.append(self._call(operator.sub, (dense, dropped), {}, like))
            elif size == -1 and self._kept:
                resized.append(-1)
            else:
                resized.append(kept)
        return resized

    def _recount(self, value: Any, edit: Recount, like: Node) -> Any:
        count = self._kept + edit.around
        if not isinstance(value, Node):
            return edit.compute(value, count)
        return self._call(edit.compute, (self._dense[value], count), {}, like)

    def _selection(self, like: Node) -> Node:
        """What is selected of the trunk as this branch reads it, or as the first branch does."""
        if self._selector not in self._selected:
            read = [entry for entry in self.branch.entries if entry in self._dense]
            source = self._dense[read[-1]]  # a later alias may not be there yet
            made = self._call(self._operators.select, (source, self._kept), {}, like)
            self._selected[self._selector] = made
        return self._selected[self._selector]

    def _kept_index(self, like: Node) -> Node:
        selection = self._selection(like)
        if isinstance(selection.meta["val"], Tensor):
            return selection
        return self._call(operator.getitem, (selection, 0), {}, like)

    def _take(self, entry: Node) -> Node:
        if entry not in self._taken:
            parts = (self._dense[entry], self._selection(entry))
            self._taken[entry] = self._call(self._operators.take, parts, {}, entry)
        return self._taken[entry]

    def _gather(self, side: Node, axes: Axes) -> Node:
        if (side, axes) not in self._gathered:
            layout = SideLayout.of(side.meta["val"].shape, axes, self._kept)
            index = self._kept_index(side)
            parts = (self._dense[side], index, *layout)
            self._gathered[side, axes] = self._call(take_side, parts, {}, side)
        return self._gathered[side, axes]

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
        node = self._graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in like.meta.items() if k != "val"}
        node.meta["fastvar"] = self.branch.label | {"kept": self._kept}
        try:
            node.meta["val"] = target(*example_values(args), **example_values(kwargs))
        except Exception as error:
            refuse("FVX018", first_line(error) or type(error).__name__, like)
        return node

    def _check(self, node: Node) -> None:
        """A shape that the axes do not predict means that a rule is wrong."""
        axes = self.branch.axes[node]
        made = self.emitted[node].meta["val"]
        pairs = zip(axes, made, strict=False) if isinstance(axes, list) else [(axes, made)]
        for expected, value in pairs:
            wanted = shape_of(expected, self._kept)
            if isinstance(value, Tensor) and list(value.shape) != wanted:
                refuse("FVX018", f"it returns {list(value.shape)} where {wanted} is expected", node)


def _no_tokens(cached: Tensor) -> Tensor:
    """Returns empty indices (B, 0) for a captured output (B, Lc, C)."""
    return torch.empty(cached.shape[0], 0, dtype=torch.int64, device=cached.device)
