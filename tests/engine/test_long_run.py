"""Many generations, as a server runs them: nothing grows, and the values stay right."""

from __future__ import annotations

import gc
import random
import resource
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.engine import Engine
from tests.engine.test_calls import CACHE_STEP, WIDTH, Draw, Net, same

SCHEDULE = Schedule((1, 2, 3, 4, 5), (0.5, 0.4))
MOST = 16
"""Programs of a block at a step, at most."""


class Adapted(nn.Module):
    """A linear layer with a low-rank addition of some strength, as LoRA makes it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, layer.out_features, bias=False).double()
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.strength * self.up(self.down(x))
        return out


def edited(net: Any, edit: tuple[str, float]) -> None:
    """Adds adapters to the feed-forwards, takes them off, or sets their strength."""
    kind, strength = edit
    for block in net.blocks:
        if kind == "off" and isinstance(block.fc1, Adapted):
            block.fc1 = block.fc1.layer
        elif kind == "on":
            if not isinstance(block.fc1, Adapted):
                torch.manual_seed(1)
                block.fc1 = Adapted(block.fc1)
            block.fc1.strength = strength


def generation(rng: random.Random, fast: Net, net: Net, seed: int) -> None:
    """Runs one with a random batch, compares it, and cuts it off or draws a step twice."""
    batch, stop = rng.randrange(1, 9), rng.choice([5, 5, 5, 5, *range(1, 5)])
    got, want = Draw(fast, seed, batch=batch), Draw(net, seed, batch=batch, hand=True)
    again = rng.randrange(8)
    for step in range(stop):
        if step == again and step < 4:
            saved = got.saved()
            got.step(step, 1)
            got.rolled_back(saved)
        same(got.step(step), want.step(step))


def whole(draw: Draw) -> None:
    for step in range(5):
        draw.step(step)


def tensors() -> int:
    gc.collect()
    return sum(type(found) is Tensor for found in gc.get_objects())


@pytest.mark.slow
def test_many_generations_leave_nothing_behind() -> None:
    generations = 1000 if settings.get_current_profile_name() == "long" else 30
    rng = random.Random(0)
    fast, net = fastvar_fx.transform(Net(), SCHEDULE), Net()
    sizes: list[tuple[int, float]] = []
    held = 0
    with torch.no_grad():
        for seed in range(generations):
            if rng.random() < 0.1:
                edit = (rng.choice(["on", "on", "off"]), rng.uniform(0.1, 2.0))
                edited(fast, edit)
                edited(net, edit)
            generation(rng, fast, net, seed)
            held = max(held, fastvar_fx.explain(fast).captured_bytes)
            if (seed + 1) % (generations // 10) == 0:
                gc.collect()  # caches of loops that are gone may be in cycles
                whole(Draw(fast, seed))
                assert fastvar_fx.explain(fast).captured_bytes == 0
                sizes.append((tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    sites: list[Any] = [vars(block)["_fastvar"].site for block in fast.blocks]
    bound = [len(programs) for site in sites for programs in site.programs.values()]
    entries = len(Engine.of(fast).store._pool.entries)
    print(f"tensors and most MiB by tenths {sizes}, bound {bound}, entries {entries}")
    assert held <= 2 * fastvar_fx.explain(fast).peak_captured_bytes
    assert max(bound) <= MOST
    assert entries <= len(sites) * MOST * (5 - CACHE_STEP)
    counts = [count for count, _ in sizes]
    assert max(counts[5:]) <= max(counts[:5]) + 2 * WIDTH, "tensors pile up"
