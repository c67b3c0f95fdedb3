"""Rewrites branches into PTS -> branch -> CTR. Rewrite only: what to change was found before.

The graph is built anew, node by node. Every node is copied in its dense form, those of a pruned
branch also in a form that reads the trunk at the kept tokens; then dead code is dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal, NoReturn, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.analyse.axes import Axes, dim_size, shape_of
from passes.analyse.branches import Branch, Kind
from passes.analyse.rules.site import (
    Edit,
    Gather,
    Recount,
    Replace,
    Resize,
    Slot,
    declared_advice,
)
from passes.base import Context, Draft, OperatorError
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


Rule = Literal["select", "take", "restore"]
"""A function of the operators."""
ASKS_NOTHING: Final[Mapping[Rule, Sequence[str]]] = {"select": (), "take": (), "restore": ()}
"""For operators whose functions get their positional arguments alone."""


class Operators(Protocol):
    """The runtime functions that the rewritten graph calls; all take and return real tensors."""

    @property
    def asks(self) -> Mapping[Rule, Sequence[str]]:
        """What each function is also given, by keyword: "cached", "cached_scale", "scale".

        Or a name of `Step.given`. And `select` may ask for "selected": what it returned in another
        block, which is None unless `Step.selection` is "taken".
        """

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
    """What a pruned step keeps, and how.

    Attributes:
        kept: How many tokens each branch keeps, or those of each kind.
        cached_scale: The scale it restores from.
        scale: Its own scale.
        operators: Selection and restoration.
        last: Whether no step comes after it.
        selects_once: Whether all branches of a block keep the tokens that the first one selects.
        given: Plain values that the operators may ask for, by name, for each kind of branch.
        selection: Whether a block selects on its own, or "given" or "taken" with `selects_once`:
            whether its graph also returns what it selected, or takes what another block has.
    """

    kept: int | Mapping[Kind, int]
    cached_scale: Scale
    scale: Scale
    operators: Operators
    last: bool = True
    selects_once: bool = False
    given: Mapping[Kind, Mapping[str, Any]] = field(default_factory=dict)
    selection: Literal["own", "given", "taken"] = "own"

    def keeps(self, kind: Kind) -> int:
        """Returns how many tokens a branch of a kind keeps."""
        return self.kept if isinstance(self.kept, int) else self.kept[kind]


class Prune:
    """At a pruned step, makes the branches run on the kept tokens."""

    name = "prune"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft whose graph takes the captured outputs and prunes."""
        if context.step is None:
            return draft
        wanted = draft.prunable(context.kinds)

        def captured(branch: Branch) -> Tensor:
            out, shape = branch.out.meta["val"], context.captured[branch.index].shape
            return out.new_empty(out.shape[0], *shape[1:])  # type: ignore[no-any-return]

        pruned = prune(draft.graph_module, wanted, context.step, captured)
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
    captured: Callable[[Branch], Tensor],
) -> PrunedGraph:
    """Rewrites `branches` to run on the kept tokens of a step.

    Args:
        graph_module: The captured graph; it stays as it is.
        branches: Branches found in it, in the order of the captured inputs.
        step: How many tokens the branches keep, in [0, L], the scales and the operators.
        captured: Returns an example (a fake tensor) of a branch's captured output.

    Raises:
        BranchRefusedError: FVX018 if a rewritten op does not run on the kept tokens.
    """
    return _Rewriter(graph_module, branches, step).run(captured)


