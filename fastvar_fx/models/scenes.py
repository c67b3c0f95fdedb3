"""Pictures of solids on a floor: what the model `demo` was trained on, and is measured on.

A seed makes a picture, so there are as many as are needed, and none of them has a licence. One to
three lit solids stand on a textured floor under a sky. The class of a picture is the solid in the
middle and its surface. Pixels are rays from a camera to the nearest surface, which is found by
steps as long as the distance to the solid (sphere tracing, doi 10.1007/s003710050084).

Points are float32 (3, n): to the right, up and away from the camera. Colours are (3, n) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_fx.errors import ArgumentError

SOLIDS: Final = ("sphere", "cube", "cylinder", "cone", "torus")
SURFACES: Final = ("matte", "glossy", "checkered", "striped", "noisy")
CLASSES: Final = tuple(f"{surface} {solid}" for solid in SOLIDS for surface in SURFACES)
"""Names of the classes; class `5 * solid + surface`."""

SIDE: Final = 256
"""Height and width of a picture in pixels."""

HELD_OUT: Final = 1 << 31
"""First seed of the pictures that no model is trained on."""

_SEEDS: Final = 1 << 32  # torch's generator takes the lower 32 bits of a seed

_CAMERA = (0.0, 2.2, -4.5)
_PITCH = math.radians(18.0)  # how far the camera looks down
_FOCAL = 2.1  # in halves of the picture's side
_SUBPIXELS = ((-0.25, 0.25, -0.25, 0.25), (-0.25, -0.25, 0.25, 0.25))
_CONTRAST = 0.06  # between neighbours, from which on a pixel is an edge and gets four rays
_MARCH_STEPS, _SHADOW_STEPS = 32, 10
_NEAR = 0.01
_BOUND = 1.42  # radius of the ball around a solid, in units of its own
_AMBIENT = 0.35


@dataclass(frozen=True)
class Solid:
    """A solid that stands on the floor.

    Attributes:
        kind: One of `SOLIDS`.
        surface: One of `SURFACES`.
        centre: Its middle, (3, 1).
        radius: Its size, a length.
        turn: Its rotation, (3, 3), applied to points relative to the middle.
        colours: Two colours, (2, 3, 1).
        axis: Direction of its stripes, (3, 1).
    """

    kind: str
    surface: str
    centre: Tensor
    radius: float
    turn: Tensor
    colours: Tensor
    axis: Tensor

    def local(self, points: Tensor) -> Tensor:
        """Returns points relative to the solid, in units of its radius."""
        return self.turn @ (points - self.centre) / self.radius

    def distance(self, points: Tensor) -> Tensor:
        """Returns a lower bound of the distance to the surface, (n,), negative inside."""
        p = self.local(points)
        across, height = torch.hypot(p[0], p[2]), p[1]
        if self.kind == "sphere":
            d = _length(p) - 1
        elif self.kind == "cube":
            d = _outside(p.abs() - 0.8)
        elif self.kind == "cylinder":
            d = _outside(torch.stack((across - 0.72, height.abs() - 0.95)))
        elif self.kind == "cone":
            slope = (across * 2 + (height - 1) * 0.95) / math.hypot(2, 0.95)
            d = torch.maximum(slope, -1 - height)
        else:
            d = torch.hypot(across - 0.72, height) - 0.28
        return d * self.radius

    def colour(self, points: Tensor, noise: Tensor) -> Tensor:
        """Returns the colour of the surface at points."""
        p = self.local(points)
        if self.surface == "checkered":
            mix = _edge((math.pi * 1.6 * (p + 0.31)).sin().prod(0), 20.0)
        elif self.surface == "striped":
            mix = _edge(((p * self.axis).sum(0) * 7.0).sin(), 7.0)
        elif self.surface == "noisy":
            mix = _edge(_value_noise(noise, p * 0.4), 6.0)
        else:
            mix = p.new_zeros(())
        return torch.lerp(self.colours[0], self.colours[1], mix)

    def normal(self, points: Tensor) -> Tensor:
        """Returns unit normals of the surface at points, by central differences."""
        offsets = torch.eye(3)[:, :, None] * 1e-3
        ahead = torch.stack([self.distance(points + offset) for offset in offsets])
        behind = torch.stack([self.distance(points - offset) for offset in offsets])
        slope = ahead - behind
        return slope / _length(slope)


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        solids: The solids, the one that names the class first.
        light: Unit vector towards the light, (3, 1).
        floor: Two colours, (2, 3, 1).
        tiles: Texture of the floor: "tiles", "planks" or "clouds".
        sky: Colours at the horizon and above, (2, 3, 1).
        noise: Values in [-1, 1] that noisy surfaces interpolate, (1, 1, 12, 12, 12).
    """

    solids: tuple[Solid, ...]
    light: Tensor
    floor: Tensor
    tiles: str
    sky: Tensor
    noise: Tensor


