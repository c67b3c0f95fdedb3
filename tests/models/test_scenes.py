"""The pictures that the packaged model is trained on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvar_fx.errors import ArgumentError
from fastvar_fx.models import CONFIGS, scenes
from fastvar_fx.models.scenes import CLASSES, SIDE, SOLIDS, SURFACES, Solid


def solid(kind: str, surface: str = "matte", turn: Tensor | None = None) -> Solid:
    return Solid(
        kind,
        surface,
        torch.tensor([[0.5], [1.0], [0.2]]),
        0.8,
        torch.eye(3) if turn is None else turn,
        torch.tensor([[0.8, 0.2, 0.1], [0.1, 0.3, 0.9]])[:, :, None],
        torch.tensor([[0.0], [1.0], [0.0]]),
    )


def test_a_seed_makes_a_picture() -> None:
    image, label = scenes.picture(3)
    again, same = scenes.picture(3)
    assert torch.equal(image, again)
    assert label == same
    other, _ = scenes.picture(4)
    assert image.float().sub(other.float()).abs().mean() > 5
    assert (image.dtype, image.shape) == (torch.uint8, (3, SIDE, SIDE))
    images, labels = scenes.pictures([4, 3])
    assert torch.equal(images, torch.stack((other, image)))
    assert labels[1] == label


def test_held_out_pictures_are_others() -> None:
    trained_on, _ = scenes.pictures(range(8))
    held_out, _ = scenes.pictures(range(scenes.HELD_OUT, scenes.HELD_OUT + 8))
    apart = (trained_on[:, None].float() - held_out[None].float()).abs().mean((2, 3, 4))
    assert apart.min() > 5


def test_classes_are_those_of_the_packaged_model() -> None:
    assert len(CLASSES) == len(SOLIDS) * len(SURFACES) == CONFIGS["demo"].num_classes
    assert CLASSES[SOLIDS.index("cone") * 5 + SURFACES.index("striped")] == "striped cone"


def test_the_class_is_that_of_the_solid_in_the_middle() -> None:
    """The torus may show its hole there; all others show their colour, darker or brighter."""
    found = 0
    for seed in range(40):
        image, label = scenes.picture(seed)
        main = scenes._draw_scene(torch.Generator().manual_seed(seed)).solids[0]
        assert CLASSES[label] == f"{main.surface} {main.kind}"
        if main.surface == "matte" and main.kind != "torus":
            found += 1
            x, y = place(main.centre[:, 0])
            colour = image[:, y, x].double()
            assert torch.cosine_similarity(colour, main.colours[0, :, 0].double(), 0) > 0.99
    assert found > 2


def place(point: Tensor) -> tuple[int, int]:
    """The pixel at which the camera sees a point."""
    right, up, ahead = (point - torch.tensor(scenes._CAMERA)).tolist()
    c, s = math.cos(scenes._PITCH), math.sin(scenes._PITCH)
    depth = ahead * c - up * s
    x, y = right / depth * scenes._FOCAL, (up * c + ahead * s) / depth * scenes._FOCAL
    return int((x + 1) / 2 * SIDE), int((1 - y) / 2 * SIDE)


@pytest.mark.parametrize(
    ("kind", "on_it"),
    [
        ("sphere", (0.0, 0.0, 1.0)),
        ("cube", (0.8, 0.3, -0.2)),
        ("cylinder", (0.72, 0.1, 0.0)),
        ("cylinder", (0.1, 0.95, 0.1)),
        ("cone", (0.0, 1.0, 0.0)),
        ("cone", (0.95, -1.0, 0.0)),
        ("torus", (1.0, 0.0, 0.0)),
        ("torus", (0.0, 0.28, 0.72)),
    ],
)
def test_points_of_the_surface(kind: str, on_it: tuple[float, float, float]) -> None:
    made = solid(kind)
    point = made.centre + made.radius * torch.tensor(on_it)[:, None]
    assert made.distance(point).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", SOLIDS)
@given(seed=st.integers(0, 1000))
def test_a_step_never_passes_through_a_surface(kind: str, seed: int) -> None:
    """The distance changes by at most the length of a step, however the solid is turned."""
    generator = torch.Generator().manual_seed(seed)
    turned = solid(kind, turn=scenes._rotation(seed / 100, seed / 77))
    a, b = torch.randn(2, 3, 200, generator=generator)
    change = (turned.distance(a) - turned.distance(b)).abs()
    assert (change <= (a - b).square().sum(0).sqrt() + 1e-5).all()


@pytest.mark.parametrize("kind", SOLIDS)
def test_normals_point_outwards(kind: str) -> None:
    made = solid(kind)
    outside = made.centre + 2 * torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    outside = outside[:, made.distance(outside) > 0.1]
    normals = made.normal(outside)
    torch.testing.assert_close(normals.square().sum(0), torch.ones(outside.shape[1]))
    assert (made.distance(outside + 0.01 * normals) > made.distance(outside)).all()


def test_solids_stand_on_the_floor() -> None:
    x, z = torch.meshgrid(torch.linspace(-4, 4, 400), torch.linspace(-4, 4, 400), indexing="ij")
    floor = torch.stack((x, torch.zeros_like(x), z)).flatten(1)
    for seed in range(20):
        for made in scenes._draw_scene(torch.Generator().manual_seed(seed)).solids:
            assert made.distance(floor).min().item() == pytest.approx(0, abs=0.02)


def test_bad_seeds_are_refused() -> None:
    for seed in (-1, 1 << 32):
        with pytest.raises(ArgumentError, match=rf"in \[0, 4294967296\); found {seed}"):
            scenes.picture(seed)
    with pytest.raises(TypeError):
        scenes.picture(1.5)  # type: ignore[arg-type]
