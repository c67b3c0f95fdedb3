"""Attention ops: which operand is what, where it has its tokens, and what the op costs.

An op is recognized by its name, its operands by the names that the libraries share. Other arguments
than queries, keys, values, a mask and the bounds of packed sequences may depend on the order or the
number of the tokens, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from passes.analyse.axes import Axes, Dim, Factor, Tag, broadcast, has_tokens, plain_dim, shape_of
from passes.analyse.rules.site import Site, filled, find_entry, rule
from passes.graph import bind, op_name


class Layout(NamedTuple):
    """Which dims of queries, keys and values hold the tokens and the heads, from the right."""

    tokens: int
    heads: int


_HEADS_FIRST: Final = Layout(tokens=-2, heads=-3)
"""(..., H, L, c)"""
_TOKENS_FIRST: Final = Layout(tokens=-3, heads=-2)
"""(B, L, H, c), or (B * L, H, c) where the sequences are packed."""

_LAYOUTS: Final[dict[str, Layout]] = {
    "aten::scaled_dot_product_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_attention_math": _HEADS_FIRST,
    "aten::_scaled_dot_product_cudnn_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_efficient_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_flash_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _HEADS_FIRST,
    "aten::_scaled_dot_product_fused_attention_overrideable": _HEADS_FIRST,
    "aten::_efficient_attention_forward": _TOKENS_FIRST,
    "aten::_flash_attention_forward": _TOKENS_FIRST,
    "flash_attn::_flash_attn_forward": _TOKENS_FIRST,
    "flash_attn::_flash_attn_varlen_forward": _TOKENS_FIRST,
    "flash_attn_3::_flash_attn_forward": _TOKENS_FIRST,
    "flash_attn_3::fwd": _TOKENS_FIRST,
    "xformers::efficient_attention_forward_cutlass": _TOKENS_FIRST,
    "xformers_flash::flash_fwd": _TOKENS_FIRST,
    "xformers_flash3::flash_fwd": _TOKENS_FIRST,
}

_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "query": ("query", "q"),
    "key": ("key", "k"),
    "value": ("value", "v"),
    "mask": ("attn_mask", "attn_bias", "bias"),
    "query_starts": ("cu_seqlens_q", "cum_seq_q", "seqstart_q"),
    "key_starts": ("cu_seqlens_k", "cum_seq_k", "seqstart_k"),
    "query_length": ("max_seqlen_q", "max_q"),
    "key_length": ("max_seqlen_k", "max_k"),
    "dropout": ("dropout_p", "p"),
}
"""What the libraries call an argument."""

_HARMLESS: Final = frozenset(
    {
        "scale", "softmax_scale", "softcap", "enable_gqa", "pack_gqa", "num_splits", "sm_margin",
        "deterministic", "compute_log_sumexp", "compute_logsumexp", "return_softmax",
        "return_softmax_lse", "return_debug_mask",
    }
)  # fmt: skip
"""Arguments that do not refer to single tokens."""


def is_attention(node: Node) -> bool:
    """Whether a call is one attention op."""
    entry = find_entry(node.target)
    return entry is not None and entry.attends


def key_operand(node: Node) -> Any:
    """Returns the operand that an attention op takes as its keys: the second tensor."""
    return [arg for arg in node.args if isinstance(arg, Node)][1]


def key_count(node: Node) -> int:
    """Returns how many keys an attention op reads; a user's op is read as heads first."""
    layout = _LAYOUTS.get(op_name(node), _HEADS_FIRST)
    return int(key_operand(node).meta["val"].shape[layout.tokens])


def attention_flops(node: Node) -> int:
    """Returns the FLOPs of an attention op's two products, masked scores included.

    It is 0 for opaque ops: where their heads are is unknown.
    """
    layout = _LAYOUTS.get(op_name(node))
    if layout is None:
        return 0
    args = {role: _find(bind(node), role)[1] for role in _NAMES}
    query, key, value = (args[role].meta["val"].shape for role in ("query", "key", "value"))
    flops = _flops(_results(node)[0].shape[:-1], query, key[layout.tokens], value)
    starts = args["query_starts"]
    return flops if starts is None else flops // (starts.meta["val"].shape[0] - 1)


def _flops(rows: Sequence[int], query: Sequence[int], keys: int, value: Sequence[int]) -> int:
    return int(2 * prod(rows) * keys * (query[-1] + value[-1]))


FLOP_FORMULAS: Final[dict[Any, Callable[..., int]]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: _flops(q[:-1], q, k[-2], v)
    )
}
"""For `FlopCounterMode(custom_mapping=...)`: the attention op that torch has no formula for."""


