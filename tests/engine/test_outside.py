"""The share of a generation's FLOPs outside the blocks, against FLOPs counted by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.executor import EAGER

SIDES = (1, 2, 3, 4)
TOKENS = sum(side * side for side in SIDES)
WIDTH, VOCAB, BATCH = 8, 40, 2
SCHEDULE = Schedule(SIDES, (0.5, 0.75))
LINE = "outside the blocks: "
Run = Callable[[Any], object]


class Block(nn.Module):
    """Attention, a feed-forward, and a product per sample that no branch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cond: Tensor) -> Any:
        x = x * self.scale(cond)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.start = nn.Parameter(torch.randn(BATCH, 1, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.decoder = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def draw(self, calls: int = 1) -> Tensor:
        """Draws an image; with two calls, guidance is a call of its own at every step."""
        maps = [self.start * (1 + i) for i in range(calls)]
        for side, following in zip(SIDES, (*SIDES[1:], SIDES[-1]), strict=True):
            made = []
            for x in maps:
                for block in self.blocks:
                    x = block(x, self.start)
                made.append(x + self.head(x).mean(-1, keepdim=True))
            images = [x.mT.reshape(BATCH, WIDTH, side, side) for x in made]
            size = (following, following)
            maps = [F.interpolate(x, size, mode="bicubic").flatten(2).mT for x in images]
        image: Tensor = self.decoder(maps[0].mT.reshape(BATCH, WIDTH, SIDES[-1], SIDES[-1]))
        return image


def net(depth: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(depth).eval()


def outside_flops(calls: int = 1) -> int:
    head = calls * 2 * BATCH * TOKENS * WIDTH * VOCAB
    return head + 2 * BATCH * SIDES[-1] ** 2 * WIDTH * 3 * 9


def block_flops(calls: int = 1) -> int:
    """FLOPs of one block over all steps, dense."""
    weights = 3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * 2 * WIDTH * WIDTH
    attention = sum(4 * BATCH * side**4 * WIDTH for side in SIDES)
    scale = len(SIDES) * 2 * BATCH * WIDTH * WIDTH
    return calls * (2 * BATCH * TOKENS * weights + attention + scale)


def share(calls: int = 1, depth: int = 3) -> float:
    outside = outside_flops(calls)
    return outside / (outside + depth * block_flops(calls))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("calls", [1, 2])
def test_the_share_is_that_of_a_dense_generation(
    mode: Callable[[], AbstractContextManager[None]], calls: int
) -> None:
    fast = fastvar_fx.transform(net(), SCHEDULE)
    for _ in range(2):  # the second run makes no programs
        with mode():
            report = fastvar_fx.trace(fast, lambda m: m.draw(calls))
        assert report.outside_share == share(calls)
    with mode():
        fast.draw(calls)
    assert fastvar_fx.explain(fast).outside_share == share(calls)
    line = f"{LINE}{100 * share(calls):.1f} % of the matrix-product FLOPs of a dense generation"
    assert line in str(report).splitlines()
    assert json.loads(report.to_json())["outside_share"] == share(calls)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_counting_leaves_the_values_as_they_are(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    drawn: list[Tensor] = []
    fast = fastvar_fx.transform(net(), SCHEDULE)
    with mode():
        fastvar_fx.trace(fast, lambda m: drawn.append(m.draw()))
        assert torch.equal(drawn[0], fast.draw())


def test_blocks_that_never_prune_are_outside() -> None:
    schedule = Schedule(SIDES, (0.5, 0.75), layers=(1, 2))
    report = fastvar_fx.trace(fastvar_fx.transform(net(), schedule), lambda m: m.draw())
    outside = outside_flops() + block_flops()
    assert report.outside_share == outside / (outside + 2 * block_flops())


def test_two_images_have_the_share_of_one() -> None:
    fast = fastvar_fx.transform(net(), SCHEDULE)
    assert fastvar_fx.trace(fast, lambda m: (m.draw(), m.draw())).outside_share == share()


def test_each_schedule_has_its_own() -> None:
    other = Schedule(SIDES, (0.25, 0.5))
    fast = fastvar_fx.transform(net(), [SCHEDULE, other])
    fastvar_fx.use(fast, other)
    assert fastvar_fx.trace(fast, lambda m: m.draw()).outside_share == share()
    fastvar_fx.use(fast, SCHEDULE)
    assert fastvar_fx.explain(fast).outside_share is None


def assert_unknown(report: fastvar_fx.Report) -> None:
    assert report.outside_share is None
    assert LINE not in str(report)


def test_it_is_unknown_without_trace() -> None:
    fast = fastvar_fx.transform(net(), SCHEDULE)
    assert_unknown(fastvar_fx.explain(fast))
    fast.draw()
    assert_unknown(fastvar_fx.explain(fast))


def test_it_is_unknown_of_compiled_blocks() -> None:
    torch._dynamo.reset()
    fast = fastvar_fx.compile(fastvar_fx.transform(net(), SCHEDULE), backend="eager")
    assert_unknown(fastvar_fx.trace(fast, lambda m: m.draw()))


def test_it_is_unknown_if_blocks_run_in_another_thread() -> None:
    def in_a_thread(model: Any) -> None:
        thread = threading.Thread(target=model.draw)
        thread.start()
        thread.join()

    assert_unknown(fastvar_fx.trace(fastvar_fx.transform(net(), SCHEDULE), in_a_thread))


def test_a_failed_run_leaves_nothing_behind() -> None:
    def fails(model: Any) -> None:
        model.draw()
        raise KeyError("the user's")

    fast = fastvar_fx.transform(net(), SCHEDULE)
    with pytest.raises(KeyError, match="the user's"):
        fastvar_fx.trace(fast, fails)
    engine = fastvar_fx.engine.engine.Engine.of(fast)
    assert engine.executor is EAGER
    assert type(engine.family.lock) is type(threading.RLock())
    assert_unknown(fastvar_fx.explain(fast))
    assert fastvar_fx.trace(fast, lambda m: m.draw()).outside_share == share()
