"""Infinity: the transformer, its token loop, and the pass on both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.errors import ArgumentError
from fastvar_fx.models import infinity
from fastvar_fx.models.cache import kv_caching
from fastvar_fx.models.infinity import CONFIGS, Infinity, build
from fastvar_fx.models.maps import TEMPLATES, template
from fastvar_fx.models.rope import pair_table
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


def small(**overrides: Any) -> Infinity:
    return build("tiny", **({"depth": 2, "width": 32, "text_width": 16} | overrides))


@pytest.fixture(scope="module")
def model() -> Infinity:
    return small()


def prompts(batch: int, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ names, sizes


@pytest.mark.parametrize(("name", "count"), [("2b", 2_204_564_032), ("8b", 8_375_791_824)])
def test_official_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        official = Infinity(CONFIGS[name])
    assert sum(p.numel() for p in official.parameters()) == count


def test_keys_and_shapes(model: Infinity) -> None:
    C, H, d, Ct = 32, 2, 8, 16
    norm: Shapes = {"weight": (C,), "bias": (C,)}
    block: Shapes = {"ada_gss": (1, 1, 6, C)} | {
        f"ca_norm.{key}": shape for key, shape in norm.items()
    }
    block |= {"sa.scale_mul_1H11": (1, H, 1, 1), "sa.mat_qkv.weight": (3 * C, C)}
    block |= {"ca.mat_q.weight": (C, C), "ca.mat_q.bias": (C,), "ca.mat_kv.weight": (2 * C, C)}
    block |= {f"sa.{key}": (C,) for key in ("q_bias", "v_bias", "zero_k_bias")}
    block |= {f"ca.{key}": (C,) for key in ("v_bias", "zero_k_bias")}
    block |= {f"{kind}.proj.weight": (C, C) for kind in ("sa", "ca")}
    block |= {f"{kind}.proj.bias": (C,) for kind in ("sa", "ca")}
    block |= {"ffn.fc1.weight": (4 * C, C), "ffn.fc1.bias": (4 * C,)}
    block |= {"ffn.fc2.weight": (C, 4 * C), "ffn.fc2.bias": (C,)}
    pool: Shapes = {
        "mat_q": (1, 1, C),
        "mat_kv.weight": (2 * C, Ct),
        "v_bias": (C,),
        "zero_k_bias": (C,),
    }
    pool |= {"proj.weight": (C, C), "proj.bias": (C,)}
    expected: Shapes = {
        f"blocks.{i}.{key}": shape for i in range(2) for key, shape in block.items()
    }
    expected |= {f"text_proj_for_sos.ca.{key}": shape for key, shape in pool.items()}
    expected |= {
        "cfg_uncond": (32, Ct),
        "pos_start": (1, 1, C),
        "text_norm.weight": (Ct,),
        "text_proj_for_ca.0.weight": (C, Ct),
        "text_proj_for_ca.0.bias": (C,),
        "text_proj_for_ca.2.weight": (C, C),
        "text_proj_for_ca.2.bias": (C,),
        "lvl_embed.weight": (15, C),
        "word_embed.weight": (C, d),
        "word_embed.bias": (C,),
        "shared_ada_lin.1.weight": (6 * C, C),
        "shared_ada_lin.1.bias": (6 * C,),
        "head_nm.ada_lin.1.weight": (2 * C, C),
        "head_nm.ada_lin.1.bias": (2 * C,),
        "head.weight": (2 * d, C),
        "head.bias": (2 * d,),
    }
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected


def test_a_checkpoint_in_chunks_loads() -> None:
    source, target = small(depth=4, seed=1), small(depth=4)
    chunked = {
        key.replace(f"blocks.{n}.", f"block_chunks.{n // 2}.module.{n % 2}."): tensor
        for key, tensor in source.state_dict().items()
        for n in [int(key.split(".")[1]) if key.startswith("blocks.") else -1]
    }
    assert "block_chunks.1.module.0.ada_gss" in chunked
    target.load_state_dict(chunked)
    assert all(map(torch.equal, target.state_dict().values(), source.state_dict().values()))


# ------------------------------------------------------------------------------------------- parts


def test_templates() -> None:
    assert len(TEMPLATES) == 15
    for h_div_w, maps in TEMPLATES.items():
        h, w = maps[-1]
        assert abs(h / w - h_div_w) < 0.01
        assert len(maps) == 13
        assert sorted(maps, key=math.prod) == list(maps)
    assert template(3.0, "0.25M")[-1] == (54, 18)
    assert template(0.333, "0.06M")[-1] == (9, 27)


def test_rotary_table_follows_its_formula() -> None:
    table = pair_table((3, 5), (16, 7), 8, torch.device("cpu"))
    for token in range(15):
        row, column = round(token // 5 * 16 / 3), round(token % 5 * 7 / 5)
        angles = [row, row / 100, column, column / 100]
        torch.testing.assert_close(table[0, token], torch.tensor(angles).cos())
        torch.testing.assert_close(table[1, token], torch.tensor(angles).sin())


def test_block_follows_its_formula(model: Infinity) -> None:
    block = model.blocks[0]
    weights = dict(block.named_parameters())
    weights["sa.scale_mul_1H11"][0, 0] = 9.0  # far above the limit, log 100
    generator = torch.Generator().manual_seed(0)
    ada = torch.randn(2, 1, 6, 32, generator=generator)
    text = torch.randn(2, 4, 32, generator=generator)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])[:, None, None]
    six = [(weights["ada_gss"] + ada)[:, :, i] for i in range(6)]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def centred(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x: Tensor, rope: Tensor) -> Tensor:
        spun = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.complex(*rope)
        return torch.view_as_real(spun).flatten(-2)

    def self_attention(x: Tensor, rope: Tensor, cache: list[Any]) -> Tensor:
        q, k, v = (x @ weights["sa.mat_qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + weights["sa.q_bias"], v + weights["sa.v_bias"]
        cache.append([])
        heads = []
        for i, part in enumerate((slice(0, 16), slice(16, 32))):
            unit_q, unit_k = (t[..., part] / t[..., part].norm(dim=-1)[..., None] for t in (q, k))
            cache[-1].append((turned(unit_k, rope), v[..., part]))
            keys = torch.cat([step[i][0] for step in cache], dim=1)
            values = torch.cat([step[i][1] for step in cache], dim=1)
            scale = weights["sa.scale_mul_1H11"][0, i, 0, 0].exp().clamp(max=100)
            heads.append((scale * turned(unit_q, rope) @ keys.mT).softmax(-1) @ values)
        return linear("sa.proj", torch.cat(heads, dim=-1))

    def cross_attention(x: Tensor) -> Tensor:
        q = linear("ca.mat_q", x)
        k, v = (text @ weights["ca.mat_kv.weight"].T).chunk(2, dim=-1)
        v = v + weights["ca.v_bias"]
        heads = []
        for part in (slice(0, 16), slice(16, 32)):
            scores = (q[..., part] @ k[..., part].mT / 4).masked_fill(~mask[:, 0], -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        return linear("ca.proj", torch.cat(heads, dim=-1))

    cache: list[Any] = []
    with kv_caching(block):
        for scale in ((1, 2), (3, 2)):
            x = torch.randn(2, math.prod(scale), 32, generator=generator)
            rope = pair_table(scale, (6, 6), 16, x.device)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = six
            h = centred(x) * (1 + scale1) + shift1
            want = x + gamma1 * self_attention(h, rope, cache)
            want = want + cross_attention(
                centred(want) * weights["ca_norm.weight"] + weights["ca_norm.bias"]
            )
            h = linear("ffn.fc1", centred(want) * (1 + scale2) + shift2)
            want = want + gamma2 * linear("ffn.fc2", F.gelu(h, approximate="tanh"))
            got = block(x, ada, text, mask, rope)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


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
def test_latents_have_the_size_of_the_last_map(model: Infinity, h_div_w: float) -> None:
    scales = template(h_div_w, "0.06M")
    latent = model.autoregressive_infer_cfg(prompts(2), scales, g_seed=0)
    assert latent.shape == (2, 8, *scales[-1])
    assert torch.equal(latent, model.autoregressive_infer_cfg(prompts(2), scales, g_seed=0))
    assert not torch.equal(latent[0], latent[1])


def test_patches_draw_several_latent_pixels_per_token() -> None:
    model = small(bits=3, patch=2)
    latent = model.autoregressive_infer_cfg(prompts(1), SCALES, g_seed=0)
    assert latent.shape == (1, 3, 20, 16)


def test_latent_is_the_sum_of_resized_codes(
    model: Infinity, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = fixed_draws(2)
    monkeypatch.setattr(infinity, "sample_top_k_top_p", draw)
    want = torch.zeros(1, 8, 10, 8)
    for step, (h, w) in enumerate(SCALES, start=1):
        bits = draw(torch.empty(1, h * w * 8, 2)).reshape(h, w, 8)
        code = (bits * 2.0 - 1) / math.sqrt(8)
        want += F.interpolate(code.permute(2, 0, 1)[None], size=(10, 8), mode="bilinear")
        latent = model.autoregressive_infer_cfg(prompts(1), SCALES, trunk_scale=step)
        torch.testing.assert_close(latent, want)


def test_guidance(model: Infinity, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step mixes cfg * with + (1 - cfg) * without the prompt; if all are 1, only with is run."""
    text, negative = prompts(2), prompts(2, 4, seed=1)

    def logits(text: Tensor, negative: Tensor | None = None, **more: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        monkeypatch.setattr(infinity, "sample_top_k_top_p", fixed_draws(2, seen))
        model.autoregressive_infer_cfg(text, SCALES, negative=negative, tau=1, **more)
        return seen

    strengths = [4.0, 3.0, 2.0, 1.0, 0.5]
    runs = logits(text, cfg=1), logits(negative, cfg=1), logits(text, negative, cfg=strengths)
    for strength, with_text, without, mixed in zip(strengths, *runs, strict=True):
        want = strength * with_text + (1 - strength) * without
        torch.testing.assert_close(mixed, want, atol=1e-4, rtol=1e-4)
    null = model.cfg_uncond[:6].expand(2, -1, -1)
    assert all(map(torch.equal, logits(text, cfg=2), logits(text, null, cfg=2)))
    _, seen = streams(model, lambda m: m.autoregressive_infer_cfg(text, SCALES, cfg=1))
    assert [stream.shape[0] for stream in seen] == [2] * 5


def test_padding_changes_nothing() -> None:
    model = small().double()
    text, short = prompts(2).double(), prompts(2, 3, seed=1).double()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    other = torch.where(mask[..., None], text, torch.full_like(text, 7.0))
    run: dict[str, Any] = {"g_seed": 0, "negative": short}
    a, dense = streams(
        model, lambda m: m.autoregressive_infer_cfg(text, SCALES, text_mask=mask, **run)
    )
    _, padded = streams(
        model, lambda m: m.autoregressive_infer_cfg(other, SCALES, text_mask=mask, **run)
    )
    assert_same_streams(padded, dense, 1e-9)
    alone, _ = streams(
        model,
        lambda m: m.autoregressive_infer_cfg(
            text[1:, :4], SCALES, g_seed=0, negative=short[1:], top_k=1
        ),
    )
    together = model.autoregressive_infer_cfg(text, SCALES, text_mask=mask, top_k=1, **run)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(
        a, model.autoregressive_infer_cfg(text, SCALES, text_mask=mask, g_seed=0)
    )


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda m: template(1.1), "no template of h / w = 1.1 at '1M', .*; take"),
        (lambda m: template(1.0, "2M"), "at '2M'"),
        (lambda m: m.autoregressive_infer_cfg(prompts(1), ()), "not a list of two or more"),
        (lambda m: m.autoregressive_infer_cfg(prompts(1), (1, 2)), "not a list of two or more"),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1), ((2, 2), (4, 4))),
            "whose first map is not",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1), ((1, 1),) * 16),
            "16 maps, but the model has embeddings for 15 steps",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1, 33), SCALES),
            "a prompt has 1 to 32 tokens; found 33. Truncate .* text_length=33",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1)[..., :8], SCALES),
            r"reads text features \(B, T, 16\), .*; found shape \(1, 6, 8\)",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(2), SCALES, negative=prompts(3)),
            r"reads text features \(2, T, 16\), .*; found shape \(3, 6, 16\)",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1), SCALES, text_mask=torch.ones(1, 6)),
            r"is bool \(1, 6\), .*; found torch.float32 \(1, 6\)",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(
                prompts(2), SCALES, text_mask=torch.tensor([[True] * 6, [False] * 6])
            ),
            r"at least one token; found \[6, 0\] tokens",
        ),
        (
            lambda m: m.autoregressive_infer_cfg(prompts(1), SCALES, cfg=[3.0] * 4),
            "cfg is one number .* per scale, 5 here; found 4",
        ),
        (lambda m: build("3b"), "no model is named '3b'; did you mean"),
        (lambda m: build("tiny", heads=32), "a head is a multiple of 4; found 2"),
        (
            lambda m: build("tiny", text_width=8192, width=32),
            "found width=32, heads=64",
        ),
    ],
)
def test_bad_input(model: Infinity, run: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        run(model)


# ---------------------------------------------------------------------------------------- the pass


class BlockByHand(nn.Module):
    """A block with FastVAR edited in."""

    def __init__(self, block: Any, pruner: Pruner) -> None:
        super().__init__()
        self.block, self.pruner = block, pruner

    def forward(self, x: Tensor, ada: Tensor, text: Tensor, mask: Tensor, rope: Tensor) -> Tensor:
        block, run = self.block, self.pruner.run
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (block.ada_gss + ada).unbind(2)

        def attend(t: Tensor, index: Tensor) -> Tensor:
            table = rope[:, index].unsqueeze(2)  # (2, B, 1, n, c / 2)
            out: Tensor = block.sa(block.ln_wo_grad(t) * (1 + scale1) + shift1, table) * gamma1
            return out

        def read(t: Tensor, index: Tensor) -> Tensor:
            out: Tensor = block.ca(block.ca_norm(t.to(block.ca_norm.weight.dtype)), text, mask)
            return out

        def feed(t: Tensor, index: Tensor) -> Tensor:
            h = block.ln_wo_grad(t) * (1 + scale2) + shift2
            out: Tensor = block.ffn(h.to(block.ffn.fc1.weight.dtype)) * gamma2
            return out

        x = x + run("sa", x, attend)
        x = x + run("ca", x, read)
        return x + run("ffn", x, feed)


@pytest.mark.parametrize(
    ("scales", "batch", "seed"),
    [(template(0.5, "0.06M"), 1, 0), (template(3.0, "0.06M"), 3, 1)],
    ids=["wide, batch 1", "tall, batch 3"],
)
def test_equals_the_method_written_by_hand(scales: Any, batch: int, seed: int) -> None:
    model, schedule = small(seed=seed).double(), Schedule(scales, RATIOS)
    text, negative = prompts(batch, seed=seed).double(), prompts(batch, 4, seed=9).double()
    finest = template(0.5)[-1]

    def run(m: Infinity) -> Tensor:
        return m.autoregressive_infer_cfg(
            text, scales, negative=negative, g_seed=seed, finest=finest
        )

    latent, want = streams(pruned_by_hand(model, schedule, BlockByHand), run)
    fast = fastvar_fx.transform(model, schedule)
    got_latent, got = streams(fast, run)
    assert_same_streams(got, want, 1e-9)
    torch.testing.assert_close(got_latent, latent, rtol=0, atol=1e-9)
    assert not torch.allclose(got[-1], streams(model, run)[1][-1], atol=1e-3)
    report = fastvar_fx.explain(fast)
    assert not report.refusals
    pruned = {(row.step, row.layer, row.kind) for row in report.rows if row.kept < row.tokens}
    kinds = ("attention", "cross_attention", "ffn")
    assert pruned == {
        (step, layer, kind)
        for step in schedule.pruned_steps
        for layer in range(2)
        for kind in kinds
    }


def numbered_templates() -> Iterator[Any]:
    """Every third one of them is for each run."""
    for place, h_div_w in enumerate(TEMPLATES):
        yield pytest.param(place, h_div_w, marks=[pytest.mark.slow] if place % 3 else [])


@pytest.mark.parametrize(("place", "h_div_w"), list(numbered_templates()))
def test_every_template_prunes_and_frees_its_features(place: int, h_div_w: float) -> None:
    scales, batch = template(h_div_w, "0.06M"), 1 + place % 4
    model, schedule = small(depth=1).double(), Schedule(scales, RATIOS)
    fast = fastvar_fx.transform(model, schedule)
    latent, want = (
        m.autoregressive_infer_cfg(prompts(batch).double(), scales, g_seed=place)
        for m in (fast, pruned_by_hand(model, schedule, BlockByHand))
    )
    torch.testing.assert_close(latent, want, rtol=0, atol=1e-9)
    report = fastvar_fx.explain(fast)
    assert not report.refusals
    cached = 3 * 2 * batch * schedule.tokens(schedule.cache_step) * 32 * 8  # branches, guidance
    assert (report.captured_bytes, report.peak_captured_bytes) == (0, cached)


def test_ratio_zero_is_bit_identical(model: Infinity) -> None:
    fast = fastvar_fx.transform(model, Schedule(SCALES, (0.0, 0.0)))
    got, want = (m.autoregressive_infer_cfg(prompts(2), SCALES, g_seed=0) for m in (fast, model))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["bf16 weights", "autocast"])
