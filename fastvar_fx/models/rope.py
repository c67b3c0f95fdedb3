"""Rotary positions of text and of token maps, as tables of cosines and sines.

The position of a token is that of its corner on the finest map, so that equal places have close
positions on maps of every size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvar_fx.models.maps import Map


def pair_table(scale: Map, finest: Map, head_dim: int, device: torch.device) -> Tensor:
    """Returns the table of a map for `rotate_pairs`, float32 (2, L, c / 2).

    Rows and columns are rounded to those of the finest map. The first half of the pairs is rotated
    by the row, the second by the column.

    Args:
        scale: (h, w) of the map.
        finest: (h, w) of the map that positions are counted on.
        head_dim: c, a multiple of 4.
        device: Where the table is made.

    Source: Infinity, arXiv 2412.04431, section 3.2, normalized as in the official code.
    """
    frequencies = _frequencies(head_dim // 2, 2, device)  # (c / 4,)
    rows, columns = (
        places.round()[:, None] * frequencies for places in _places(scale, finest, device)
    )  # (h, c / 4), (w, c / 4)
    h, w = scale
    angles = torch.cat((rows[:, None].expand(-1, w, -1), columns[None].expand(h, -1, -1)), dim=-1)
    angles = angles.flatten(0, 1)  # (L, c / 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Returns `x` (B, H, L, c), its pairs of neighbouring features rotated by the table."""
    cos, sin = table.unbind(0)  # 2 of (L, c / 2)
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)  # 2 of (B, H, L, c / 2)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1).flatten(-2)


def half_table(scale: Map, finest: Map, head_dim: int, offset: Tensor) -> Tensor:
    """Returns the table of a map for `rotate_halves`, float32 (2, B, 1, L, c).

    Args:
        scale: (h, w) of the map.
        finest: (h, w) of the map that positions are counted on.
        head_dim: c, a multiple of 4.
        offset: What rows and columns count from, (B,).

    Source: HART's official code; the first half of the features takes the row's angles, the second
    the column's, though each rotation mixes both halves.
    """
    frequencies = _frequencies(head_dim, 4, offset.device)  # (c / 4,)
    rows, columns = (
        (places + offset[:, None])[..., None] * frequencies
        for places in _places(scale, finest, offset.device)
    )  # (B, h, c / 4), (B, w, c / 4)
    h, w = scale
    rows, columns = rows[:, :, None].expand(-1, -1, w, -1), columns[:, None].expand(-1, h, -1, -1)
    angles = torch.cat((rows, rows, columns, columns), dim=-1).flatten(1, 2)  # (B, L, c)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def text_table(positions: Tensor, head_dim: int) -> Tensor:
    """Returns the table of text positions (B, T) for `rotate_halves`, (2, B, 1, T, c)."""
    angles = positions[..., None] * _frequencies(head_dim, 2, positions.device)  # (B, T, c / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Returns `x` (B, H, L, c), feature i of its two halves rotated as a pair by the table."""
    cos, sin = table.unbind(0)  # 2 of (B, 1, L, c)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _frequencies(width: int, step: int, device: torch.device) -> Tensor:
    """Returns angular frequencies from 1 down to nearly 1e-4, (width / step,)."""
    return 1e4 ** -(torch.arange(0, width, step, device=device) / width)


def _places(scale: Map, finest: Map, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns where the rows (h,) and columns (w,) of a map lie on the finest map."""
    rows, columns = (
        torch.arange(n, device=device) * (finest_n / n)
        for n, finest_n in zip(scale, finest, strict=True)
    )
    return rows, columns
