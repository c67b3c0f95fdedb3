"""Finds the residual branches of a block program. Analysis only: no graph is edited.

The trunk is followed backwards from the block's result to its (B, L, C) input: through adds of the
stream and a branch, and through other ops on the stream itself (casts, a post-norm). The nodes
between the trunk and such an add are a branch. The axis rule of every op of a branch then decides
whether tokens may be dropped through it; a branch with an op through which they may not is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

import torch
from torch.fx import Graph, Node

from passes.analyse.axes import Axes, has_batch, has_tokens, stream_axes
from passes.analyse.rules.attention import is_attention, key_operand
from passes.analyse.rules.site import Edit, Slot, apply_rule
from passes.graph import (
    bind,
    inputs_within,
    memory_owner,
    op_name,
    outputs_of,
    placeholder_of,
    reach,
    written,
)
from passes.refusal import Refusal, RefusedError, refuse
from passes.user_frames import where

if TYPE_CHECKING:
    from passes.base import Context, Draft
    from passes.trace.capture import BlockProgram
    from passes.trace.state import Path

AxesByNode = dict[Node, Axes | list[Axes]]
"""The axes of each value; a list for several results."""
Kind = Literal["attention", "cross_attention", "ffn"]
KINDS: Final[tuple[Kind, ...]] = ("attention", "cross_attention", "ffn")

_ADDS: Final = frozenset({"aten::add", "aten::sub"})
_PRODUCTS: Final = frozenset(
    {
        "aten::linear", "aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm",
        "aten::einsum", "aten::_int_mm", "aten::conv1d", "aten::conv2d", "aten::convolution",
        "aten::scaled_dot_product_attention",
    }
)  # fmt: skip
_SOFTMAXES: Final = frozenset({"aten::softmax", "aten::_softmax"})
_EXPONENTIALS: Final = frozenset({"aten::exp", "aten::exp2"})

_MADE_HERE: Final = (
    "tokens that are sent to experts are written by place: weight each expert's output per token "
    "instead, as in sum(weight[..., i:i + 1] * expert(x)), or declare the feed-forward as one op "
    "with register_opaque. Other results can be joined with cat or stack"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch:
    """A residual branch.

    Attributes:
        index: Its place along the trunk, from the block's input on; those without an add come last.
        kind: What it is.
        name: The module path that its weights share, such as `attn`; its kind if there is none.
        add: The residual add; None if it changes the trunk otherwise, and so is refused.
        out: What it adds: the branch's whole contribution.
        region: Its nodes in graph order, `out` included, and those that only make its new state.
        entries: The trunk values it reads, in graph order.
        axes: The axes of every value of the region and of the entries.
        edits: What changes in a node when tokens are dropped.
        refusal: Why it stays dense, with axes and edits as far as they are known; None if it may
            drop tokens.
    """

    index: int
    kind: Kind
    name: str
    add: Node | None = field(repr=False)
    out: Node = field(repr=False)
    region: tuple[Node, ...] = field(repr=False)
    entries: tuple[Node, ...] = field(repr=False)
    axes: AxesByNode = field(repr=False)
    edits: dict[Node, dict[Slot, Edit]] = field(repr=False)
    refusal: Refusal | None = None

    @property
    def label(self) -> dict[str, Any]:
        """What its nodes are marked with, under `meta["fastvar"]`."""
        return {"branch": self.index, "kind": self.kind}


class FindBranches:
    """Finds the branches, and marks their nodes under `meta["fastvar"]`, which copies inherit."""

    name = "find_branches"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with its branches."""
        graph_module, inputs = draft.graph_module, draft.inputs
        program = replace(draft.captured, graph_module=graph_module, inputs=inputs)
        found = find_branches(program, context.call.stream)
        for branch in found:
            for node in branch.region:
                node.meta["fastvar"] = dict(branch.label)
        return replace(draft, source=graph_module, found=tuple(found))


def counts_flops(node: Node) -> bool:
    """Whether a call is a matrix product or an attention, whose FLOPs are counted."""
    return op_name(node) in _PRODUCTS or is_attention(node)


def is_like_stream(value: Node, stream: Node) -> bool:
    """Whether a value has the shape (B, L, C) with the samples and tokens of the stream."""
    shape, of_stream = _shape(value) or (), _shape(stream) or ()
    return len(shape) == 3 and shape[:2] == of_stream[:2]


