"""Flash-attention in self-attention, and in cross-attention to texts of different lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from tests import kernels

SCALES = ((2, 2), (3, 3), (4, 4))
WIDTH, HEADS, TEXT = 8, 2, (3, 5)

if kernels.INSTALLED:
    pytest.skip("the real ops are registered", allow_module_level=True)


class Block(nn.Module):
    """Self-attention and cross-attention to texts of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor, starts: Tensor, causal: bool) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, HEADS, -1).unbind(2)
        x = x + self.attend(q, k, v, causal).reshape(B, L, WIDTH)
        q = self.q(x).view(B * L, HEADS, -1)
        k, v = self.kv(text).view(len(text), 2, HEADS, -1).unbind(1)
        return x + self.cross(q, k, v, starts, L).reshape(B, L, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out: Tensor = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 0.5, causal, -1, -1, 0.0, None, False
        )[0]
        return out

    def cross(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, L: int) -> Tensor:
        queries = torch.arange(0, (len(TEXT) + 1) * L, L, dtype=torch.int32)
        out: Tensor = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, queries, starts, L, max(TEXT), 0.0, 0.5, False, -1, -1, 0.0, None, False
        )[0]
        return out


class Plain(Block):
    """The same in plain attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)

    def cross(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, L: int) -> Tensor:
        padded = k.new_zeros(2, 2, max(TEXT), HEADS, WIDTH // HEADS)
        mask = torch.zeros(2, 1, 1, max(TEXT), dtype=torch.bool)
        for sample, length in enumerate(TEXT):
            first = sum(TEXT[:sample])
            padded[0, sample, :length] = k[first : first + length]
            padded[1, sample, :length] = v[first : first + length]
            mask[sample, ..., :length] = True
        keys, values = padded.transpose(2, 3)
        q = q.view(2, L, HEADS, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=0.5)
        return out.transpose(1, 2)


def outputs_of(kind: type[Block], causal: bool = False) -> tuple[list[Tensor], fastvar_fx.Report]:
    torch.manual_seed(0)
    net = nn.Module()
    net.blocks = nn.ModuleList(kind() for _ in range(2))
    fast = fastvar_fx.transform(net.double().eval(), Schedule(SCALES, (0.5,)), strict=False)
    text = torch.randn(sum(TEXT), WIDTH, dtype=torch.float64)
    starts = torch.tensor([0, TEXT[0], sum(TEXT)], dtype=torch.int32)
    outputs = []
    for h, w in SCALES:
        x = torch.randn(2, h * w, WIDTH, dtype=torch.float64)
        for block in fast.get_submodule("blocks").children():
            x = block(x, text, starts, causal)
        outputs.append(x)
    return outputs, fastvar_fx.explain(fast)


def test_flash_attention_equals_plain_attention() -> None:
    got, report = outputs_of(Block)
    want, _ = outputs_of(Plain)
    assert not report.refusals
    assert {row.kind for row in report.rows} == {"attention", "cross_attention"}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_causal_flash_attention_is_refused() -> None:
    _, report = outputs_of(Block, causal=True)
    codes = {(row.kind, row.refusal.code) for row in report.refusals if row.refusal is not None}
    assert codes == {("attention", "FVX012")}
