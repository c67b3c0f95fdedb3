"""Numbers and batch sizes that vary become inputs; programs are bounded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.engine import Engine
from tests import zoo

C = 16
SCALES = (1, 2, 3)
SCHEDULE = Schedule(SCALES, (0.5,))
STEPS = 2
"""The cache step and a pruned one."""


class Block(nn.Module):
    """A block with numbers in all places where loops set them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)
        self.drop = nn.Dropout(0.1)
        self.strength = 1.0
        self.scaling, self.pair = {"default": 1.0, "other": 0.25}, [2.0, 0.5]
        self.count = 3

    def forward(self, x: Tensor, guidance: float = 1.0, options: Any = None) -> Tensor:
        h = self.drop(self.fc(self.norm(x))) * self.scaling["default"] * 0.1
        h = torch.add(h, x, alpha=self.pair[1] * 0.3 * 3) ** 2
        if self.strength > 0.5:
            h = h + self.strength / 3
        h = h.clamp(max=guidance * 3 + 1.0) * self.twist(x)
        out: Tensor = x + self.out(h) * (options["w"] if options else 1.0)
        return out

    def twist(self, x: Tensor) -> Any:
        return 1


class Constant(Block):
    """Makes a constant of an int, which fixes it."""

    def twist(self, x: Tensor) -> Any:
        return x.new_tensor([float(self.count)])


class Model(nn.Module):
    def __init__(self, kind: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    @torch.no_grad()
    def draw(self, batch: int = 2, **given: Any) -> Tensor:
        generator, maps = torch.Generator().manual_seed(0), []
        for side in SCALES:
            x = torch.randn(batch, side * side, C, generator=generator)
            for block in self.blocks:
                x = block(x, **given)
            maps.append(x)
        return torch.cat(maps, 1)


Edit = Callable[[Any, float], object]
PLACES: dict[str, Edit] = {
    "attribute": lambda block, value: setattr(block, "strength", value),
    "dict": lambda block, value: block.scaling.update(default=value),
    "unread": lambda block, value: block.scaling.update(other=value),
    "list": lambda block, value: block.pair.__setitem__(1, value),
}


def fresh(model: Model) -> Model:
    return fastvar_fx.transform(model, SCHEDULE)


def edited(model: Model, edit: Edit, value: float) -> Model:
    for block in model.blocks:
        edit(block, value)
    return model


def programs(fast: Model) -> list[int]:
    """How many programs each block holds for each step."""
    held: list[Any] = [vars(block)["_fastvar"].site.programs for block in fast.blocks]
    return [len(found) for steps in held for found in steps.values()]


def traced(fast: Model) -> float:
    return fastvar_fx.explain(fast).trace_seconds


@pytest.mark.parametrize("place", PLACES)
def test_a_strength_opens_at_its_second_value(place: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast, seconds = fresh(model), []
    for value in (1.0, 0.7, 0.9, 2.0, 1 / 3 + 0.5, 1.0, 0.75):
        got = edited(fast, PLACES[place], value).draw()
        assert torch.equal(got, fresh(edited(model, PLACES[place], value)).draw())
        seconds.append(traced(fast))
    assert programs(fast) == [1] * 2 * STEPS
    assert seconds[1:] == seconds[1:2] * 6, "nothing is traced after the second value"
    assert len({row.program for row in fastvar_fx.explain(fast).rows}) == STEPS


@pytest.mark.parametrize("give", [lambda v: {"guidance": v}, lambda v: {"options": {"w": v}}])
def test_an_argument_opens_too(give: Callable[[float], dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = fresh(model)
    for value in (1.5, 3.0, -0.25, 0.1):
        assert torch.equal(fast.draw(**give(value)), fresh(model).draw(**give(value)))
    assert programs(fast) == [1] * 2 * STEPS


def test_a_float_that_decides_has_a_program_for_each_way() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = fresh(model)
    for value in (1.0, 0.75, 0.5, 0.25, 2.0, 0.4, 0.5000000000000001, -1.0):
        got = edited(fast, PLACES["attribute"], value).draw()
        assert torch.equal(got, fresh(edited(model, PLACES["attribute"], value)).draw())
    assert programs(fast) == [2] * 2 * STEPS


@pytest.mark.slow
@zoo.examples(10, quick=4)
@given(st.lists(st.floats(-4, 4, width=64), min_size=2, max_size=4), st.sampled_from([*PLACES]))
def test_any_values(values: list[float], place: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = fresh(model)
    for value in values:
        got = edited(fast, PLACES[place], value).draw()
        assert torch.equal(got, fresh(edited(model, PLACES[place], value)).draw())
    assert max(programs(fast)) <= 1 + len({value > 0.5 for value in values})


@pytest.mark.slow
def test_settings_of_torchs_layers() -> None:
    """An op takes the value of a layer's `eps` itself, so each has a program; these are bounded."""
    torch.manual_seed(0)
    model = Model().eval()
    fast = fresh(model)

    def edit(block: Any, value: float) -> None:
        block.norm.eps = block.drop.p = value

    for i in range(18):
        got = edited(fast, edit, 10.0**-i).draw()
        assert torch.equal(got, fresh(edited(model, edit, 10.0**-i)).draw())
    assert programs(fast) == [16] * 2 * STEPS


def test_batch_sizes_open() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast, seconds = fresh(model), []
    for batch in (1, 3, 2, 4, 17, 1, 40, 2):
        assert torch.equal(fast.draw(batch), fresh(model).draw(batch))
        seconds.append(traced(fast))
    assert programs(fast) == [2] * 2 * STEPS, "one for a batch of 1, one for the others"
    assert seconds[2:] == seconds[2:3] * 6


@pytest.mark.slow
def test_programs_are_bounded_and_the_oldest_go() -> None:
    torch.manual_seed(0)
    model = Model(Constant).eval()
    fast = fresh(model)

    def draw(value: int, model: Model) -> Tensor:
        for block in model.blocks:
            block.count = value  # type: ignore[assignment]
        return model.draw()

    graphs: list[weakref.ref[Any]] = []
    for value in range(36):
        got = draw(value, fast)
        assert value % 6 or torch.equal(got, draw(value, fresh(model)))
        if value == 0:
            site: Any = vars(fast.blocks[0])["_fastvar"].site
            graphs = [weakref.ref(found[0]._graph) for found in site.programs.values()]
            del site
    assert programs(fast) == [16] * 2 * STEPS
    engine: Any = Engine.of(fast)
    assert len(engine.store._pool.entries) == 2 * 16 * STEPS
    gc.collect()
    assert [graph() for graph in graphs] == [None] * STEPS, "the first ones are freed"
    seconds = traced(fast)
    draw(30, fast)
    assert traced(fast) == seconds, "a recent one is found again"


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_programs_of_a_strength_compile_no_more() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = fresh(model)
    fastvar_fx.compile(fast, backend="eager")
    counts = []
    for value in (1.0, 0.75, 2.0, 0.6, 0.9, 3.0):
        got = edited(fast, PLACES["dict"], value).draw()
        want = fresh(edited(model, PLACES["dict"], value)).draw()
        torch.testing.assert_close(got, want)
        compilation: Any = Engine.of(fast).executor
        counts.append(sum(compilation.graphs.values()))
    assert counts[2:] == counts[2:3] * 4, counts
