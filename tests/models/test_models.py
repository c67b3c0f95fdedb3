"""The VAR model and the decoder side of its VQ-VAE."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.errors import ArgumentError, ModelError
from fastvar_fx.models import (
    CONFIGS,
    VAR,
    VAR_256,
    VAR_512,
    VARConfig,
    VQVAEDecoder,
    build,
    checkpoints,
    load,
)
from fastvar_fx.models.sampling import sample_top_k_top_p
from fastvar_fx.models.var import SelfAttention
from fastvar_fx.models.vqvae import PhiBank, SpatialAttention

SCALES = (1, 2, 3, 4)
SMALL: dict[str, Any] = {
    "depth": 2,
    "width": 64,
    "heads": 2,
    "num_classes": 10,
    "vocab_size": 48,
    "z_channels": 8,
}

Shapes = dict[str, tuple[int, ...]]


def small(**overrides: Any) -> VAR:
    return build("tiny", **({"scales": SCALES} | SMALL | overrides))


@pytest.fixture(scope="module")
def var() -> VAR:
    return small()


def shapes(state: dict[str, Tensor]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def caches(model: VAR) -> list[tuple[bool, Tensor | None, Tensor | None]]:
    return [
        (module.caching, module.cached_k, module.cached_v)
        for module in model.modules()
        if isinstance(module, SelfAttention)
    ]


# ------------------------------------------------------------------------------------------- names


def expected_var_shapes(*, shared_aln: bool, attn_l2_norm: bool) -> Shapes:
    """The published checkpoints' keys, for the sizes in SMALL and SCALES."""
    C, H, V, Cvae, L, K, classes = 64, 2, 48, 8, 1 + 4 + 9 + 16, 4, 10
    expected: Shapes = {
        "pos_start": (1, 1, C),
        "pos_1LC": (1, L, C),
        "lvl_1L": (1, L),
        "attn_bias_for_masking": (1, 1, L, L),
        "word_embed.weight": (C, Cvae),
        "word_embed.bias": (C,),
        "class_emb.weight": (classes + 1, C),
        "lvl_embed.weight": (K, C),
    }
    if shared_aln:
        expected |= {"shared_ada_lin.1.weight": (6 * C, C), "shared_ada_lin.1.bias": (6 * C,)}
    for i in range(2):
        block: Shapes = {"ada_gss": (1, 1, 6, C)} if shared_aln else {}
        if attn_l2_norm:
            block["attn.scale_mul_1H11"] = (1, H, 1, 1)
        block |= {
            "attn.q_bias": (C,),
            "attn.v_bias": (C,),
            "attn.zero_k_bias": (C,),
            "attn.mat_qkv.weight": (3 * C, C),
            "attn.proj.weight": (C, C),
            "attn.proj.bias": (C,),
            "ffn.fc1.weight": (4 * C, C),
            "ffn.fc1.bias": (4 * C,),
            "ffn.fc2.weight": (C, 4 * C),
            "ffn.fc2.bias": (C,),
        }
        if not shared_aln:
            block |= {"ada_lin.1.weight": (6 * C, C), "ada_lin.1.bias": (6 * C,)}
        expected |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return expected | {
        "head_nm.ada_lin.1.weight": (2 * C, C),
        "head_nm.ada_lin.1.bias": (2 * C,),
        "head.weight": (V, C),
        "head.bias": (V,),
    }


