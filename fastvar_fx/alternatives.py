"""Other rules of selection and restoration than the paper's, to compare it with.

Each goes to `transform(select=..., take=..., restore=...)`. A rule that needs the shape of a token
map to select tokens is made for a schedule and finds the map by its number of tokens.

    fast = transform(model, schedule, select=alternatives.uniform_grid(schedule.scales))
    fast = transform(model, schedule, **alternatives.token_merging(schedule.scales))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastvar_fx.ops import Restore, Scale, Select, Take, pivotal_scores, put_tokens, take_tokens

Mode = Literal["nearest", "bilinear", "area"]
"""How to interpolate a cached map."""


class Rules(TypedDict, total=False):
    """Arguments of `transform` that say how a branch is pruned."""

    select: Select
    take: Take
    restore: Restore
    select_once: bool


_SPREAD = (0.7548776662466927, 0.5698402909980532)
"""Steps of the R2 sequence, whose multiples fill the unit square evenly (M. Roberts, 2018)."""


# --- selection --------------------------------------------------------------------------------


def random_tokens(x: Tensor, kept: int) -> Tensor:
    """Returns `kept` tokens (B, kept) drawn from torch's global generator, ascending, int64."""
    return _highest(torch.rand_like(x[..., 0], dtype=torch.float32), kept)


def lowest_scores(x: Tensor, kept: int) -> Tensor:
    """Returns the tokens (B, kept) nearest to the mean token, ascending, int64: the smooth ones."""
    return _highest(-pivotal_scores(x), kept)


def uniform_grid(scales: Sequence[Scale]) -> Select:
    """Returns a rule that keeps tokens spread evenly over the map, whatever they hold.

    Args:
        scales: Those of the schedule; two of one token count must have one shape.

    Raises:
        ValueError: If two scales of one token count differ in shape.

    Example:
        >>> grid = uniform_grid([(2, 2), (4, 4)])
        >>> grid(torch.zeros(1, 16, 8), 4).tolist()
        [[0, 2, 9, 11]]
    """
    return partial(_evenly, _maps_by_count(scales))


def _evenly(maps: dict[int, tuple[int, int]], x: Tensor, kept: int) -> Tensor:
    if x.shape[1] not in maps:
        raise ValueError(f"the rule was made for maps of {sorted(maps)} tokens; found {x.shape[1]}")
    height, width = maps[x.shape[1]]
    rows = torch.arange(height, device=x.device, dtype=torch.float64) * _SPREAD[0]
    columns = torch.arange(width, device=x.device, dtype=torch.float64) * _SPREAD[1]
    order = rearrange(rows, "h -> h 1") + columns  # a threshold of it cuts out a lattice
    scores = x.new_zeros(x.shape[:2], dtype=torch.float64) - (order % 1).flatten()
    return _highest(scores, kept)


def _maps_by_count(scales: Sequence[Scale]) -> dict[int, tuple[int, int]]:
    """Returns (rows, columns) by token count; jointly drawn maps stand below each other."""
    maps: dict[int, tuple[int, int]] = {}
    for scale in scales:
        shape = (prod(scale[:-1]), scale[-1])
        if maps.setdefault(prod(scale), shape) != shape:
            raise ValueError(
                f"the token count must tell the map, but {prod(scale)} tokens are "
                f"{maps[prod(scale)]} and {shape} in {tuple(scales)}"
            )
    return maps


def _highest(scores: Tensor, kept: int) -> Tensor:
    return scores.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


# --- restoration ------------------------------------------------------------------------------


def zeros(kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale) -> Tensor:
    """Returns a branch's output (B, L, C) that is 0 at the tokens that were not kept."""
    full = cached.new_zeros(cached.shape[0], prod(scale), cached.shape[2])
    return put_tokens(full, index, kept)


