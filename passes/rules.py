"""Axis rules: what each op does to the axes, and that its branch may drop tokens through it.

A rule is asked about one call of its op with at least one operand from inside the branch. It
returns the axes of the result and notes what must change when tokens are dropped: size arguments
(`Site.resize`) and side inputs that have an entry per token (`Site.meet`). An op without a rule is
refused; so is every call for which its rule cannot say that dropping tokens is sound.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.fx import Node

from passes.axes import (
    Axes,
    AxesError,
    Dim,
    Factor,
    Tag,
    broadcast,
    has_batch,
    has_tokens,
    meets_tokens,
    other,
    regroup,
    token_dims,
)
from passes.refusal import refuse

if TYPE_CHECKING:
    from collections.abc import Mapping

Result = Axes | tuple[Axes, ...]
Rule = Callable[["Site"], "Axes | list[Axes]"]


@dataclass(frozen=True)
class Gather:
    """A side input is gathered at the kept tokens of the axes it meets, aligned from the right."""

    axes: Axes


@dataclass(frozen=True)
class Resize:
    """A size argument takes the shape of these axes with the kept token count."""

    axes: Axes


@dataclass(frozen=True)
class Replace:
    """An argument takes another value."""

    value: object


@dataclass(frozen=True)
class Recount:
    """An argument that depends on the token count is computed anew, as compute(value, count).

    The count is that of the kept tokens and of `around` entries that stay.
    """

    compute: Callable[[Any, int], Any]
    around: int = 0


Edit = Gather | Resize | Replace | Recount
Slot = tuple[str, int | None]
"""An argument by name, and the element if it is a list."""


class Site:
    """One call of an op inside a branch, as its rule sees it.

    Attributes:
        node: The call.
        args: Its arguments by name, defaults filled in; tensors are FX nodes.
        edits: What must change when tokens are dropped, as the rule noted it.
    """

    def __init__(self, node: Node, axes: Mapping[Node, Axes | list[Axes]]) -> None:
        self.node = node
        self.args = {name: _plain(value) for name, value in bind(node).items()}
        self.edits: dict[Slot, Edit] = {}
        self._axes = axes

    def axes(self, value: object) -> Axes | None:
        """Returns the axes of a tensor from inside the branch, or None for a side input."""
        if not isinstance(value, Node):
            return None
        found = self._axes.get(value)
        if isinstance(found, list):
            self.refuse("FVX010", "a tuple of tensors is used as a tensor")
        return found

    def tuple_axes(self, value: object) -> list[Axes] | None:
        """Returns the axes of a tuple of tensors from inside the branch."""
        found = self._axes.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, list) else None

    def stream(self, name: str) -> Axes:
        """Returns the axes of an argument that must come from inside the branch."""
        axes = self.axes(self.args[name])
        if axes is None:
            self.refuse("FVX010", f"`{name}` is not computed from the tokens, another operand is")
        return axes

    @property
    def out_shape(self) -> list[int]:
        """The shape of the (single) result."""
        return list(self.node.meta["val"].shape)

    def dim(self, name: str, rank: int) -> int:
        """Returns the argument `name` as a dim in [0, rank)."""
        return int(self.args[name]) % rank

    def dims(self, name: str, rank: int) -> list[int]:
        """Returns the argument `name` as dims in [0, rank); None and [] mean all."""
        value = self.args[name]
        listed = [value] if isinstance(value, int) else list(value or range(rank))
        return [d % rank for d in listed]

    def meet(self, name: str, axes: Axes, index: int | None = None) -> None:
        """Notes that a side input meets `axes`, aligned from the right."""
        value = self.args[name] if index is None else self.args[name][index]
        if not isinstance(value, Node) or self.axes(value) is not None:
            return
        if meets_tokens(value.meta["val"].shape, axes):
            self.edits[name, index] = Gather(axes)

    def resize(self, name: str, axes: Axes) -> None:
        """Notes that the size argument `name` is the shape of `axes`."""
        if token_dims(axes):
            self.edits[name, None] = Resize(axes)

    def replace(self, name: str, value: object) -> None:
        """Notes that the argument `name` takes another value when tokens are dropped."""
        self.edits[name, None] = Replace(value)

    def recount(self, name: str, compute: Callable[[Any, int], Any], around: int = 0) -> None:
        """Notes that `compute(value, kept)` takes the place of an argument when tokens are dropped.

        For what depends on the token count but has no token axis, such as the `cu_seqlens` of a
        packed attention. A tensor is computed in the graph, by a named function; a number now.
        Entries `around` the tokens, such as cached keys, are counted with the kept ones.
        """
        self.edits[name, None] = Recount(compute, around)

    def keep_tokens_whole(self, axes: Axes, dims: Sequence[int], what: str) -> None:
        """Refuses if `dims` hold the samples or the tokens."""
        for d in dims:
            if has_tokens(axes[d]):
                self.refuse("FVX012", f"it {what} the token axis")
            if has_batch(axes[d]):
                self.refuse("FVX013", f"it {what} the batch axis")

    def refuse(self, code: str, reason: str) -> NoReturn:
        """Refuses this call."""
        refuse(code, reason, self.node)


def _plain(value: Any) -> Any:
    """Puts the value of a size that is computed in the graph in its place."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Node) and isinstance(value.meta.get("val"), (int, float)):
        return value.meta["val"]
    return value


