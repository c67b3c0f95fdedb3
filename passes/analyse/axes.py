"""Axis algebra: where the token axis is in every value of a branch, einops-style.

A value's axes are a tuple of dims, each dim a tuple of factors whose sizes multiply to the dim's
size, outermost first. A factor's tag says what it ranges over: the samples, the tokens of this
step (for keys, with the entries of earlier steps before them), or anything else. Labels decide,
never sizes: a map of 1024 tokens may be as long as the width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Tag(Enum):
    """What a factor ranges over."""

    BATCH = "batch"
    TOKEN = "token"
    OTHER = "other"


@dataclass(frozen=True)
class Factor:
    """One factor of a dim.

    Attributes:
        size: Its size; a token factor's counts `before` and `after` too.
        tag: What it ranges over.
        before: Entries before this step's tokens, such as cached keys; they are always kept.
        after: Entries after them.
    """

    size: int
    tag: Tag = Tag.OTHER
    before: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        """How many of its entries are tokens of this step."""
        return self.size - self.before - self.after

    def kept_size(self, kept: int) -> int:
        """Its size when `kept` of this step's tokens are left."""
        return self.before + kept + self.after if self.tag is Tag.TOKEN else self.size


Dim = tuple[Factor, ...]
Axes = tuple[Dim, ...]


class AxesError(Exception):
    """An op does something to an axis that the algebra cannot follow.

    Attributes:
        code: The refusal code of this case.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def dim_size(dim: Dim, kept: int | None = None) -> int:
    """Returns the size of `dim`; with `kept`, its size when that many tokens are left."""
    return math.prod(f.size if kept is None else f.kept_size(kept) for f in dim)


def shape_of(axes: Axes, kept: int | None = None) -> list[int]:
    """Returns the shape of a value; with `kept`, its shape when that many tokens are left."""
    return [dim_size(dim, kept) for dim in axes]


def plain_dim(size: int) -> Dim:
    """Returns a dim that holds neither samples nor tokens."""
    return () if size == 1 else (Factor(size),)


def has_tokens(dim: Dim) -> bool:
    """Whether `dim` holds a token factor."""
    return any(f.tag is Tag.TOKEN for f in dim)


def has_batch(dim: Dim) -> bool:
    """Whether `dim` holds the batch factor."""
    return any(f.tag is Tag.BATCH for f in dim)


def token_dims(axes: Axes) -> list[int]:
    """Returns the positions of the dims that hold a token factor."""
    return [i for i, dim in enumerate(axes) if has_tokens(dim)]


def stream_axes(shape: Sequence[int]) -> Axes:
    """Returns the axes of a residual stream of shape (B, L, C)."""
    batch, tokens, width = shape
    return (_tagged(batch, Tag.BATCH), _tagged(tokens, Tag.TOKEN), plain_dim(width))


def _tagged(size: int, tag: Tag) -> Dim:
    return () if size == 1 else (Factor(size, tag),)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes:
    """Returns the axes after a `view` to `shape`.

    Raises:
        AxesError: If the token or the batch factor would have to be split.
    """
    left = _merge_others(f for dim in axes for f in dim)
    result: list[Dim] = []
    for size in shape:
        dim: list[Factor] = []
        need = size
        while need > 1:
            if not left:
                raise AxesError("FVX011", f"cannot regroup {shape_of(axes)} into {list(shape)}")
            factor = left.pop(0)
            if need % factor.size == 0:
                dim.append(factor)
                need //= factor.size
            elif factor.tag is Tag.OTHER and factor.size % need == 0:
                dim.append(replace(factor, size=need))
                left.insert(0, replace(factor, size=factor.size // need))
                need = 1
            else:
                raise AxesError(
                    "FVX011",
                    f"{shape_of(axes)} becomes {list(shape)}, which splits the "
                    f"{factor.tag.value} axis of {factor.size}",
                )
        result.append(tuple(dim))
    return tuple(result)


def _merge_others(factors: Iterable[Factor]) -> list[Factor]:
    merged: list[Factor] = []
    for factor in factors:
        if merged and merged[-1].tag is Tag.OTHER and factor.tag is Tag.OTHER:
            merged[-1] = Factor(merged[-1].size * factor.size)
        else:
            merged.append(factor)
    return merged


def broadcast(operands: Sequence[Axes]) -> Axes:
    """Returns the axes of a broadcast over `operands`, aligned from the right.

    Raises:
        AxesError: If the token or the batch axis meets an axis of another meaning.
    """
    rank = max(len(axes) for axes in operands)
    padded = [((),) * (rank - len(axes)) + axes for axes in operands]
    return tuple(_broadcast_dim(dims) for dims in zip(*padded, strict=True))


def _broadcast_dim(dims: Sequence[Dim]) -> Dim:
    full = [dim for dim in dims if dim]
    if not full:
        return ()
    if any(has_tokens(dim) or has_batch(dim) for dim in full):
        layouts = [_merge_others(dim) for dim in full]
        if any(layout != layouts[0] for layout in layouts):
            raise AxesError("FVX012", "a token axis or the batch axis meets another axis")
    return max(full, key=len)


def meets_tokens(side_shape: Sequence[int], axes: Axes) -> bool:
    """Whether a side input, aligned from the right, has an entry per token of `axes`."""
    aligned = zip(reversed(side_shape), reversed(axes), strict=False)
    return any(has_tokens(dim) and size != 1 for size, dim in aligned)