def picture(seed: int) -> tuple[Tensor, int]:
    """Returns a picture and its class.

    Args:
        seed: An int in [0, 2^32); the same seed makes the same picture, others make others.

    Returns:
        Uint8 (3, 256, 256), and an index into `CLASSES`.

    Raises:
        TypeError: If the seed is no int.
        ArgumentError: If it is out of range.

    Example:
        >>> image, label = picture(0)
        >>> image.shape, CLASSES[label]
        (torch.Size([3, 256, 256]), 'noisy sphere')
    """
    if not isinstance(seed, int):
        raise TypeError(f"a seed is an int; found {type(seed).__name__}")
    if not 0 <= seed < _SEEDS:
        raise ArgumentError(f"a seed is in [0, {_SEEDS}); found {seed}")
    generator = torch.Generator().manual_seed(seed)
    scene = _draw_scene(generator)
    main = scene.solids[0]
    label = SOLIDS.index(main.kind) * len(SURFACES) + SURFACES.index(main.surface)
    return _render(scene), label


def pictures(seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns several pictures, uint8 (N, 3, 256, 256), and their classes, int64 (N,)."""
    made = [picture(seed) for seed in seeds]
    return torch.stack([image for image, _ in made]), torch.tensor([label for _, label in made])


# --------------------------------------------------------------------------------------------------
# Drawing lots
# --------------------------------------------------------------------------------------------------


def _draw_scene(generator: torch.Generator) -> Scene:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def one_of(names: Sequence[str]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator))]

    def solid(x: float, z: float, radius: float) -> Solid:
        kind, surface = one_of(SOLIDS), one_of(SURFACES)
        tilt = uniform(0.9, 1.4) if kind == "torus" else 0.0
        turn = math.pi / 4 if kind == "cube" else 0.0  # an edge in front, or the hole
        lowest = {"cube": 0.8, "cylinder": 0.95, "torus": 0.28 + 0.72 * math.sin(tilt)}
        first = _colour(uniform(0, 1), 0.75, uniform(0.55, 0.95))
        second = _colour(uniform(0, 1), uniform(0, 0.5), 1.0 if first.mean() < 0.5 else 0.2)
        return Solid(
            kind,
            surface,
            torch.tensor([[x], [radius * lowest.get(kind, 1.0)], [z]]),
            radius,
            _rotation(turn + uniform(-0.4, 0.4), tilt),
            torch.stack((first, second)),
            F.normalize(torch.tensor([[uniform(-0.4, 0.4)], [1.0], [0.0]]), dim=0),
        )

    main = solid(uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(1.05, 1.25))
    left, right = (side * uniform(1.8, 2.2) for side in (-1, 1))
    places = [(left, uniform(0.2, 1.6)), (right, uniform(0.2, 1.6))]
    others = [solid(x, z, uniform(0.4, 0.6)) for x, z in places if uniform(0, 1) < 0.35]
    hue = uniform(0, 1)
    angle, height = uniform(-2.6, -0.5), uniform(0.7, 1.1)
    light = torch.tensor([[math.cos(angle)], [height], [math.sin(angle)]])
    return Scene(
        solids=(main, *others),
        light=F.normalize(light, dim=0),
        floor=torch.stack([_colour(hue + uniform(0, 0.1), 0.3, value) for value in (0.85, 0.55)]),
        tiles=one_of(("tiles", "planks", "clouds")),
        sky=torch.stack(
            (_colour(uniform(0, 1), 0.12, 0.95), _colour(uniform(0.5, 0.7), 0.5, 0.85))
        ),
        noise=torch.rand(1, 1, 12, 12, 12, generator=generator) * 2 - 1,
    )


def _colour(hue: float, saturation: float, value: float) -> Tensor:
    """Returns the colour (3, 1) of a hue, a saturation and a value in [0, 1]."""
    wheel = ((hue + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1 * 6 - 3).abs().sub(1).clamp(0, 1)
    return value * torch.lerp(torch.ones(3), wheel, saturation)[:, None]


def _rotation(turn: float, tilt: float) -> Tensor:
    """Returns the rotation (3, 3) around the vertical, then around the axis to the right."""
    c, s, ct, st = math.cos(turn), math.sin(turn), math.cos(tilt), math.sin(tilt)
    around = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return torch.tensor([[1, 0, 0], [0, ct, -st], [0, st, ct]]) @ around


# --------------------------------------------------------------------------------------------------
# Light
# --------------------------------------------------------------------------------------------------


def _render(scene: Scene) -> Tensor:
    """Returns the picture of a scene, uint8 (3, 256, 256); edges are smoothed."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.stack((x, y)).view(2, -1) + 0.5  # (2, n) in pixels
    colours = _seen(scene, _rays(places))
    edges = _edges(colours).nonzero()[:, 0]
    closer = places[:, edges, None] + torch.tensor(_SUBPIXELS)[:, None]  # (2, m, 4)
    colours[:, edges] = _seen(scene, _rays(closer.flatten(1))).view(3, -1, 4).mean(2)
    return (colours.view(3, SIDE, SIDE) * 255).round().to(torch.uint8)


def _rays(places: Tensor) -> Tensor:
    """Returns the unit directions of the rays through places of the picture, (2, n) in pixels."""
    x, y = places / SIDE * 2 - 1
    c, s = math.cos(_PITCH), math.sin(_PITCH)
    rays = torch.stack((x, -y * c - _FOCAL * s, _FOCAL * c - y * s))
    return rays / _length(rays)


def _edges(colours: Tensor) -> Tensor:
    """Returns which pixels differ from one beside them, bool (n,)."""
    image = colours.view(1, 3, SIDE, SIDE)
    high = F.max_pool2d(image, 3, stride=1, padding=1)
    low = -F.max_pool2d(-image, 3, stride=1, padding=1)
    return (high - low).amax((0, 1)).flatten() > _CONTRAST


def _seen(scene: Scene, rays: Tensor) -> Tensor:
    """Returns the colours that rays from the camera meet, in [0, 1]."""
    origin = torch.tensor(_CAMERA)[:, None]
    colours = torch.lerp(scene.sky[0], scene.sky[1], (2.5 * rays[1]).clamp(0, 1))
    depth = torch.full_like(rays[0], math.inf)
    down = (rays[1] < -0.02).nonzero()[:, 0]
    depth[down] = -origin[1] / rays[1, down]
    points = origin + depth[down] * rays[:, down]
    up = torch.tensor([[0.0], [1.0], [0.0]]).expand_as(points)
    lit = _floor_colour(scene, points) * _lit(scene, points, up)
    colours[:, down] = torch.lerp(scene.sky[0], lit, torch.exp(-0.05 * depth[down]))
    for solid in scene.solids:
        hit, t = _march(solid, origin, rays)
        nearer = t < depth[hit]
        hit, t = hit[nearer], t[nearer]
        depth[hit] = t
        colours[:, hit] = _shade(scene, solid, origin + t * rays[:, hit], rays[:, hit])
    return colours.clamp(0, 1)


def _near(solid: Solid, origins: Tensor, rays: Tensor) -> Tensor:
    """Returns which rays come near a solid, int64 (m,)."""
    towards = solid.centre - origins
    along = (towards * rays).sum(0)
    away = towards.square().sum(0) - along.square()
    return ((away < (_BOUND * solid.radius) ** 2) & (along > 0)).nonzero()[:, 0]


def _march(solid: Solid, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which rays hit a solid, int64 (m,), and how far away, (m,)."""
    ids = _near(solid, origin, rays)
    rays = rays[:, ids]
    t = ((solid.centre - origin) * rays).sum(0) - _BOUND * solid.radius
    step = t
    for _ in range(_MARCH_STEPS):
        step = solid.distance(origin + t * rays)
        t = t + step
    hit = step.abs() < _NEAR
    return ids[hit], t[hit]


def _lit(scene: Scene, points: Tensor, normals: Tensor) -> Tensor:
    """Returns how much light reaches points of a surface, (n,)."""
    direct = (normals * scene.light).sum(0).clamp_min(0) * _unshadowed(
        scene, points + 0.02 * normals
    )
    return _AMBIENT + (1 - _AMBIENT) * direct


def _unshadowed(scene: Scene, points: Tensor) -> Tensor:
    """Returns the share of the light that no solid hides, (n,): how near its rays pass."""
    seen = torch.ones_like(points[0])
    for solid in scene.solids:
        ids = _near(solid, points, scene.light)
        share = seen[ids]
        t = torch.full_like(share, 0.03)
        for _ in range(_SHADOW_STEPS):
            d = solid.distance(points[:, ids] + t * scene.light)
            share = torch.minimum(share, (9 * d / t).clamp(0, 1))
            t = t + d.clamp(0.05, 0.5)
        seen[ids] = share
    return seen


def _shade(scene: Scene, solid: Solid, points: Tensor, rays: Tensor) -> Tensor:
    """Returns the colours of a solid's surface as the camera sees it."""
    normals = solid.normal(points)
    colours = solid.colour(points, scene.noise) * _lit(scene, points, normals)
    if solid.surface != "glossy":
        return colours
    mirrored = rays - 2 * (rays * normals).sum(0) * normals
    shine = (mirrored * scene.light).sum(0).clamp(0, 1).pow(30)
    sky = torch.lerp(scene.sky[0], scene.sky[1], mirrored[1].clamp(0, 1))
    return torch.lerp(colours, sky, 0.25) + 0.8 * shine


def _floor_colour(scene: Scene, points: Tensor) -> Tensor:
    x, z = points[0], points[2]
    if scene.tiles == "tiles":
        mix = _edge((x * 2.2).sin() * (z * 2.2).sin(), 8.0)
    elif scene.tiles == "planks":
        mix = _edge((x * 3.1 + 0.4).sin(), 3.0)
    else:
        mix = _edge(_value_noise(scene.noise, points * 0.09), 3.0)
    fade = torch.exp(-0.12 * (z - _CAMERA[2]).clamp_min(0))  # far away a pattern is a grey
    return torch.lerp(scene.floor[0], scene.floor[1], 0.5 + (mix - 0.5) * fade)


def _value_noise(values: Tensor, points: Tensor) -> Tensor:
    """Returns random values interpolated at points, (n,)."""
    grid = points.T.reshape(1, 1, 1, -1, 3)
    return F.grid_sample(values, grid, padding_mode="reflection", align_corners=False).flatten()


def _edge(wave: Tensor, sharpness: float) -> Tensor:
    """Returns 0 where a wave is low and 1 where it is high, with an edge between."""
    return torch.sigmoid(sharpness * wave)


def _outside(beyond: Tensor) -> Tensor:
    """Returns the distance to a box, (n,), from how far points lie beyond each of its faces."""
    return _length(beyond.clamp_min(0)) + beyond.amax(0).clamp_max(0)


def _length(vectors: Tensor) -> Tensor:
    """Returns the lengths of vectors (k, n), (n,); several times as fast as `norm`."""
    return vectors.square().sum(0).sqrt()
