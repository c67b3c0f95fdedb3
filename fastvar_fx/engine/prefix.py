"""Pruning of one map in a longer sequence, as in loops without a KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvar_fx.methods import Method
from fastvar_fx.ops import Scale, take_tokens
from passes.rewrite.prune import Rule

Around = tuple[int, int]
"""How many tokens of a sequence come before and after a map."""


@dataclass(frozen=True)
class Within:
    """Operators that prune a map in a longer sequence; the tokens around it all stay.

    Attributes:
        method: How the map is pruned.
        around: How many tokens come before and after it.
        cached_around: The same in the captured output.
    """

    method: Method
    around: Around
    cached_around: Around
    restores_anew: bool = False

    @property
    def asks(self) -> Mapping[Rule, Sequence[str]]:
        """What the functions of the method ask for."""
        return self.method.asks

    def select(self, x: Tensor, kept: int, **asked: Any) -> tuple[Tensor, Any]:
        """Returns all tokens that stay (B, kept), and what the method selected of the map."""
        tokens, count = _parts(x, self.around)[1], kept - sum(self.around)
        inner = self.method.select(tokens, count, **self._inside(asked))
        chosen = inner[0] if isinstance(inner, tuple) else inner
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        before, _, after = _parts(places, self.around)
        return torch.cat((before, chosen + self.around[0], after), dim=1), inner

    def take(self, x: Tensor, selection: tuple[Tensor, Any], **asked: Any) -> Tensor:
        """Returns the tokens around the map, and between them what the branch runs on."""
        index, inner = selection
        if self.method.take is take_tokens:
            return take_tokens(x, index)
        before, tokens, after = _parts(x, self.around)
        taken = self.method.take(tokens, inner, **self._inside(asked))
        return torch.cat((before, taken, after), dim=1)

    def restore(
        self,
        kept: Tensor,
        selection: tuple[Tensor, Any],
        cached: Tensor,
        *scales: Scale,
        **asked: Any,
    ) -> Tensor:
        """Returns the whole output, with that of the map restored."""
        before, tokens, after = _parts(kept, self.around)
        captured = _parts(cached, self.cached_around)[1]
        inside = self._inside(asked)
        full = self.method.restore(tokens, selection[1], captured, *scales, **inside)
        return torch.cat((before, full, after), dim=1)

    def _inside(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Returns what a function asks for, of the map alone."""
        inside = dict(asked)
        if "cached" in asked:
            inside["cached"] = _parts(asked["cached"], self.cached_around)[1]
        if asked.get("selected") is not None:
            _, inside["selected"] = asked["selected"]
        return inside


def _parts(x: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
    """Splits x (B, n, ...) into what is before the map, the map, and what is after it."""
    before, after = around
    end = x.shape[1] - after
    return x[:, :before], x[:, before:end], x[:, end:]
