"""Edits, loops and failures at random, compared with FastVAR by hand around the live submodules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx.engine.engine import Engine
from tests import zoo
from tests.engine.test_calls import (
    DEPTH,
    PRUNED,
    WIDTH,
    Draw,
    randn,
    same,
    warm,
)
from tests.engine.test_long_run import Adapted

LOOPS, STEPS = 3, 5


class Centred(nn.Module):
    """A layer on the deviations of tokens from their mean, which other tokens change."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x - x.mean(1, keepdim=True))
        return out


# --- what users do to a block between generations ------------------------------------------------


def adapt(block: Any, value: float) -> None:
    """Adds an adapter, or sets the strength of the one that there is."""
    if not isinstance(block.o, Adapted):
        torch.manual_seed(1)
        block.o = Adapted(block.o)
    block.o.strength = value


def unload(block: Any, value: float) -> None:
    """Takes the adapter off again."""
    if isinstance(block.o, Adapted):
        block.o = block.o.layer


def merge(block: Any, value: float) -> None:
    """Changes weights in place."""
    block.k.weight.data.mul_(0.5 + value / 4)


def swap(block: Any, value: float) -> None:
    """Puts another layer in the place of one."""
    torch.manual_seed(int(100 * value))
    block.fc2 = nn.Linear(16, WIDTH).double()


def centre(block: Any, value: float) -> None:
    """Makes the feed-forward read all tokens, or each by itself again."""
    block.fc1 = block.fc1.layer if isinstance(block.fc1, Centred) else Centred(block.fc1)


def hook(block: Any, value: float) -> None:
    """Adds a hook, or takes it off."""
    if block.q._forward_hooks:
        block.q._forward_hooks.clear()
    else:
        block.q.register_forward_hook(_doubled)


def patch(block: Any, value: float) -> None:
    """Sets a forward on a layer itself, or removes it."""
    if vars(block.fc2).pop("forward", None) is None:
        block.fc2.forward = lambda h: 3 * nn.functional.linear(h, block.fc2.weight)


def tie(block: Any, value: float) -> None:
    """Makes one parameter of two."""
    block.k.weight = block.q.weight


def _doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


EDITS: dict[str, Callable[[Any, float], None]] = {
    edit.__name__: edit for edit in (adapt, unload, merge, swap, centre, hook, patch, tie)
}


class Shared:
    """A model that all draws edit, and what it was at first, programs included."""

    def __init__(self, form: str) -> None:
        self.fast: Any = warm(form)[0]
        for batch in (2, 3):
            Both(self.fast, 0, batch).whole()
        self._registries: list[tuple[Any, dict[Any, Any]]] = [
            (registry, dict(registry))
            for module in self.fast.blocks.modules()
            for registry in (module._parameters, module._modules, module._forward_hooks)
        ]
        self._store = Engine.of(self.fast).store
        self._records = dict(self._store.records)
        self._values = [(p, p.data.clone()) for p in self.fast.parameters()]
        self._sites = [
            (site, site._structure, {step: [*known] for step, known in site.programs.items()})
            for site in (vars(block)["_fastvar"].site for block in self.fast.blocks)
        ]

    def restored(self) -> Any:
        """Returns the model as it was before all edits, in no generation."""
        for registry, held in self._registries:
            registry.clear()
            registry.update(held)
        for parameter, value in self._values:
            parameter.data.copy_(value)
        for module in self.fast.modules():
            vars(module).pop("forward", None)
        for site, structure, programs in self._sites:
            site._structure = structure
            site.programs = {step: [*known] for step, known in programs.items()}
        self._store.records = dict(self._records)
        fastvar_fx.reset(self.fast)
        return self.fast


SHARED: dict[str, Shared] = {}


# --- loops ---------------------------------------------------------------------------------------


