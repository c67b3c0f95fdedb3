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
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastvar_fx
from fastvar_fx import Schedule
from passes.analyse.rules.attention import attention_flops, is_attention
from passes.refusal import RefusedError
from passes.rewrite.prune import Step, prune
from tests import kernels, reference
from tests.passes.test_rules import (
    F64,
    KEPT,
    Chosen,
    Host,
    N,
    assert_prunes,
    captured,
    found_in,
    host_of,
    indices,
    run_pruned,
)

SCALES = ((2, 2), (3, 3), (4, 4))
HEADS, HEAD = 4, 4
C = HEADS * HEAD
SCALE = HEAD**-0.5

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


def exp_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = heads_first(q, *repeated(q, k, v))
    scores = masked(q @ k.mT * SCALE, mask)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2)


def divided_last(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = heads_first(q, *repeated(q, k, v))
    weights = masked(q @ k.mT * SCALE, mask).exp()
    return ((weights @ v) / weights.sum(-1, keepdim=True)).transpose(1, 2)


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
    *(Form(core) for core in (*PLAIN, *LIBRARIES)),
    *(Form(core, batch=1, cached=True) for core in (*PLAIN, *LIBRARIES)),
    *(Form(core, cached=True) for core in LIBRARIES),
    *(Form(sdpa, mask=mask, cached=True) for mask in MASKS),
    *(Form(matmul, mask=mask, batch=1) for mask in (*MASKS, "queries")),
    *(Form(core, mask="samples") for core in (sdpa_of_the_cpu, sdpa_math, einsum, baddbmm)),
    *(Form(core, mask="both", cached=True) for core in (sdpa_math, matmul, baddbmm, cutlass)),
    *(Form(core, rope, qk_norm=True, cached=True) for core in (sdpa, matmul) for rope in ROPES),
    *(Form(flash_varlen, rope, qkv="split") for rope in ROPES),
    *(Form(core, groups=2, cached=True) for core in (sdpa, matmul, einsum, flash, flex)),
    Form(sdpa, "complex", "heads", "split", 2, qk_norm=True, cached=True),
    *(Form(core, mask="both", cached=True) for core in (exp_sum, divided_last)),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_pruned_block_equals_the_branch_by_hand(form: Form) -> None:
    if kernels.INSTALLED and form.core in LIBRARIES:
        pytest.skip("the library registers its ops itself")
    assert_equals_by_hand(form)


def test_a_layer_of_torch_is_attention_too() -> None:
    attention = nn.MultiheadAttention(N, 2, batch_first=True).double().eval()
    assert_prunes(lambda m, h: attention(h, h, h)[0], (), 3, KEPT)
    assert_prunes(lambda m, h: attention(h, h, h, need_weights=False)[0], (), 1, KEPT)


# -- backends that run on a GPU only: what they are called with on the kept tokens --------------

aten = torch.ops.aten
Call = Callable[[Host, Tensor], Tensor]


def thrice(op: Any, *args: Any, tokens_first: bool = False, **kwargs: Any) -> Call:
    """A branch that calls an attention op on queries, keys and values that are the same."""

    def branch(m: Host, h: Tensor) -> Tensor:
        x = h.unflatten(-1, (2, -1))
        x = x if tokens_first else x.transpose(1, 2)
        out = op(x, x, x, *args, **kwargs)[0]
        return (out if tokens_first else out.transpose(1, 2)).flatten(-2)

    return branch


@pytest.mark.parametrize(
    "branch",
    [
        thrice(aten._scaled_dot_product_flash_attention),
        thrice(aten._scaled_dot_product_efficient_attention, None, False),
        thrice(aten._scaled_dot_product_cudnn_attention, None, False),
        thrice(aten._scaled_dot_product_fused_attention_overrideable),
        thrice(aten._flash_attention_forward, None, None, N, N, 0, False, False, tokens_first=True),
        thrice(aten._efficient_attention_forward, *[None] * 3, N, N, 0, 0, tokens_first=True),
    ],
)
def test_backends_of_the_gpu(branch: Call) -> None:
    program = captured(host_of(branch), torch.randn(3, N, N, dtype=F64), [])
    found = found_in(program)
    assert found.refusal is None, str(found.refusal)
    assert found.kind == "attention"
    step = Step(KEPT, (1, 1), (2, N // 2), Chosen(indices(3, KEPT)))
    pruned = prune(program.graph_module, [found], step, lambda b: b.out.meta["val"])
    (call,) = [node for node in pruned.graph_module.graph.nodes if is_attention(node)]
    assert sorted(call.meta["val"][0].shape) == sorted((3, KEPT, 2, N // 2))
    assert N not in call.args
    assert attention_flops(call) == 4 * 3 * KEPT * KEPT * N


# -- what is refused ----------------------------------------------------------------------------


def flash_with(**options: Any) -> Call:
    names = ("dropout_p", "softmax_scale", "causal", "left", "right", "softcap", "alibi", "lse")
    usual = dict(zip(names, (0.0, 0.5, False, -1, -1, 0.0, None, False), strict=True))
    tail = (usual | options).values()
    return lambda m, h: thrice(torch.ops.flash_attn._flash_attn_forward, *tail, tokens_first=True)(
        m, h
    )


def packed_with(order: str = "bl", sequences: int = N, **options: Any) -> Call:
    def branch(m: Host, h: Tensor) -> Tensor:
        x = h if order == "bl" else h.transpose(0, 1)
        x = x.reshape(-1, 2, N // 2)
        bounds = torch.linspace(0, N * N, sequences + 1, dtype=torch.int32)
        out = torch.ops.flash_attn._flash_attn_varlen_forward(
            x, x, x, bounds, bounds, N, N, 0.0, 0.5, False, -1, -1, 0.0, None, False, **options
        )[0]
        return (out.view(N, N, N) if order == "bl" else out.view(N, N, N).transpose(0, 1)).clone()

    return branch


def cutlass_with(mask: Tensor | None, packed: bool, kind: int) -> Call:
    def branch(m: Host, h: Tensor) -> Tensor:
        x = h.view(1 if packed else N, -1, 2, N // 2)
        bounds = torch.arange(0, N * N + 1, N) if packed else None
        tail = (bounds, bounds, N, 0.0, False, kind, 0.5, None, None)
        op = torch.ops.xformers.efficient_attention_forward_cutlass
        return op(x, x, x, mask, *tail)[0].reshape(N, N, N)

    return branch


def with_odd_rows(m: Host, h: Tensor) -> Tensor:
    """Uses a log-sum-exp that the op pads."""
    x = h.unflatten(-1, (2, -1)).transpose(1, 2)
    out, rows, *_ = aten._scaled_dot_product_efficient_attention(x, x, x, None, True)
    return out.transpose(1, 2).flatten(-2) * rows[0, 0, 0]


def mask_from_tokens(m: Host, h: Tensor) -> Tensor:
    """A mask whose token axis nothing says, for its op has no rule."""
    mask = torch.cdist(h, h)
    return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)


PER_TOKEN = torch.ones(N, dtype=torch.int32)
REFUSED: list[tuple[Call, str, str]] = [
    (flash_with(causal=True), "FVX012", "with causal=True it depends on the order"),
    (flash_with(left=0), "FVX012", "with window_size_left=0 it depends on the order"),
    (flash_with(right=2), "FVX012", "with window_size_right=2 it depends on the order"),
    (flash_with(alibi=torch.ones(HEADS)), "FVX012", "`alibi_slopes` may depend on the order"),
    (flash_with(dropout_p=0.1), "FVX013", "dropout is active"),
    (packed_with(block_table=PER_TOKEN), "FVX012", "`block_table` may depend on the order"),
    (packed_with(seqused_k=PER_TOKEN), "FVX012", "`seqused_k` may depend on the order"),
    (packed_with("lb"), "FVX011", "its sequences are not the samples"),
    (packed_with(sequences=2 * N), "FVX011", "its sequences are not the samples"),
    (cutlass_with(None, False, 1), "FVX012", "with custom_mask_type=1 it depends on the order"),
    (cutlass_with(torch.ones(1, HEADS, N, N), True, 0), "FVX012", "its token axis is unknown"),
    (thrice(aten._scaled_dot_product_flash_attention_for_cpu, 0.0, True), "FVX012", "is_causal"),
    (thrice(aten._scaled_dot_product_flash_attention, 0.1), "FVX013", "dropout is active"),
    (with_odd_rows, "FVX010", "where the tokens are in this result of the op is unknown"),
    (mask_from_tokens, "FVX010", "no axis rule is registered"),
]


@pytest.mark.skipif(kernels.INSTALLED, reason="the library registers its ops itself")
@pytest.mark.parametrize(("branch", "code", "reason"), REFUSED)
def test_what_depends_on_order_or_place_is_refused(branch: Call, code: str, reason: str) -> None:
    found = found_in(captured(host_of(branch), torch.randn(N, N, N, dtype=F64), []))
    assert found.refusal is not None
    assert found.refusal.code == code, str(found.refusal)
    assert reason in found.refusal.reason, str(found.refusal)
    assert found.refusal.where.partition(".py:")[0].endswith("test_attention_forms")


def test_a_late_mask_over_keys_that_were_pruned_says_so() -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList([block_of(Form(cached=True))])
    fast = fastvar_fx.transform(net.eval(), Schedule(SCALES, (0.5, 0.5)), blocks="blocks")
    (block,) = fast.get_submodule("blocks").children()

    def step(length: int, columns: int) -> None:
        x, angles = torch.randn(2, length, C, dtype=F64), torch.randn(length, HEAD // 2)
        block(x, angles, torch.zeros(length, columns, dtype=F64))

    step(4, 4)
    step(9, 1)
    with pytest.raises(RuntimeError, match="must match") as caught:
        step(16, 29)
    (note,) = caught.value.__notes__
    assert "since step 1 the keys cached in blocks.0 are those of kept tokens" in note


def causal_blocks(m: Host, h: Tensor) -> Tensor:
    x = h.unsqueeze(1)
    return flex_attention(x, x, x, block_mask=CAUSAL)[:, 0]


def biased_scores(m: Host, h: Tensor) -> Tensor:
    x = h.unsqueeze(1)
    return flex_attention(x, x, x, score_mod=lambda score, b, head, i, j: score + i - j)[:, 0]


CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device="cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("branch", [causal_blocks, biased_scores])
def test_flex_attention_that_reads_positions_is_refused(branch: Call) -> None:
    with pytest.raises(RefusedError) as caught:
        captured(host_of(branch), torch.randn(2, N, N, dtype=F64), [])
    refusal = caught.value.refusal
    assert (refusal.code, refusal.op) == ("FVX012", "flex_attention")
    assert "score_mod or a block_mask" in refusal.reason
    assert "scaled_dot_product_attention the mask as a tensor" in refusal.hint
    assert refusal.where.partition(".py:")[0].endswith("test_attention_forms")


# -- how the residual add is written ------------------------------------------------------------

Residual = Callable[[Tensor, Tensor, Tensor], Tensor]
RESIDUALS: dict[str, Residual] = {
    "addcmul": torch.addcmul,
    "addcmul with a value": lambda x, gate, y: x.addcmul(y, gate, value=0.5),
    "addcmul_": lambda x, gate, y: x.clone().addcmul_(gate, y),
    "alpha": lambda x, gate, y: torch.add(x, y, alpha=0.5),
    "alpha in place": lambda x, gate, y: x.clone().add_(y * gate, alpha=2),
    "sub": lambda x, gate, y: torch.sub(x, y, alpha=2),
}


class Gated(Host):
    """A residual branch whose add is written in one of these ways."""

    def __init__(self, residual: Residual) -> None:
        super().__init__(lambda m, h: m.out(h.tanh()))
        self.gate = nn.Parameter(torch.randn(N))
        self.residual = residual

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        return self.residual(x, self.gate, self.branch(x))


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_residual_adds(residual: Residual) -> None:
    torch.manual_seed(0)
    host = Gated(residual).double().eval()
    x = torch.randn(3, N, N, dtype=F64)
    program = captured(host, x, [])
    branch = found_in(program)
    assert branch.refusal is None, str(branch.refusal)
    index = indices(3, KEPT)
    (got,) = run_pruned(host, program, branch, [x], index)
    kept = torch.zeros(3, N, 1, dtype=torch.bool).scatter(1, index.unsqueeze(-1), True)
    torch.testing.assert_close(got, host(x).where(kept, x), rtol=0, atol=1e-12)
