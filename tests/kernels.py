"""Registered ops of attention libraries, stood in for by exact attention on the CPU.

The schemas are the libraries' own, so that what the compiler reads off a call is what it will meet.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]

_FLASH_TAIL = (
    "float dropout_p, float softmax_scale, bool causal, int window_size_left, "
    "int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax"
)
_FLASH_3_TAIL = (
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0"
)
SCHEMAS = {
    "flash_attn::_flash_attn_forward": f"(Tensor q, Tensor k, Tensor v, {_FLASH_TAIL}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn::_flash_attn_varlen_forward": "(Tensor q, Tensor k, Tensor v, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    f"{_FLASH_TAIL}, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn_3::fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, "
    "Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
    f"int? max_seqlen_k=None, {_FLASH_3_TAIL}) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "xformers_flash::flash_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float p, "
    "float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right, "
    "bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
    "xformers::efficient_attention_forward_cutlass": "(Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_bias, Tensor? seqstart_q, Tensor? seqstart_k, int? max_seqlen_q, "
    "float dropout_p, bool compute_logsumexp, int custom_mask_type, float? scale, "
    "Tensor? seqlen_k, int? window_size) -> (Tensor, Tensor, int, int)",
}


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of q (B, L, H, c) over k, v (B, M, G, c), bias (B, H, L, M); (B, L, H, c)."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("blhc,bmhc->bhlm", q, k) * scale
    scores = scores if bias is None else scores + bias
    return torch.einsum("bhlm,bmhc->blhc", scores.softmax(-1), v)


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attention within each of the sequences that q, k and v (N, H, c) hold in a row."""
    out = torch.full_like(q, torch.nan)
    for starts, tensor, length in zip((query_starts, key_starts), (q, k), longest, strict=True):
        assert int(starts[-1]) == tensor.shape[0]
        assert int(starts.diff().max()) == length
    for sequence in range(len(query_starts) - 1):
        own, keys = (
            slice(*s[sequence : sequence + 2].tolist()) for s in (query_starts, key_starts)
        )
        out[own] = exact(q[None, own], k[None, keys], v[None, keys], None, scale)[0]
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, _: float, scale: float, *rest: object) -> Results:
    return exact(q, k, v, None, scale), *_flash_rest(q)


def _flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int,
    longest_k: int, _: float, scale: float, *rest: object, **more: object,
) -> Results:  # fmt: skip
    out = packed(q, k, v, starts_q, starts_k, (longest_q, longest_k), scale)
    return out, *_flash_rest(q)


def _flash_3(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Results:
    scale = next(argument for argument in rest if isinstance(argument, float))
    return exact(q, k, v, None, scale), *_flash_rest(q)


def _xformers_flash(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor | None, starts_k: Tensor | None,
    used: Tensor | None, longest_q: int, longest_k: int, p: float, scale: float, *rest: object,
) -> Results:  # fmt: skip
    if starts_q is None or starts_k is None:
        return exact(q, k, v, None, scale), *_flash_rest(q)[:2]
    out = packed(q, k, v, starts_q, starts_k, (longest_q, longest_k), scale)
    return out, *_flash_rest(q)[:2]


def _cutlass(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, starts_q: Tensor | None,
    starts_k: Tensor | None, longest: int | None, p: float, lse: bool, mask: int, scale: float,
    *rest: object,
) -> tuple[Tensor, Tensor, int, int]:  # fmt: skip
    if starts_q is None or starts_k is None:
        out = exact(q, k, v, bias, scale)
    else:
        assert longest is not None
        lengths = (longest, int(starts_k.diff().max()))
        out = packed(q[0], k[0], v[0], starts_q, starts_k, lengths, scale)[None]
    return out, q.new_empty(q.shape[0], q.shape[2], 0), 0, 0


def _flash_rest(q: Tensor) -> Results:
    """Log-sum-exp, no probabilities, the state of the random generator."""
    lse = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3])
    return lse, torch.empty(2, dtype=torch.int64, device=q.device), q.new_empty(0)


def _register() -> None:
    kernels: tuple[Callable[..., Any], ...] = (
        _flash,
        _flash_varlen,
        _flash_3,
        _xformers_flash,
        _cutlass,
    )
    for (name, schema), kernel in zip(SCHEMAS.items(), kernels, strict=True):
        torch.library.define(name, schema)
        torch.library.impl(name, ("cpu", "cuda"))(kernel)
        torch.library.register_fake(name, _shapes_of(name))


def _shapes_of(name: str) -> Callable[..., Any]:
    def fake(q: Tensor, *args: object, **kwargs: object) -> tuple[Any, ...]:
        if "cutlass" in name:
            return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], 0), 0, 0
        rest = _flash_rest(q)
        return torch.empty_like(q), *(rest[:2] if "xformers" in name else rest)

    return fake


INSTALLED = any(find_spec(name) for name in ("flash_attn", "flash_attn_3", "xformers"))
"""Whether a library is there that registers ops itself, with no kernels for the CPU."""

if not INSTALLED:
    _register()