def conv(name: str, c_in: int, c_out: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, kernel, kernel), f"{name}.bias": (c_out,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def res_block(name: str, c_in: int, c_out: int) -> Shapes:
    expected = norm(f"{name}.norm1", c_in) | conv(f"{name}.conv1", c_in, c_out, 3)
    expected |= norm(f"{name}.norm2", c_out) | conv(f"{name}.conv2", c_out, c_out, 3)
    return expected | (conv(f"{name}.nin_shortcut", c_in, c_out, 1) if c_in != c_out else {})


def attention(name: str, channels: int) -> Shapes:
    expected = norm(f"{name}.norm", channels) | conv(f"{name}.qkv", channels, 3 * channels, 1)
    return expected | conv(f"{name}.proj_out", channels, channels, 1)


def expected_vae_shapes(V: int, Cvae: int, ch: int) -> Shapes:
    expected: Shapes = {"quantize.embedding.weight": (V, Cvae)}
    for i in range(4):
        expected |= conv(f"quantize.quant_resi.qresi_ls.{i}", Cvae, Cvae, 3)
    expected |= conv("post_quant_conv", Cvae, Cvae, 3) | conv("decoder.conv_in", Cvae, 4 * ch, 3)
    expected |= res_block("decoder.mid.block_1", 4 * ch, 4 * ch)
    expected |= attention("decoder.mid.attn_1", 4 * ch)
    expected |= res_block("decoder.mid.block_2", 4 * ch, 4 * ch)
    for i, (c_in, c_out) in enumerate([(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]):
        for j in range(3):
            first = c_in if j == 0 else c_out
            expected |= res_block(f"decoder.up.{i}.block.{j}", first * ch, c_out * ch)
            if i == 4:
                expected |= attention(f"decoder.up.{i}.attn.{j}", c_out * ch)
        if i > 0:
            expected |= conv(f"decoder.up.{i}.upsample.conv", c_out * ch, c_out * ch, 3)
    return expected | norm("decoder.norm_out", ch) | conv("decoder.conv_out", ch, 3, 3)


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_var_keys_and_shapes(shared_aln: bool, attn_l2_norm: bool) -> None:
    model = small(shared_aln=shared_aln, attn_l2_norm=attn_l2_norm)
    expected = expected_var_shapes(shared_aln=shared_aln, attn_l2_norm=attn_l2_norm)
    assert shapes(model.state_dict()) == expected


def test_vae_keys_and_shapes(var: VAR) -> None:
    assert shapes(var.vae.state_dict()) == expected_vae_shapes(48, 8, 32)
    with torch.device("meta"):
        published = VQVAEDecoder()
    assert shapes(published.state_dict()) == expected_vae_shapes(4096, 32, 160)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("d16", 310), ("d20", 601), ("d24", 1033), ("d30", 2010), ("d36-512", 2354)],
)
def test_published_models_have_the_published_sizes(name: str, millions: int) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = VAR(config.new_vae(), config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.width == 64 * model.depth == 64 * model.heads
    assert model.scales == (VAR_512 if name == "d36-512" else VAR_256)
    assert model.shared_aln == (name == "d36-512")


def test_buffers(var: VAR) -> None:
    level = var.lvl_1L[0]
    assert level.tolist() == [0] + [1] * 4 + [2] * 9 + [3] * 16
    visible = var.attn_bias_for_masking[0, 0] == 0
    assert torch.equal(visible, level[:, None] >= level[None, :])
    assert var.attn_bias_for_masking.isinf().equal(~visible[None, None])
    assert not var.get_buffer("blocks.0.attn.zero_k_bias").any()


# ------------------------------------------------------------------------------------------- build


def test_build_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = small(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    b, c = small(seed=3), small(seed=4)
    for part_a, part_b, part_c in ((a, b, c), (a.vae, b.vae, c.vae)):
        state_a, state_b, state_c = (p.state_dict() for p in (part_a, part_b, part_c))
        assert all(torch.equal(state_a[key], state_b[key]) for key in state_a)
        assert any(not torch.equal(state_a[key], state_c[key]) for key in state_a)
    assert not a.training
    assert not a.vae.training
    assert not any(p.requires_grad for p in (*a.parameters(), *a.vae.parameters()))


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_random_weights_keep_branches_and_pictures_alive(
    shared_aln: bool, attn_l2_norm: bool
) -> None:
    model = small(depth=8, shared_aln=shared_aln, attn_l2_norm=attn_l2_norm)
    ratios: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, args, out: ratios.append(float((out - args[0]).std() / args[0].std()))
        )
    image = model.autoregressive_infer_cfg(2, 1, g_seed=0)
    assert min(ratios) > 0.1
    assert max(ratios) < 3
    assert 0.1 < float(image.std()) < 0.4
    assert float(((image == 0) | (image == 1)).float().mean()) < 0.3


def test_constructor_gives_usable_weights() -> None:
    vae = VQVAEDecoder(vocab_size=16, z_channels=8, ch=32)
    model = VAR(vae, VARConfig(num_classes=4, depth=1, width=32, heads=1, scales=(1, 2)))
    assert bool(model(torch.tensor([0]), torch.randn(1, 4, 8)).isfinite().all())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: build("d36"), ArgumentError, r"named 'd36'; did you mean .*d36-512"),
        (
            lambda: build("tiny", dept=3),
            TypeError,
            r"no size 'dept' to override; did you mean depth",
        ),
        (
            lambda: build("tiny", heads=3),
            ArgumentError,
            "heads must .* width=128, heads=3",
        ),
        (lambda: build("tiny", depth=0), ArgumentError, "depth is at least 1; found 0"),
        (lambda: build("tiny", width=64.0), TypeError, "width is an int; found 64.0, a float"),
        (lambda: build("tiny", scales=(1,)), ArgumentError, r"found \(1,\)"),
        (lambda: build("tiny", scales=(1, 3, 2)), ArgumentError, r"found \(1, 3, 2\)"),
        (lambda: build("tiny", scales=(0, 1)), ArgumentError, r"found \(0, 1\)"),
        (lambda: build("tiny", ch=48), ArgumentError, "ch is a multiple of 32, .*; found 48"),
        (lambda: VARConfig(depth=4, vocab_size=0), ArgumentError, "vocab_size is .*; found 0"),
        (lambda: VQVAEDecoder(z_channels=0), ArgumentError, "z_channels is at least 1; found 0"),
        (lambda: load("d17", "a", "b"), ArgumentError, "named 'd17'; did you mean"),
    ],
)
def test_bad_sizes_and_names(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_block_follows_its_formula(shared_aln: bool, attn_l2_norm: bool) -> None:
    model = small(shared_aln=shared_aln, attn_l2_norm=attn_l2_norm, depth=1)
    weights = {name.removeprefix("blocks.0."): p for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 64, generator=generator)
    cond = torch.randn(2, 64, generator=generator)
    if attn_l2_norm:
        weights["attn.scale_mul_1H11"][0, 0] = 9.0  # far above the limit, log 100

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        normed = centred / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale) + shift

    def attention_branch(h: Tensor) -> Tensor:
        q, k, v = (h @ weights["attn.mat_qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + weights["attn.q_bias"], v + weights["attn.v_bias"]
        heads = []
        for i, part in enumerate((slice(0, 32), slice(32, 64))):
            q_i, k_i, scale = q[..., part], k[..., part], torch.tensor(0.25 / 32**0.5)
            if attn_l2_norm:
                q_i, k_i = q_i / q_i.norm(dim=-1)[..., None], k_i / k_i.norm(dim=-1)[..., None]
                scale = weights["attn.scale_mul_1H11"][0, i, 0, 0].exp().clamp(max=100)
            heads.append((scale * q_i @ k_i.transpose(1, 2)).softmax(-1) @ v[..., part])
        return linear("attn.proj", torch.cat(heads, dim=-1))

    if shared_aln:
        passed = model.shared_ada_lin(cond)
        ada = weights["ada_gss"] + linear("shared_ada_lin.1", F.silu(cond)).view(2, 1, 6, 64)
    else:
        passed = cond
        ada = linear("ada_lin.1", F.silu(cond)).view(2, 1, 6, 64)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (ada[:, :, i] for i in range(6))
    expected = x + gamma1 * attention_branch(modulated(x, scale1, shift1))
    hidden = F.gelu(linear("ffn.fc1", modulated(expected, scale2, shift2)), approximate="tanh")
    expected = expected + gamma2 * linear("ffn.fc2", hidden)
    torch.testing.assert_close(model.blocks[0](x, passed), expected, atol=1e-4, rtol=1e-4)


def test_decoder_attention_follows_its_formula(var: VAR) -> None:
    attend = var.vae.decoder.mid.attn_1
    assert isinstance(attend, SpatialAttention)
    x = torch.randn(2, 128, 3, 4, generator=torch.Generator().manual_seed(0))
    q, k, v = attend.qkv(attend.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.einsum("bci,bcj->bij", q, k).div(128**0.5).softmax(dim=-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view(2, 128, 3, 4)
    torch.testing.assert_close(attend(x), x + attend.proj_out(mixed), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- teacher-forced pass


def test_logits_do_not_depend_on_the_rest_of_the_batch(var: VAR) -> None:
    labels = torch.tensor([1, 5, 10])
    x = torch.randn(3, 29, 8, generator=torch.Generator().manual_seed(0))
    together = var(labels, x)
    assert together.shape == (3, 30, 48)
    assert together.dtype == torch.float32
    for i in range(3):
        alone = var(labels[i : i + 1], x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_a_scale_does_not_see_later_ones(var: VAR) -> None:
    x = torch.randn(1, 29, 8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 4:13] += 1  # the inputs of step 2, tokens 5 to 13
    a, b = var(torch.tensor([1]), x), var(torch.tensor([1]), changed)
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-6, rtol=0)
    moved = (a - b).abs().amax(dim=-1)[0]
    assert bool((moved[5:] > 1e-3).all())


@pytest.mark.parametrize(
    ("label", "x"),
    [
        (torch.zeros(2, dtype=torch.long), torch.zeros(3, 29, 8)),
        (torch.zeros(2, dtype=torch.long), torch.zeros(2, 30, 8)),
        (torch.zeros(2, dtype=torch.long), torch.zeros(2, 29, 9)),
        (torch.tensor(0), torch.zeros(1, 29, 8)),
    ],
)
def test_bad_teacher_forced_shapes(var: VAR, label: Tensor, x: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"take labels \(B,\) and inputs \(B, 29, 8\)"):
        var(label, x)


# -------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
@pytest.mark.parametrize("scales", [SCALES, (2, 3, 5)])
def test_cached_steps_equal_the_teacher_forced_pass(
    shared_aln: bool, attn_l2_norm: bool, scales: tuple[int, ...]
) -> None:
    model = small(shared_aln=shared_aln, attn_l2_norm=attn_l2_norm, scales=scales)
    stepwise: list[Tensor] = []
    partial: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda _, args, out: stepwise.append(out))
    model.infer_fhat(2, torch.tensor([3, 7]), g_seed=0, on_step=lambda _, f: partial.append(f))
    hook.remove()
    assert [part.shape[1] for part in stepwise] == [side**2 for side in scales]

    inputs = torch.cat(
        [
            F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2)
            for f_hat, side in zip(partial, scales[1:], strict=False)
        ],
        dim=1,
    )
    labels = torch.tensor([3, 7, 10, 10])  # 10 is "no class"
    at_once = model(labels, inputs.repeat(2, 1, 1))
    torch.testing.assert_close(torch.cat(stepwise, dim=1), at_once, atol=1e-4, rtol=1e-4)


def test_generation_depends_on_its_seed_alone(var: VAR) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = var.autoregressive_infer_cfg(2, None, g_seed=5, top_k=20, top_p=0.9)
    assert torch.equal(before, torch.random.get_rng_state())
    b = var.autoregressive_infer_cfg(2, None, g_seed=5, top_k=20, top_p=0.9)
    c = var.autoregressive_infer_cfg(2, None, g_seed=6, top_k=20, top_p=0.9)
    assert a.shape == (2, 3, 64, 64)
    assert float(a.min()) >= 0
    assert float(a.max()) <= 1
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_without_a_seed_the_global_generator_draws(var: VAR) -> None:
    torch.manual_seed(1)
    a = var.infer_fhat(1, None)
    b = var.infer_fhat(1, None)
    torch.manual_seed(1)
    assert torch.equal(a, var.infer_fhat(1, None))
    assert not torch.equal(a, b)


def test_greedy_generation_does_not_depend_on_the_rest_of_the_batch(var: VAR) -> None:
    labels = torch.tensor([2, 9, -1])
    together = var.infer_fhat(3, labels, top_k=1)
    for i in range(3):
        alone = var.infer_fhat(1, int(labels[i]), top_k=1)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_label_forms_agree(var: VAR) -> None:
    one = var.infer_fhat(2, 4, g_seed=0)
    assert torch.equal(one, var.infer_fhat(2, torch.tensor([4, 4]), g_seed=0))
    assert torch.equal(one, var.infer_fhat(2, torch.tensor([4, 4], dtype=torch.int32), g_seed=0))
    assert not torch.equal(one, var.infer_fhat(2, -1, g_seed=0))


def test_guidance_changes_the_image_after_the_first_step(var: VAR) -> None:
    weak: list[Tensor] = []
    strong: list[Tensor] = []
    var.infer_fhat(1, 4, g_seed=0, cfg=0.0, on_step=lambda _, f: weak.append(f))
    var.infer_fhat(1, 4, g_seed=0, cfg=8.0, on_step=lambda _, f: strong.append(f))
    assert torch.equal(weak[0], strong[0])
    assert not torch.equal(weak[-1], strong[-1])


def test_without_guidance_each_image_runs_once(var: VAR) -> None:
    sizes: list[int] = []
    hook = var.head.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    var.infer_fhat(3, 4, cfg=0.0)
    hook.remove()
    assert set(sizes) == {3}


def test_guidance_moves_away_from_no_class(var: VAR) -> None:
    logits: list[Tensor] = []
    partial: list[Tensor] = []
    hook = var.head.register_forward_hook(lambda _, args, out: logits.append(out))
    var.infer_fhat(1, 4, cfg=3.0, top_k=1, on_step=lambda _, f: partial.append(f))
    hook.remove()
    f_hat = torch.zeros(1, 8, 4, 4)
    for step, (with_class, without) in enumerate(logits):
        tokens = (with_class + step * (with_class - without)).argmax(dim=-1)  # t = 3 * step / 3
        f_hat = f_hat + var.vae.quantize.residual(tokens[None], step, 4, 4)
        torch.testing.assert_close(partial[step], f_hat)


def test_on_step_sees_every_step_and_may_keep_what_it_sees(var: VAR) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    last = var.infer_fhat(2, 0, g_seed=0, on_step=lambda k, f: seen.append((k, f, f.clone())))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(kept, copied) for _, kept, copied in seen)
    assert torch.equal(seen[-1][1], last)
    image = var.autoregressive_infer_cfg(2, 0, g_seed=0)
    assert torch.equal(image, var.vae.decode(last))


def test_caches_are_released(var: VAR) -> None:
    sizes: list[int] = []

    def fail_at_step_2(step: int, f_hat: Tensor) -> None:
        cached = caches(var)[-1][1]
        sizes.append(0 if cached is None else cached.shape[2])
        if step == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        var.infer_fhat(1, 0, on_step=fail_at_step_2)
    assert sizes == [1, 5, 14]
    assert caches(var) == [(False, None, None)] * 2
    var.infer_fhat(1, 0)
    assert caches(var) == [(False, None, None)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"B": 0, "label": 0}, ArgumentError, "B is at least 1; found 0"),
        ({"B": 1.0, "label": 0}, TypeError, "B is an int; found 1.0"),
        ({"B": 1, "label": 10}, ArgumentError, "0 to 9, or -1 for no class; found 10"),
        ({"B": 1, "label": -2}, ArgumentError, "found -2"),
        ({"B": 2, "label": torch.tensor([0, 10])}, ArgumentError, "found 10"),
        ({"B": 2, "label": torch.tensor([0])}, ArgumentError, r"\(2,\).*; found shape \(1,\)"),
        (
            {"B": 1, "label": torch.tensor([0.0])},
            TypeError,
            "label is .*; found torch.float32",
        ),
        ({"B": 1, "label": "cat"}, TypeError, "label is an int, .*; found str"),
        ({"B": 1, "label": 0, "top_p": 1.5}, ArgumentError, r"top_p is in \[0, 1\], .*found 1.5"),
        ({"B": 1, "label": 0, "top_p": -0.1}, ArgumentError, "top_p is .*found -0.1"),
        ({"B": 1, "label": 0, "top_k": 49}, ArgumentError, "top_k is 1 to 48, .*found 49"),
        ({"B": 1, "label": 0, "top_k": -1}, ArgumentError, "top_k is .*found -1"),
        ({"B": 1, "label": 0, "cfg": float("nan")}, ArgumentError, "cfg is .*found nan"),
        ({"B": 1, "label": 0, "cfg": -1.0}, ArgumentError, "cfg is .*found -1.0"),
    ],
)
def test_bad_sampling_arguments(
    var: VAR, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        var.autoregressive_infer_cfg(**arguments)


def test_the_vae_is_held_not_owned(var: VAR) -> None:
    assert not any(key.startswith(("vae", "_vae")) for key in var.state_dict())
    assert not any(isinstance(module, VQVAEDecoder) for module in var.modules())
    moved = copy.deepcopy(var).to("meta")
    assert moved.vae.quantize.embedding.weight.device.type == "cpu"
    with pytest.raises(ArgumentError, match=r"on meta, .* on cpu; call var\.vae\.to\('meta'\)"):
        moved.infer_fhat(1, 0)


def test_low_precision_weights_generate(var: VAR) -> None:
    half = copy.deepcopy(var).bfloat16()
    assert half.infer_fhat(1, 0, g_seed=0).dtype == torch.float32
    half.vae.bfloat16()
    assert half.autoregressive_infer_cfg(1, 0, g_seed=0).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- sampling


def drawn(logits: Tensor, **truncation: Any) -> set[int]:
    """Ids that 200 draws reach."""
    many = logits.expand(1, 200, -1)
    ids = sample_top_k_top_p(many, generator=torch.Generator().manual_seed(0), **truncation)
    assert ids.shape == (1, 200)
    return set(ids.flatten().tolist())


def test_truncated_sampling() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert drawn(logits) == {0, 1, 2, 3}
    assert drawn(logits, top_k=2) == {0, 2}
    assert drawn(logits, top_p=0.6) == {0, 2}
    assert drawn(logits, top_p=0.75) == {0, 2, 3}
    assert drawn(logits, top_p=1e-4) == {0}
    assert drawn(logits, top_k=3, top_p=0.5) == {0, 2}
    assert drawn(torch.zeros(4), top_k=1) == {0, 1, 2, 3}  # ties with the k-th stay


def test_sampling_leaves_its_input_alone() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample_top_k_top_p(logits, top_k=2, top_p=0.5)
    assert torch.equal(logits, before)


# ---------------------------------------------------------------------------------------- quantizer


def test_phi_of_each_step(var: VAR) -> None:
    """The ten published scales, among them step 2, which ties between the first two."""
    bank = copy.deepcopy(var.vae.quantize.quant_resi)
    chosen: list[int] = []
    for i, phi in enumerate(bank.qresi_ls):
        phi.register_forward_hook(lambda *_, i=i: chosen.append(i))
    for step in range(10):
        bank(torch.zeros(1, 8, 2, 2), step / 9)
    assert chosen == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_residual_of_a_constant_map_is_phi_of_its_code(var: VAR) -> None:
    quantize = var.vae.quantize
    code = quantize.embedding.weight[5].view(1, 8, 1, 1)
    added = quantize.residual(torch.full((1, 4), 5), 1, 4, 6)
    expected = quantize.quant_resi(code.expand(1, 8, 6, 6), 1 / 3)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-5)


