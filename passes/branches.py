"""Finds the residual branches of a block program. Analysis only: the graph is never edited.

The trunk is walked backwards from the block's result to its (B, L, C) input: through adds of the
stream and a branch, and through whatever else the stream itself passes (casts, a post-norm). What
lies between the trunk and such an add is a branch. Every op of a branch is then asked by its axis
rule whether tokens may be dropped through it; a branch with one that says no is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch.fx import Graph, Node

from passes.attention import is_attention, key_operand
from passes.axes import Axes, has_batch, has_tokens, stream_axes
from passes.graphs import memory_owner, mutated, op_name, outputs_of
from passes.refusal import Refusal, RefusedError, refuse
from passes.rules import Edit, Gather, Slot, apply_rule, bind

Kind = Literal["attention", "cross_attention", "ffn"]
KINDS: Final[tuple[Kind, ...]] = ("attention", "cross_attention", "ffn")

_ADDS: Final = frozenset({"aten::add", "aten::sub"})
_PRODUCTS: Final = frozenset(
    {
        "aten::linear", "aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm",
        "aten::einsum", "aten::conv1d", "aten::conv2d", "aten::convolution",
        "aten::scaled_dot_product_attention",
    }
)  # fmt: skip
_SOFTMAXES: Final = frozenset({"aten::softmax", "aten::_softmax"})


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch that may drop tokens.

    Attributes:
        index: Its place along the trunk, from the block's input on.
        kind: What it is.
        name: The module path that its weights share, such as `attn`; its kind if there is none.
        add: The residual add.
        out: What it adds: the branch's whole contribution.
        entries: The trunk values it reads, in graph order.
        region: Its nodes in graph order, `out` included, and those that only make its new state.
        axes: The axes of every value of the region and of the entries.
        edits: What changes in a node when tokens are dropped.
    """

    index: int
    kind: Kind
    name: str
    add: Node = field(repr=False)
    out: Node = field(repr=False)
    entries: tuple[Node, ...] = field(repr=False)
    region: tuple[Node, ...] = field(repr=False)
    axes: dict[Node, Axes | list[Axes]] = field(repr=False)
    edits: dict[Node, dict[Slot, Edit]] = field(repr=False)

    @property
    def label(self) -> dict[str, Any]:
        """What its nodes are marked with, under `meta["fastvar"]`."""
        return {"branch": self.index, "kind": self.kind}


@dataclass(frozen=True, eq=False)
class RefusedBranch:
    """A residual branch that stays dense, and why."""

    index: int
    kind: Kind
    name: str
    out: Node = field(repr=False)
    region: tuple[Node, ...] = field(repr=False)
    refusal: Refusal

    @property
    def label(self) -> dict[str, Any]:
        """What its nodes are marked with, under `meta["fastvar"]`."""
        return {"branch": self.index, "kind": self.kind}


FoundBranch = Branch | RefusedBranch


def met_at_cached_keys(branch: Branch) -> Node | None:
    """Returns the op at which a branch that caches its keys meets a value per cached key.

    Such a value, a mask say, comes from outside and has entries for all keys of earlier steps.
    Where keys were pruned, it would have to be gathered by what every earlier step kept.
    """
    if not any(user.op == "output" for node in branch.region for user in node.users):
        return None
    for node, edits in branch.edits.items():
        for (name, item), edit in edits.items():
            if isinstance(edit, Gather):
                side = bind(node)[name] if item is None else bind(node)[name][item]
                pairs = zip(reversed(_shape(side) or ()), reversed(edit.axes), strict=False)
                counted = any(size != 1 and any(f.before for f in dim) for size, dim in pairs)
                if counted and _is_given(side):
                    return node
    return None


def _is_given(node: Node) -> bool:
    """Whether a value is not made from sizes alone."""
    if node.target is torch.ops.aten.sym_size.int:
        return False
    return node.op != "call_function" or any(map(_is_given, node.all_input_nodes))


def counts_flops(node: Node) -> bool:
    """Whether a call is a matrix product or an attention: what its FLOPs are counted by."""
    return op_name(node) in _PRODUCTS or is_attention(node)


def find_branches(graph: Graph, stream: Node, results: int) -> list[FoundBranch]:
    """Finds the residual branches of a captured graph.

    Args:
        graph: A block program's graph.
        stream: The placeholder of its (B, L, C) input.
        results: How many outputs are the call's result; those behind them are written state.

    Raises:
        RefusedError: FVX003 if no result is reached by a residual stream; FVX004 if the trunk
            holds no branch.
    """
    outputs = outputs_of(graph)
    inside = _descendants(graph, stream)
    trunk, adds = _walk_trunk(stream, outputs[:results], inside)
    if not adds:
        refuse("FVX004", "its result is not a sum of its input and something computed from it")
    regions = [_region(graph, out, trunk, inside) for _, out in adds]
    _claim_states(graph, regions, outputs[results:], trunk, inside)
    return [
        _examine(index, add, out, region, trunk, inside, regions, set(outputs[results:]))
        for index, ((add, out), region) in enumerate(zip(adds, regions, strict=True))
    ]


