"""Pruning of one map in a longer sequence, as in loops without a KV cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvar_fx.methods import Method
from fastvar_fx.ops import Scale, take_tokens

Around = tuple[int, int]
"""How many tokens of a sequence come before and after a map."""


def within(method: Method, around: Around, cached_around: Around) -> Method:
    """Returns a method that prunes a map in a longer sequence; the tokens around it all stay.

    Args:
        method: How the map is pruned.
        around: How many tokens come before and after it.
        cached_around: The same in the captured output.
    """
    return Method(
        select=partial(_select_within, method, around),
        take=partial(_take_within, method, around),
        restore=partial(_restore_within, method, around, cached_around),
        once=method.once,
    )


def _parts(x: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
    """Splits x (B, n, ...) into what is before the map, the map, and what is after it."""
    before, after = around
    end = x.shape[1] - after
    return x[:, :before], x[:, before:end], x[:, end:]


def _select_within(method: Method, around: Around, x: Tensor, kept: int) -> tuple[Tensor, Any]:
    """Returns all tokens that stay (B, kept), and what the method selected of the map."""
    inner = method.select(_parts(x, around)[1], kept - sum(around))
    chosen = inner[0] if isinstance(inner, tuple) else inner
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    before, _, after = _parts(places, around)
    return torch.cat((before, chosen + around[0], after), dim=1), inner


def _take_within(
    method: Method, around: Around, x: Tensor, selection: tuple[Tensor, Any]
) -> Tensor:
    index, inner = selection
    if method.take is take_tokens:
        return take_tokens(x, index)
    before, tokens, after = _parts(x, around)
    return torch.cat((before, method.take(tokens, inner), after), dim=1)


def _restore_within(  # noqa: PLR0913
    method: Method,
    around: Around,
    cached_around: Around,
    kept: Tensor,
    selection: tuple[Tensor, Any],
    cached: Tensor,
    cached_scale: Scale,
    scale: Scale,
) -> Tensor:
    before, tokens, after = _parts(kept, around)
    captured = _parts(cached, cached_around)[1]
    full = method.restore(tokens, selection[1], captured, cached_scale, scale)
    return torch.cat((before, full, after), dim=1)