def bind(node: Node) -> dict[str, Any]:
    """Returns a call's arguments by the names of its schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    args: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            args[argument.name] = node.args[position]
        else:
            args[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return args


_RULES: dict[object, Rule] = {}


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Registers an axis rule.

    Args:
        targets: Ops as `"namespace::name"`, which covers all overloads and the in-place form, or
            functions that appear as call targets in a graph.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES[target] = function
        return function

    return register


def find_rule(node: Node) -> Rule | None:
    """Returns the axis rule of a call, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return _RULES.get(target)
    name = target._schema.name
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in target.tags:
        return pointwise
    return found


def apply_rule(node: Node, axes: Mapping[Node, Axes | list[Axes]]) -> tuple[Any, dict[Slot, Edit]]:
    """Returns the axes of a call's result and its edits.

    Raises:
        RefusedError: If the op has no rule, or its rule refuses the call.
    """
    found = find_rule(node)
    site = Site(node, axes)
    if found is None:
        refuse("FVX010", "nothing says that tokens may be dropped through it", node)
    try:
        result = found(site)
    except AxesError as error:
        site.refuse("FVX011" if "becomes" in str(error) else "FVX012", str(error))
    return result, site.edits


# --- pointwise ---------------------------------------------------------------------------------


def pointwise(site: Site) -> Axes:
    """Broadcasts all tensor operands."""
    return _broadcast_operands(site, [n for n, v in site.args.items() if isinstance(v, Node)])


def _broadcast_operands(site: Site, names: Sequence[str]) -> Axes:
    inside = [axes for n in names if (axes := site.axes(site.args[n])) is not None]
    result = broadcast(inside)
    for name in names:
        site.meet(name, result)
    return filled(result, site.out_shape)


def filled(axes: Axes, shape: Sequence[int]) -> Axes:
    """Adds what side inputs broadcast: dims that the operands from inside the branch lack."""
    padded = ((),) * (len(shape) - len(axes)) + axes
    return tuple(dim or other(size) for dim, size in zip(padded, shape, strict=True))


@rule(
    "aten::silu", "aten::gelu", "aten::relu6", "aten::selu", "aten::hardswish", "aten::hardsigmoid",
    "aten::clone", "aten::contiguous", "aten::detach", "aten::alias", "aten::lift_fresh",
    "aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::zeros_like",
    "aten::ones_like", "aten::empty_like", "aten::full_like", "aten::softplus", "aten::square",
    "aten::conj", "aten::_conj", "aten::resolve_conj", "aten::resolve_neg", "aten::real",
    "aten::imag", "aten::zero", "aten::fill", "aten::nan_to_num", "aten::positive",
)  # fmt: skip
def _unary(site: Site) -> Axes:
    return site.stream("input" if "input" in site.args else "self")