class Loop(Draw):
    """A generation whose caches may hold more than the block reads."""

    def __init__(self, fast: Any, seed: int, batch: int, *, hand: bool = False) -> None:
        super().__init__(fast, seed, batch=batch, hand=hand)
        if fast.form == "dict" and seed % 3 == 0:
            for cache in self.caches:
                cache.update(unread=randn(seed, batch, 1), also=[None] * (seed % 2))

    def prunes(self, layer: int, name: str) -> bool:
        return name == "attention" or not isinstance(self.net.blocks[layer].fc1, Centred)


class Both:
    """A generation of a transformed model, and the same by hand around its live submodules."""

    def __init__(self, fast: Any, seed: int, batch: int) -> None:
        self.got, self.want = Loop(fast, seed, batch), Loop(fast, seed, batch, hand=True)
        self.at = 0

    def step(self, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Draws the next step, after it failed or after another try if `kind` says so."""
        got, want, step = self.got, self.want, self.at
        saved = got.saved(), want.saved()
        if kind == "fail":
            with pytest.raises(RuntimeError, match="must match"):
                got.step(step, fails=0)
            got.rolled_back(saved[0])
        if kind == "again" and step < STEPS - 1:
            yield got.step(step, 1), want.step(step, 1)
            got.rolled_back(saved[0])
            want.rolled_back(saved[1])
        yield got.step(step), want.step(step)
        self.at += 1

    def whole(self) -> None:
        """Draws the steps to the end."""
        while self.at < STEPS:
            for got, want in self.step("on"):
                same(got, want)


def check_refusals(fast: Any) -> None:
    """After a generation: each branch that stays dense reads other tokens, and no other does."""
    for row in fastvar_fx.explain(fast).rows:
        if row.step not in PRUNED:
            continue
        block = fast.blocks[row.layer]
        centred = isinstance(block.fc1, Centred)
        assert (row.refusal is not None) == (centred and row.kind == "ffn")
        if row.refusal is not None:
            x = randn(0, 2, row.tokens)
            assert not torch.allclose(block.feed(x)[:, ::2], block.feed(x[:, ::2]))


Action = tuple[int, str, Any]


@st.composite
def actions(draw: Any) -> list[Action]:
    """Which of the loops goes on and how, and which block is edited before all begin anew."""
    one = st.integers(0, LOOPS - 1)
    kinds = st.sampled_from(["on", "on", "on", "again", "fail"])
    on = st.tuples(one, kinds, st.none())
    over = st.tuples(one, st.just("over"), st.none())
    whole = st.tuples(one, st.just("whole"), st.none())
    going = st.lists(st.one_of(on, on, on, over, whole), max_size=12)
    edits = st.tuples(
        st.integers(0, DEPTH - 1), st.sampled_from(sorted(EDITS)), st.floats(0.1, 2.0)
    )
    batch = st.tuples(one, st.just("batch"), st.integers(1, 3))
    made: list[Action] = draw(going)
    for change in draw(st.lists(st.one_of(edits, edits, batch), min_size=1, max_size=2)):
        made += [change, *draw(going), (0, "whole", None)]
    return made


@pytest.mark.hypothesis
@pytest.mark.parametrize("form", [pytest.param("dict", marks=pytest.mark.slow), "tuple"])
@zoo.examples(30, quick=16, long=1000)
@given(actions=actions())
def test_edits_and_loops_in_any_order(actions: list[Action], form: str) -> None:
    if form not in SHARED:
        SHARED[form] = Shared(form)
    fast, batch, seeds = SHARED[form].restored(), 2, itertools.count()
    loops = [Both(fast, next(seeds), batch) for _ in range(LOOPS)]
    for who, kind, value in actions:
        if kind in EDITS:
            EDITS[kind](fast.blocks[who], value)
            loops = [Both(fast, next(seeds), batch) for _ in loops]
            continue
        if kind in ("over", "batch") or loops[who].at == STEPS:
            batch = value or batch
            loops[who] = Both(fast, next(seeds), batch)
        elif kind == "whole":
            loops[who].whole()
            check_refusals(fast)
        else:
            for got, want in loops[who].step(kind):
                same(got, want)