def _descendants(graph: Graph, stream: Node) -> set[Node]:
    inside = {stream}
    for node in graph.nodes:
        if node.op == "call_function" and any(arg in inside for arg in node.all_input_nodes):
            inside.add(node)
    return inside


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _walk_trunk(
    stream: Node, results: list[Node], inside: set[Node]
) -> tuple[set[Node], list[tuple[Node, Node]]]:
    """Returns the values of the trunk, and its (add, branch output) pairs from the input on."""
    heavy, residuals = _survey(stream, inside)
    for result in results:
        trunk: set[Node] = set()
        adds: list[tuple[Node, Node]] = []
        node: Node | None = result if _shape(result) == _shape(stream) else None
        while node is not None and node is not stream:
            trunk.add(node)
            if node in residuals:
                before, out = residuals[node]
                adds.append((node, out))
                node = before
            else:
                node = _predecessor(node, inside, heavy)
        if node is stream:
            return trunk | {stream}, adds[::-1]
    return refuse("FVX003", f"no result of shape {_shape(stream)} is its input plus something")


def _survey(stream: Node, inside: set[Node]) -> tuple[set[Node], dict[Node, tuple[Node, Node]]]:
    """Returns the values that hold real work, and the residual adds.

    Real work is a matrix product or an attention done since the trunk. A residual add is given
    with its (trunk, branch output).
    """
    heavy: set[Node] = set()
    residuals: dict[Node, tuple[Node, Node]] = {}
    roots: dict[Node, Node] = {}  # where the trunk of a residual add began
    for node in stream.graph.nodes:
        if node not in inside or node is stream:
            continue
        pair = _residual_operands(node, inside, heavy, roots)
        sources = node.all_input_nodes
        if pair is not None:
            residuals[node] = pair
            roots[node] = roots.get(pair[0], pair[0])
            sources = [pair[0]]
        if counts_flops(node) or any(source in heavy for source in sources):
            heavy.add(node)
    return heavy, residuals


def _residual_operands(
    node: Node, inside: set[Node], heavy: set[Node], roots: dict[Node, Node]
) -> tuple[Node, Node] | None:
    """Splits an add into (trunk, branch output), or returns None if it is not a residual add."""
    if op_name(node) not in _ADDS or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    if not (isinstance(a, Node) and isinstance(b, Node) and a in inside and b in inside):
        return None
    if not (_shape(a) == _shape(b) == _shape(node)) or a is b:
        return None
    for trunk, out in ((a, b), (b, a)):
        if out in heavy and (trunk not in heavy or _depends(out, roots.get(trunk, trunk))):
            return trunk, out
    return None


def _depends(node: Node, on: Node) -> bool:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is on:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _predecessor(node: Node, inside: set[Node], heavy: set[Node]) -> Node | None:
    """Follows the trunk through an op that is no residual add: a cast, a norm, a projection."""
    if node in heavy and op_name(node) != "aten::linear":
        if counts_flops(node):
            return None
    sources = [arg for arg in node.all_input_nodes if arg in inside]
    return next((arg for arg in sources if _shape(arg) == _shape(node)), next(iter(sources), None))


def _region(graph: Graph, out: Node, trunk: set[Node], inside: set[Node]) -> set[Node]:
    """The nodes between the trunk and `out`, and the in-place ops that write into them."""
    region = _cone([out], trunk, inside)
    grown = True
    while grown:
        grown = False
        for node in graph.nodes:
            if node in region or node in trunk or node not in inside:
                continue
            target = mutated(node)
            if target is not None and memory_owner(target) in region:
                region |= _cone([node], trunk, inside)
                grown = True
    return region


def _cone(roots: Iterable[Node], trunk: set[Node], inside: set[Node]) -> set[Node]:
    cone: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in inside and node not in trunk and node not in cone:
            cone.add(node)
            stack.extend(node.all_input_nodes)
    return cone


def _claim_states(
    graph: Graph, regions: list[set[Node]], states: list[Node], trunk: set[Node], inside: set[Node]
) -> None:
    """Gives the values that only become new state to the branch they are made from."""
    for state in states:
        if state in inside and state not in trunk and not any(state in r for r in regions):
            cone = _cone([state], trunk, inside)
            nearest = max(regions, key=lambda region: len(region & cone))
            nearest |= cone


def _examine(
    index: int,
    add: Node,
    out: Node,
    region: set[Node],
    trunk: set[Node],
    inside: set[Node],
    regions: list[set[Node]],
    states: set[Node],
) -> FoundBranch:
    ordered = tuple(node for node in add.graph.nodes if node in region)
    name = _name(ordered, inside)
    axes: dict[Node, Axes | list[Axes]] = {}
    try:
        entries = _entries(ordered, trunk)
        axes |= {entry: stream_axes(entry.meta["val"].shape) for entry in entries}
        _check_owned(ordered, add, trunk, regions, region)
        edits = _propagate(ordered, axes)
        _check_output(out, axes)
        _check_returned(ordered, axes, states)
    except RefusedError as error:
        kind = _kind(ordered, axes, inside)
        return RefusedBranch(index, kind, name or kind, out, ordered, error.refusal)
    kind = _kind(ordered, axes, inside)
    return Branch(index, kind, name or kind, add, out, entries, ordered, axes, edits)