def test_residual_is_an_upsampled_map_half_convolved(var: VAR) -> None:
    quantize = var.vae.quantize
    tokens = torch.arange(18).view(2, 9)
    codes = quantize.embedding.weight[tokens].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    upsampled = F.interpolate(codes, size=(5, 5), mode="bicubic")
    weight = quantize.get_parameter("quant_resi.qresi_ls.0.weight")
    bias = quantize.get_parameter("quant_resi.qresi_ls.0.bias")
    expected = 0.5 * upsampled + 0.5 * F.conv2d(upsampled, weight, bias, padding=1)
    torch.testing.assert_close(quantize.residual(tokens, 0, 4, 5), expected)


def test_the_next_input_averages_areas_of_the_new_sum(var: VAR) -> None:
    quantize, scales = var.vae.quantize, (1, 2, 3, 4)
    tokens, f_hat = torch.tensor([[7]]), torch.randn(1, 8, 4, 4)
    new, average = quantize.get_next_autoregressive_input(0, 4, f_hat, tokens, scales)
    torch.testing.assert_close(new, f_hat + quantize.residual(tokens, 0, 4, 4))
    areas = new.view(1, 8, 2, 2, 2, 2).mean(dim=(3, 5))
    torch.testing.assert_close(average, areas)
    tokens = torch.arange(16)[None]
    new, same = quantize.get_next_autoregressive_input(3, 4, f_hat, tokens, scales)
    torch.testing.assert_close(new, f_hat + quantize.residual(tokens, 3, 4, 4))
    assert same is new


