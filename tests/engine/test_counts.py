"""A branch whose values depend on the token count stays dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule, ops
from tests.by_hand import Pruner
from tests.engine.test_stored import SCALES, SCHEDULE, Block, C, H, Model, at_index, call, check

Twist = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B, H, L or T, D) -> what attention returns (B, H, L, D)."""


def kind_of(twist: Twist) -> type[Block]:
    class Twisted(Block):
        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            q, k, v = self.heads(x)
            return self.join(twist(q, *self.grow(k, v)))

    return Twisted


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def newest(count: int) -> Twist:
    return lambda q, k, v: attend(q, k[:, :, -count:], v[:, :, -count:])


def newest_by_start(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    start = max(0, k.shape[2] - 20)
    return attend(q, k[:, :, start:], v[:, :, start:])


NUMBERS: dict[str, Twist] = {
    "log L": lambda q, k, v: attend(q * math.log(1 + q.shape[2]), k, v),
    "log T": lambda q, k, v: attend(q * (math.log(k.shape[2]) / math.log(9)), k, v),
    "L ** -0.5": lambda q, k, v: attend(q * q.shape[2] ** -0.5, k, v),
    "scale": lambda q, k, v: attend(q, k, v, scale=k.shape[2] ** -0.5),
    "1 / L": lambda q, k, v: attend(q, k, v) / q.shape[2],
    "times T": lambda q, k, v: attend(q, k, v) * k.shape[2],
    "alpha": lambda q, k, v: torch.add(attend(q, k, v), q, alpha=1 / q.shape[2]),
    "numel": lambda q, k, v: attend(q, k, v) * (16 / q.numel()),
    "tensor": lambda q, k, v: attend(q * torch.tensor(float(q.shape[2])).log(), k, v),
    "full": lambda q, k, v: attend(q + torch.full((1,), 1 / k.shape[2]), k, v),
    "arange": lambda q, k, v: attend(q + 0.1 * torch.arange(q.shape[2]).double().mean(), k, v),
}
KEPT: dict[str, Twist] = {
    "plain": attend,
    "width": lambda q, k, v: attend(q * q.shape[-1] ** -0.5, k, v, scale=1 / k.shape[3]),
    "oldest": lambda q, k, v: attend(q, k[:, :, 1:], v[:, :, 1:]),
    "wide window": newest(100),
    "ratio of one": lambda q, k, v: attend(q * (v.shape[2] / k.shape[2]), k, v),
    "batch": lambda q, k, v: attend(q, k, v) / q.shape[0],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_made_of_the_token_count(name: str) -> None:
    check(kind_of(NUMBERS[name]), 1, {(0, "attend"): "for the kept tokens"}, "FVX022")


FACTORS = {1: 1.0, 4: 1.1, 9: 1.2, 16: 1.3, 25: 1.4}


def test_a_number_that_is_looked_up_by_the_token_count() -> None:
    """There is none for the kept tokens, so nobody knows what the branch does with them."""
    factor = kind_of(lambda q, k, v: attend(q, k, v) * FACTORS[q.shape[2]])
    check(factor, 1, {(0, "attend"): "KeyError"}, "FVX023")


def test_a_tensor_that_is_looked_up_by_the_token_count() -> None:
    class Levels(Block):
        def __init__(self) -> None:
            super().__init__()
            named = {str(side * side): nn.Parameter(torch.randn(C)) for side in SCALES}
            self.levels = nn.ParameterDict(named)

        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            return super().attend(x + self.levels[str(x.shape[1])], shared)

    check(Levels, 1, {(0, "attend"): "has no attribute"}, "FVX023")


@pytest.mark.parametrize("twist", [newest(20), newest_by_start], ids=["-20:", "start"])
def test_windows_of_the_newest_keys(twist: Twist) -> None:
    check(kind_of(twist), 1, {(0, "attend"): ""}, "FVX012")


@pytest.mark.parametrize("name", KEPT)
def test_other_numbers_and_the_oldest_keys(name: str) -> None:
    check(kind_of(KEPT[name]), 1, {})


def test_a_feed_forward_that_divides_by_the_count() -> None:
    class Divides(Block):
        def feed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            return super().feed(x, shared) / x.shape[1]

    check(Divides, 2, {(i, "feed"): "for the kept tokens" for i in range(2)}, "FVX022")


def test_a_table_as_wide_as_a_map_is_long() -> None:
    """Its rows are cut by the forward; its width only happens to be the number of tokens."""

    class Table(Block):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, sum(n * n for n in SCALES), C))
            self.seen = 0

        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            start = self.seen
            self.seen += x.shape[1]
            return super().attend(x + self.table[:, start : start + x.shape[1]], shared)

    assert C in [n * n for n in SCALES]
    fast = fastvar_fx.transform(Model(Table, 1).eval(), SCHEDULE)
    fast.generate(0, call)
    assert not fastvar_fx.explain(fast).refusals


