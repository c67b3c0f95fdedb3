"""Axis rules of ops that move, split and join entries."""

from __future__ import annotations

import operator

import torch

from passes.analyse.axes import (
    Axes,
    Dim,
    Factor,
    Tag,
    broadcast,
    has_batch,
    has_tokens,
    plain_dim,
    regroup,
)
from passes.analyse.rules.site import Site, filled, rule
from passes.graph import op_name


@rule("aten::view", "aten::reshape", "aten::_unsafe_view")
def _view(site: Site) -> Axes:
    if "dtype" in site.args:
        site.refuse("FVX010", "it reinterprets the bits of the tokens")
    axes = regroup(site.stream("self"), site.out_shape)
    site.resize("shape" if "shape" in site.args else "size", axes)
    return axes


@rule("aten::unflatten")
def _unflatten(site: Site) -> Axes:
    before, dim = site.stream_dim()
    axes = regroup(before, site.out_shape)
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


@rule("aten::repeat", "aten::tile")
def _repeat(site: Site) -> Axes:
    axes = site.stream("self")
    repeats = list(site.args["repeats" if "repeats" in site.args else "dims"])
    padded = ((),) * (len(repeats) - len(axes)) + axes
    return tuple((*plain_dim(n), *dim) for n, dim in zip(repeats, padded, strict=True))


@rule("aten::repeat_interleave")
def _repeat_interleave(site: Site) -> Axes:
    if not isinstance(site.args["repeats"], int) or site.args["dim"] is None:
        site.refuse("FVX010", "it repeats by a tensor, or flattens")
    axes, dim = site.stream_dim()
    return (*axes[:dim], (*axes[dim], *plain_dim(site.args["repeats"])), *axes[dim + 1 :])


@rule("aten::select")
def _select(site: Site) -> Axes:
    axes, dim = site.stream_dim()
    site.keep_tokens_whole(axes, [dim], "selects one position of")
    return axes[:dim] + axes[dim + 1 :]


@rule("aten::slice", "aten::narrow")
def _slice(site: Site) -> Axes:
    axes, dim = site.stream_dim()
    size, result = site.node.args[0].meta["val"].shape[dim], site.out_shape[dim]  # type: ignore[union-attr]
    if size == result:
        if "length" in site.args and has_tokens(axes[dim]):
            site.refuse("FVX012", "it narrows the token axis")
        return axes
    if len(axes[dim]) == 1 and axes[dim][0].tag is Tag.TOKEN and "end" in site.args:
        return _drop_leading(site, axes, dim, result)
    site.keep_tokens_whole(axes, [dim], "slices")
    return tuple(plain_dim(result) if d == dim else a for d, a in enumerate(axes))


def _drop_leading(site: Site, axes: Axes, dim: int, result: int) -> Axes:
    """A slice may drop entries before the tokens, such as the oldest cached keys."""
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
    axes, dim = site.stream_dim()
    site.keep_tokens_whole(axes, [dim], "splits")
    parts = site.node.meta["val"]
    if len(parts[0].shape) < len(axes):  # unbind
        return [axes[:dim] + axes[dim + 1 :]] * len(parts)
    return [(*axes[:dim], plain_dim(part.shape[dim]), *axes[dim + 1 :]) for part in parts]


@rule(operator.getitem)
def _getitem(site: Site) -> Axes:
    parts = site.tuple_axes(site.args["0"])
    if parts is None:
        site.refuse("FVX010", "it indexes a tensor")
    index = int(site.args["1"])
    if index >= len(parts):
        site.refuse("FVX010", "where the tokens are in this result of the op is unknown")
    return parts[index]


@rule("aten::glu")
def _glu(site: Site) -> Axes:
    axes, dim = site.stream_dim()
    site.keep_tokens_whole(axes, [dim], "halves")
    return tuple(plain_dim(site.out_shape[d]) if d == dim else a for d, a in enumerate(axes))


@rule("aten::flip", "aten::roll")
def _moved(site: Site) -> Axes:
    axes = site.stream("self")
    verb = f"{op_name(site.node).removeprefix('aten::')}s"
    site.keep_tokens_whole(axes, site.dims("dims", len(axes)), verb)
    return axes


@rule("aten::pad", "aten::constant_pad_nd")
def _pad(site: Site) -> Axes:
    axes = site.stream("self")
    amounts = enumerate(site.args["pad"])
    changed = sorted({len(axes) - 1 - i // 2 for i, amount in amounts if amount})
    site.keep_tokens_whole(axes, changed, "pads")
    return tuple(plain_dim(site.out_shape[d]) if d in changed else a for d, a in enumerate(axes))


@rule("aten::view_as_complex")
def _view_as_complex(site: Site) -> Axes:
    axes = site.stream("self")
    site.keep_tokens_whole(axes, [len(axes) - 1], "takes as real and imaginary parts")
    return axes[:-1]


@rule("aten::view_as_real")
def _view_as_real(site: Site) -> Axes:
    return (*site.stream("self"), plain_dim(2))


@rule("aten::stack")
def _stack(site: Site) -> Axes:
    tensors = site.args["tensors"]
    joined = broadcast([axes for t in tensors if (axes := site.axes(t)) is not None])
    for index in range(len(tensors)):
        site.meet("tensors", joined, index)
    dim = int(site.args["dim"]) % (len(joined) + 1)
    return (*joined[:dim], plain_dim(len(tensors)), *joined[dim:])


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
        joined[dim] = plain_dim(site.out_shape[dim])
    return tuple(joined)


def _cat_tokens(site: Site, dim: int) -> Dim:
    """A cache is joined before (or after) the tokens: together they are the keys."""
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
