"""The packaged model, its whole VQ-VAE, and the pictures that it never saw."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvar_fx.errors import ArgumentError, ModelError
from fastvar_fx.models import VAR, demo_weights, load
from fastvar_fx.models.vqvae import VQVAE, Pyramid, VQVAEDecoder

SCALES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def trained() -> VAR:
    return load("demo")


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor]:
    return demo_weights.held_out(2)


@pytest.fixture(scope="module")
def vae() -> VQVAE:
    torch.manual_seed(0)
    pyramid = Pyramid(multipliers=(1, 2), res_blocks=1, groups=2, attention=False)
    return VQVAE(vocab_size=32, z_channels=4, ch=4, pyramid=pyramid).eval().requires_grad_(False)


def token_maps(model: VAR, images: Tensor) -> list[Tensor]:
    assert isinstance(model.vae, VQVAE)
    return model.vae.encode(images, model.scales)


def bits(model: VAR, maps: list[Tensor], labels: Tensor) -> float:
    """Bits per token, teacher-forced."""
    logits = model(labels, model.vae.quantize.inputs(maps[:-1], model.scales))
    nats = F.cross_entropy(logits.mT, torch.cat(maps, 1))
    return nats.item() / math.log(2)


# ------------------------------------------------------------------------------------ what it knows


def test_the_model_draws_what_it_was_given(trained: VAR, held_out: tuple[Tensor, Tensor]) -> None:
    images = held_out[0][:2]
    maps = token_maps(trained, images)
    quantize, steps = trained.vae.quantize, len(trained.scales)
    f_hat = sum(quantize.residual(ids, step, steps, 32) for step, ids in enumerate(maps))
    assert isinstance(f_hat, Tensor)
    drawn = trained.vae.decode(f_hat) * 2 - 1
    psnr = 10 * math.log10(4 / F.mse_loss(drawn, images).item())
    assert psnr > 26


def test_the_model_expects_pictures_more_than_noise(
    trained: VAR, held_out: tuple[Tensor, Tensor]
) -> None:
    images, labels = (part[1:2] for part in held_out)
    maps = token_maps(trained, images)
    shuffled = [ids[:, torch.randperm(ids.shape[1])] for ids in maps]
    vocabulary = math.log2(trained.vae.vocab_size)
    seen = bits(trained, maps, labels)
    assert seen < vocabulary - 1
    assert seen < bits(trained, shuffled, labels) - 0.2


def test_it_is_ready_to_use(trained: VAR) -> None:
    assert not trained.training
    assert not trained.vae.training
    parameters = [*trained.parameters(), *trained.vae.parameters()]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in parameters)


# --------------------------------------------------------------------------------- teacher forcing


@pytest.mark.slow
def test_cached_steps_equal_the_pass_on_an_images_tokens(
    trained: VAR, held_out: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = held_out[0][:1], held_out[1][:1]
    maps = token_maps(trained, images)
    forced = iter(maps)
    monkeypatch.setattr(
        "fastvar_fx.models.var.sample_top_k_top_p", lambda *_: next(forced), raising=True
    )
    stepwise: list[Tensor] = []
    hook = trained.head.register_forward_hook(lambda _, args, out: stepwise.append(out[:1]))
    f_hat = trained.infer_fhat(1, labels, g_seed=0)
    hook.remove()
    inputs = trained.vae.quantize.inputs(maps[:-1], trained.scales)
    at_once = trained(labels, inputs)
    torch.testing.assert_close(torch.cat(stepwise, 1), at_once, atol=2e-3, rtol=1e-3)
    quantize = trained.vae.quantize
    added = sum(quantize.residual(ids, i, len(maps), 32) for i, ids in enumerate(maps))
    torch.testing.assert_close(f_hat, added, atol=1e-4, rtol=1e-4)


def test_some_tokens_run_as_if_the_others_did_not_exist(trained: VAR) -> None:
    x = torch.randn(1, trained.L - 1, 16, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([1])
    first = sum(side**2 for side in trained.scales[:5])
    only = torch.arange(first)
    prefix = trained(label, x, only)
    changed = x.clone()
    changed[:, first - 1 :] += 1
    torch.testing.assert_close(prefix, trained(label, changed, only))
    scattered = torch.cat((only[:30], torch.tensor([200, 700])))  # tokens of maps 6 and 8
    some = trained(label, x, scattered)
    torch.testing.assert_close(some[:, :30], prefix[:, :30])
    changed[:, 199] = x[:, 199]
    other = trained(label, changed, scattered)
    torch.testing.assert_close(some[:, :31], other[:, :31])
    assert not torch.allclose(some[:, 31], other[:, 31])


# -------------------------------------------------------------------------------------- the VQ-VAE


def test_published_encoder_keys_and_shapes() -> None:
    with torch.device("meta"):
        state = VQVAE().state_dict()
    decoder_side = {key for key in state if not key.startswith(("encoder.", "quant_conv."))}
    with torch.device("meta"):
        assert decoder_side == set(VQVAEDecoder().state_dict())
    assert state["encoder.conv_in.weight"].shape == (160, 3, 3, 3)
    assert state["encoder.down.3.downsample.conv.weight"].shape == (320, 320, 3, 3)
    assert state["encoder.down.4.block.0.nin_shortcut.weight"].shape == (640, 320, 1, 1)
    assert state["encoder.down.4.attn.1.qkv.weight"].shape == (1920, 640, 1, 1)
    assert "encoder.down.4.downsample.conv.weight" not in state
    assert "encoder.down.0.block.2.conv1.weight" not in state
    assert state["encoder.conv_out.weight"].shape == (32, 640, 3, 3)


def test_nearest_is_the_nearest(vae: VQVAE) -> None:
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    vectors = z.permute(0, 2, 3, 1).reshape(2, 15, 4)
    distances = (vectors[:, :, None] - vae.quantize.embedding.weight).norm(dim=-1)
    assert torch.equal(vae.quantize.nearest(z), distances.argmin(-1))


def test_token_maps_quantize_what_earlier_ones_left(vae: VQVAE) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    f = vae.features(images, SCALES)
    rest = f.clone()
    for step, token_map in enumerate(vae.quantize.quantized(f, SCALES)):
        side = SCALES[step]
        torch.testing.assert_close(token_map.z, F.adaptive_avg_pool2d(rest, side))
        assert torch.equal(token_map.tokens, vae.quantize.nearest(token_map.z))
        rest -= vae.quantize.residual(token_map.tokens, step, 4, 4)
    encoded = vae.encode(images, SCALES)
    assert [ids.shape[1] for ids in encoded] == [1, 4, 9, 16]


def test_inputs_are_those_of_generation(vae: VQVAE) -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = vae.encode(images, SCALES)
    inputs = vae.quantize.inputs(maps[:-1], SCALES)
    f_hat, begin = torch.zeros(1, 4, 4, 4), 0
    for step, ids in enumerate(maps[:-1]):
        f_hat, average = vae.quantize.get_next_autoregressive_input(step, 4, f_hat, ids, SCALES)
        end = begin + SCALES[step + 1] ** 2
        assert torch.equal(inputs[0, begin:end].T, average[0].flatten(1))
        begin = end
    assert begin == inputs.shape[1]


@torch.enable_grad()
def test_gradients_reach_codebook_and_phi_but_not_the_features(vae: VQVAE) -> None:
    learning = copy.deepcopy(vae).requires_grad_(True)
    f = torch.randn(1, 4, 4, 4, requires_grad=True)
    added = [token_map.added for token_map in learning.quantize.quantized(f, SCALES)]
    torch.stack(added).sum().backward()  # type: ignore[no-untyped-call]
    assert f.grad is None
    assert learning.quantize.embedding.weight.grad is not None
    assert learning.quantize.get_parameter("quant_resi.qresi_ls.0.weight").grad is not None


def test_images_of_another_size_are_refused(vae: VQVAE) -> None:
    for shape in ((1, 3, 8, 10), (1, 3, 16, 16), (1, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ArgumentError, match=r"take images \(B, 3, 8, 8\)") as caught:
            vae.encode(torch.zeros(shape), SCALES)
        assert f"found {shape}" in str(caught.value)


@pytest.mark.parametrize("wrong", [{"multipliers": ()}, {"groups": 0}, {"res_blocks": 0}])
def test_impossible_pyramids_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="every number is at least 1"):
        Pyramid(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- files


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_weights, "WEIGHTS", tmp_path / "demo.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file .* with the weights of 'demo'; install"):
        load("demo")


def test_damaged_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, cut = demo_weights.WEIGHTS.read_bytes(), tmp_path / "demo.safetensors"
    monkeypatch.setattr(demo_weights, "WEIGHTS", cut)
    for size in (0, 1000, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="which safetensors cannot read"):
            load("demo")


def test_weights_of_another_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors, other = load_file(demo_weights.WEIGHTS), tmp_path / "demo.safetensors"
    monkeypatch.setattr(demo_weights, "WEIGHTS", other)
    for name in ("var.head.bias", "vae.encoder.conv_in.bias"):
        save_file({key: value for key, value in tensors.items() if key != name}, other)
        with pytest.raises(ModelError, match=f"(?s)does not hold the .*{name.split('.', 1)[1]}"):
            load("demo")
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(ModelError, match="does not hold the"):
        load("demo")


def test_files_and_names_that_do_not_go_together() -> None:
    for arguments in (("demo", "a", "b"), ("d16",), ("d16", "a")):
        with pytest.raises(TypeError, match="need var_path and vae_path"):
            load(*arguments)