@rule("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::native_dropout")
def _dropout(site: Site) -> Axes | list[Axes]:
    if site.args["train"]:
        site.refuse("FVX013", "dropout is active: random masks differ per token")
    axes = _unary(site)
    assert isinstance(axes, tuple)
    return [axes, axes] if isinstance(site.node.meta["val"], (tuple, list)) else axes


@rule("aten::masked_fill", "aten::copy", "aten::where")
def _masked(site: Site) -> Axes:
    return pointwise(site)


@rule("aten::bernoulli", "aten::rand_like", "aten::randn_like", "aten::normal", "aten::uniform")
def _random(site: Site) -> Axes:
    site.refuse("FVX013", "it draws random numbers, which would differ on the kept tokens")


# --- reductions and normalizations -------------------------------------------------------------


def _reduced(site: Site, axes: Axes, dims: Sequence[int]) -> None:
    """Refuses a reduction over the tokens unless it normalizes or sums attention scores."""
    for d in dims:
        if has_batch(axes[d]):
            site.refuse("FVX013", "it reduces over the samples of the batch")
        if has_tokens(axes[d]) and not any(has_tokens(axes[e]) for e in _rest(axes, dims)):
            site.refuse("FVX013", "it reduces over the tokens")


def _rest(axes: Axes, dims: Sequence[int]) -> list[int]:
    return [d for d in range(len(axes)) if d not in dims]


@rule(
    "aten::sum", "aten::mean", "aten::amax", "aten::amin", "aten::prod", "aten::logsumexp",
    "aten::var", "aten::std", "aten::linalg_vector_norm", "aten::norm", "aten::all", "aten::any",
    "aten::argmax", "aten::argmin", "aten::var_mean", "aten::std_mean", "aten::max", "aten::min",
    "aten::nansum", "aten::count_nonzero",
)  # fmt: skip
def _reduction(site: Site) -> Axes | list[Axes]:
    if "other" in site.args:  # max(self, other) and min(self, other)
        return pointwise(site)
    axes = site.stream("self")
    dims = site.dims("dim", len(axes)) if "dim" in site.args else list(range(len(axes)))
    _reduced(site, axes, dims)
    keep = bool(site.args.get("keepdim", False))
    kept = [() if d in dims else dim for d, dim in enumerate(axes) if keep or d not in dims]
    result = tuple(kept)
    values = site.node.meta["val"]
    return [result] * len(values) if isinstance(values, (tuple, list)) else result


@rule("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax")
def _softmax(site: Site) -> Axes:
    axes = site.stream("self")
    _reduced(site, axes, [site.dim("dim", len(axes))])
    return axes


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def _scan(site: Site) -> Axes:
    axes = site.stream("self")
    dim = axes[site.dim("dim", len(axes))]
    if has_tokens(dim) or has_batch(dim):
        site.refuse("FVX013", "it scans over the tokens or the samples")
    return axes


@rule("aten::cummax", "aten::cummin", "aten::sort", "aten::topk")
def _ordered(site: Site) -> list[Axes]:
    axes = site.stream("self")
    dim = site.dim("dim", len(axes))
    site.keep_tokens_whole(axes, [dim], "orders")
    size = site.node.meta["val"][0].shape[dim]
    result = tuple(other(size) if d == dim else a for d, a in enumerate(axes))
    return [result, result]


