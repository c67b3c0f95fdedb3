"""A small VAR, and FastVAR by hand around its live submodules: what every tool is compared with.

The hand-written one calls the very modules that hooks, adapters and quantised weights are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule, ops

SIDES = (1, 2, 4, 6, 8)
SCHEDULE = Schedule(SIDES, (0.5, 0.75))
LABELS = torch.tensor([1, 2])
WIDTH = 64
DEPTH = 2
HEADS = 4

Attend = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
RunBlock = Callable[["Block", Tensor, Tensor, Any], Tensor]


class Attention(nn.Module):
    """Self-attention whose keys and values are cached in attributes, or in the cache given."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.layer = layer

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        B, L, C = x.shape
        q, k, v = (f(x).view(B, L, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        else:
            if self.keys is not None and self.values is not None:
                k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
            self.keys, self.values = k, v
        out = F.scaled_dot_product_attention(q, k, v)
        attended: Tensor = self.proj(out.transpose(1, 2).reshape(B, L, C))
        return attended


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.norm, self.ffn_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.ffn = Attention(layer), FeedForward()

    def forward(self, x: Tensor, cond: Tensor, cache: Any = None) -> Tensor:
        x = x + self.attn(self.norm(x) + cond[:, None], cache)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Toy(nn.Module):
    """Draws the maps of `SIDES`; its loop is its forward, which is what offloading wraps."""

    blocks: Any

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.emb = nn.Embedding(10, WIDTH)
            self.pos = nn.Parameter(torch.randn(1, sum(s * s for s in SIDES), WIDTH))
            self.blocks = nn.ModuleList(Block(layer) for layer in range(DEPTH))
            self.head = nn.Linear(WIDTH, WIDTH)
        self.eval()

    def steps(
        self, labels: Tensor, cache: Any = None, run: RunBlock | None = None
    ) -> Iterator[Tensor]:
        for block in self.blocks:
            block.attn.keys = block.attn.values = None
        cond = self.emb(labels)
        x = cond[:, None] + self.pos[:, :1]
        begin = 1
        for side, following in zip(SIDES, (*SIDES[1:], 0), strict=True):
            for block in self.blocks:
                x = block(x, cond, cache) if run is None else run(block, x, cond, cache)
            image = self.head(x).transpose(1, 2).unflatten(2, (side, side))
            yield image
            if following:
                x = F.interpolate(image, (following, following)).flatten(2).mT
                end = begin + following * following
                x, begin = x + self.pos[:, begin:end], end

    def draw(self, labels: Tensor, cache: Any = None, run: RunBlock | None = None) -> Tensor:
        *_, image = self.steps(labels, cache, run)
        return image

    def forward(self, labels: Tensor) -> Tensor:
        return self.draw(labels)


def by_hand(
    model: Any, cache: Any = None, around: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """What FastVAR, written by hand around a model's submodules, draws.

    Args:
        model: A plain model.
        cache: The KV cache, if not attributes.
        around: What a hook of the blocks does to their output.
    """
    captured: dict[Any, Tensor] = {}
    steps = {SCHEDULE.tokens(step): step for step in range(SCHEDULE.steps)}

    def branch(key: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        step = steps[x.shape[1]]
        if step not in SCHEDULE.pruned_steps:
            captured[key] = function(x)
            return x + captured[key]
        index = ops.pivotal_token_selection(x, SCHEDULE.kept(step))
        kept = function(ops.take_tokens(x, index))
        scales = SCHEDULE.scales[SCHEDULE.cache_step], SCHEDULE.scales[step]
        return x + ops.cached_token_restoration(kept, index, captured[key], *scales)

    def run(block: Block, x: Tensor, cond: Tensor, cache: Any) -> Tensor:
        key = id(block)
        x = branch((key, 0), x, lambda t: block.attn(block.norm(t) + cond[:, None], cache))
        return around(branch((key, 1), x, lambda t: block.ffn(block.ffn_norm(t))))

    image: Tensor = model.draw(LABELS, cache, run)
    return image


Model = TypeVar("Model", bound=nn.Module)


def transformed(model: Model, **options: Any) -> Model:
    return fastvar_fx.transform(model, SCHEDULE, **options)


def assert_prunes(fast: Any, want: Tensor, run: Callable[[Any], Tensor] | None = None) -> None:
    """Checks that all branches prune, and that two generations draw what is wanted."""
    for _ in range(2):
        got = fast(LABELS) if run is None else run(fast)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    rows = fastvar_fx.explain(fast).rows
    pruned = {(row.block, row.kind, row.step) for row in rows if row.kept < row.tokens}
    assert len(pruned) == 2 * DEPTH * len(SCHEDULE.pruned_steps)


When = Callable[[Toy, Callable[[Any], Any]], Any]
"""Edits a model before or after it is transformed; returns the transformed one."""


def before(model: Toy, edit: Callable[[Any], Any]) -> Any:
    return transformed(edit(model))


def after_transform(model: Toy, edit: Callable[[Any], Any]) -> Any:
    return edit(transformed(model))


def after_a_generation(model: Toy, edit: Callable[[Any], Any]) -> Any:
    fast = transformed(model)
    fast(LABELS)
    return edit(fast)


at_any_time = pytest.mark.parametrize("when", [before, after_transform, after_a_generation])