def test_a_table_that_is_split() -> None:
    class Split(Block):
        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            _, table = torch.arange(2.0 * x.shape[1]).view(-1, 2).unbind(1)
            return super().attend(x + 0 * table.view(1, -1, 1), shared) / x.shape[2]

    check(Split, 1, {})


def test_a_number_that_the_loop_sets_is_the_same_for_the_kept_tokens() -> None:
    class Scaled(Block):
        scale = 0.25

        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            return super().attend(x, shared) * self.scale

    check(Scaled, 1, {})


def test_positions_are_those_of_the_map() -> None:
    """A table by position is gathered, whether it is made of the token count or not."""

    class Placed(Block):
        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            index = shared.get("index", torch.arange(x.shape[1]).expand(x.shape[:2]))
            q, k, v = self.heads(x + index[..., None] / 10)
            return self.join(attend(q, *self.grow(k, v)))

    torch.manual_seed(0)
    schedule = Schedule((1, 2, 3, 4), (0.5,))
    model = Model(Placed, 1).eval()
    fast, block = fastvar_fx.transform(model, schedule), model.blocks[0]
    maps = [torch.randn(2, side * side, C) for side in (1, 2, 3, 4)]
    with torch.no_grad():
        got = [call(0, fast.blocks[0], x, {}) for x in maps][-1]
        for x in maps[:2]:
            block(x, {})
        before = maps[2], block.attend(maps[2], {})  # type: ignore[operator]
        middle = before[0] + before[1]
        captured = before[1], block.feed(middle, {})  # type: ignore[operator]
        x = maps[3]
        for name, cached in zip(("attend", "feed"), captured, strict=True):
            index = ops.pivotal_token_selection(x, schedule.kept(3))
            tokens = ops.take_tokens(x, index)
            kept = getattr(block, name)(tokens, {"index": index})
            x = x + ops.cached_token_restoration(kept, index, cached, (3, 3), (4, 4))
    torch.testing.assert_close(got, x)
    assert not fastvar_fx.explain(fast).refusals


WEIGHTS: dict[str, Twist] = {
    "one more": lambda q, k, v: _shares((q @ k.mT).exp(), 1.0) @ v,
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
}