# ------------------------------------------------------------------------------------- checkpoints


def full_vae_state(model: VAR) -> dict[str, Tensor]:
    """A whole VQ-VAE's state dict: the decoder side, and keys of an encoder."""
    encoder_side = {
        "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
        "quant_conv.weight": torch.zeros(8, 8, 3, 3),
        "quantize.ema_vocab_hit_SV": torch.zeros(4, 48),
    }
    return encoder_side | model.vae.state_dict()


@pytest.fixture
def files(var: VAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path]:
    """The name of the sizes of ``var``, and checkpoints of it and its VQ-VAE."""
    config = VARConfig(**SMALL, scales=SCALES, ch=32)
    monkeypatch.setattr(checkpoints, "CONFIGS", {**CONFIGS, "small": config})
    var_path, vae_path = tmp_path / "var.pth", tmp_path / "vae.pth"
    torch.save(var.state_dict(), var_path)
    torch.save(full_vae_state(var), vae_path)
    return "small", var_path, vae_path


def test_load_gives_the_saved_model(var: VAR, files: tuple[str, Path, Path]) -> None:
    before = torch.random.get_rng_state()
    loaded = load(*files)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not loaded.training
    assert not loaded.vae.training
    assert not any(p.requires_grad for p in (*loaded.parameters(), *loaded.vae.parameters()))
    a = var.autoregressive_infer_cfg(1, 3, g_seed=0)
    assert torch.equal(a, loaded.autoregressive_infer_cfg(1, 3, g_seed=0))


