"""HART: the transformer, its token loop, and the pass on both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.errors import ArgumentError
from fastvar_fx.models import hart
from fastvar_fx.models.cache import kv_caching
from fastvar_fx.models.hart import CONFIGS, HART, HART_1024, build
from fastvar_fx.models.maps import template
from fastvar_fx.models.rope import half_table, text_table
from tests.by_hand import (
    Pruner,
    Shapes,
    assert_same_streams,
    difference,
    fixed_draws,
    pruned_by_hand,
    streams,
)

SCALES = ((1, 1), (2, 2), (4, 3), (7, 5), (10, 8))
RATIOS = (0.4, 0.6)


def small(**overrides: Any) -> HART:
    return build("tiny", **({"depth": 2, "width": 32, "text_width": 16} | overrides))


@pytest.fixture(scope="module")
def model() -> HART:
    return small()


def prompts(batch: int, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ names, sizes


def test_official_size() -> None:
    with torch.device("meta"):
        official = HART(CONFIGS["0.7b"])
    blocks = sum(p.numel() for p in official.blocks.parameters())
    assert blocks == 24 * (4 * 1536**2 + 3 * 1536 * 4096 + 4 * 1536)
    assert len(HART_1024) == 14


def test_keys_and_shapes(model: HART) -> None:
    C, Ct, V, Cvae, hidden = 32, 16, 256, 8, 256
    block: Shapes = {"attn.qkv_proj.weight": (3 * C, C), "attn.proj.weight": (C, C)}
    block |= {f"attn.{key}": (C,) for key in ("q_bias", "v_bias", "zero_k_bias", "proj.bias")}
    block |= {"ffn.gate_proj.weight": (hidden, C), "ffn.up_proj.weight": (hidden, C)}
    block |= {"ffn.down_proj.weight": (C, hidden), "ln_wo_grad.weight": (C,)}
    expected: Shapes = {
        f"blocks.{i}.{key}": shape for i in range(2) for key, shape in block.items()
    }
    expected |= {
        "context_norm.weight": (Ct,),
        "context_embed.weight": (C, Ct),
        "context_embed.bias": (C,),
        "word_embed.weight": (C, Cvae),
        "word_embed.bias": (C,),
        "lvl_embed.mlp.0.weight": (C, 256),
        "lvl_embed.mlp.0.bias": (C,),
        "lvl_embed.mlp.2.weight": (C, C),
        "lvl_embed.mlp.2.bias": (C,),
        "head_nm.ln_wo_grad.weight": (C,),
        "head_nm.ada_lin.1.weight": (2 * C, C),
        "head_nm.ada_lin.1.bias": (2 * C,),
        "head.weight": (V, C),
        "head.bias": (V,),
        "quantizer.embedding.weight": (V, Cvae),
    }
    for i in range(4):
        expected[f"quantizer.quant_resi.qresi_ls.{i}.weight"] = (Cvae, Cvae, 3, 3)
        expected[f"quantizer.quant_resi.qresi_ls.{i}.bias"] = (Cvae,)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected


# ------------------------------------------------------------------------------------------- parts


def test_rotary_tables_follow_their_formulas() -> None:
    table = half_table((3, 5), (16, 7), 8, torch.tensor([0, 4]))[:, :, 0]
    for offset, of_sample in zip((0, 4), table.unbind(1), strict=True):
        for token in range(15):
            row, column = token // 5 * 16 / 3 + offset, token % 5 * 7 / 5 + offset
            angles = torch.tensor([row, row / 100] * 2 + [column, column / 100] * 2)
            torch.testing.assert_close(of_sample[0, token], angles.cos())
            torch.testing.assert_close(of_sample[1, token], angles.sin())
    table = text_table(torch.tensor([[0, 3]]), 4)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.03]]).repeat(1, 2)
    torch.testing.assert_close(table[:, 0, 0], torch.stack((angles.cos(), angles.sin())))


def test_block_follows_its_formula(model: HART) -> None:
    block = model.blocks[0]
    weights = dict(block.named_parameters())
    weights["ln_wo_grad.weight"][0] = 3.0
    generator = torch.Generator().manual_seed(0)

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["ln_wo_grad.weight"]

    def turned(x: Tensor, table: Tensor) -> Tensor:
        (cos, sin), (a, b) = table[:, :, 0], (x[..., :8], x[..., 8:])
        first = a * cos[..., :8] - b * sin[..., :8]
        return torch.cat((first, b * cos[..., 8:] + a * sin[..., 8:]), dim=-1)

    def attention(x: Tensor, table: Tensor, cache: list[Any]) -> Tensor:
        q, k, v = (x @ weights["attn.qkv_proj.weight"].T).chunk(3, dim=-1)
        q, v = q + weights["attn.q_bias"], v + weights["attn.v_bias"]
        cache.append([])
        heads = []
        for i, part in enumerate((slice(0, 16), slice(16, 32))):
            cache[-1].append((turned(k[..., part], table), v[..., part]))
            keys = torch.cat([step[i][0] for step in cache], dim=1)
            values = torch.cat([step[i][1] for step in cache], dim=1)
            scores = turned(q[..., part], table) @ keys.mT / 16
            heads.append(scores.softmax(-1) @ values)
        return torch.cat(heads, dim=-1) @ weights["attn.proj.weight"].T + weights["attn.proj.bias"]

    cache: list[Any] = []
    with kv_caching(block):
        for scale in ((1, 2), (3, 2)):
            x = torch.randn(2, math.prod(scale), 32, generator=generator)
            table = half_table(scale, (6, 6), 16, torch.tensor([0, 4]))
            want = x + attention(normed(x), table, cache)
            h = normed(want)
            gate, up = (h @ weights[f"ffn.{kind}_proj.weight"].T for kind in ("gate", "up"))
            want = want + (F.silu(gate) * up) @ weights["ffn.down_proj.weight"].T
            torch.testing.assert_close(block(x, table), want, atol=1e-4, rtol=1e-4)


def test_random_weights_keep_branches_alive() -> None:
    model = small(depth=6)
    ratios: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, args, out: ratios.append(float((out - args[0]).std() / args[0].std()))
        )
    model.autoregressive_infer_cfg(prompts(1), SCALES, g_seed=0)
    assert min(ratios) > 0.1
    assert max(ratios) < 3


# -------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize("h_div_w", [0.5, 1.0, 3.0])
def test_maps_have_the_size_of_the_last_one(model: HART, h_div_w: float) -> None:
    scales = template(h_div_w, "0.06M")
    text = prompts(2, 30)
    f_hat, seen = streams(model, lambda m: m.autoregressive_infer_cfg(text, scales, g_seed=0))
    assert f_hat.shape == (2, 8, *scales[-1])
    assert [stream.shape[1] for stream in seen] == [1, *(h * w for h, w in scales[1:])]
    assert torch.equal(f_hat, model.autoregressive_infer_cfg(text, scales, g_seed=0))
    assert not torch.equal(f_hat[0], f_hat[1])


def test_maps_add_up(model: HART, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = fixed_draws(256)
    monkeypatch.setattr(hart, "sample_top_k_top_p", draw)
    want, last = torch.zeros(1, 8, 10, 8), len(SCALES) - 1
    inputs = []
    hook = model.word_embed.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    f_hat = model.autoregressive_infer_cfg(prompts(1), SCALES)
    hook.remove()
    for step, (h, w) in enumerate(SCALES):
        codes = model.quantizer.embedding(draw(torch.empty(1, h * w, 2))).mT.reshape(1, 8, h, w)
        if step < last:
            large = F.interpolate(codes, size=(10, 8), mode="bicubic")
            want = want + model.quantizer.quant_resi(large, step / last)
            area = F.interpolate(want, size=SCALES[step + 1], mode="area").flatten(2).mT
            torch.testing.assert_close(inputs[step], area)
        else:
            want = want + codes
    torch.testing.assert_close(f_hat, want)


def test_guidance(model: HART, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step s mixes (1 + t) * with - t * without the text, t = cfg * s / (K - 1), at most K - 2."""
    text, negative = prompts(2), prompts(2, seed=1)
    place = torch.zeros(2, 6)

    def logits(text: Tensor, negative: Tensor | None, cfg: float) -> list[Tensor]:
        seen: list[Tensor] = []
        monkeypatch.setattr(hart, "sample_top_k_top_p", fixed_draws(256, seen))
        model.autoregressive_infer_cfg(text, SCALES, negative=negative, positions=place, cfg=cfg)
        return seen

    runs = logits(text, negative, 0), logits(negative, text, 0), logits(text, negative, 2.0)
    shares = (0, 1 / 4, 2 / 4, 3 / 4, 3 / 4)
    for share, with_text, without, mixed in zip(shares, *runs, strict=True):
        want = (1 + 2 * share) * with_text - 2 * share * without
        torch.testing.assert_close(mixed, want, atol=1e-4, rtol=1e-4)
    zeros = logits(text, torch.zeros_like(text), 2.0)
    assert all(map(torch.equal, logits(text, None, 2.0), zeros))