def test_half_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draws fixed, half precision differs from float32 by rounding alone."""
    monkeypatch.setattr(infinity, "sample_top_k_top_p", fixed_draws(2))
    schedule = Schedule(SCALES, RATIOS)

    def run(m: Infinity) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return m.autoregressive_infer_cfg(prompts(2), SCALES)

    half = small().bfloat16() if kind == "bf16 weights" else small()
    for want_of, got_of in (
        (small(), half),
        (
            pruned_by_hand(half, schedule, BlockByHand),
            fastvar_fx.transform(half, schedule),
        ),
    ):
        _, want = streams(want_of, run)
        latent, got = streams(got_of, run)
        assert {stream.dtype for stream in got} <= {torch.float32, half.head.weight.dtype}
        assert latent.dtype == torch.float32
        assert difference(got, want) < 0.1


@pytest.mark.slow
def test_prompts_in_a_row(model: Infinity) -> None:
    schedule = Schedule(SCALES, RATIOS[:1])
    fast = fastvar_fx.transform(model, schedule)
    for seed in (0, 1):
        fresh = fastvar_fx.transform(model, schedule)
        text = prompts(1, seed=seed)
        got, want = (m.autoregressive_infer_cfg(text, SCALES, g_seed=0) for m in (fast, fresh))
        assert torch.equal(got, want)