@rule("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm", "aten::_fused_rms_norm")
def _feature_norm(site: Site) -> Axes | list[Axes]:
    axes = site.stream("input")
    normalized = range(len(axes) - len(site.args["normalized_shape"]), len(axes))
    if any(has_tokens(axes[d]) or has_batch(axes[d]) for d in normalized):
        site.refuse("FVX013", "it normalizes over the tokens")
    if not isinstance(site.node.meta["val"], (tuple, list)):
        return axes
    statistics = tuple(() if d in normalized else dim for d, dim in enumerate(axes))
    return [axes] + [statistics] * (len(site.node.meta["val"]) - 1)


@rule("aten::group_norm", "aten::native_group_norm", "aten::instance_norm", "aten::batch_norm")
def _channel_norm(site: Site) -> Axes:
    axes = site.stream("input")
    trained = bool(site.args.get("training", True) or site.args.get("use_input_stats", False))
    if not (site.node.target is torch.ops.aten.batch_norm.default and not trained):
        batch_too = site.node.target is torch.ops.aten.batch_norm.default
        if any(has_tokens(dim) for dim in (axes if batch_too else axes[1:])):
            site.refuse("FVX013", "it normalizes over the tokens")
        if any(has_batch(dim) for dim in (axes if batch_too else axes[1:])):
            site.refuse("FVX013", "it normalizes over the samples of the batch")
    if has_tokens(axes[1]) or has_batch(axes[1]):
        site.refuse("FVX013", "it has parameters per token or per sample")
    return axes


# --- matrix products ---------------------------------------------------------------------------


def _contract(site: Site, left: Dim | None, right: Dim | None) -> None:
    """Refuses a sum over tokens unless both operands are tokens of the branch, as in attention."""
    dims = [dim for dim in (left, right) if dim is not None]
    if any(has_batch(dim) for dim in dims):
        site.refuse("FVX013", "it sums over the samples of the batch")
    if any(has_tokens(dim) for dim in dims):
        if left is None or right is None:
            site.refuse("FVX013", "it mixes the tokens with weights of a fixed length")
        if left != right:
            site.refuse("FVX013", "it sums over a token axis and another axis")


@rule("aten::linear")
def _linear(site: Site) -> Axes:
    axes = site.stream("input")
    if site.axes(site.args["weight"]) or site.axes(site.args["bias"]):
        site.refuse("FVX010", "its weights are computed from the tokens")
    _contract(site, axes[-1], None)
    return (*axes[:-1], other(site.out_shape[-1]))


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot")
def _matmul(site: Site) -> Axes:
    left, right = [name for name, value in site.args.items() if isinstance(value, Node)]
    return _product(site, left, right)


@rule("aten::addmm", "aten::baddbmm", "aten::addmv")
def _matmul_added(site: Site) -> Axes:
    added, left, right = [name for name, value in site.args.items() if isinstance(value, Node)]
    product = _product(site, left, right)
    site.meet(added, product)
    inside = site.axes(site.args[added])
    return product if inside is None else broadcast([product, inside])


def _product(site: Site, left: str, right: str) -> Axes:
    a, b = site.axes(site.args[left]), site.axes(site.args[right])
    rank_a, rank_b = (len(site.args[name].meta["val"].shape) for name in (left, right))
    _contract(
        site,
        None if a is None else a[-1],
        None if b is None else b[-2 if rank_b > 1 else -1],
    )
    batched = broadcast([axes[:-2] for axes in (a, b) if axes is not None])
    out = list(site.out_shape)
    rows = [] if rank_a == 1 else [a[-2] if a is not None else other(out[-1 - (rank_b > 1)])]
    columns = [] if rank_b == 1 else [b[-1] if b is not None else other(out[-1])]
    for name, axes in ((left, a), (right, b)):
        if axes is None:  # its batch dims may be indexed by token; its last two never are
            site.meet(name, (*batched, (), ()))
    lead = out[: len(out) - len(rows) - len(columns)]
    return (*filled(batched[len(batched) - len(lead) :], lead), *rows, *columns)


