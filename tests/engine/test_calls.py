"""Calls of a step and loops that share a model, each compared with FastVAR edited in by hand.

A generation's calls are told apart by the caches that they are handed, else by their other
arguments, else by their order. What cannot be told apart is an error, never a wrong image.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import RunError, Schedule
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.program import Program
from tests import zoo
from tests.marks import mostly_slow
from tests.reference import pivotal_indices

WIDTH = 8
SCHEDULE = Schedule((1, 2, 3, 4, 5), (0.5, 0.4))
CACHE_STEP, PRUNED = 2, (3, 4)
DEPTH = 2


class Slotted:
    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys: Tensor | None = None


class Called:
    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def __call__(self) -> None:
        raise AssertionError


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None


OBJECTS = {"slots": Slotted, "callable": Called, "module": Held}


class Block(nn.Module):
    """Attention over a cache that is handed in, of one of several forms, then a feed-forward."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def attend(self, x: Tensor, cond: Tensor, cache: Any) -> tuple[Tensor, Any]:
        q, k = self.q(x + cond), self.k(x + cond)
        if self.form == "dict":
            k = cache["k"] = torch.cat([cache["k"], k], 1) if "k" in cache else k
        elif self.form in OBJECTS:
            k = cache.keys = torch.cat([cache.keys, k], 1) if cache.keys is not None else k
        elif self.form == "tuple":
            cache = (torch.cat([cache[0], k], 1) if cache else k,)
            (k,) = cache
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, k))
        return out, cache

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out

    def forward(self, x: Tensor, cond: Tensor, cache: Any = None) -> Any:
        out, cache = self.attend(x, cond, cache)
        x = x + out
        x = x + self.feed(x)
        return (x, cache) if self.form == "tuple" else x


class Net(nn.Module):
    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.blocks = nn.ModuleList(Block(form) for _ in range(DEPTH))
        self.double().eval()


def randn(seed: int, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, WIDTH, generator=generator).double()


class Draw:
    """One stream of calls through a net, such as the conditional half of a generation."""

    def __init__(self, net: Net, seed: int, *, hand: bool = False, batch: int = 1) -> None:
        self.net, self.seed, self.hand, self.batch = net, seed, hand, batch
        self.cond = randn(seed, batch, 1)
        make: Any = {"dict": dict, **OBJECTS}.get(net.form, tuple)
        self.caches: list[Any] = [make() for _ in net.blocks]
        self.captured: dict[tuple[int, str], Tensor] = {}
        self.rows = slice(None)

    def step(self, step: int, try_: int = 0, *, fails: int | None = None) -> Tensor:
        x = randn(100 * self.seed + 10 * step + try_, self.batch, SCHEDULE.tokens(step))[self.rows]
        for layer in range(DEPTH):
            x = self.block(layer, x[..., : WIDTH - (layer == fails)], step)
        return x

    def block(self, layer: int, x: Tensor, step: int) -> Tensor:
        if self.hand:
            return self.by_hand(layer, x, step)
        made = self.net.blocks[layer](x, self.cond[self.rows], self.caches[layer])
        if self.net.form == "tuple":
            made, self.caches[layer] = made
        out: Tensor = made
        return out

    def by_hand(self, layer: int, x: Tensor, step: int) -> Tensor:
        block: Any = self.net.blocks[layer]

        def attend(x: Tensor) -> Tensor:
            made, self.caches[layer] = block.attend(x, self.cond[self.rows], self.caches[layer])
            out: Tensor = made
            return out

        for name, branch in (("attention", attend), ("ffn", block.feed)):
            if step in PRUNED and self.prunes(layer, name):
                index = pivotal_indices(x, SCHEDULE.kept(step))[..., None].expand(-1, -1, WIDTH)
                cached = self.captured[layer, name][self.rows]
                size = SCHEDULE.scales[CACHE_STEP]
                image = cached.mT.reshape(*cached.mT.shape[:2], *size)
                full = F.interpolate(image, SCHEDULE.scales[step], mode="area").flatten(2).mT
                x = x + full.scatter(1, index, branch(x.gather(1, index)))
            else:
                out = branch(x)
                if step not in PRUNED:
                    self.captured[layer, name] = out
                x = x + out
        return x

    def prunes(self, layer: int, name: str) -> bool:
        """Whether a branch prunes at the pruned steps, by hand."""
        return True

    def saved(self) -> list[Any]:
        return [dict(c) if self.net.form == "dict" else c for c in self.caches]

    def rolled_back(self, caches: list[Any]) -> None:
        """Puts earlier caches back, as a loop does that draws a step again."""
        for mine, earlier in zip(self.caches, caches, strict=True):
            if self.net.form == "dict":
                mine.clear()
                mine.update(earlier)
        if self.net.form == "tuple":
            self.caches = caches


