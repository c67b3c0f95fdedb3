"""Token maps of any shape: those that Infinity was trained on, and a check for lists of maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fastvar_fx.errors import ArgumentError
from fastvar_fx.schedule import INFINITY_1024

Map = tuple[int, int]
"""(h, w) of a token map."""

_TALL: Mapping[float, tuple[Map, ...]] = {
    1.0: tuple((side, side) for side in INFINITY_1024),
    1.25: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24),
           (35, 28), (45, 36), (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21),
            (36, 27), (48, 36), (60, 45), (72, 54)),
    1.5: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22),
          (39, 26), (48, 32), (63, 42), (78, 52)),
    1.75: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20),
           (42, 24), (56, 32), (70, 40), (84, 48)),
    2.0: ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19),
          (46, 23), (60, 30), (74, 37), (90, 45)),
    2.5: ((1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16),
          (50, 20), (65, 26), (80, 32), (100, 40)),
    3.0: ((1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15),
          (54, 18), (72, 24), (90, 30), (111, 37)),
}  # fmt: skip

TEMPLATES: Mapping[float, tuple[Map, ...]] = MappingProxyType(
    {int(1000 / ratio) / 1000: tuple((w, h) for h, w in maps) for ratio, maps in _TALL.items()}
    | dict(_TALL)
)
"""The 13 token maps of a one-megapixel image by its h / w, from 0.333 to 3.0."""

_STEPS = MappingProxyType({"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13})


def template(h_div_w: float = 1.0, pixels: str = "1M") -> tuple[Map, ...]:
    """Returns the token maps that Infinity was trained on, (h, w) coarse to fine.

    Args:
        h_div_w: A key of `TEMPLATES`.
        pixels: "0.06M", "0.25M", "0.60M" or "1M"; smaller images leave out the last maps.

    Raises:
        ArgumentError: If there is no such template.

    Example:
        >>> template(0.5, "0.06M")[-1]
        (11, 22)
    """
    if h_div_w not in TEMPLATES or pixels not in _STEPS:
        raise ArgumentError(
            f"there is no template of h / w = {h_div_w!r} at {pixels!r}, but of h / w = "
            f"{', '.join(map(str, sorted(TEMPLATES)))} at {', '.join(_STEPS)}; take the nearest of "
            f"them, or give your own list of (h, w)"
        )
    return TEMPLATES[h_div_w][: _STEPS[pixels]]


def check_maps(scales: Sequence[object], most: int | None = None) -> None:
    """Checks that `scales` are two or more (h, w) token maps, the first a single token.

    Args:
        scales: What was given as token maps.
        most: How many a model has embeddings for; None for any number.

    Raises:
        ArgumentError: If they are not.
    """
    if len(scales) < 2 or not all(map(_is_map, scales)):
        found = "not a list of two or more (h, w)"
    elif scales[0] != (1, 1):
        found = "a list whose first map is not (1, 1), but step 0 draws a single token"
    elif most is not None and len(scales) > most:
        found = f"a list of {len(scales)} maps, but the model has embeddings for {most} steps"
    else:
        return
    raise ArgumentError(
        f"scales are token maps, coarse to fine, such as ((1, 1), (2, 2), (4, 4)); {tuple(scales)} "
        f"is {found}"
    )


def _is_map(value: object) -> bool:
    sides = value if isinstance(value, tuple) else ()
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