def _shares(weights: Tensor, more: float) -> Tensor:
    return weights / (more + weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", WEIGHTS)
def test_attention_with_other_weights_than_those_of_a_softmax(name: str) -> None:
    check(kind_of(WEIGHTS[name]), 1, {})


class Grid(Block):
    """Positions of a square map, which cannot be made for some of its tokens."""

    def table(self, tokens: int) -> Tensor:
        side = math.isqrt(tokens)
        rows = torch.arange(side)[:, None].expand(side, side).flatten()
        columns = torch.arange(side).repeat(side)
        return torch.stack([rows, columns], -1).repeat(1, C // H // 2) / 10  # (L, C / H)

    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        table = shared["table"] if "table" in shared else self.table(x.shape[1])
        q, k, v = self.heads(x)
        return self.join(attend(q * table.cos(), *self.grow(k * table.cos(), v)))


def grid_by_hand(model: Model) -> Tensor:
    pruner = Pruner(SCHEDULE)

    def step(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
        table = block.table(x.shape[1]).expand(len(x), 1, -1, -1)
        for name in ("attend", "feed"):
            branch = partial(at_index, getattr(block, name), {"table": table})
            x = x + pruner.run(name, x, branch)
        return x

    return model.generate(0, step)


def test_positions_of_a_square_map_are_gathered_where_fewer_tokens_are_no_square() -> None:
    torch.manual_seed(0)
    model = Model(Grid, 1).eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    torch.testing.assert_close(fast.generate(0, call), grid_by_hand(model))
    assert not fastvar_fx.explain(fast).refusals


@pytest.mark.parametrize("name", ["feed", "attend"])
def test_numbers_of_the_token_count_are_found_beside_positions_of_a_square_map(name: str) -> None:
    class Divided(Grid):
        pass

    def divided(self: Any, x: Tensor, shared: dict[str, Any]) -> Tensor:
        out: Tensor = getattr(super(Divided, self), name)(x, shared) / x.shape[1]
        return out

    setattr(Divided, name, divided)
    fast = fastvar_fx.transform(Model(Divided, 1).eval(), SCHEDULE)
    fast.generate(0, call)
    rows = fastvar_fx.explain(fast).refusals
    assert {row.branch for row in rows} == {{"feed": "ffn", "attend": "attention"}[name]}
    codes = {row.refusal.code for row in rows if row.refusal is not None}
    assert codes == {"FVX022" if name == "feed" else "FVX023"}


class Placed(Block):
    """Positions that are added to the stream, outside all branches."""

    where = ""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.randn(side * side, C) for side in SCALES)
        self.base = nn.Parameter(torch.randn(1, C, 2, 2))
        self.wide = nn.Linear(2 * C, C)

    def placed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        side = shared["side"]
        if self.where == "interpolated":
            table = F.interpolate(self.base, size=(side, side), mode="bilinear").flatten(2).mT
            return x + table
        if self.where == "joined":
            joined: Tensor = self.wide(torch.cat([x, shared["table"]], -1))
            return joined
        tables = {"list": self.tables[side - 1], "argument": shared["table"]}
        out: Tensor = x + tables.get(self.where, shared["holder"].table)
        return out

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        return super().forward(self.placed(x, shared), shared)


def placed(layer: int, block: Any, x: Tensor, shared: dict[str, Any]) -> dict[str, Any]:
    """What a loop hands to a block with positions."""
    table = torch.linspace(-1, 1, x[0].numel()).view(1, *x.shape[1:]).expand(x.shape)
    return shared | {"side": math.isqrt(x.shape[1]), "table": table, "holder": Holder(table)}


class Holder:
    def __init__(self, table: Tensor) -> None:
        self.table = table[0]


def placed_by_hand(model: Model, dense: str = "") -> Tensor:
    pruner = Pruner(SCHEDULE)

    def step(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
        x = block.placed(x, placed(layer, block, x, shared))
        for name in ("attend", "feed"):
            branch = getattr(block, name)
            run = partial(at_index, branch, {})
            x = x + (branch(x, {}) if name == dense else pruner.run(name, x, run))
        return x

    return model.generate(0, step)


def call_placed(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
    return call(layer, block, x, placed(layer, block, x, shared))


@pytest.mark.parametrize(
    ("place", "divides"),
    [
        ("argument", False),
        pytest.param("attribute", False, marks=pytest.mark.slow),
        ("list", True),
        pytest.param("interpolated", False, marks=pytest.mark.slow),
        ("interpolated", True),
        ("joined", False),
    ],
)
def test_positions_that_are_added_to_the_stream(place: str, divides: bool) -> None:
    class Kind(Placed):
        where = place

        def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            out = super().attend(x, shared)
            return out / math.log(1 + x.shape[1]) if divides else out

    torch.manual_seed(0)
    model = Model(Kind, 1).eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    want = placed_by_hand(model, "attend" if divides else "")
    torch.testing.assert_close(fast.generate(0, call_placed), want)
    found = [row.refusal for row in fastvar_fx.explain(fast).refusals]
    assert {why.code for why in found if why is not None} == ({"FVX022"} if divides else set())


@given(st.sampled_from([lambda n: n, math.log1p, math.sqrt, lambda n: 1 / n]), st.booleans())
def test_any_function_of_any_count(function: Callable[[int], float], keys: bool) -> None:
    def twist(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * (1 + function((k if keys else q).shape[2]) / 4), k, v)

    check(kind_of(twist), 1, {(0, "attend"): "for the kept tokens"}, "FVX022")