def transformed(form: str = "dict", schedule: Schedule = SCHEDULE, **options: Any) -> Net:
    return fastvar_fx.transform(Net(form), schedule, **options)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


FORMS = ("dict", "tuple", "none")


# --- several calls a step ----------------------------------------------------------------------


ORDERS = {
    "swapped": [("ab", "ba")[step % 2] for step in range(5)],
    "swapped at the last step": ["ab"] * 4 + ["ba"],
    "one from the cache step on": ["ab", "ab", "ab", "a", "a"],
    "the other from the cache step on": ["ab", "ab", "ab", "b", "b"],
    "the other at the last step": ["ab", "ab", "ab", "ab", "b"],
    "one at the last step but one": ["ab", "ab", "ab", "b", "ab"],
    "guidance from the second step": ["a", "ab", "ab", "ab", "ab"],
    "guidance from the cache step": ["a", "a", "ab", "ab", "ab"],
    "first the one, then the other": ["ab", "ba", "ba", "ab", "ba"],
}


@pytest.mark.parametrize("form", mostly_slow(FORMS, quick=2))
@pytest.mark.parametrize("order", ORDERS)
def test_calls_in_any_order(form: str, order: str) -> None:
    """Without caches, the other arguments of a call tell it apart."""
    fast = transformed(form)
    for _ in range(2):
        got = {who: Draw(fast, seed) for seed, who in enumerate("ab")}
        want = {who: Draw(Net(form), seed, hand=True) for seed, who in enumerate("ab")}
        for step, calls in enumerate(ORDERS[order]):
            if order == "one at the last step but one" and step == 4:
                calls = "b"
            for who in calls:
                same(got[who].step(step), want[who].step(step))


@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("calls", ["a", "ab"])
@pytest.mark.parametrize("live_rows", [None, "last"])
def test_caches_that_the_loop_makes_anew(form: str, calls: str, live_rows: Any) -> None:
    """After a pruned step that was known by its caches; with `live_rows`, of fewer samples."""
    fast, net = transformed(form, live_rows=live_rows), Net(form)
    rows = slice(None) if live_rows is None else slice(1, 2)
    for _ in range(2):
        pairs = [
            (Draw(fast, seed, batch=2), Draw(net, seed, batch=2, hand=True))
            for seed in range(len(calls))
        ]
        for step in range(5):
            if step == 4:
                for draw in (draw for pair in pairs for draw in pair):
                    made = half_of(draw, rows).caches
                    draw.rows = rows
                    draw.caches = [
                        {"k": cache["k"].clone()} if form == "dict" else (cache[0].clone(),)
                        for cache in made
                    ]
                    del made
            for got, want in pairs:
                same(got.step(step), want.step(step))


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_step_between_pruned_ones_grows_the_caches(form: str) -> None:
    schedule = Schedule((1, 2, 3, 4, 5, 6), (0.5, 0.0, 0.4))
    fast, alone = transformed(form, schedule), [transformed(form, schedule) for _ in range(2)]
    draws = [(Draw(fast, seed), Draw(alone[seed], seed)) for seed in range(2)]
    for step in range(6):
        x = randn(step, 1, schedule.tokens(step))
        for got, want in draws[:: -1 if step % 2 else 1]:
            for layer in range(DEPTH):
                same(got.block(layer, x, step), want.block(layer, x, step))


@pytest.mark.parametrize("form", FORMS)
def test_a_call_without_counterpart_at_the_cache_step_is_an_error(form: str) -> None:
    fast = transformed(form)
    for first in "ab":
        draws = {"a": Draw(fast, 0), "b": Draw(Net(form), 1)}
        for step in range(3):
            for draw in draws.values():
                draw.step(step)
        draws["b"].net = fast
        with pytest.raises(RunError, match="cache step"):
            _ = [draws[who].step(3) for who in sorted("ab", key=lambda who: who != first)]


