"""Axis rules of reductions, scans, orderings and normalizations."""

from __future__ import annotations

from collections.abc import Collection

import torch

from passes.analyse.axes import Axes, has_batch, has_tokens, plain_dim
from passes.analyse.rules.site import Site, pointwise, rule


def _reduced(site: Site, axes: Axes, dims: Collection[int]) -> None:
    """Refuses a reduction over the tokens unless it normalizes or sums attention scores."""
    scores = any(has_tokens(dim) for d, dim in enumerate(axes) if d not in dims)
    site.keep_apart([axes[d] for d in dims if has_batch(axes[d]) or not scores], "reduces")


@rule(
    "aten::sum", "aten::mean", "aten::amax", "aten::amin", "aten::prod", "aten::logsumexp",
    "aten::var", "aten::std", "aten::linalg_vector_norm", "aten::norm", "aten::all", "aten::any",
    "aten::argmax", "aten::argmin", "aten::var_mean", "aten::std_mean", "aten::max", "aten::min",
    "aten::nansum", "aten::count_nonzero", "aten::median", "aten::nanmedian", "aten::mode",
    "aten::kthvalue", "aten::aminmax",
)  # fmt: skip
def _reduction(site: Site) -> Axes | list[Axes]:
    if "other" in site.args:  # max(self, other) and min(self, other)
        return pointwise(site)
    axes = site.stream("self")
    dims = site.dims("dim", len(axes)) if "dim" in site.args else list(range(len(axes)))
    _reduced(site, axes, dims)
    keep = bool(site.args.get("keepdim", False))
    kept = [() if d in dims else dim for d, dim in enumerate(axes) if keep or d not in dims]
    return site.results(tuple(kept))


@rule("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax")
def _softmax(site: Site) -> Axes:
    axes, dim = site.stream_dim()
    _reduced(site, axes, [dim])
    return axes


@rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def _scan(site: Site) -> Axes:
    axes, dim = site.stream_dim()
    site.keep_apart([axes[dim]], "scans")
    return axes


@rule("aten::cummax", "aten::cummin", "aten::sort", "aten::topk")
def _ordered(site: Site) -> Axes | list[Axes]:
    axes, dim = site.stream_dim()
    site.keep_tokens_whole(axes, [dim], "orders")
    size = site.node.meta["val"][0].shape[dim]
    return site.results((*axes[:dim], plain_dim(size), *axes[dim + 1 :]))


@rule("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm", "aten::_fused_rms_norm")
def _feature_norm(site: Site) -> Axes | list[Axes]:
    axes = site.stream("input")
    first = len(axes) - len(site.args["normalized_shape"])
    site.keep_apart(axes[first:], "normalizes")
    return site.results(axes, (*axes[:first], *[()] * (len(axes) - first)))


@rule("aten::group_norm", "aten::native_group_norm", "aten::instance_norm", "aten::batch_norm")
def _channel_norm(site: Site) -> Axes:
    axes = site.stream("input")
    over_batch = site.node.target is torch.ops.aten.batch_norm.default
    if not over_batch or site.args.get("training", True):
        site.keep_apart(axes if over_batch else axes[1:], "normalizes")
    if has_tokens(axes[1]) or has_batch(axes[1]):
        site.refuse("FVX013", "it has parameters per token or per sample")
    return axes