def test_load_refuses_unusable_files(files: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, var_path, vae_path = files
    damaged, page, nested = tmp_path / "damaged.pth", tmp_path / "page.pth", tmp_path / "nested.pth"
    damaged.write_bytes(var_path.read_bytes()[:5000])
    page.write_text("<html>not found</html>")
    torch.save({"trainer": {"var": {}}}, nested)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pth; download"):
        load(name, tmp_path / "none.pth", vae_path)
    for path in (damaged, page):
        with pytest.raises(ModelError, match=r"that torch cannot read.* download it again"):
            load(name, path, vae_path)
    with pytest.raises(ModelError, match=r"keys \['trainer'\], not a dict of tensors"):
        load(name, nested, vae_path)


def test_load_refuses_swapped_files(files: tuple[str, Path, Path]) -> None:
    name, var_path, vae_path = files
    with pytest.raises(ModelError, match=r"VAR's VQ-VAE has a codebook.*; found \d+ keys without"):
        load(name, var_path, var_path)
    with pytest.raises(ModelError, match=r"state dict of a VAR has pos_1LC .*; found \d+ other"):
        load(name, vae_path, vae_path)


def test_load_refuses_another_model(files: tuple[str, Path, Path]) -> None:
    _, var_path, vae_path = files
    with pytest.raises(ModelError, match=r"model 'd16': the model has depth=16, width=1024"):
        load("d16", var_path, vae_path)


def test_another_schedule_is_refused_with_both_named(var: VAR) -> None:
    other = small(scales=(1, 2, 4))
    with pytest.raises(ModelError) as caught:
        other.load_state_dict(var.state_dict())
    assert str(caught.value) == (
        "the model has tokens=21, scales=(1, 2, 4), but the checkpoint has tokens=30, "
        "scales=(1, 2, 3, 4). Build the model as the checkpoint was trained, or load another "
        "checkpoint"
    )


def test_other_mismatches_are_refused(var: VAR) -> None:
    with pytest.raises(ModelError, match="has depth=3, but the checkpoint has depth=2"):
        small(depth=3).load_state_dict(var.state_dict())
    with pytest.raises(ModelError, match="model has shared_aln=True, attn_l2_norm=False, but"):
        small(shared_aln=True, attn_l2_norm=False).load_state_dict(var.state_dict())
    with pytest.raises(RuntimeError, match=r"class_emb\.weight"):
        small(num_classes=11).load_state_dict(var.state_dict())
    state = var.state_dict()
    del state["head.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        small().load_state_dict(state)


def test_vae_takes_the_decoder_side_of_a_checkpoint(var: VAR) -> None:
    state = full_vae_state(var)
    vae = VQVAEDecoder.from_state_dict(state)
    assert shapes(vae.state_dict()) == shapes(var.vae.state_dict())
    other = small(seed=9).vae
    other.load_full_state_dict(state)
    f_hat = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for loaded in (vae, other):
        assert torch.equal(loaded.decode(f_hat), var.vae.decode(f_hat))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("decoder.conv_out.bias", None, r"missing     decoder\.conv_out\.bias \(3,\)"),
        ("decoder.conv_in.bias", torch.zeros(5), r"other shape decoder\.conv_in\.bias \(5,\), not"),
        ("encoder_2.weight", torch.zeros(1), r"unexpected  encoder_2\.weight"),
        ("quantize.ema", torch.zeros(1), r"unexpected  quantize\.ema"),
    ],
)
def test_vae_names_what_does_not_fit(var: VAR, key: str, value: Tensor | None, says: str) -> None:
    state = full_vae_state(var)
    if value is None:
        del state[key]
    else:
        state[key] = value
    before = {name: tensor.clone() for name, tensor in var.vae.state_dict().items()}
    for call in (VQVAEDecoder.from_state_dict, var.vae.load_full_state_dict):
        with pytest.raises(ModelError, match=f"(?s)1 keys do not fit .*:\n  {says}"):
            call(state)
    assert all(torch.equal(before[name], t) for name, t in var.vae.state_dict().items())


