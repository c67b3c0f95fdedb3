"""The training scripts: bad input, going on after a stop, and that training trains."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvar_fx.models.vqvae import Pyramid, QuantizedMap

TRAIN = Path(__file__).parents[2] / "examples" / "train"
sys.path.append(str(TRAIN))

import data  # noqa: E402
import loop  # noqa: E402
import train_vae  # noqa: E402
import train_var  # noqa: E402

sys.path.remove(str(TRAIN))  # its scripts are no modules for other tests

LISTED = [
    data.Photograph("sky", "blue.jpg", "A", "CC0-1.0", "skies", data.TRAIN),
    data.Photograph("sky", "evening", "B", "CC0-1.0", "skies", data.HELD_OUT),
    data.Photograph("land", "hills.png", "C", "CC0-1.0", "hills", data.TRAIN),
]


def paint(path: Path, width: int, height: int, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = Image.linear_gradient("L").resize((width, height))
    Image.merge("RGB", (ramp, ramp, Image.new("L", ramp.size, shade))).save(path)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    paint(folder / "sky/usr/share/blue.jpg", 400, 300)
    paint(folder / "sky/usr/share/evening/screenshot.jpg", 100, 80)
    paint(folder / "sky/usr/share/evening/images/640.jpg", 640, 300, 90)
    paint(folder / "land/usr/hills.png", 256, 256, 200)
    return folder


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
    monkeypatch.setattr(train_var, "FIRST_MAPS", 2)
    monkeypatch.setattr(train_var, "WINDOW", 4)
    monkeypatch.setattr(loop, "WARM_UP", 5)


@pytest.fixture
def crops(packages: Path, tmp_path: Path) -> Path:
    path = tmp_path / "set.safetensors"
    data.build(LISTED, packages).save(path)
    return path


# -------------------------------------------------------------------------------------------- data


def test_the_list_names_licence_and_author_of_every_photograph() -> None:
    listed = data.photographs()
    assert len(listed) == 37
    assert all(photograph.author and photograph.package for photograph in listed)
    free = {"CC0-1.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-2+", "LGPL-3"}
    assert {photograph.licence for photograph in listed} == free
    for motif in data.motifs(listed):
        splits = [p.split for p in listed if p.motif == motif]
        assert set(splits) == {data.TRAIN, data.HELD_OUT}


def test_the_set(crops: Path) -> None:
    made = data.CropSet.load(crops)
    assert made.motifs == ("skies", "hills")
    assert made.images.shape[1:] == made.held_out.shape[1:] == (3, 256, 256)
    assert set(made.labels.tolist()) == {0, 1}
    assert set(made.held_out_labels.tolist()) == {0}
    blue = made.images[made.labels == 0][:, 2].float().mean()
    assert blue < 10  # of the first photograph alone, not of the one held out
    assert made.held_out[:, 2].float().mean() > 80


def test_held_out_photographs_are_named_by_class(packages: Path, tmp_path: Path) -> None:
    data.save_held_out(LISTED, packages, tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "0-evening.jpg"
    with Image.open(file) as picture:
        assert picture.size == (256, 256)


def test_bad_photographs_are_refused(packages: Path, tmp_path: Path) -> None:
    def says() -> str:
        with pytest.raises(SystemExit) as stopped:
            data.build(LISTED, packages)
        return str(stopped.value)

    hills = packages / "land/usr/hills.png"
    paint(hills, 300, 255)
    assert "has only 300 x 255; leave it out of the list" in says()
    hills.write_bytes(hills.read_bytes()[:200])
    assert "a file that cannot be read" in says()
    hills.unlink()
    assert "there is no picture hills.png of land" in says()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(SystemExit, match="does not exist or is empty; unpack"):
            data.build(LISTED, folder)


def test_bad_sets_are_refused(crops: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no\.safetensors is not .* set .*; build it"):
        data.CropSet.load(tmp_path / "no.safetensors")
    wrong = data.CropSet.load(crops)
    wrong = dataclasses.replace(wrong, images=wrong.images[:, :, :100].contiguous())
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(SystemExit, match=r"found torch.uint8 \(\d+, 3, 100, 256\)"):
        data.CropSet.load(tmp_path / "wrong.safetensors")
    crops.write_bytes(crops.read_bytes()[:5000])
    with pytest.raises(SystemExit, match="SafetensorError"):
        data.CropSet.load(crops)


# ---------------------------------------------------------------------------------------- training


def parameters(path: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = torch.load(path)["model"]
    return model


class Stopped(Exception):  # noqa: N818
    """Stands for being killed."""


@pytest.mark.usefixtures("small")
@torch.enable_grad()
def test_a_stopped_training_ends_as_an_uninterrupted_one(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    train_vae.train(crops, tmp_path / "whole", 6, "cpu", bf16=False)
    whole = parameters(tmp_path / "whole/vae.pt")

    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    objective = train_vae.Objective.__call__

    def stop_at_four(self: train_vae.Objective, step: int) -> tuple[Tensor, str]:
        if step == 4:
            raise Stopped
        return objective(self, step)

    monkeypatch.setattr(train_vae.Objective, "__call__", stop_at_four)
    with pytest.raises(Stopped):
        train_vae.train(crops, tmp_path / "parts", 6, "cpu", bf16=False)
    monkeypatch.setattr(train_vae.Objective, "__call__", objective)
    train_vae.train(crops, tmp_path / "parts", 6, "cpu", bf16=False)
    parts = parameters(tmp_path / "parts/vae.pt")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("small")
@torch.enable_grad()
def test_training_makes_the_tokens_likelier(crops: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_vae.train(crops, run, 4, "cpu", bf16=False)
    train_var.tokenize(crops, run)
    tokens = torch.load(run / "tokens.pt")
    images = data.CropSet.load(crops)
    assert tokens["tokens"].shape == (2 * len(images.images), 85)
    assert tokens["labels"].tolist() == images.labels.tolist() * 2
    train_var.train(run, 40, "cpu", bf16=False)
    vae = train_var.trained_vae(run)
    var = train_var.new_var(vae)
    before = train_var.bits(var, vae, tokens["tokens"], tokens["labels"]).mean()
    var.load_state_dict(torch.load(run / "var.pt")["model"])
    after = train_var.bits(var, vae, tokens["tokens"], tokens["labels"]).mean()
    assert after < before - 0.2

    out = tmp_path / "demo.safetensors"
    train_var.export(run, out)
    assert out.stat().st_size > 1000


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
def test_bad_checkpoints_are_refused(crops: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no file .*; run `train.py tokens` first"):
        train_var.train(tmp_path, 1, "cpu", bf16=False)
    path = tmp_path / "vae.pt"
    loop.write(path, {"model": {}, "step": 1})
    with pytest.raises(SystemExit, match="is one of another model"):
        train_vae.train(crops, tmp_path, 2, "cpu", bf16=False)
    whole = path.read_bytes()
    for cut in (whole[:100], b""):
        path.write_bytes(cut)
        with pytest.raises(SystemExit, match=r"is a damaged file of \d+ bytes"):
            train_vae.train(crops, tmp_path, 2, "cpu", bf16=False)