@rule("aten::einsum")
def _einsum(site: Site) -> Axes:
    equation = site.args["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    if "." in equation or not arrow:
        site.refuse("FVX010", f"einsum equation {equation!r} has no explicit output or an ellipsis")
    terms = inputs.split(",")
    found: dict[str, Dim] = {}
    seen: dict[str, list[Dim | None]] = {}
    for letters, tensor in zip(terms, site.args["tensors"], strict=True):
        axes = site.axes(tensor)
        for position, letter in enumerate(letters):
            dim = None if axes is None else axes[position]
            seen.setdefault(letter, []).append(dim)
            if dim:
                found[letter] = broadcast([(dim,), (found.get(letter, ()),)])[0]
    for letter, dims in seen.items():
        if letter not in output and has_batch(found.get(letter, ())):
            site.refuse("FVX013", "it sums over the samples of the batch")
        if letter not in output and len(dims) == 1 and has_tokens(found.get(letter, ())):
            site.refuse("FVX013", "it reduces over the tokens")
        if letter not in output and len(dims) > 1:
            _contract(site, dims[0], dims[1])
    for index, letters in enumerate(terms):
        site.meet("tensors", tuple(found.get(letter, ()) for letter in letters), index)
    sizes = dict(zip(output, site.out_shape, strict=True))
    return tuple(found.get(letter) or other(sizes[letter]) for letter in output)


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
def _convolution(site: Site) -> Axes:
    axes = site.stream("input")
    kernel = site.args["weight"].meta["val"].shape[2:]
    if any(size != 1 for size in kernel) and any(has_tokens(dim) for dim in axes[2:]):
        site.refuse("FVX013", f"it convolves over the tokens with a kernel of {tuple(kernel)}")
    if has_tokens(axes[1]):
        site.refuse("FVX013", "it mixes the tokens with weights of a fixed length")
    if any(has_batch(dim) for dim in axes[1:]):
        site.refuse("FVX013", "it mixes the samples of the batch")
    if site.out_shape[2:] != list(site.args["input"].meta["val"].shape[2:]):
        site.refuse("FVX012", "it strides over or pads the tokens")
    return (axes[0], other(site.out_shape[1]), *axes[2:])


def attending(site: Site, query: Axes | None, keys: Sequence[Dim]) -> Axes:
    """Returns the axes of an attention's queries.

    Refuses queries that are not computed from the tokens, and keys that are not the same tokens as
    the values; `keys` holds what the keys and the values range over, of those from the branch.
    """
    if query is None:
        site.refuse("FVX013", "it pools the tokens into queries that are not tokens")
    if any(has_tokens(dim) for dim in keys) and (len(keys) == 1 or keys[0] != keys[1]):
        site.refuse("FVX013", "its keys and its values are not the same tokens")
    return query


# --- views -------------------------------------------------------------------------------------


@rule("aten::view", "aten::reshape", "aten::_unsafe_view")
def _view(site: Site) -> Axes:
    if "dtype" in site.args:
        site.refuse("FVX010", "it reinterprets the bits of the tokens")
    axes = regroup(site.stream("self"), site.out_shape)
    site.resize("shape" if "shape" in site.args else "size", axes)
    return axes


@rule("aten::unflatten")
def _unflatten(site: Site) -> Axes:
    before = site.stream("self")
    axes = regroup(before, site.out_shape)
    dim = site.dim("dim", len(before))
    site.resize("sizes", axes[dim : dim + 1 + len(axes) - len(before)])
    return axes


@rule("aten::flatten", "aten::unsqueeze", "aten::squeeze", "aten::view_as", "aten::reshape_as",
      "aten::ravel")  # fmt: skip
def _reshaped(site: Site) -> Axes:
    if "other" in site.args and site.axes(site.args["other"]) is None:
        site.refuse("FVX010", "it takes its shape from a value outside the branch")
    return regroup(site.stream("self"), site.out_shape)


@rule(
    "aten::permute", "aten::transpose", "aten::t", "aten::swapaxes", "aten::swapdims",
    "aten::movedim", "aten::moveaxis", "aten::mT", "aten::numpy_T", "aten::matrix_H",
)  # fmt: skip
def _permuted(site: Site) -> Axes:
    axes = site.stream("self")
    ranks = torch.empty(tuple(range(2, 2 + len(axes))), device="meta")  # every dim has its own size
    assert isinstance(site.node.target, torch._ops.OpOverload)
    rest = {name: value for name, value in site.args.items() if name != "self"}
    moved = site.node.target(ranks, **rest)
    return tuple(axes[size - 2] for size in moved.shape)


@rule("aten::expand", "aten::broadcast_to")
def _expand(site: Site) -> Axes:
    axes = filled(site.stream("self"), site.out_shape)
    site.resize("size", axes)
    return axes


@rule("aten::expand_as")
def _expand_as(site: Site) -> Axes:
    return _broadcast_operands(site, ["self", "other"])


@rule("aten::repeat", "aten::tile")
def _repeat(site: Site) -> Axes:
    axes = site.stream("self")
    repeats = list(site.args["repeats" if "repeats" in site.args else "dims"])
    padded = ((),) * (len(repeats) - len(axes)) + axes
    return tuple((*other(n), *dim) for n, dim in zip(repeats, padded, strict=True))


@rule("aten::repeat_interleave")
def _repeat_interleave(site: Site) -> Axes:
    axes = site.stream("self")
    if not isinstance(site.args["repeats"], int) or site.args["dim"] is None:
        site.refuse("FVX010", "it repeats by a tensor, or flattens")
    dim = site.dim("dim", len(axes))
    return tuple((*a, *other(site.args["repeats"])) if d == dim else a for d, a in enumerate(axes))


@rule("aten::select")
def _select(site: Site) -> Axes:
    axes = site.stream("self")
    dim = site.dim("dim", len(axes))
    site.keep_tokens_whole(axes, [dim], "selects one position of")
    return axes[:dim] + axes[dim + 1 :]


@rule("aten::slice", "aten::narrow")
def _slice(site: Site) -> Axes:
    axes = site.stream("self")
    dim = site.dim("dim", len(axes))
    size, result = site.node.args[0].meta["val"].shape[dim], site.out_shape[dim]  # type: ignore[union-attr]
    if size == result:
        if "length" in site.args and has_tokens(axes[dim]):
            site.refuse("FVX012", "it narrows the token axis")
        return axes
    if len(axes[dim]) == 1 and axes[dim][0].tag is Tag.TOKEN and "end" in site.args:
        return _drop_leading(site, axes, dim, result)
    site.keep_tokens_whole(axes, [dim], "slices")
    return tuple(other(result) if d == dim else a for d, a in enumerate(axes))


def _drop_leading(site: Site, axes: Axes, dim: int, result: int) -> Axes:
    """A slice may drop entries that stand before the tokens, such as the oldest cached keys."""
    (factor,) = axes[dim]
    end = site.args["end"]
    open_end = end is None or end >= factor.size
    dropped = factor.size - result
    if site.args["step"] != 1 or not open_end or dropped > factor.before:
        site.refuse("FVX012", "it slices the token axis")
    site.replace("start", dropped)
    shorter = Factor(result, Tag.TOKEN, factor.before - dropped, factor.after)
    return tuple((shorter,) if d == dim else a for d, a in enumerate(axes))


@rule("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::tensor_split", "aten::unbind",
      "aten::unsafe_chunk", "aten::unsafe_split")  # fmt: skip
def _split(site: Site) -> list[Axes]:
    axes = site.stream("self")
    dim = site.dim("dim", len(axes))
    site.keep_tokens_whole(axes, [dim], "splits")
    parts = site.node.meta["val"]
    if len(parts[0].shape) < len(axes):  # unbind
        return [axes[:dim] + axes[dim + 1 :]] * len(parts)
    return [(*axes[:dim], other(part.shape[dim]), *axes[dim + 1 :]) for part in parts]


@rule(operator.getitem)
def _getitem(site: Site) -> Axes:
    parts = site.tuple_axes(site.args["0"])
    if parts is None:
        site.refuse("FVX010", "it indexes a tensor")
    index = int(site.args["1"])
    if index >= len(parts):
        site.refuse("FVX010", "nothing says where the tokens are in this result of the op")
    return parts[index]


@rule("aten::glu")
def _glu(site: Site) -> Axes:
    axes = site.stream("self")
    dim = site.dim("dim", len(axes))
    site.keep_tokens_whole(axes, [dim], "halves")
    return tuple(other(site.out_shape[d]) if d == dim else a for d, a in enumerate(axes))


@rule("aten::flip")
def _flip(site: Site) -> Axes:
    axes = site.stream("self")
    site.keep_tokens_whole(axes, site.dims("dims", len(axes)), "flips")
    return axes


@rule("aten::roll")
def _roll(site: Site) -> Axes:
    axes = site.stream("self")
    site.keep_tokens_whole(axes, site.dims("dims", len(axes)), "rolls")
    return axes


@rule("aten::pad", "aten::constant_pad_nd")
def _pad(site: Site) -> Axes:
    axes = site.stream("self")
    amounts = list(site.args["pad"])
    padded = [len(axes) - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    changed = sorted(set(padded))
    site.keep_tokens_whole(axes, changed, "pads")
    return tuple(other(site.out_shape[d]) if d in changed else a for d, a in enumerate(axes))


@rule("aten::view_as_complex")
def _view_as_complex(site: Site) -> Axes:
    axes = site.stream("self")
    site.keep_tokens_whole(axes, [len(axes) - 1], "takes as real and imaginary parts")
    return axes[:-1]


@rule("aten::view_as_real")
def _view_as_real(site: Site) -> Axes:
    return (*site.stream("self"), other(2))


@rule("aten::stack")
def _stack(site: Site) -> Axes:
    tensors = site.args["tensors"]
    joined = broadcast([axes for t in tensors if (axes := site.axes(t)) is not None])
    for index in range(len(tensors)):
        site.meet("tensors", joined, index)
    dim = int(site.args["dim"]) % (len(joined) + 1)
    return (*joined[:dim], other(len(tensors)), *joined[dim:])


@rule("aten::cat", "aten::concat", "aten::concatenate")
def _cat(site: Site) -> Axes:
    tensors = site.args["tensors"]
    inside = [axes for t in tensors if (axes := site.axes(t)) is not None]
    rank = len(inside[0])
    dim = site.dim("dim", rank)
    joined = list(broadcast([(*axes[:dim], (), *axes[dim + 1 :]) for axes in inside]))
    for index in range(len(tensors)):
        site.meet("tensors", tuple(joined), index)
    if any(has_tokens(axes[dim]) or has_batch(axes[dim]) for axes in inside):
        joined[dim] = _cat_tokens(site, dim)
    else:
        joined[dim] = other(site.out_shape[dim])
    return tuple(joined)


def _cat_tokens(site: Site, dim: int) -> Dim:
    """A cache is put before (or behind) the tokens: together they are the keys."""
    before = after = 0
    tokens: Factor | None = None
    for tensor in site.args["tensors"]:
        axes = site.axes(tensor)
        if axes is None or not (has_tokens(axes[dim]) or has_batch(axes[dim])):
            size = tensor.meta["val"].shape[dim] if len(tensor.meta["val"].shape) > 1 else 0
            before, after = (before + size, after) if tokens is None else (before, after + size)
        elif tokens is None and len(axes[dim]) == 1 and axes[dim][0].tag is Tag.TOKEN:
            tokens = axes[dim][0]
        else:
            site.refuse("FVX012", "it joins the tokens with themselves or with the batch")
    assert tokens is not None
    size = before + tokens.size + after
    return (Factor(size, Tag.TOKEN, tokens.before + before, tokens.after + after),)