class _Rewriter:
    """Builds the pruned graph.

    Attributes:
        graph: The graph in the making.
        dense: The dense form of each node of the source.
        selected: What each branch of the block has selected, by index.
    """

    def __init__(self, graph_module: GraphModule, branches: Iterable[Branch], step: Step) -> None:
        self.step = step
        self.graph = Graph()
        self.dense: dict[Node, Node] = {}
        self.selected: dict[int, Node] = {}
        self._source = graph_module
        self._emitters = [_BranchEmitter(self, branch) for branch in branches]

    def run(self, captured: Callable[[Branch], Tensor]) -> PrunedGraph:
        inputs = [self._copy(node) for node in self._source.graph.find_nodes(op="placeholder")]
        for emitter in self._emitters:
            emitter.cache = self._cache_input(emitter.branch, captured)
        adds = {emitter.branch.add: emitter for emitter in self._emitters}
        for node in self._source.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in adds:
                self._add(node, adds[node].branch.out, adds[node].restored())
            else:
                self._copy(node)
            for emitter in self._emitters:
                emitter.emit(node)
        made = dict(self.dense)
        for emitter in reversed(self._emitters):
            made |= emitter.emitted
        self.graph.output([made[value] for value in outputs_of(self._source.graph)])
        self.graph.eliminate_dead_code(is_impure_node=partial(has_effect, random=False))
        read = [place for place in drop_unread_inputs(self.graph) if place < len(inputs)]
        forms = {emitter.branch.index: self._form(emitter) for emitter in self._emitters}
        return PrunedGraph(GraphModule(self._source, self.graph), tuple(read), forms)

    def _cache_input(self, branch: Branch, captured: Callable[[Branch], Tensor]) -> Node:
        node = self.graph.placeholder(f"captured_{branch.index}")
        node.meta = {"val": captured(branch), "fastvar": {"input": f"captured {branch.name}"}}
        return node

    def _copy(self, node: Node) -> Node:
        self.dense[node] = self.graph.node_copy(node, self.dense.__getitem__)
        return self.dense[node]

    def _add(self, node: Node, out: Node, restored: Node) -> None:
        """Emits the residual add, into the restored output where that saves an allocation."""
        plain = node.target is torch.ops.aten.add.Tensor and len(node.args) == 2 and not node.kwargs
        same = restored.meta["val"].dtype == node.meta["val"].dtype
        if not (plain and same and self.step.operators.restores_anew):
            self._copy(node).replace_input_with(self.dense[out], restored)
            return
        (trunk,) = [self.dense[arg] for arg in node.all_input_nodes if arg is not out]
        add = self.graph.call_function(torch.ops.aten.add_.Tensor, (restored, trunk))
        add.meta = dict(node.meta)
        self.dense[node] = add

    def _form(self, emitter: _BranchEmitter) -> list[Node]:
        """Returns the nodes of a branch that are left, in either form."""
        both = {*(self.dense[node] for node in emitter.branch.region), *emitter.emitted.values()}
        return [node for node in self.graph.nodes if node in both]