def test_fewer_calls_that_nothing_tells_apart_are_an_error() -> None:
    draws = alike(transformed("none"))
    for step in (0, 1, 2):
        for draw in draws:
            draw.step(step)
    draws[1].step(3)
    with pytest.raises(RunError, match="the pruned step before ran fewer"):
        draws[1].step(4)


def test_fewer_calls_at_the_last_step_are_an_error_in_trace_and_in_the_next_generation() -> None:
    fast = transformed("none")

    def run(net: Net) -> None:
        for step in range(5):
            for draw in alike(net)[: 1 if step == 4 else 2]:
                draw.step(step)

    with pytest.raises(RunError, match="the last step ran fewer"):
        fastvar_fx.trace(fast, run)
    with pytest.raises(RunError, match="the last step of the last generation ran fewer"):
        run(fast)


def test_fewer_calls_at_the_last_step_of_a_method_are_an_error_at_its_end() -> None:
    """Once: the next generation is not the one to blame."""

    class Drawing(Net):
        def draw(self, last: int) -> None:
            for step in range(5):
                for draw in alike(self)[: last if step == 4 else 2]:
                    draw.step(step)

    fast = fastvar_fx.transform(Drawing("none"), SCHEDULE)
    for _ in range(2):
        with pytest.raises(RunError, match="the last step ran fewer"):
            fast.draw(1)
        fast.draw(2)


def test_fewer_calls_at_the_last_step_after_a_cache_step_that_is_the_first() -> None:
    schedule = Schedule((3, 4, 5), (0.5, 0.4))
    fast = transformed("none", schedule)
    block = fast.blocks[0]
    for tokens in (9, 9, 16, 16, 25):
        block(randn(tokens, 1, tokens), SHARED)
    with pytest.raises(RunError, match="the last step of the last generation ran fewer"):
        block(randn(0, 1, 9), SHARED)


def test_a_step_that_is_left_amid_its_calls_and_drawn_again_is_an_error() -> None:
    draws = alike(transformed("none"))
    for step in range(3):
        for draw in draws:
            draw.step(step)
    draws[0].step(3)  # the loop is interrupted, and draws the step again
    for draw in draws:
        draw.step(3)
    with pytest.raises(RunError, match="the pruned step before ran some of them again"):
        draws[0].step(4)


