"""Gathers side inputs, such as RoPE tables and masks, at the kept tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from passes.analyse.axes import Axes, Tag, has_batch, has_tokens


class SideLayout(NamedTuple):
    """How a side input is gathered at the kept tokens of the value it meets.

    Attributes:
        splits: Per dim, aligned from the right, the sizes of the factors it is split into;
            None leaves it as it is.
        tokens: Dims to gather, counted after the split: their number of tokens, and how many
            entries come after these.
        batch: The dim, after the split, that ranges over the samples; -1 if there is one sample.
        full: The sizes, after the split and the gather, to expand to; -1 leaves one as it is.
    """

    splits: tuple[tuple[int, ...] | None, ...]
    tokens: tuple[tuple[int, int, int], ...]
    batch: int
    full: tuple[int, ...]

    @staticmethod
    def of(side_shape: Iterable[int], axes: Axes, kept: int) -> SideLayout:
        """Returns the layout for a side input of `side_shape` that meets `axes` from the right."""
        sizes = list(side_shape)
        rank = max(len(axes), len(sizes))
        sizes = [1] * (rank - len(sizes)) + sizes
        splits: list[tuple[int, ...] | None] = []
        tokens: list[tuple[int, int, int]] = []
        full: list[int] = []
        batch = -1
        for size, dim in zip(sizes, ((),) * (rank - len(axes)) + axes, strict=True):
            if not (has_batch(dim) or (has_tokens(dim) and size != 1)):
                splits.append(None)
                full.append(-1)
                continue
            splits.append(tuple(1 if size == 1 else f.size for f in dim) if len(dim) > 1 else None)
            for factor in dim:
                if factor.tag is Tag.BATCH:
                    batch = len(full)
                elif factor.tag is Tag.TOKEN and size != 1:
                    tokens.append((len(full), factor.tokens, factor.after))
                full.append(factor.kept_size(kept) if size == 1 or factor.tag is Tag.BATCH else -1)
        return SideLayout(tuple(splits), tuple(tokens), batch, tuple(full))


def take_side(
    side: Tensor,
    index: Tensor,
    splits: tuple[tuple[int, ...] | None, ...],
    tokens: tuple[tuple[int, int, int], ...],
    batch: int,
    full: tuple[int, ...],
) -> Tensor:
    """Gathers a side input per sample at the kept tokens.

    Args:
        side: A tensor with an entry per token on one or more dims, such as a RoPE table.
        index: Kept tokens (B, kept), int64.
        splits: This and the rest: see `SideLayout`.
        tokens: Dims to gather, with their number of tokens and of entries after these.
        batch: Dim of the samples, or -1.
        full: Sizes to expand to.
    """
    shape = (1,) * (len(splits) - side.dim()) + tuple(side.shape)
    parts = [split or (size,) for split, size in zip(splits, shape, strict=True)]
    value = side.reshape([size for part in parts for size in part])
    for dim, count, after in tokens:
        keys = _keys(index, value.shape[dim], count, after)
        place = [1] * value.dim()
        place[dim] = keys.shape[1]
        if batch >= 0:
            place[batch] = index.shape[0]
        keys = keys.mT if batch > dim else keys
        value = torch.take_along_dim(value, keys.reshape(place), dim)
    value = value.expand(full)
    for dim, part in enumerate(parts):  # merged again, from the left
        value = value.flatten(dim, dim + len(part) - 1)
    return value


def _keys(index: Tensor, size: int, tokens: int, after: int) -> Tensor:
    """Extends the kept tokens by the entries before and after all tokens."""
    before = size - tokens - after
    if not (before or after):
        return index
    samples = index.shape[0]
    earlier = torch.arange(before, device=index.device).expand(samples, before)
    later = torch.arange(size - after, size, device=index.device).expand(samples, after)
    return torch.cat([earlier, index + before, later], dim=1)