class _BranchEmitter:
    """Emits one branch on the kept tokens.

    Attributes:
        branch: The branch.
        cache: Its captured output.
        emitted: The pruned form of its nodes.
    """

    cache: Node

    def __init__(self, rewriter: _Rewriter, branch: Branch) -> None:
        self.branch = branch
        self.emitted: dict[Node, Node] = {}
        self._rewriter = rewriter
        self._dense = rewriter.dense
        self._kept = rewriter.step.keeps(branch.kind)
        self._operators = rewriter.step.operators
        self._selector = 0 if rewriter.step.selects_once else branch.index
        self._taken: dict[tuple[Node, Axes | None], Node] = {}
        self._region = set(branch.region)
        if not self._kept:  # ops may fail on no tokens, so only what becomes new state is emitted
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
        self.emitted[node] = self._call(node.target, positional, node, keyword)
        self._check(node)

    def restored(self) -> Node:
        """Emits the restoration of the branch's full output."""
        out, step, cache = self.branch.out, self._rewriter.step, self.cache
        if self._kept:
            kept, selection = self.emitted[out], self._selection(out)
        else:
            kept = self._call(torch.ops.aten.slice.Tensor, (cache, 1, 0, 0), out)
            selection = self._call(_no_tokens, (cache,), out)
        parts = (kept, selection, cache, step.cached_scale, step.scale)
        return self._rule("restore", parts, out)

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
            return self._take(value, edit.axes)
        return self._dense[value]

    def _resized(self, sizes: Iterable[Any], axes: Axes, like: Node) -> list[Any]:
        """The size argument of these axes; one that is computed loses the dropped tokens."""
        resized: list[Any] = []
        for size, dim in zip(sizes, axes, strict=True):
            kept = dim_size(dim, self._kept)
            if isinstance(size, Node):
                dropped, dense = dim_size(dim) - kept, self._dense[size]
                resized.append(self._call(operator.sub, (dense, dropped), like))
            elif size == -1 and self._kept:
                resized.append(-1)
            else:
                resized.append(kept)
        return resized

    def _recount(self, value: Any, edit: Recount, like: Node) -> Any:
        count = self._kept + edit.around
        if not isinstance(value, Node):
            return edit.compute(value, count)
        return self._call(edit.compute, (self._dense[value], count), like)

    def _selection(self, like: Node) -> Node:
        """What is selected of the trunk as this branch reads it, or as the first branch does."""
        selected = self._rewriter.selected
        if self._selector not in selected:
            read = [entry for entry in self.branch.entries if entry in self._dense]
            source = self._dense[read[-1]]  # a later alias may not be there yet
            made = self._rule("select", (source, self._kept), like)
            selected[self._selector] = made
        return selected[self._selector]

    def _take(self, value: Node, axes: Axes | None = None) -> Node:
        """Emits the kept tokens of a trunk value, or of a side input that meets these axes."""
        if (value, axes) not in self._taken:
            dense, selection = self._dense[value], self._selection(value)
            if axes is None:
                made = self._rule("take", (dense, selection), value)
            else:
                if not isinstance(selection.meta["val"], Tensor):
                    selection = self._call(operator.getitem, (selection, 0), value)
                layout = SideLayout.of(value.meta["val"].shape, axes, self._kept)
                if layout.batch < 0 and selection.meta["val"].shape[0] > 1:
                    op = next(user for user in value.users if user in self._region)
                    self._refuse(_SHARED, op)
                made = self._call(take_side, (dense, selection, *layout), value)
            self._taken[value, axes] = made
        return self._taken[value, axes]

    def _rule(self, name: Rule, args: tuple[Any, ...], like: Node) -> Node:
        """Emits a call of one of the operators, with what it asks for."""
        step = self._rewriter.step
        known = {"cached": self.cache, "cached_scale": step.cached_scale, "scale": step.scale}
        known |= {"selected": None, **step.given.get(self.branch.kind, {})}
        asked = {key: known[key] for key in self._operators.asks[name]}
        node = self._call(getattr(self._operators, name), args, like, asked)
        made, out = node.meta["val"], like.meta["val"]
        if name == "select":
            index = made[0] if isinstance(made, tuple) else made
            self._check_made(name, index, (out.shape[0], self._kept), torch.int64)
        elif name == "restore":
            self._check_made(name, made, out.shape, out.dtype)
        return node  # what `take` returns is checked with the ops that read it

    def _check_made(self, name: Rule, made: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
        wanted, found = _described(shape, dtype), repr(made)
        if isinstance(made, Tensor):
            found = _described(made.shape, made.dtype)
        if found != wanted:
            raise OperatorError(
                f"{name} of the method has to return {wanted} for {self.branch.name}, of which "
                f"{self._kept} tokens are kept; it returned {found}"
            )

    def _call(
        self, target: Any, args: tuple[Any, ...], like: Node, kwargs: dict[str, Any] | None = None
    ) -> Node:
        kwargs = kwargs or {}
        node = self._rewriter.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in like.meta.items() if k != "val"}
        node.meta["fastvar"] = self.branch.label | {"kept": self._kept}
        try:
            node.meta["val"] = target(*example_values(args), **example_values(kwargs))
        except Exception as error:
            self._refuse(first_line(error) or type(error).__name__, like)
        return node

    def _check(self, node: Node) -> None:
        """A shape that the axes do not predict means that a rule is wrong."""
        axes = self.branch.axes[node]
        made = self.emitted[node].meta["val"]
        pairs = zip(axes, made, strict=False) if isinstance(axes, list) else [(axes, made)]
        for expected, value in pairs:
            wanted = shape_of(expected, self._kept)
            if isinstance(value, Tensor) and list(value.shape) != wanted:
                self._refuse(f"it returns {list(value.shape)} where {wanted} is expected", node)

    def _refuse(self, reason: str, node: Node) -> NoReturn:
        refuse("FVX018", reason, node, advice=declared_advice(self.branch.region))


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


_SHARED: Final = (
    "it takes per-token values that all samples share, but each sample keeps tokens of its own"
)


def _no_tokens(cached: Tensor) -> Tensor:
    """Returns empty indices (B, 0) for a captured output (B, Lc, C)."""
    return torch.empty(cached.shape[0], 0, dtype=torch.int64, device=cached.device)
