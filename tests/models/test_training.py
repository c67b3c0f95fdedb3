"""The training scripts: bad input, going on after a stop, and that training trains."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvar_fx.models import scenes
from fastvar_fx.models.vqvae import Pyramid, QuantizedMap

TRAIN = Path(__file__).parents[2] / "examples" / "train"
sys.path.append(str(TRAIN))

import loop  # noqa: E402
import train_vae  # noqa: E402
import train_var  # noqa: E402

sys.path.remove(str(TRAIN))  # its scripts are no modules for other tests

PICTURES = 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a step takes milliseconds."""
    pyramid = Pyramid(multipliers=(1,) * 6, res_blocks=1, groups=1, attention=False)
    config = dataclasses.replace(
        train_vae.CONFIG,
        depth=1,
        width=16,
        heads=2,
        vocab_size=16,
        z_channels=4,
        ch=4,
        scales=(1, 2, 4, 8),
        pyramid=pyramid,
    )
    for module in (train_vae, train_var):
        monkeypatch.setattr(module, "CONFIG", config)
    monkeypatch.setattr(train_vae, "VAR_256", (1, 2, 3, 4))
    monkeypatch.setattr(train_var, "STAGES", ((0.4, 2, 4), (0.6, 3, 4), (1.0, 4, 2)))
    monkeypatch.setattr(train_var, "SHARD", PICTURES)
    monkeypatch.setattr(train_var, "WINDOW", 4)
    monkeypatch.setattr(loop, "WARM_UP", 5)


# ---------------------------------------------------------------------------------------- training


def parameters(path: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = torch.load(path)["model"]
    return model


class Stopped(Exception):  # noqa: N818
    """Stands for being killed."""


@pytest.mark.usefixtures("small")
@torch.enable_grad()
def test_a_stopped_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    train_vae.train(tmp_path / "whole", 6, PICTURES, "cpu", bf16=False)
    whole = parameters(tmp_path / "whole/vae.pt")

    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    objective = train_vae.Objective.__call__

    def stop_at_four(self: train_vae.Objective, step: int) -> tuple[Tensor, str]:
        if step == 4:
            raise Stopped
        return objective(self, step)

    monkeypatch.setattr(train_vae.Objective, "__call__", stop_at_four)
    with pytest.raises(Stopped):
        train_vae.train(tmp_path / "parts", 6, PICTURES, "cpu", bf16=False)
    monkeypatch.setattr(train_vae.Objective, "__call__", objective)
    train_vae.train(tmp_path / "parts", 6, PICTURES, "cpu", bf16=False)
    parts = parameters(tmp_path / "parts/vae.pt")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("small")
@torch.enable_grad()
def test_training_makes_the_tokens_likelier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_vae.train(run, 4, PICTURES, "cpu", bf16=False)
    train_var.tokenize(run, 2 * PICTURES)
    data = train_var.TokenSet.load(run, held_out=False)
    assert data.tokens.shape == (4 * PICTURES, 85)
    _, labels = scenes.pictures(range(2 * PICTURES))
    first, second = torch.split(labels, PICTURES)
    assert torch.equal(data.labels, torch.cat((first, first, second, second)))
    train_var.train(run, 40, "cpu", bf16=False, compiled=False)
    vae = train_var.trained_vae(run)
    before = train_var.bits(train_var.new_var(vae), vae, data.tokens, data.labels).mean()
    after = train_var.bits(train_var.trained_var(run, vae), vae, data.tokens, data.labels).mean()
    assert after < before - 0.2

    out = tmp_path / "demo.safetensors"
    train_var.export(run, out)
    further = tmp_path / "further"
    train_var.start(out, further)
    (further / "tokens").symlink_to(run / "tokens")
    monkeypatch.setattr(train_var, "PEAK_RATE", 0.0)
    train_var.train(further, 1, "cpu", bf16=False, compiled=False)
    trained = train_var.trained_var(run, vae).state_dict()
    for name, tensor in train_var.trained_var(further, vae).state_dict().items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.usefixtures("small")
def test_weights_that_training_cannot_start_with(tmp_path: Path) -> None:
    file = tmp_path / "demo.safetensors"
    with pytest.raises(SystemExit, match="no weights that can be read"):
        train_var.start(file, tmp_path)
    file.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="no weights that can be read"):
        train_var.start(file, tmp_path)
    save_file({"var.head.bias": torch.zeros(16)}, file)
    with pytest.raises(SystemExit, match="weights of another model"):
        train_var.start(file, tmp_path)
    other = train_vae.CONFIG.new_whole_vae().state_dict()
    save_file({f"vae.{name}": tensor[:1].clone() for name, tensor in other.items()}, file)
    with pytest.raises(SystemExit, match="weights of another model"):
        train_var.start(file, tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_unused_codes_are_refilled_with_vectors_to_be_quantized() -> None:
    codebook = torch.nn.Embedding(6, 2)
    before = codebook.weight.clone()
    unused = torch.tensor([True, False, True, True, False, True])
    z = torch.stack((torch.arange(4.0), torch.arange(4.0) + 10)).view(1, 2, 2, 2)
    maps = [QuantizedMap(z, torch.zeros(1, 4), z)] * 2
    train_vae.refill(codebook, unused, maps, torch.Generator().manual_seed(0))
    assert torch.equal(codebook.weight[~unused], before[~unused])
    assert torch.equal(codebook.weight[unused, 1], codebook.weight[unused, 0] + 10)


@pytest.mark.usefixtures("small")
def test_windows_show_parts_of_larger_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = train_var.seen(3, generator)
    assert whole.tolist() == list(range(21))
    part = train_var.seen(4, generator)
    assert len(part) == 21 + 16
    rows, columns = (part[21:] - 21) // 8, (part[21:] - 21) % 8
    assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 3


@pytest.mark.usefixtures("small")
def test_tokens_that_are_there_stay(tmp_path: Path) -> None:
    """An interrupted tokenization goes on with the first file that is missing."""
    loop.write(tmp_path / "vae.pt", {"model": train_vae.new_vae().state_dict()})
    train_var.tokenize(tmp_path, PICTURES)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "tokens").iterdir()}
    assert sorted(int(file.stem) for file in written) == [0, scenes.HELD_OUT]
    train_var.tokenize(tmp_path, PICTURES + 1)
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert (tmp_path / "tokens" / f"{PICTURES:016d}.pt").exists()


@pytest.mark.usefixtures("small")
def test_bits_by_frequency() -> None:
    """Code 2 was seen three times in the first map, 16 times in the second; 1 is added to all."""
    known = torch.full((4, 85), 2)
    known[0, 0] = 5
    asked = torch.full((1, 85), 2)
    asked[0, 1] = 7
    bits = train_var.frequency_bits(asked, known)
    assert bits[0, 0].item() == pytest.approx(-math.log2(4 / 20))
    assert bits[0, 1].item() == pytest.approx(-math.log2(1 / 32))


@pytest.mark.usefixtures("small")
def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no tokens in .*; run `train.py tokens` first"):
        train_var.train(tmp_path, 1, "cpu", bf16=False, compiled=False)
    path = tmp_path / "vae.pt"
    loop.write(path, {"model": {}, "step": 1})
    with pytest.raises(SystemExit, match="is one of another model"):
        train_vae.train(tmp_path, 2, PICTURES, "cpu", bf16=False)
    whole = path.read_bytes()
    for cut in (whole[:100], b""):
        path.write_bytes(cut)
        with pytest.raises(SystemExit, match=r"is a damaged file of \d+ bytes"):
            train_vae.train(tmp_path, 2, PICTURES, "cpu", bf16=False)