def find_branches(program: BlockProgram, stream: Path) -> list[Branch]:
    """Finds the residual branches of a block program.

    Args:
        program: The program.
        stream: Path of its (B, L, C) input.

    Raises:
        RefusedError: FVX003 if the program does not read the stream, or no result is reached by a
            residual stream; FVX004 if the trunk holds no branch.
    """
    node = placeholder_of(program, stream)
    if node is None:
        refuse("FVX003", "its (B, L, C) input is not read")
    trunk = _Trunk(program.graph_module.graph, node, program.result_count)
    found = [_examine(trunk, index) for index in range(len(trunk.adds))]
    return found + [_left_out(trunk, len(found) + i, at) for i, at in enumerate(trunk.rest)]


class _Trunk:
    """The trunk of a block, and the nodes between it and its residual adds.

    Attributes:
        stream: Its (B, L, C) input.
        inside: The stream and all that is computed from it.
        values: The values of the trunk.
        adds: Its (add, branch output) pairs from the input on.
        states: Outputs of the graph that become state.
        beside: What values of the trunk are computed from besides the trunk, such as gates; no
            whole branch is among it.
        regions: The nodes of each branch.
        rest: What else values of the trunk are computed from and no branch is, by the value, where
            a matrix product or an attention is among it.
    """

    def __init__(self, graph: Graph, stream: Node, results: int) -> None:
        self.stream = stream
        self.inside = {stream}
        self._light = {stream}  # computed from the stream without one
        self._heavy: set[Node] = set()  # holds a matrix product or an attention since the trunk
        self._residuals: dict[Node, tuple[Node, Node]] = {}  # add -> (trunk, branch output)
        self._roots: dict[Node, Node] = {}  # where the trunk of a residual add began
        self._nearest = ""
        for node in graph.nodes:
            sources = node.all_input_nodes
            if node.op == "call_function" and any(source in self.inside for source in sources):
                self.inside.add(node)
                self._survey(node)
        outputs = outputs_of(graph)
        self.values, self.adds = self._walk(stream, outputs[:results])
        if not self.adds:
            reason = "its result is not a sum of its input and something computed from it"
            refuse("FVX004", reason, nearest=self._nearest)
        self.states = set(outputs[results:])
        between = self.inside - self.values
        cones = self._cones(graph, between)
        ends = {out for _, out in self.adds}
        self.beside = set().union(*(cone for cone in cones.values() if cone.isdisjoint(ends)))
        self.regions = [inputs_within([out], between) for _, out in self.adds]
        taken = set().union(*self.regions)
        left = {value: cone - taken for value, cone in cones.items()}
        self.rest = {value: rest for value, rest in left.items() if any(map(counts_flops, rest))}
        for state in outputs[results:]:
            if state in between and not any(state in region for region in self.regions):
                # What only becomes new state belongs to the branch it is computed from.
                cone = inputs_within([state], between)
                nearest = max(self.regions, key=lambda region: len(region & cone))
                nearest |= cone

    def _cones(self, graph: Graph, between: set[Node]) -> dict[Node, set[Node]]:
        """Returns what each value of the trunk reads that is neither of the trunk nor a branch."""
        adds = {add for add, _ in self.adds}
        values = (node for node in graph.nodes if node in self.values and node not in adds)
        read = {value: between.intersection(value.all_input_nodes) for value in values}
        return {value: inputs_within(nodes, between) for value, nodes in read.items() if nodes}

    def _survey(self, node: Node) -> None:
        pair = self._split(node)
        sources = node.all_input_nodes
        if not counts_flops(node) and not self._light.isdisjoint(sources):
            self._light.add(node)
        if pair is not None:
            trunk, _ = self._residuals[node] = pair
            self._roots[node] = self._roots.get(trunk, trunk)
            sources = [trunk]
        if counts_flops(node) or any(source in self._heavy for source in sources):
            self._heavy.add(node)

    def _split(self, node: Node) -> tuple[Node, Node] | None:
        """Splits a residual add into (trunk, branch output); returns None for any other node."""
        if op_name(node) not in _ADDS or len(node.args) < 2:
            return None
        a, b = node.args[:2]
        if not (isinstance(a, Node) and isinstance(b, Node) and {a, b} <= self.inside):
            return None
        if not (_shape(a) == _shape(b) == _shape(node)) or a is b:
            return None
        for trunk, out in ((a, b), (b, a)):
            if self._is_residual(trunk, out):
                return trunk, out
        at = f" at {where(node)}" if where(node) else ""
        why = "to which no matrix product or attention contributes"
        if {a, b} <= self._heavy:
            why = "neither operand of which is the residual stream alone"
        self._nearest = f"{node.target}{at}, {why}"
        return None

    def _is_residual(self, trunk: Node, out: Node) -> bool:
        """Whether a sum of two values is one of the trunk and a branch."""
        root = self._roots.get(trunk, trunk)
        if out in self._heavy:
            gated = trunk in self._light and out not in self._light
            return trunk not in self._heavy or gated or root in reach([out], _inputs)
        # A branch may end with an add of its own, as in x + (h + ffn(h)).
        nested = out in self._residuals and self._roots[out] is not root
        return nested and trunk in reach([out], _inputs)

    def _walk(
        self, stream: Node, results: Sequence[Node]
    ) -> tuple[set[Node], list[tuple[Node, Node]]]:
        for result in results:
            values: set[Node] = {stream}
            adds: list[tuple[Node, Node]] = []
            node: Node | None = result if _shape(result) == _shape(stream) else None
            while node is not None and node is not stream:
                values.add(node)
                if node in self._residuals:
                    before, out = self._residuals[node]
                    adds.append((node, out))
                    node = before
                else:
                    node = self._predecessor(node)
            if node is stream:
                return values, adds[::-1]
        reason = f"no result of shape {_shape(stream)} is its input plus something"
        return refuse("FVX003", reason, nearest=self._nearest)

    def _predecessor(self, node: Node) -> Node | None:
        """Follows the trunk through an op that is no residual add: a cast, a norm, a projection."""
        if node in self._heavy and op_name(node) != "aten::linear" and counts_flops(node):
            return None
        sources = [arg for arg in node.all_input_nodes if arg in self.inside]
        alike = [arg for arg in sources if _shape(arg) == _shape(node)]
        # The others may be gates, or the trunk further up.
        alike.sort(key=lambda arg: (arg not in self._light, arg not in self._residuals))
        return next(iter([*alike, *sources]), None)