def test_positions_of_the_text_matter(model: HART) -> None:
    text, counted = prompts(1), torch.arange(6).expand(1, 6)

    def first_step(positions: Tensor | None) -> list[Tensor]:
        return streams(
            model, lambda m: m.autoregressive_infer_cfg(text, SCALES, positions=positions)
        )[1][:1]

    assert torch.equal(first_step(None)[0], first_step(counted)[0])
    later = counted + torch.tensor([0, 0, 0, 0, 0, 9])
    assert difference(first_step(later), first_step(None)) > 1e-3


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda m: m.autoregressive_infer_cfg(prompts(1), (1, 2)), "not a list of two or more"),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1), ((2, 2), (4, 4))),
            "whose first map is not",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1, 31), SCALES),
            "a prompt has 1 to 30 tokens; found 31. Truncate .* text_length=31",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1)[..., :8], SCALES),
            r"reads text features \(B, T, 16\), .*; found shape \(1, 6, 8\)",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(2), SCALES, negative=prompts(2, 5)),
            r"negative \(2, 5, 16\), positions \(2, 6\) and text \(2, 6, 16\). Pad",
        ),
        (lambda m: build("07b"), "no model is named '07b'; did you mean"),
        (lambda m: build("tiny", heads=32), "a head is a multiple of 4; found 2"),
    ],
)
def test_bad_input(model: HART, run: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        run(model)


# ---------------------------------------------------------------------------------------- the pass


class BlockByHand(nn.Module):
    """A block with FastVAR edited in."""

    def __init__(self, block: Any, pruner: Pruner) -> None:
        super().__init__()
        self.block, self.pruner = block, pruner

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        block, run = self.block, self.pruner.run

        def attend(t: Tensor, index: Tensor) -> Tensor:
            table = rope.take_along_dim(index[None, :, None, :, None], dim=3)
            out: Tensor = block.attn(block.ln_wo_grad(t), table)
            return out

        def feed(t: Tensor, index: Tensor) -> Tensor:
            out: Tensor = block.ffn(block.ln_wo_grad(t))
            return out

        x = x + run("attn", x, attend)
        return x + run("ffn", x, feed)


@pytest.mark.parametrize(
    ("scales", "batch", "seed"),
    [(template(0.5, "0.06M"), 1, 0), (template(3.0, "0.06M"), 3, 1)],
    ids=["wide, batch 1", "tall, batch 3"],
)
def test_equals_the_method_written_by_hand(scales: Any, batch: int, seed: int) -> None:
    model, schedule = small(seed=seed).double(), Schedule(scales, RATIOS)
    text, negative = prompts(batch, 30, seed=seed).double(), prompts(batch, 30, seed=9).double()

    def run(m: HART) -> Tensor:
        return m.autoregressive_infer_cfg(text, scales, negative=negative, g_seed=seed)

    f_hat, want = streams(pruned_by_hand(model, schedule, BlockByHand), run)
    fast = fastvar_fx.transform(model, schedule)
    got_f_hat, got = streams(fast, run)
    assert_same_streams(got, want, 1e-9)
    torch.testing.assert_close(got_f_hat, f_hat, rtol=0, atol=1e-9)
    assert not torch.allclose(got[-1], streams(model, run)[1][-1], atol=1e-3)
    report = fastvar_fx.explain(fast)
    assert not report.refusals
    pruned = {(row.step, row.layer, row.kind) for row in report.rows if row.kept < row.tokens}
    assert pruned == {
        (step, layer, kind)
        for step in schedule.pruned_steps
        for layer in range(2)
        for kind in ("attention", "ffn")
    }


def test_ratio_zero_is_bit_identical(model: HART) -> None:
    fast = fastvar_fx.transform(model, Schedule(SCALES, (0.0, 0.0)))
    got, want = (m.autoregressive_infer_cfg(prompts(2), SCALES, g_seed=0) for m in (fast, model))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["bf16 weights", "autocast"])
def test_half_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draws fixed, half precision differs from float32 by rounding alone."""
    monkeypatch.setattr(hart, "sample_top_k_top_p", fixed_draws(256))
    schedule = Schedule(SCALES, RATIOS)

    def run(m: HART) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return m.autoregressive_infer_cfg(prompts(2), SCALES)

    half = small().bfloat16() if kind == "bf16 weights" else small()
    for want_of, got_of in (
        (small(), half),
        (pruned_by_hand(half, schedule, BlockByHand), fastvar_fx.transform(half, schedule)),
    ):
        _, want = streams(want_of, run)
        f_hat, got = streams(got_of, run)
        assert f_hat.dtype == torch.float32
        assert difference(got, want) < 0.1


def test_prompts_in_a_row(model: HART) -> None:
    schedule = Schedule(SCALES, RATIOS[:1])
    fast = fastvar_fx.transform(model, schedule)
    for seed in (0, 1):
        fresh = fastvar_fx.transform(model, schedule)
        text = prompts(1, seed=seed)
        got, want = (m.autoregressive_infer_cfg(text, SCALES, g_seed=0) for m in (fast, fresh))
        assert torch.equal(got, want)
