"""Rewrites branches into PTS -> branch -> CTR. Rewrite only: what to change was found before.

The graph is built anew, node by node. A pruned branch is emitted as a copy that reads the trunk at
the kept tokens; its dense form is left out unless something else still needs it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.axes import Axes, Tag, dim_size, has_batch, has_tokens, shape_of
from passes.branches import Branch
from passes.graphs import example_values, memory_owner, mutated, outputs_of
from passes.refusal import Refusal, RefusedError, refuse
from passes.rules import Gather, Recount, Replace, Resize, bind

Scale = tuple[int, ...]
"""A token map, as the operators read it; nothing here looks into it."""


class Operators(Protocol):
    """The runtime functions that the rewritten graph calls; all take and return real tensors."""

    @property
    def select(self) -> Callable[[Tensor, int], Any]:
        """(x (B, L, C), kept) -> indices of the kept tokens (B, kept), int64.

        Or a tuple that starts with them; `take` and `restore` then get the tuple.
        """

    @property
    def restores_anew(self) -> bool:
        """Whether what `restore` returns is memory of its own, free to overwrite."""

    @property
    def take(self) -> Callable[[Tensor, Any], Tensor]:
        """(x (B, L, C), what `select` gave) -> what the branch runs on, (B, kept, C)."""

    @property
    def restore(self) -> Callable[[Tensor, Any, Tensor, Scale, Scale], Tensor]:
        """(kept (B, kept, C), what `select` gave, cached (B, Lc, C), its scale, scale) -> all."""


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


@dataclass(frozen=True)
class PrunedGraph:
    """A rewritten graph.

    Attributes:
        graph_module: Takes the original inputs that it still reads, then one captured output per
            pruned branch; returns what the original returns.
        inputs: Positions of the original inputs that it still reads.
    """

    graph_module: GraphModule
    inputs: tuple[int, ...]


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
        captured: Gives an example (a fake tensor) of a branch's captured output.

    Raises:
        PruneRefusedError: FVX018 if a rewritten op does not run on the kept tokens.
    """
    return _Rewriter(graph_module, list(branches), step, operators).run(captured)