def test_vae_error_stays_short_when_nothing_fits(var: VAR) -> None:
    with pytest.raises(ModelError, match=r"\d+ keys do not fit") as caught:
        build("tiny", **SMALL, scales=SCALES, ch=64).vae.load_full_state_dict(full_vae_state(var))
    assert len(str(caught.value).splitlines()) < 14


def test_decode_is_bounded_and_sixteen_times_larger(var: VAR) -> None:
    f_hat = 100 * torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    image = var.vae.decode(f_hat)
    assert image.shape == (2, 3, 32, 48)
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1


def test_named_schedules_grow_to_the_published_sizes() -> None:
    for scales, tokens in ((VAR_256, 680), (VAR_512, 2240)):
        assert len(scales) == 10
        assert sum(side**2 for side in scales) == tokens
        assert all(a < b for a, b in itertools.pairwise(scales))


@pytest.mark.parametrize("count", range(1, 12))
def test_phis_are_chosen_as_with_numpy(count: int) -> None:
    bank = PhiBank(1, count)
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    assert bank.ticks == tuple(ticks)
    for number, phi in enumerate(bank.qresi_ls):
        nn.init.zeros_(phi.get_parameter("weight"))
        nn.init.constant_(phi.get_parameter("bias"), number)
    for last in range(1, 16):
        for step in range(last + 1):
            chosen = 2 * float(bank(torch.zeros(1, 1, 1, 1), step / last))
            assert chosen == np.abs(ticks - step / last).argmin()