def _find(args: dict[str, Any], role: str) -> tuple[str, Any]:
    """Returns an argument's name and value by its role; an op without one has no value for it."""
    return next(((name, args[name]) for name in _NAMES[role] if name in args), ("", None))


def _results(node: Node) -> list[Any]:
    value = node.meta["val"]
    return list(value) if isinstance(value, (tuple, list)) else [value]


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


@rule(*_LAYOUTS, attends=True)
def _attention(site: Site) -> Axes | list[Axes]:
    _refuse_order(site)
    layout = _LAYOUTS[op_name(site.node)]
    q, k, v = (site.axes(_find(site.args, role)[1]) for role in ("query", "key", "value"))
    inside = [axes for axes in (k, v) if axes is not None]
    keys = [axes[layout.tokens] for axes in inside]
    q = attending(site, q, keys)
    if any(has_tokens(axes[-1]) for axes in (q, *inside)):
        site.refuse("FVX013", "it sums over the token axis as if it were features")
    broadcast([_without(axes, layout.tokens) for axes in (q, *inside)])
    rows = (*q[:-3], q[layout.heads], q[layout.tokens]) if len(q) > 2 else q[:-1]
    _meet_mask(site, (*rows, keys[0] if keys else ()))
    _recount(site, q[layout.tokens], keys[0] if k is not None else None)
    results = _results(site.node)
    features = v[-1] if v is not None else plain_dim(results[0].shape[-1])
    out = (*filled(q[:-1], results[0].shape[:-1]), features)
    if not isinstance(site.node.meta["val"], (tuple, list)):
        return out
    has_rows = isinstance(results[1], Tensor) and list(results[1].shape) == shape_of(rows)
    return [out, rows] if has_rows else [out]


def _without(axes: Axes, tokens: int) -> Axes:
    """The dims that queries, keys and values must agree on, but for their features."""
    return tuple(dim for d, dim in enumerate(axes[:-1], -len(axes)) if d != tokens)


def _refuse_order(site: Site) -> None:
    """Refuses what depends on the order of the tokens, or may."""
    known = {_find(site.args, role)[0] for role in _NAMES} | _HARMLESS
    for name, value in site.args.items():
        if name in known or _is_off(name, value):
            continue
        if isinstance(value, Node):
            site.refuse("FVX012", f"its `{name}` may depend on the order or count of the tokens")
        site.refuse("FVX012", f"with {name}={value} it depends on the order of the tokens")
    if _find(site.args, "dropout")[1]:
        site.refuse("FVX013", "dropout is active: random masks differ per token")


def _is_off(name: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_off(name, item) for item in value)
    if "window" in name:
        return value is None or value < 0
    return value is None or (not isinstance(value, Node) and not value)


def _meet_mask(site: Site, scores: Axes) -> None:
    """A mask or bias is aligned with the scores (..., H, queries, keys) from the right."""
    name, mask = _find(site.args, "mask")
    if mask is None:
        return
    if _find(site.args, "query_starts")[1] is not None:
        site.refuse("FVX012", "a mask over packed sequences: its token axis is unknown")
    inside = site.axes(mask)
    if inside is not None:
        broadcast([scores, inside])
    site.meet(name, scores)


def _recount(site: Site, queries: Dim, keys: Dim | None) -> None:
    """Bounds of packed sequences and longest lengths follow the tokens that are left.

    Keys from outside the branch keep theirs.
    """
    packed = _find(site.args, "query_starts")[1] is not None
    for side, dim in (("query", queries), ("key", keys)):
        if dim is None:
            continue
        tokens = dim[-1] if dim else None
        if packed:
            name, starts = _find(site.args, f"{side}_starts")
            tokens = _sequence(site, dim, starts)
            site.recount(name, _sequence_starts, tokens.before + tokens.after)
        if tokens is None or tokens.tag is not Tag.TOKEN:
            continue
        name, length = _find(site.args, f"{side}_length")
        if length == tokens.size:
            site.recount(name, _longest, tokens.before + tokens.after)


def _sequence(site: Site, packed: Dim, starts: Any) -> Factor:
    """Returns the token factor of packed sequences, which must be the samples in a row."""
    samples = packed[0].size if len(packed) == 2 else 1
    in_a_row = [factor.tag for factor in packed] in ([Tag.BATCH, Tag.TOKEN], [Tag.TOKEN])
    if starts is None or not in_a_row or list(starts.meta["val"].shape) != [samples + 1]:
        site.refuse("FVX011", "its sequences are not the samples")
    return packed[-1]


def _sequence_starts(starts: Tensor, count: int) -> Tensor:
    """Where each sample's entries begin when every sample has as many."""
    return torch.arange(starts.shape[0], dtype=starts.dtype, device=starts.device) * count


def _longest(length: int, count: int) -> int:
    return count