@pytest.mark.parametrize("again", range(5))
@pytest.mark.parametrize("calls", range(1, 4))
def test_a_step_left_amid_its_calls_ends_right_or_in_an_error(again: int, calls: int) -> None:
    """`calls` of its four block calls ran; that two are one and a half passes shows at once."""
    draws, hands = alike(transformed("none")), alike(Net("none"))
    for step in range(5):
        if step == again:
            for draw in draws[: (calls + 1) // 2]:
                x = randn(step, 1, SCHEDULE.tokens(step))
                for layer in range(min(calls, 2) if draw is draws[0] else calls - 2):
                    x = draw.block(layer, x, step)
        try:
            got = [draw.step(step) for draw in draws]
        except RunError:
            assert step >= max(again, CACHE_STEP)
            assert calls == 2 or step <= max(again, PRUNED[0])
            break
        for hand in hands:
            hand.hand = True
        want = [hand.step(step) for hand in hands]
        if calls != 2 or again < CACHE_STEP or step == 4:
            assert all(map(torch.allclose, got, want))
    else:
        assert again < CACHE_STEP
    for step in range(5):
        for draw in draws:
            draw.step(step)


def test_calls_with_one_token_map_at_the_cache_step_have_one_at_each_step() -> None:
    """So a pruned step that is left after its first call and drawn again shows at once."""
    draws = alike(transformed("none", SCHEDULE))
    maps = [randn(step, 1, SCHEDULE.tokens(step)) for step in range(5)]

    def draw(step: int, x: Tensor) -> None:
        for each in draws:
            for layer in range(DEPTH):
                x = each.block(layer, maps[step] if layer == 0 else x, step)

    for step in range(5):
        draw(step, maps[step])
    for step in range(3):
        draw(step, maps[step])
    draws[0].block(1, draws[0].block(0, maps[3], 3), 3)
    maps[3] = randn(9, 1, 16)
    with pytest.raises(RunError, match="another token map than the call before"):
        draw(3, maps[3])


def alike(net: Net) -> list[Draw]:
    """Two streams of calls that nothing but their order tells apart."""
    draws = [Draw(net, seed) for seed in range(2)]
    for draw in draws:
        draw.cond = SHARED
    return draws


SHARED = torch.zeros(1, 1, WIDTH).double()


@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("split", PRUNED)
def test_one_call_of_both_halves_and_then_a_call_of_each(form: str, split: int) -> None:
    fast, net = transformed(form), Net(form)
    for _ in range(2):
        got, want = Draw(fast, 0, batch=2), Draw(net, 0, hand=True, batch=2)
        for step in range(split):
            same(got.step(step), want.step(step))
        halves = [(slice(0, 1), slice(1, 2)), (slice(1, 2), slice(0, 1))][split % 2]
        parts = [(half_of(got, rows), half_of(want, rows)) for rows in halves]
        for step in range(split, 5):
            for mine, hand in parts:
                same(mine.step(step), hand.step(step))


def half_of(draw: Draw, rows: slice) -> Draw:
    half = copy.copy(draw)
    half.rows = rows
    if draw.net.form == "dict":
        half.caches = [{"k": cache["k"][rows]} for cache in draw.caches]
    else:
        half.caches = [(cache[0][rows],) for cache in draw.caches]
    return half


def test_calls_from_the_first_step_on_which_is_the_cache_step() -> None:
    schedule = Schedule((3, 4, 5), (0.5, 0.4))
    fast, alone = transformed("none", schedule), [transformed("none", schedule) for _ in range(2)]
    for step in (2, 3, 4):
        for who in range(2):
            x = torch.randn(1, schedule.tokens(step - 2), WIDTH).double()
            cond = torch.full((1, 1, WIDTH), float(who)).double()
            same(fast.blocks[0](x, cond), alone[who].blocks[0](x, cond))


# --- steps drawn again -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "none"])
@pytest.mark.parametrize("calls", ["a", "ab"])
@pytest.mark.parametrize("again", range(4))
def test_a_step_drawn_again(form: str, calls: str, again: int) -> None:
    """The loop rejects what it drew, and rolls its caches back."""
    fast, net = transformed(form), Net(form)
    for _ in range(2):
        pairs = [(Draw(fast, seed), Draw(net, seed, hand=True)) for seed in range(len(calls))]
        for step in range(5):
            saved = [draw.saved() for pair in pairs for draw in pair]
            for try_ in range(3 if step == again else 1):
                for draw, caches in zip((d for p in pairs for d in p), saved, strict=True):
                    draw.rolled_back(copy.copy(caches))
                for got, want in pairs:
                    same(got.step(step, try_), want.step(step, try_))
        assert fastvar_fx.explain(fast).captured_bytes == 0


def test_the_last_step_cannot_be_drawn_again_once_its_features_are_freed() -> None:
    fast = transformed()
    draw = Draw(fast, 0)
    for step in range(5):
        caches = draw.saved()
        draw.step(step)
    for _ in range(2):
        draw.rolled_back(copy.copy(caches))
        with pytest.raises(RunError, match="drawn to its end"):
            draw.step(4)
    got, want = Draw(fast, 1), Draw(Net(), 1, hand=True)
    for step in range(5):
        same(got.step(step), want.step(step))


@pytest.mark.parametrize("form", ["dict", "none"])
@pytest.mark.parametrize("calls", ["a", "ab"])
@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("step", mostly_slow((4, 2, 3, 1, 0), quick=2))
def test_an_exception_in_a_block_and_the_step_again(
    form: str, calls: str, layer: int, step: int
) -> None:
    """The exception comes in the last call of the step, and all calls of it are made again."""
    fast, net = transformed(form), Net(form)
    for again in (True, False):
        pairs = [(Draw(fast, seed), Draw(net, seed, hand=True)) for seed in range(len(calls))]
        for at in range(5):
            if again and at == step:
                saved = [got.saved() for got, _ in pairs]
                for got, _ in pairs[:-1]:
                    got.step(at)
                with pytest.raises(RuntimeError, match="must match"):
                    pairs[-1][0].step(at, fails=layer)
                for (got, _), caches in zip(pairs, saved, strict=True):
                    got.rolled_back(caches)
            for got, want in pairs:
                same(got.step(at), want.step(at))


# --- loops that alternate ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "tuple", *OBJECTS])
@pytest.mark.parametrize("order", ["aaaaabbbbbb"[:10], "aaaabbbbba", "ababababba", "aabbbabbaa"])
def test_loops_that_alternate_are_kept_apart_by_their_caches(form: str, order: str) -> None:
    fast, net = transformed(form), Net(form)
    for _ in range(2):
        pairs = {w: (Draw(fast, s), Draw(net, s, hand=True)) for s, w in enumerate("ab")}
        steps = dict.fromkeys("ab", 0)
        for who in order:
            got, want = pairs[who]
            same(got.step(steps[who]), want.step(steps[who]))
            steps[who] += 1
    assert fastvar_fx.explain(fast).captured_bytes == 0


@pytest.mark.parametrize("form", OBJECTS)
def test_caches_of_earlier_generations_are_not_kept_and_their_programs_are_used(form: str) -> None:
    fast = transformed(form)
    for seed in range(3):
        draw = Draw(fast, seed)
        for step in range(5):
            draw.step(step)
        held = [weakref.ref(cache.keys) for cache in draw.caches]
    del draw
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    blocks: Any = fast.blocks
    programs = [made for block in blocks for made in block._fastvar.site.programs.values()]
    assert [len(step) for step in programs] == [1] * 6


@pytest.mark.parametrize("order", ["aaaabbbbba", "aaabbbbbaa", "aaabbbbaab"])
def test_loops_that_alternate_and_hand_in_nothing_are_an_error(order: str) -> None:
    fast = transformed("none")
    draws = dict(zip("ab", alike(fast), strict=True))
    steps = [(who, order[:i].count(who)) for i, who in enumerate(order)]
    with pytest.raises(RunError, match="transform or deep-copy the model once for each"):
        _ = [draws[who].step(step) for who, step in steps]


@pytest.mark.parametrize("order", ["aaabbba", "aaabbbba", "aaaabbba"])
def test_a_loop_without_caches_comes_back_after_another_began(order: str) -> None:
    """Its own arguments show that it is not the one that captured last."""
    fast, net = transformed("none"), Net("none")
    draws = {who: Draw(fast, seed) for seed, who in enumerate("ab")}
    want = Draw(net, 1, hand=True)
    steps = [(who, order[:i].count(who)) for i, who in enumerate(order)]
    for who, step in steps[:-1]:
        got = draws[who].step(step)
        if who == "b":
            same(got, want.step(step))
    with pytest.raises(RunError, match=r"left for another one|draw the whole gen"):
        draws["a"].step(steps[-1][1])
    for step in range(order.count("b"), 5):
        same(draws["b"].step(step), want.step(step))


def test_a_copy_made_within_a_generation_says_that_it_cannot_go_on() -> None:
    fast = transformed()
    draw = Draw(fast, 0)
    for step in range(3):
        draw.step(step)
    copied = copy.copy(draw)
    copied.net, copied.caches = copy.deepcopy(fast), draw.saved()
    with pytest.raises(RunError, match="continued on a copy of the model"):
        copied.step(3)
    want = Draw(Net(), 0, hand=True)
    for step in range(5):
        image = want.step(step)
    for step in (3, 4):
        got = draw.step(step)
    same(got, image)


def test_features_of_a_loop_that_is_gone_are_freed_when_another_begins() -> None:
    fast = transformed()
    draw = Draw(fast, 0)
    for step in range(4):
        draw.step(step)
    assert fastvar_fx.explain(fast).captured_bytes > 0
    del draw
    gc.collect()
    Draw(fast, 1).step(0)
    assert fastvar_fx.explain(fast).captured_bytes == 0


# --- threads -----------------------------------------------------------------------------------


def in_threads(*runs: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("warm", [True, False])
def test_threads_that_share_a_model(form: str, warm: bool) -> None:
    fast, net = transformed(form), Net(form)
    if warm:
        for step, draw in enumerate([Draw(fast, 9)] * 5):
            draw.step(step)

    def run(seed: int) -> None:
        for _ in range(3):
            got, want = Draw(fast, seed), Draw(net, seed, hand=True)
            for step in range(5):
                same(got.step(step), want.step(step))

    in_threads(*(partial(run, seed) for seed in range(4)))
    assert all(type(parameter) is nn.Parameter for parameter in fast.parameters())
    assert fastvar_fx.explain(fast).captured_bytes == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_generation_whose_steps_run_in_different_threads(form: str) -> None:
    fast, net = transformed(form), Net(form)
    for _ in range(2):
        got, want = Draw(fast, 0), Draw(net, 0, hand=True)
        for step in range(5):
            in_threads(partial(agree, got, want, step))


def test_steps_of_a_generation_that_always_run_in_the_same_threads() -> None:
    fast, net = transformed("none"), Net("none")
    with ThreadPoolExecutor(1) as early, ThreadPoolExecutor(1) as late:
        for seed in range(5):
            got, want = Draw(fast, seed), Draw(net, seed, hand=True)
            for step in range(5):
                (early if step < 2 else late).submit(agree, got, want, step).result()


def test_a_thread_enters_a_method_while_a_block_of_another_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = transformed("none")
    pairs = list(zip(alike(fast), alike(Net("none")), strict=True))
    pairs[1][1].hand = pairs[0][1].hand = True
    run = Program.run
    with ThreadPoolExecutor(1) as other:

        def interrupted(*args: Any) -> Any:
            result = run(*args)
            other.submit(lambda: Engine.of(fast).generation.watch).result()
            return result

        for step in range(3):
            other.submit(agree, *pairs[1], step).result()
        monkeypatch.setattr(Program, "run", interrupted)
        for step in range(5):
            agree(*pairs[0], step)
        monkeypatch.undo()
        for step in (3, 4):
            other.submit(agree, *pairs[1], step).result()


def agree(got: Draw, want: Draw, step: int) -> None:
    same(got.step(step), want.step(step))


# --- all of it at random -----------------------------------------------------------------------


@st.composite
def turns(draw: Any) -> Any:
    """Which of three loops goes on, and whether it draws its step again or is given up."""
    kinds = st.sampled_from(["on", "on", "on", "again", "fail", "over"])
    return draw(st.lists(st.tuples(st.integers(0, 2), kinds), min_size=10, max_size=60))


@pytest.mark.hypothesis
@zoo.examples(400, quick=100, long=2000)
@given(turns=turns(), form=st.sampled_from(["dict", "tuple"]))
def test_loops_with_caches_that_do_anything(turns: list[tuple[int, str]], form: str) -> None:
    fast, net = WARM[form]
    fastvar_fx.reset(fast)
    for got, want in played(turns, fast, net):
        same(got, want)


def played(turns: list[tuple[int, str]], fast: Net, net: Net) -> Iterator[tuple[Tensor, Tensor]]:
    made, seeds = [new(fast, net, seed) for seed in range(3)], 3
    for who, kind in turns:
        got, want, step = made[who]
        if kind == "over" or step == 5:
            made[who] = new(fast, net, seeds)
            seeds += 1
            continue
        saved = got.saved(), want.saved()
        if kind == "fail":
            with pytest.raises(RuntimeError, match="must match"):
                got.step(step, fails=0)
            got.rolled_back(saved[0])
        if kind == "again" and step < 4:
            yield got.step(step, 1), want.step(step, 1)
            got.rolled_back(saved[0])
            want.rolled_back(saved[1])
        yield got.step(step), want.step(step)
        made[who] = (got, want, step + 1)


def new(fast: Net, net: Net, seed: int) -> tuple[Draw, Draw, int]:
    return Draw(fast, seed), Draw(net, seed, hand=True), 0


def warm(form: str) -> tuple[Net, Net]:
    fast, net = transformed(form), Net(form)
    draw = Draw(fast, 0)
    for step in range(5):
        draw.step(step)
    return fast, net


WARM = {form: warm(form) for form in ("dict", "tuple")}