def _inputs(node: Node) -> list[Node]:
    return node.all_input_nodes


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _examine(trunk: _Trunk, index: int) -> Branch:
    add, out = trunk.adds[index]
    region = tuple(node for node in add.graph.nodes if node in trunk.regions[index])
    entries: tuple[Node, ...] = ()
    axes: AxesByNode = {}
    edits: dict[Node, dict[Slot, Edit]] = {}
    refusal = None
    try:
        entries = _entries(region, trunk)
        axes |= {entry: stream_axes(entry.meta["val"].shape) for entry in entries}
        _check_owned(region, add, trunk)
        edits = _propagate(region, axes)
        _check_output(out, axes)
        _check_returned(region, axes, trunk.states)
    except RefusedError as error:
        refusal = error.refusal
    kind = _kind(region, axes, trunk.inside)
    return Branch(
        index=index,
        kind=kind,
        name=_name(region, trunk.inside) or kind,
        add=add,
        out=out,
        region=region,
        entries=entries,
        axes=axes,
        edits=edits,
        refusal=refusal,
    )


def _left_out(trunk: _Trunk, index: int, value: Node) -> Branch:
    """Returns what a value of the trunk is computed from, as a branch that is refused."""
    region = tuple(node for node in value.graph.nodes if node in trunk.rest[value])
    kind = _kind(region, {}, trunk.inside)
    reason = f"the stream is what {value.target} makes of it, which adds no branch of its shape"
    return Branch(
        index=index,
        kind=kind,
        name=_name(region, trunk.inside) or kind,
        add=None,
        out=region[-1],
        region=region,
        entries=(),
        axes={},
        edits={},
        refusal=Refusal.at(value, "FVX025", reason),
    )


def _entries(region: tuple[Node, ...], trunk: _Trunk) -> tuple[Node, ...]:
    entries = {arg for node in region for arg in node.all_input_nodes if arg in trunk.values}
    for entry in entries:
        if not is_like_stream(entry, trunk.stream):
            refuse("FVX003", f"it reads the trunk as {_shape(entry)}, not as (B, L, C)", entry)
    return tuple(node for node in region[0].graph.nodes if node in entries)


def _check_owned(region: tuple[Node, ...], add: Node, trunk: _Trunk) -> None:
    """Refuses a branch used from outside, or that writes into what it does not own."""
    known = trunk.beside.union(*trunk.regions)
    for node in region:
        for user in node.users:
            if user.op == "output" or user is add or user in known:
                continue
            if not _fills_a_cache(user, known | trunk.values):
                refuse("FVX014", f"it is used by {user.target} outside the branch", node)
        for owner in map(memory_owner, written(node)):
            if owner not in region:
                _refuse_write(node, owner, trunk)


def _refuse_write(node: Node, owner: Node, trunk: _Trunk) -> NoReturn:
    if owner.op != "call_function" or owner in trunk.inside:
        refuse("FVX015", f"{node.target} overwrites a value from outside", node)
    reason = f"{node.target} fills a tensor of {owner.target}, which is not made from the tokens"
    refuse("FVX015", reason, node, advice=_MADE_HERE)


