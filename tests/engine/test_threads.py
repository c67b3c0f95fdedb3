"""Threads that share a model: each runs its own schedule, and leaves nothing when it ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.family import _Choice
from fastvar_fx.engine.loop import Loop
from passes.trace.calls import Call, reference
from tests.engine.test_calls import SCHEDULE, Draw, Net, in_threads, same, transformed
from tests.engine.test_skip import CODE, VOCAB, WIDTH, Accumulator, Block
from tests.marks import mostly_slow

LANDSCAPE = ((1, 1), (2, 2), (2, 4), (3, 6), (4, 8))
PORTRAIT = tuple((w, h) for h, w in LANDSCAPE)
LONGER = (*LANDSCAPE[:-1], (5, 10))
"""The same as the landscape up to the step that is skipped."""

SKIPPING = [Schedule(scales, (0.5, 1.0)) for scales in (LANDSCAPE, PORTRAIT, LONGER)]


class Sums(Accumulator):
    """Sums maps of any shape up at the final resolution."""

    scales: Sequence[Any] = ()

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        final = f_hat.shape[-2:]
        f_hat = f_hat + self.conv(F.interpolate(h_BChw, final, mode="bicubic"))
        shape = h_BChw.shape[-2:]
        for scales in (LANDSCAPE, PORTRAIT, LONGER):
            if scales[-1] == final and si < SN - 1 and scales[si] == shape:
                return f_hat, F.interpolate(f_hat, scales[si + 1], mode="area")
        return f_hat, f_hat


class Var(nn.Module):
    """A small VAR whose loop yields after each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Uncached() for _ in range(2))
        self.start = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.word, self.head = nn.Linear(CODE, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.codes = nn.Embedding(VOCAB, CODE)
        self.proxy = (Sums(),)
        self.eval()

    def draw(self, scales: Sequence[Any], turn: Callable[[], object]) -> list[Tensor]:
        return list(self._steps(scales, turn))

    def _steps(
        self, scales: Sequence[Any], turn: Callable[[], object] = int, until: int = 5
    ) -> Iterator[Tensor]:
        """Yields the sums; `turn` is called between the blocks and the sum."""
        quantizer: Any = self.proxy[0]
        f_hat, x = torch.zeros(1, CODE, *scales[-1]), self.start
        for si, shape in enumerate(scales[:until]):
            for block in self.blocks:
                x = block(x)
            h = self.codes(self.head(x).argmax(-1)).mT.reshape(1, CODE, *shape)
            turn()
            f_hat, following = quantizer.get_next_autoregressive_input(si, len(scales), f_hat, h)
            x = self.word(following.flatten(2).mT)
            yield f_hat


class Uncached(Block):
    cached = False


def alone(scales: Sequence[Any]) -> list[Tensor]:
    """What a model of this schedule alone draws, by a loop that leaves out the skipped step."""
    fast = fastvar_fx.transform(Var(), Schedule(scales[:-1], (0.5,)))
    return list(fast._steps(scales, until=4))


@pytest.mark.parametrize("hands", [True, False], ids=["scales handed in", "by token counts"])
def test_threads_that_skip_steps_of_different_schedules(hands: bool) -> None:
    pair = [SKIPPING[0].scales, SKIPPING[1 if hands else 2].scales]
    fast = fastvar_fx.transform(Var(), [SKIPPING[0], SKIPPING[1 if hands else 2]])
    wanted = list(map(alone, pair))
    barrier = threading.Barrier(2, timeout=60)

    @torch.no_grad()
    def run(scales: Sequence[Any], want: list[Tensor]) -> None:
        for _ in range(3):
            if hands:
                got = fast.draw(scales, barrier.wait)
            else:
                got = list(fast._steps(scales, barrier.wait))
            assert all(map(torch.equal, got, [*want, want[-1]]))

    in_threads(*map(partial, repeat(run), pair, wanted))


def test_models_that_make_their_programs_at_once() -> None:
    """torch's tracing serves one thread, whatever the models."""
    draws = [(Draw(transformed(), seed), Draw(Net(), seed, hand=True)) for seed in range(4)]

    @torch.no_grad()
    def run(got: Draw, want: Draw) -> None:
        for step in range(5):
            same(got.step(step), want.step(step))

    in_threads(*(partial(run, *pair) for pair in draws))


def test_calls_that_are_traced_at_once_leave_the_compiler_on() -> None:
    """Within each, compiled functions run eagerly; the one that began first ends first."""
    entered, began, ended = (threading.Event() for _ in range(3))
    failed = []

    class Waits(nn.Module):
        def forward(self, x: Tensor, first: bool) -> Tensor:
            if first:
                entered.set()
                assert began.wait(60)
            else:
                began.set()
                assert ended.wait(60)
            return x + 1

    def run(first: bool) -> None:
        module = Waits()
        try:
            reference(Call(module.forward, module, (torch.zeros(2), first), {}))
        except AssertionError as error:
            failed.append(error)
        if first:
            ended.set()

    calls = [0]

    def counting(graph_module: nn.Module, _inputs: object) -> Any:
        calls[0] += 1
        return graph_module.forward

    torch._dynamo.reset()
    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert not failed
    torch.compile(lambda x: x + 2, backend=counting)(torch.zeros(2))
    assert calls == [1]


def test_loops_that_skip_after_those_of_other_schedules() -> None:
    fast = fastvar_fx.transform(Var(), [SKIPPING[0], SKIPPING[2]])
    for schedule in (SKIPPING[0], SKIPPING[2], SKIPPING[2], SKIPPING[0]):
        want = alone(schedule.scales)
        assert all(map(torch.equal, fast._steps(schedule.scales), [*want, want[-1]]))


# --- threads that end --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["none", "dict"])
@pytest.mark.parametrize("steps", mostly_slow([3, 4, 5], quick=1))
def test_threads_that_end_leave_nothing_behind(form: str, steps: int) -> None:
    """Each thread of a server draws one image, or a part of one."""
    fast, net = fastvar_fx.transform(Net(form), [SCHEDULE, LARGER]), Net(form)

    @torch.no_grad()
    def run(barrier: threading.Barrier, seed: int) -> None:
        got, want = Draw(fast, seed), Draw(net, seed, hand=True)
        for step in range(steps):
            barrier.wait()
            same(got.step(step), want.step(step))

    held = []
    for threads in (1, 6, 1):
        barrier = threading.Barrier(threads, timeout=60)
        in_threads(*(partial(run, barrier, seed) for seed in range(threads)))
        bytes_held = fastvar_fx.explain(fast).captured_bytes
        held.append((bytes_held, count(Loop), count(_Choice)))
    assert held[2][0] <= 2 * held[0][0]  # one may wait for Python's collector
    assert held[0][1:] == held[1][1:] == held[2][1:]


def test_features_that_keep_the_caches_alive_are_few() -> None:
    """With gradients enabled, as they are in new threads, nobody knows which caches are left."""
    fast = transformed()

    def run(seed: int) -> None:
        draw = Draw(fast, seed)
        for step in range(3):
            draw.step(step)

    held = []
    for seed in range(14):
        in_threads(partial(run, seed))
        held.append(fastvar_fx.explain(fast).captured_bytes)
    assert held[12:] == held[11:13]


LARGER = Schedule((1, 2, 4, 5, 6), (0.5, 0.4))


def count(kind: type) -> int:
    return sum(type(found) is kind for found in gc.get_objects())
