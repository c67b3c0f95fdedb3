"""Attention however it is written: a pruned block against its branch run by hand on kept tokens."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import fastvar_fx
from fastvar_fx import Schedule
from tests import kernels, reference

SCALES = ((2, 2), (3, 3), (4, 4))
HEADS, HEAD = 4, 4
C = HEADS * HEAD
SCALE = HEAD**-0.5
F64 = torch.float64

# -- cores: q (B, L, H, c) over k and v (B, M, G, c), mask (B, H, L, M) or less -----------------

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """A mask over the queries alone scales; added to the scores of all keys it would cancel."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores * mask if mask.shape[-1] == 1 else scores + mask


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def repeated(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in tensors]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = k.shape[2] < q.shape[2]
    q, k, v = heads_first(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def sdpa_of_the_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = heads_first(q, k, v)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = op(q, k, v, attn_mask=mask)[0]
    return out.transpose(1, 2)


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = heads_first(q, k, v)
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask)[0]
    return out.transpose(1, 2)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = heads_first(q, *repeated(q, k, v))
    scores = masked(q @ k.mT * SCALE, mask)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = repeated(q, k, v)
    scores = masked(torch.einsum("blhc,bmhc->bhlm", q * SCALE, k), mask)
    return torch.einsum("bhlm,bmhc->blhc", scores.softmax(-1), v)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Samples and heads in one dim, the mask as what the product is added to."""
    batch, length, heads, _ = q.shape
    q, k, v = (t.flatten(0, 1) for t in heads_first(q, k, v))
    if mask is None:
        scores = torch.bmm(q, k.mT) * SCALE
    else:
        mask = mask.expand(batch, heads, length, k.shape[1]).flatten(0, 1)
        scores = torch.baddbmm(mask, q, k.mT, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, length, -1).transpose(1, 2)


class FlashAttention(torch.autograd.Function):
    """flash-attention's public functions wrap its op like this."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tail = (0.0, SCALE, False, -1, -1, 0.0, None, False)
        out: Tensor = torch.ops.flash_attn._flash_attn_forward(q, k, v, *tail)[0]
        return out


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return FlashAttention.apply(q, k, v)


def flash_kvpacked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    kv = torch.stack([k, v], dim=2)
    return flash(q, kv[:, :, 0].detach(), kv[:, :, 1].detach(), None)


def flash_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=SCALE)[0]
    return out


def starts(x: Tensor) -> Tensor:
    return torch.arange(0, (len(x) + 1) * x.shape[1], x.shape[1], dtype=torch.int32)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    bounds = (starts(q), starts(k), q.shape[1], k.shape[1])
    tail = (0.0, SCALE, False, -1, -1, 0.0, None, False)
    packed = (t.flatten(0, 1) for t in (q, k, v))
    out: Tensor = torch.ops.flash_attn._flash_attn_varlen_forward(*packed, *bounds, *tail)[0]
    return out.view_as(q)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.xformers_flash.flash_fwd(
        q, k, v, None, None, None, q.shape[1], k.shape[1], 0.0, SCALE, False, -1, -1, False, None
    )[0]
    return out


def xformers_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`BlockDiagonalMask.from_seqlens`: one sequence per sample, all in a row."""
    lengths = torch.tensor([0] + [q.shape[1]] * len(q), dtype=torch.int32).cumsum(0)
    bounds = (lengths.to(torch.int32), starts(k), None, q.shape[1], k.shape[1])
    packed = (t.reshape(-1, HEADS, HEAD) for t in (q, k, v))
    tail = (0.0, SCALE, False, -1, -1, False, None)
    out: Tensor = torch.ops.xformers_flash.flash_fwd(*packed, *bounds, *tail)[0]
    return out.reshape(q.shape)


def cutlass(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """xformers' older kernel, which takes a bias."""
    bias = None if mask is None else mask.expand(len(q), HEADS, q.shape[1], k.shape[1])
    tail = (None, None, -1, 0.0, False, 0, SCALE, None, None)
    out: Tensor = torch.ops.xformers.efficient_attention_forward_cutlass(q, k, v, bias, *tail)[0]
    return out