def nearest_kept(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns a branch's output (B, L, C) that repeats at each token that of the nearest kept one.

    Near is meant on the map; jointly drawn maps are far from each other.

    Raises:
        ValueError: If no token is kept.
    """
    _check_some_kept(kept, "nearest_kept")
    places = _places(scale, cached.device)  # (L, 3)
    distances = torch.cdist(places, places[index])  # (B, L, kept)
    return take_tokens(kept, distances.argmin(dim=2))


def interpolated(mode: Mode) -> Restore:
    """Returns cached token restoration with another interpolation than `area`.

    Raises:
        ValueError: If the mode is unknown.
    """
    known = ("nearest", "bilinear", "area")
    if mode not in known:
        raise ValueError(f"interpolated takes a mode of {known}; found {mode!r}")
    return partial(_interpolate_and_put, mode)


def _interpolate_and_put(
    mode: Mode, kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    h, w = cached_scale[-2:]
    image = rearrange(cached, "b (m h w) c -> (b m) c h w", h=h, w=w)
    resized = F.interpolate(image, size=scale[-2:], mode=mode)
    full = rearrange(resized, "(b m) c h w -> b (m h w) c", b=cached.shape[0])
    return put_tokens(full.contiguous(), index, kept)


def _places(scale: Scale, device: torch.device) -> Tensor:
    """Returns the place of every token, float32 (L, 3): map, row and column."""
    maps, height, width = scale if len(scale) == 3 else (1, *scale)
    far = height + width
    axes = (torch.arange(n, device=device, dtype=torch.float32) for n in (maps, height, width))
    places = torch.cartesian_prod(*axes)  # (L, 3)
    return places * places.new_tensor([far, 1, 1])


# --- merging ----------------------------------------------------------------------------------


def token_merging(scales: Sequence[Scale]) -> Rules:
    """Returns `select`, `take` and `restore` of ToMe, which merges tokens and uses no cache.

    One token in four, spread evenly over the map, is a destination; if fewer are kept, as many as
    are kept. Of the others, those most similar to a destination are merged into it: the branch runs
    on the mean of the group, and its output is copied to all of them. Side inputs such as positions
    are the destination's.

    Args:
        scales: Those of the schedule.

    Raises:
        ValueError: If two scales of one token count differ in shape; at a call that keeps no token.

    Source: bipartite soft matching of ToMe, arXiv 2210.09461, with the destinations and the
    unmerging of tomesd, arXiv 2303.17604. Similarity is the cosine of the residual stream. Here
    destinations lie on an even lattice, not at random in 2 x 2 windows, and means are not weighted.

    Example:
        >>> rules = token_merging([(2, 2), (4, 4)])
        >>> sorted(rules)
        ['restore', 'select', 'take']
    """
    return {
        "select": partial(_match, _maps_by_count(scales)),
        "take": _merge,
        "restore": _unmerge,
    }


def _match(maps: dict[int, tuple[int, int]], x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens that stay (B, kept), and of every token which of them it is in (B, L)."""
    _check_some_kept(x[:, :kept], "token_merging")
    tokens = x.shape[1]
    into = _evenly(maps, x, min(kept, max(tokens // 4, 1)))  # (B, D) destinations
    unit = F.normalize(x.float(), dim=-1)
    similarity = unit @ take_tokens(unit, into).mT  # (B, L, D)
    best = similarity.max(dim=2)
    merged_last = best.values.scatter(1, into, -torch.inf)  # a destination always stays
    stays = _highest(-merged_last, kept)  # (B, kept)
    slots = torch.full_like(best.indices, -1)
    order = torch.arange(kept, device=x.device).expand_as(stays)
    slots = slots.scatter(1, stays, order)
    theirs = slots.gather(1, into.gather(1, best.indices))  # the slot of each one's destination
    return stays, torch.where(slots < 0, theirs, slots)


def _merge(x: Tensor, selection: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the means (B, kept, C) of the groups."""
    stays, slots = selection
    place = rearrange(slots, "b l -> b l 1").expand_as(x)
    means = x.new_zeros(*stays.shape, x.shape[2])
    return means.scatter_reduce(1, place, x, "mean", include_self=False)


def _unmerge(
    kept: Tensor,
    selection: tuple[Tensor, Tensor],
    cached: Tensor,
    cached_scale: Scale,
    scale: Scale,
) -> Tensor:
    """Returns a branch's output (B, L, C): each token has that of its group."""
    _check_some_kept(kept, "token_merging")
    return take_tokens(kept, selection[1])


def _check_some_kept(kept: Tensor, rule: str) -> None:
    if not kept.shape[1]:
        raise ValueError(f"{rule} needs a token to go by, but none is kept; use a ratio below 1")
