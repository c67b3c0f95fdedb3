"""Axis rules of reductions, scans, orderings and normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.analyse.axes import Axes, has_batch, has_tokens, plain_dim
from passes.analyse.rules.site import Site, pointwise, rule


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
    result = tuple(plain_dim(size) if d == dim else a for d, a in enumerate(axes))
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
    over_batch = site.node.target is torch.ops.aten.batch_norm.default
    if not over_batch or site.args.get("training", True):
        mixed = axes if over_batch else axes[1:]
        if any(has_tokens(dim) for dim in mixed):
            site.refuse("FVX013", "it normalizes over the tokens")
        if any(has_batch(dim) for dim in mixed):
            site.refuse("FVX013", "it normalizes over the samples of the batch")
    if has_tokens(axes[1]) or has_batch(axes[1]):
        site.refuse("FVX013", "it has parameters per token or per sample")
    return axes