def _fills_a_cache(node: Node, known: set[Node]) -> bool:
    """Whether a value is written into an input of the block by an in-place op.

    A preallocated cache is filled with all tokens, pruned or not: where a step's tokens are in it
    is a number in the model's code. So keys and values are computed densely, and queries pruned.
    """
    users = reach([node], lambda current: current.users.keys() - known)
    targets = (target for user in users for target in written(user))
    return any(memory_owner(target).op == "placeholder" for target in targets)


def _propagate(region: tuple[Node, ...], axes: AxesByNode) -> dict[Node, dict[Slot, Edit]]:
    edits: dict[Node, dict[Slot, Edit]] = {}
    for done, node in enumerate(region):
        try:
            axes[node], changes = apply_rule(node, axes)
        except RefusedError as error:
            nearest = f"{done} of the branch's {len(region)} ops keep the token axis"
            raise RefusedError(replace(error.refusal, nearest=nearest)) from error
        if changes:
            edits[node] = changes
    return edits


def _dims(axes: Axes | list[Axes] | None) -> Axes:
    """The axes of one tensor; none for several or for an unknown value."""
    return axes if isinstance(axes, tuple) else ()


def _check_output(out: Node, axes: AxesByNode) -> None:
    found, shape = _dims(axes[out]), _shape(out) or ()
    expected = stream_axes(shape) if len(shape) == 3 else ()
    if found[:2] != expected[:2] or has_tokens(found[2]) or has_batch(found[2]):
        refuse("FVX011", "its output is not laid out as (B, L, C) like the stream", out)


def _check_returned(region: tuple[Node, ...], axes: AxesByNode, states: set[Node]) -> None:
    """A block may return its keys and values, earlier ones included; nothing else of a branch."""
    for node in region:
        if node in states or not any(user.op == "output" for user in node.users):
            continue
        dims = [dim for dim in _dims(axes[node]) if has_tokens(dim)]
        if len(dims) != 1 or not any(factor.before for factor in dims[0]):
            refuse("FVX014", "the block returns it", node)


def _kind(region: tuple[Node, ...], axes: AxesByNode, inside: set[Node]) -> Kind:
    """Attention attends to tokens of the map, cross-attention to something else."""
    keys = [key for node in region for key in _attended(node, axes, region)]
    if not keys:
        return "ffn"
    return "attention" if any(keys) or _reads_filled(region, inside) else "cross_attention"


def _reads_filled(region: tuple[Node, ...], inside: set[Node]) -> bool:
    """Whether it reads an input of the block that tokens were written into, such as a cache."""
    filled = {memory_owner(target) for node in inside for target in written(node)} - inside
    read = {arg for node in region for arg in node.all_input_nodes} - inside
    return not filled.isdisjoint(map(memory_owner, read))


def _attended(
    node: Node, axes: Mapping[Node, Axes | list[Axes]], region: tuple[Node, ...]
) -> Iterator[bool]:
    """Yields whether the keys of an attention op are tokens; unknown axes count as tokens.

    Softmax may be written out, or be another function of the scores: a value with two token axes.
    """
    if is_attention(node):
        keys = axes.get(key_operand(node))
        yield (keys is None and node not in axes) or any(map(has_tokens, _dims(keys)))
    elif op_name(node) in _SOFTMAXES and _weighs_values(node, region):
        scores = axes.get(node)
        yield scores is None or has_tokens(_dims(scores)[int(bind(node)["dim"])])
    elif _divides_by_its_sum(node) and _weighs_values(node, region):
        yield node not in axes
    if sum(map(has_tokens, _dims(axes.get(node)))) > 1:
        yield True


def _divides_by_its_sum(node: Node) -> bool:
    """Whether a call divides an exponential by its sum, as a softmax does."""
    operands = node.all_input_nodes
    if op_name(node) != "aten::div" or len(operands) < 2:
        return False
    weights, total = operands
    sums = (n for n in reach([total], _inputs) if op_name(n) == "aten::sum")
    return op_name(weights) in _EXPONENTIALS and any(weights in n.all_input_nodes for n in sums)


def _weighs_values(softmax: Node, region: tuple[Node, ...]) -> bool:
    """Whether what a softmax returns goes into a product with values: then it is an attention's."""

    def users(node: Node) -> list[Node]:
        found = () if op_name(node) in _PRODUCTS else node.users
        return [user for user in found if user in region]

    names = map(op_name, reach([softmax], users))
    return next((name != "aten::linear" for name in names if name in _PRODUCTS), False)


def _name(region: tuple[Node, ...], inside: set[Node]) -> str:
    """Returns the module path that the weights of the branch's matrix products share."""
    paths = []
    for node in region:
        if op_name(node) in _PRODUCTS:
            paths += [
                arg.meta["fastvar"]["input"].split(".")[:-1]
                for arg in node.all_input_nodes
                if arg.op == "placeholder" and arg not in inside
            ]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)