def _entries(region: tuple[Node, ...], trunk: set[Node]) -> tuple[Node, ...]:
    entries = {arg for node in region for arg in node.all_input_nodes if arg in trunk}
    for entry in entries:
        if len(_shape(entry) or ()) != 3:
            refuse("FVX003", f"it reads the trunk as {_shape(entry)}, not as (B, L, C)", entry)
    order = {node: place for place, node in enumerate(region[0].graph.nodes)}
    return tuple(sorted(entries, key=order.__getitem__))


def _check_owned(
    ordered: tuple[Node, ...],
    add: Node,
    trunk: set[Node],
    regions: list[set[Node]],
    region: set[Node],
) -> None:
    """Refuses a branch used from outside, or that writes into what it does not own."""
    known = set().union(*regions)
    for node in ordered:
        for user in node.users:
            if user.op == "output" or user is add or user in known:
                continue
            if not _fills_a_cache(user, known | trunk):
                refuse("FVX014", f"it is used by {user.target} outside the branch", node)
        target = mutated(node)
        if target is not None and memory_owner(target) not in region:
            refuse("FVX015", f"{node.target} overwrites a value from outside", node)


def _fills_a_cache(node: Node, known: set[Node]) -> bool:
    """Whether a value goes into an input of the block by an in-place op.

    A preallocated cache is filled with all tokens, pruned or not: where a step's tokens stand in it
    is a number in the model's code. So keys and values are computed densely, and queries pruned.
    """
    stack, seen = [node], set(known)
    while stack:
        current = stack.pop()
        target = mutated(current)
        if target is not None and memory_owner(target).op == "placeholder":
            return True
        seen.add(current)
        stack += [user for user in current.users if user not in seen]
    return False


def _propagate(
    region: tuple[Node, ...], axes: dict[Node, Axes | list[Axes]]
) -> dict[Node, dict[Slot, Edit]]:
    edits: dict[Node, dict[Slot, Edit]] = {}
    for node in region:
        result, changes = apply_rule(node, axes)
        axes[node] = result
        if changes:
            edits[node] = changes
    return edits


def _check_output(out: Node, axes: Mapping[Node, Axes | list[Axes]]) -> None:
    found, expected = axes[out], stream_axes(_shape(out) or ())
    if found[:2] != expected[:2] or has_tokens(found[2]) or has_batch(found[2]):  # type: ignore[arg-type]
        refuse("FVX011", "its output is not laid out as (B, L, C) like the stream", out)


def _check_returned(
    region: tuple[Node, ...], axes: Mapping[Node, Axes | list[Axes]], states: set[Node]
) -> None:
    """A block may return its keys and values, earlier ones included; nothing else of a branch."""
    for node in region:
        if node in states or not any(user.op == "output" for user in node.users):
            continue
        dims = [dim for dim in axes[node] if has_tokens(dim)]  # type: ignore[arg-type]
        if len(dims) != 1 or not any(factor.before for factor in dims[0]):  # type: ignore[union-attr]
            refuse("FVX014", "the block returns it", node)


def _kind(
    region: tuple[Node, ...], axes: Mapping[Node, Axes | list[Axes]], inside: set[Node]
) -> Kind:
    """Attention attends to tokens of the map, cross-attention to something else."""
    keys = [key for node in region for key in _attended(node, axes, region)]
    if not keys:
        return "ffn"
    return "attention" if any(keys) or _reads_filled(region, inside) else "cross_attention"


def _reads_filled(region: tuple[Node, ...], inside: set[Node]) -> bool:
    """Whether it reads an input of the block that tokens were written into, such as a cache."""
    written = (target for node in inside if (target := mutated(node)) is not None)
    filled = {memory_owner(target) for target in written} - inside
    read = {arg for node in region for arg in node.all_input_nodes} - inside
    return not filled.isdisjoint(map(memory_owner, read))


def _attended(
    node: Node, axes: Mapping[Node, Axes | list[Axes]], region: tuple[Node, ...]
) -> Iterator[bool]:
    """Yields whether the keys of an attention op are tokens; unknown axes count as tokens."""
    if is_attention(node):
        keys = axes.get(key_operand(node))
        yield (keys is None and node not in axes) or any(map(has_tokens, keys or ()))  # type: ignore[arg-type]
    elif op_name(node) in _SOFTMAXES and _weighs_values(node, region):
        scores = axes.get(node)
        dim = int(bind(node)["dim"])
        yield scores is None or has_tokens(scores[dim])  # type: ignore[arg-type]


def _weighs_values(softmax: Node, region: tuple[Node, ...]) -> bool:
    """Whether a softmax goes into a product with values: then it is an attention's."""
    stack = [user for user in softmax.users if user in region]
    while stack:
        node = stack.pop()
        if op_name(node) in _PRODUCTS:
            return op_name(node) != "aten::linear"
        stack += [user for user in node.users if user in region]
    return False


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
    if not paths:
        return ""
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