def cutlass_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    tail = (None, starts(q), starts(k), q.shape[1], 0.0, False, 0, SCALE, None, None)
    packed = (t.reshape(1, -1, HEADS, HEAD) for t in (q, k, v))
    out: Tensor = torch.ops.xformers.efficient_attention_forward_cutlass(*packed, *tail)[0]
    return out.reshape(q.shape)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = k.shape[2] < q.shape[2]
    q, k, v = heads_first(q, k, v)
    return flex_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


compiled_flex_attention = torch.compile(flex_attention, backend="eager")


def compiled_flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = heads_first(q, k, v)
    return compiled_flex_attention(q, k, v).transpose(1, 2)


# -- rotary embeddings of x (B, L, H, c) by angles (L, c / 2) -----------------------------------


def half(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (t.repeat(1, 2).unsqueeze(1) for t in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def pairs(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def complex_numbers(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


ROPES = {"half": half, "pairs": pairs, "complex": complex_numbers}

# -- masks: which axes they have ----------------------------------------------------------------


def mask_of(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    shapes = {
        "queries": (queries, 1),
        "keys": (1, keys),
        "both": (queries, keys),
        "heads": (1, HEADS, queries, keys),
        "heads_keys": (HEADS, 1, keys),
        "samples": (batch, 1, queries, keys),
        "samples_keys": (batch, 1, 1, keys),
    }
    if kind == "none":
        return None
    values = torch.randn(shapes[kind.removeprefix("bool_")], dtype=F64)
    if not kind.startswith("bool_"):
        return values
    allowed = values > 0
    allowed[..., 0] = True  # no query is without a key
    return allowed


# -- a block, and the same by hand --------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a block's attention is written."""

    core: Core = sdpa
    rope: str = "none"
    mask: str = "none"
    qkv: str = "fused"
    groups: int = HEADS
    qk_norm: bool = False
    cached: bool = False
    batch: int = 3

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if k != "core" and v != vars(Form)[k]]
        return "-".join([self.core.__name__, *changed])


class Block(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.norm, self.proj = nn.LayerNorm(C), nn.Linear(C, C)
        widths = [C, form.groups * HEAD, form.groups * HEAD]
        parts = [sum(widths)] if form.qkv == "fused" else widths
        self.qkv = nn.ModuleList(nn.Linear(C, width) for width in parts)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)
        self.past: tuple[Tensor, Tensor] | None = None

    def project(self, x: Tensor) -> list[Tensor]:
        joined = torch.cat([layer(self.norm(x)) for layer in self.qkv], dim=-1)
        if self.form.qkv == "fused" and self.form.groups == HEADS:
            parts = joined.view(*x.shape[:2], 3, HEADS, HEAD).unbind(2)
        else:
            widths = [C, self.form.groups * HEAD, self.form.groups * HEAD]
            parts = tuple(p.unflatten(-1, (-1, HEAD)) for p in joined.split(widths, dim=-1))
        q, k, v = parts
        return [self.q_norm(q), self.k_norm(k), v] if self.form.qk_norm else [q, k, v]

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.form.cached:
            return k, v
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], dim=1), torch.cat([self.past[1], v], dim=1)
        self.past = k, v
        return k, v

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        if self.form.rope != "none":
            q, k = ROPES[self.form.rope](q, angles), ROPES[self.form.rope](k, angles)
        k, v = self.keys(k, v)
        out: Tensor = x + self.proj(self.form.core(q, k, v, mask).reshape(x.shape))
        return out


def by_hand(block: Block, x: Tensor, index: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
    """What the branch adds to the tokens x (B, n, C) that stand at `index` (B, n) of the map."""
    q, k, v = block.project(x)
    if block.form.rope != "none":
        kind = "half" if block.form.rope == "half" else "pairs"
        q, k = (reference.rotate(kind, t, angles[index]) for t in (q, k))
    k, v = block.keys(k, v)
    k, v = repeated(q, k, v)
    scores = torch.einsum("blhc,bmhc->bhlm", q, k) * SCALE
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        earlier = torch.arange(k.shape[1] - x.shape[1]).expand(len(x), -1)
        positions = torch.cat([earlier, earlier.shape[1] + index], dim=1)
        own = [mask[i if len(mask) > 1 else 0] for i in range(len(x))]  # (H, L, M)
        rows = [m[:, i] if m.shape[1] > 1 else m for m, i in zip(own, index, strict=True)]
        own = [m[..., i] if m.shape[2] > 1 else m for m, i in zip(rows, positions, strict=True)]
        scores = masked(scores, torch.stack(own))
    out = torch.einsum("bhlm,bmhc->blhc", scores.softmax(-1), v)
    return F.linear(out.reshape(x.shape), block.proj.weight, block.proj.bias)


def block_of(form: Form) -> Block:
    torch.manual_seed(0)
    return Block(form).to(F64).eval()


def assert_equals_by_hand(form: Form) -> None:
    hand = block_of(form)
    net = nn.Module()
    net.blocks = nn.ModuleList([block_of(form)])
    fast = fastvar_fx.transform(net.eval(), Schedule(SCALES, (0.5,)), blocks="blocks", strict=False)
    (block,) = fast.get_submodule("blocks").children()
    cached = torch.empty(0)
    past = 0
    for scale in SCALES:
        tokens = scale[0] * scale[1]
        keys = tokens + past * form.cached
        x, angles = torch.randn(form.batch, tokens, C, dtype=F64), torch.randn(tokens, HEAD // 2)
        mask = mask_of(form.mask, form.batch, tokens, keys)
        got = block(x, angles.to(F64), mask)
        pruned = scale == SCALES[-1]
        index = reference.pivotal_indices(x, tokens // 2 if pruned else tokens)
        added = by_hand(hand, reference.take_tokens(x, index), index, angles.to(F64), mask)
        if pruned:
            added = reference.restore(cached, SCALES[-2], scale, added, index)
        torch.testing.assert_close(got, x + added, rtol=0, atol=1e-10)
        cached, past = added, past + tokens
    report = fastvar_fx.explain(fast)
    assert not report.refusals, str(report)
    row = report.rows[-1]
    assert (row.kind, row.kept) == ("attention", tokens // 2)
    products = 2 * tokens * C * sum(layer.out_features for layer in [*hand.qkv, hand.proj])
    assert row.flops == form.batch * (products + 4 * tokens * keys * C)


LIBRARIES = (flash, flash_kvpacked, flash_3, flash_varlen, xformers, xformers_blocks, cutlass,
             cutlass_blocks)  # fmt: skip
PLAIN = (sdpa, sdpa_of_the_cpu, sdpa_math, matmul, einsum, baddbmm, flex, compiled_flex)
MASKS = ("keys", "both", "heads", "heads_keys", "samples", "samples_keys",
         "bool_keys", "bool_both", "bool_samples", "bool_samples_keys")  # fmt: skip
FORMS = [
    *(Form(core, cached=cached) for core in (*PLAIN, *LIBRARIES) for cached in (False, True)),
    *(Form(core, batch=1, cached=True) for core in (*PLAIN, *LIBRARIES)),
    *(Form(sdpa, mask=mask, cached=True) for mask in MASKS),
    *(Form(matmul, mask=mask, batch=1) for mask in (*MASKS, "queries")),
    *(Form(core, mask="samples") for core in (sdpa_of_the_cpu, sdpa_math, einsum, baddbmm)),
    *(Form(core, mask="both", cached=True) for core in (sdpa_math, matmul, baddbmm, cutlass)),
    *(Form(core, rope, qk_norm=True, cached=True) for core in (sdpa, matmul) for rope in ROPES),
    *(Form(flash_varlen, rope, qkv="split") for rope in ROPES),
    *(Form(core, groups=2, cached=True) for core in (sdpa, matmul, einsum, flash, flex)),
    Form(sdpa, "complex", "heads", "split", 2, qk_norm=True, cached=True),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_pruned_block_equals_the_branch_by_hand(form: Form) -> None:
    if kernels.INSTALLED and form.core in LIBRARIES:
        pytest.skip("the library registers its ops itself")
    assert_equals_by_hand(form)
