"""Axis rules of opaque kernels, of which only the schema is known."""

from __future__ import annotations

from collections.abc import Sequence

from passes.analyse.axes import Axes, broadcast, dim_size, has_tokens, token_dims
from passes.analyse.rules.attention import attending
from passes.analyse.rules.site import Site


def tokenwise(site: Site) -> Axes:
    """A kernel that works on every token alone, on a first tensor that has the tokens."""
    first, *others = site.tensors
    axes = site.stream(first)
    for name in others:
        inside = site.axes(site.args[name])
        if inside is not None:
            broadcast([axes, inside])
        elif _broadcasts(site.args[name].meta["val"].shape, axes):
            site.meet(name, axes)
        else:
            _refuse_per_token(site, name, axes)
    return axes


def _broadcasts(side_shape: Sequence[int], axes: Axes) -> bool:
    aligned = zip(reversed(side_shape), reversed(axes), strict=False)
    return all(size in (1, dim_size(dim)) for size, dim in aligned) and len(side_shape) <= len(axes)


def attention(site: Site) -> Axes:
    """Softmax attention of the first tensor over the second and third, tokens on the same dim."""
    query, key, value, *more = site.tensors
    q = site.axes(site.args[query])
    k, v = (site.axes(site.args[name]) for name in (key, value))
    inside = [axes for axes in (k, v) if axes is not None]
    keys = [tuple(f for dim in axes if has_tokens(dim) for f in dim) for axes in inside]
    for name in more:
        _refuse_per_token(site, name, *(axes for axes in (q, *inside) if axes is not None))
    return attending(site, q, keys)


def _refuse_per_token(site: Site, name: str, *met: Axes) -> None:
    """Refuses a tensor such as a mask that may have an entry per token, on an unknown axis."""
    shape = list(site.args[name].meta["val"].shape)
    tokens = {dim_size(axes[d]) for axes in met for d in token_dims(axes)}
    if site.axes(site.args[name]) is not None or tokens & set(shape):
        site.refuse(
            "FVX012",
            f"`{name}` of shape {shape} may have an entry per token, and its token axis is "
            f"unknown: declare the kernel with its own axis rule",
        )