class PruneRefusedError(RefusedError):
    """A branch turned out not to run on the kept tokens.

    Attributes:
        branch: Its index.
    """

    def __init__(self, branch: int, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.branch = branch


class _Rewriter:
    def __init__(
        self, graph_module: GraphModule, branches: list[Branch], step: Step, operators: Operators
    ) -> None:
        self._source = graph_module
        self._operators = operators
        self._branches = branches
        self._graph = Graph()
        self._dense: dict[Node, Node] = {}
        self._live, self._pruned_live = _liveness(graph_module.graph, branches, step.kept)
        selected: dict[int, Node] = {}
        self._emitters = [
            _BranchEmitter(self._graph, branch, step, operators, self._dense, selected)
            for branch in branches
        ]

    def run(self, captured: Callable[[Branch], Tensor]) -> PrunedGraph:
        order = {node: place for place, node in enumerate(self._source.graph.nodes)}
        placeholders = self._source.graph.find_nodes(op="placeholder")
        read = [i for i, node in enumerate(placeholders) if node in self._live]
        for index in read:
            self._copy(placeholders[index])
        caches = [self._cache_input(branch, captured(branch)) for branch in self._branches]
        adds = {branch.add: i for i, branch in enumerate(self._branches)}
        for node in order:
            if node.op in ("placeholder", "output"):
                continue
            if node in adds:
                emitter, cache = self._emitters[adds[node]], caches[adds[node]]
                self._add(node, emitter.branch.out, emitter.restored(cache))
            elif node in self._live:
                self._copy(node)
            for emitter in self._emitters:
                if node in self._pruned_live[emitter.branch.index]:
                    try:
                        emitter.emit(node)
                    except RefusedError as error:
                        raise PruneRefusedError(emitter.branch.index, error.refusal) from error
        self._output()
        self._graph.lint()
        return PrunedGraph(GraphModule(self._source, self._graph), tuple(read))

    def _cache_input(self, branch: Branch, example: Tensor) -> Node:
        node = self._graph.placeholder(f"captured_{branch.index}")
        node.meta = {"val": example, "fastvar": {"input": f"captured {branch.name}"}}
        return node

    def _copy(self, node: Node, replaced: dict[Node, Node] | None = None) -> None:
        env = self._dense if replaced is None else self._dense | replaced
        self._dense[node] = self._graph.node_copy(node, lambda arg: env[arg])

    def _add(self, node: Node, out: Node, restored: Node) -> None:
        """Emits the residual add, into the restored output where that saves an allocation."""
        plain = node.target is torch.ops.aten.add.Tensor and len(node.args) == 2 and not node.kwargs
        same = restored.meta["val"].dtype == node.meta["val"].dtype
        if not (plain and same and self._operators.restores_anew):
            self._copy(node, {out: restored})
            return
        (trunk,) = [self._dense[arg] for arg in node.all_input_nodes if arg is not out]
        add = self._graph.call_function(torch.ops.aten.add_.Tensor, (restored, trunk))
        add.meta = dict(node.meta)
        self._dense[node] = add

    def _output(self) -> None:
        outputs = []
        for value in outputs_of(self._source.graph):
            pruned = next((e.emitted[value] for e in self._emitters if value in e.emitted), None)
            outputs.append(self._dense[value] if pruned is None else pruned)
        self._graph.output(outputs)


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
        self.emitted: dict[Node, Node] = {}
        self._graph = graph
        self._step = step
        self._kept = step.kept
        self._operators = operators
        self._dense = dense
        self._selected = selected
        self._selector = 0 if step.selects_once else branch.index
        self._taken: dict[Node, Node] = {}
        self._gathered: dict[tuple[Node, Axes], Node] = {}

    def emit(self, node: Node) -> None:
        """Emits the pruned form of a node of the region."""
        edits = self.branch.edits.get(node, {})
        args: dict[str, Any] = {}
        for name, value in bind(node).items():
            edit = edits.get((name, None))
            if isinstance(edit, Replace):
                args[name] = edit.value
            elif isinstance(edit, Recount):
                args[name] = self._recount(value, edit, node)
            elif isinstance(edit, Resize):
                args[name] = self._resized(value, edit.axes, node)
            elif isinstance(value, (list, tuple)):
                args[name] = [
                    self._operand(item, edits.get((name, i))) for i, item in enumerate(value)
                ]
            else:
                args[name] = self._operand(value, edit)
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
            text = str(error).strip().splitlines()
            refuse("FVX018", text[0] if text else type(error).__name__, like)
        return node

    def _check(self, node: Node) -> None:
        """A shape that the axes do not predict means that a rule is wrong."""
        axes = self.branch.axes[node]
        made = self.emitted[node].meta["val"]
        pairs = zip(axes, made, strict=False) if isinstance(axes, list) else [(axes, made)]
        for expected, value in pairs:
            wanted = shape_of(expected, self._kept)
            if isinstance(value, Tensor) and list(value.shape) != wanted:
                refuse("FVX018", f"it gives {list(value.shape)} where {wanted} was due", node)


def _liveness(
    graph: Graph, branches: list[Branch], kept: int
) -> tuple[set[Node], dict[int, set[Node]]]:
    """Returns the nodes that are needed in dense form, and those of each branch in pruned form."""
    outputs = outputs_of(graph)
    adds = {branch.add: branch for branch in branches}
    pruned: dict[int, set[Node]] = {branch.index: set() for branch in branches}
    live: set[Node] = set()
    for branch in branches:
        wanted = [node for node in outputs if node in branch.region]
        _grow(pruned[branch.index], wanted + [branch.out] * (kept > 0), set(branch.region))
    roots = [node for node in outputs if not any(node in b.region for b in branches)]
    for branch in branches:
        roots += branch.entries
        region = pruned[branch.index]
        roots += [arg for n in region for arg in n.all_input_nodes if arg not in branch.region]
    stack = roots + [node for node in graph.nodes if _is_scope(node)]
    while stack:
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                skipped = adds[node].out if node in adds else None
                stack.extend(arg for arg in node.all_input_nodes if arg is not skipped)
        stack = [node for node in _writers(graph.nodes, live) if node not in adds]
    return live, pruned


def _grow(live: set[Node], roots: list[Node], within: set[Node]) -> None:
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in within and node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    writers = [node for node in _writers(within, live) if node in within]
    if writers:
        _grow(live, writers, within)


def _writers(nodes: Iterable[Node], live: set[Node]) -> list[Node]:
    """In-place ops not yet live that write into the memory of a live value, or of an input."""
    owners = {memory_owner(node) for node in live}
    return [
        node
        for node in nodes
        if node not in live
        and (target := mutated(node)) is not None
        and ((owner := memory_owner(target)) in owners or owner.op == "placeholder")
    ]


def _is_scope(node: Node) -> bool:
    """Autocast and grad-mode switches take effect by their place in the graph."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    return getattr(node.target, "__name__", "") in {
        "_enter_autocast",
        "_exit_autocast",
        "_set_grad_enabled",
    }


class SideLayout(NamedTuple):
    """How a side input is gathered at the kept tokens of the value it meets.

    Attributes:
        splits: Per dim, aligned from the right, the sizes of the factors it is taken apart into;
            None leaves it as it is.
        tokens: Dims to gather, counted after the split: their number of tokens, and how many
            entries stand behind these.
        batch: The dim, after the split, that ranges over the samples; -1 if there is one sample.
        full: The sizes, after the split and the gather, to expand to; -1 leaves one as it is.
    """

    splits: tuple[tuple[int, ...] | None, ...]
    tokens: tuple[tuple[int, int, int], ...]
    batch: int
    full: tuple[int, ...]

    @staticmethod
    def of(side_shape: Iterable[int], axes: Axes, kept: int) -> SideLayout:
        """Returns the layout for a side input of `side_shape` that meets `axes` from the right."""
        sizes = list(side_shape)
        rank = max(len(axes), len(sizes))
        sizes = [1] * (rank - len(sizes)) + sizes
        splits: list[tuple[int, ...] | None] = []
        tokens: list[tuple[int, int, int]] = []
        full: list[int] = []
        batch = -1
        for size, dim in zip(sizes, ((),) * (rank - len(axes)) + axes, strict=True):
            if not (has_batch(dim) or (has_tokens(dim) and size != 1)):
                splits.append(None)
                full.append(-1)
                continue
            splits.append(tuple(1 if size == 1 else f.size for f in dim) if len(dim) > 1 else None)
            for factor in dim:
                if factor.tag is Tag.BATCH:
                    batch = len(full)
                elif factor.tag is Tag.TOKEN and size != 1:
                    tokens.append((len(full), factor.tokens, factor.after))
                full.append(factor.kept_size(kept) if size == 1 or factor.tag is Tag.BATCH else -1)
        return SideLayout(tuple(splits), tuple(tokens), batch, tuple(full))


def _no_tokens(cached: Tensor) -> Tensor:
    """Returns empty indices (B, 0) for a captured feature (B, Lc, C)."""
    return torch.empty(cached.shape[0], 0, dtype=torch.int64, device=cached.device)


def take_side(
    side: Tensor,
    index: Tensor,
    splits: tuple[tuple[int, ...] | None, ...],
    tokens: tuple[tuple[int, int, int], ...],
    batch: int,
    full: tuple[int, ...],
) -> Tensor:
    """Gathers a side input per sample at the kept tokens.

    Args:
        side: A tensor with an entry per token on one or more dims, such as a RoPE table.
        index: Kept tokens (B, kept), int64.
        splits: This and the rest: see `SideLayout`.
        tokens: Dims to gather, with their number of tokens and what stands behind them.
        batch: Dim of the samples, or -1.
        full: Sizes to expand to.
    """
    shape = (1,) * (len(splits) - side.dim()) + tuple(side.shape)
    parts = [split or (size,) for split, size in zip(splits, shape, strict=True)]
    value = side.reshape([size for part in parts for size in part])
    for dim, count, after in tokens:
        keys = _keys(index, value.shape[dim], count, after)
        place = [1] * value.dim()
        place[dim] = keys.shape[1]
        if batch >= 0:
            place[batch] = index.shape[0]
        keys = keys.mT if batch > dim else keys
        value = torch.take_along_dim(value, keys.reshape(place), dim)
    value = value.expand(full)
    for dim, part in enumerate(parts):  # merged again, from the left
        value = value.flatten(dim, dim + len(part) - 1)
    return value


def _keys(index: Tensor, size: int, tokens: int, after: int) -> Tensor:
    """Extends the kept tokens by the entries that stand before and behind all tokens."""
    before = size - tokens - after
    if not (before or after):
        return index
    samples = index.shape[0]
    earlier = torch.arange(before, device=index.device).expand(samples, before)
    later = torch.arange(size - after, size, device=index.device).expand(samples, after)
    return torch.cat([earlier, index + before, later], dim=1)
