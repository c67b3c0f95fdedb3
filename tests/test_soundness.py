"""What must never be dropped or mixed silently: each was wrong once."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
import fastvar_fx.ops
from fastvar_fx import Method, ModelError, Schedule
from tests.devices import DEVICE

SCALES = ((2, 2), (3, 3), (4, 4))
SCHEDULE = Schedule(SCALES, (0.5,))
WIDTH = 8


class Net(nn.Module):
    """Blocks of one class, called one after the other."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.to(DEVICE, torch.float64)

    def run(self, batch: int = 2) -> list[Tensor]:
        outputs = []
        for h, w in SCALES:
            generator = torch.Generator().manual_seed(h)
            x = torch.randn(batch, h * w, WIDTH, generator=generator, dtype=torch.float64)
            x = x.to(DEVICE)
            for block in self.blocks:
                x = block(x)
            outputs.append(x)
        return outputs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


def first(net: Net) -> Any:
    return net.blocks[0]


def transformed(block: Callable[[], nn.Module], schedule: Schedule = SCHEDULE) -> Net:
    torch.manual_seed(0)
    return fastvar_fx.transform(Net(block).eval(), schedule)


def test_in_place_writes_of_a_branch_that_stays_dense_are_kept() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(x)
            h = self.fc(x).cumsum(1)
            h[..., :4] *= 0.0
            out: Tensor = x + h
            return out

    fast = transformed(Block)
    out = fast.run()[-1]
    report = fastvar_fx.explain(fast)
    assert {(row.kind, row.kept < row.tokens) for row in report.rows if row.step == 2} == {
        ("attention", True),
        ("ffn", False),
    }
    only = fastvar_fx.transform(_same(Block), SCHEDULE, branches=("attention",), strict=True)
    assert torch.equal(only.run()[-1], out)
    pruned = first(fast)._fastvar.site.programs[2][0]._graph
    assert "mul_" in pruned.code


def _same(block: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(block).eval()


def test_in_place_writes_inside_a_pruned_branch_are_kept() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            out = torch.empty_like(h)
            out[..., ::2] = h[..., 1::2] * 2
            out[..., 1::2] = h[..., ::2]
            result: Tensor = x + self.out(out)
            return result

    class Plain(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            out: Tensor = x + self.out(torch.stack([h[..., 1::2] * 2, h[..., ::2]], -1).flatten(-2))
            return out

    fast = transformed(Block)
    got = fast.run()
    assert not fastvar_fx.explain(fast).refusals
    for a, b in zip(got, transformed(Plain).run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_static_cache_is_still_filled() -> None:
    class Block(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.keys = torch.zeros(2, 29, WIDTH, dtype=torch.float64, device=DEVICE)
            self.at = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.out(x)
            self.keys[:, self.at : self.at + x.shape[1]] = h
            self.at = (self.at + x.shape[1]) % 29
            keys = self.keys[:, : self.at or 29]
            x = x + F.scaled_dot_product_attention(h, keys, keys)
            out: Tensor = x + self.fc(x)
            return out

    fast, dense = transformed(Block), _same(Block)
    fast.run()
    dense.run()
    report = fastvar_fx.explain(fast)
    assert {(row.kind, row.kept < row.tokens) for row in report.rows if row.step == 2} == {
        ("attention", True),
        ("ffn", True),
    }
    assert first(fast).keys.abs().amin(-1).amin() > 0
    assert torch.equal(first(fast).keys, first(dense).keys)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h.cumsum(0),
        lambda h: h + torch.einsum("blc->lc", h),
        lambda h: h * h.permute(2, 1, 0),
        lambda h: h.permute(2, 1, 0),
        lambda h: F.batch_norm(h.flatten(0, 1), None, None, training=True).view_as(h),
        lambda h: F.conv1d(h.transpose(0, 1), h.new_ones(8, 8, 1)).transpose(0, 1),
        lambda h: F.pad(h, (0, 0, 1, -1)),
        lambda h: h[:, torch.arange(15, -1, -1, device=DEVICE)] if h.shape[1] == 16 else h,
    ],
)
def test_samples_and_tokens_are_never_mixed(mix: Callable[[Tensor], Tensor]) -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(x)
            out: Tensor = x + mix(self.fc(x))
            return out

    fast = transformed(Block)
    fast.run(batch=8)
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step == 2]
    assert {(row.kind, row.kept < row.tokens) for row in rows} == {
        ("attention", True),
        ("ffn", False),
    }


def test_registering_a_buffer_during_the_forward() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] == 16 and not hasattr(self, "bias"):
                bias = torch.full((WIDTH,), 0.5, dtype=x.dtype, device=x.device)
                self.register_buffer("bias", bias)
            y = x + self.get_buffer("bias") if x.shape[1] == 16 else x
            out: Tensor = x + self.fc(y)
            return out

    fast = transformed(Block)
    begun = fast.run()
    assert all(map(torch.equal, fast.run(), begun))
    assert type(first(fast).bias) is Tensor


@pytest.mark.parametrize("holder", [SimpleNamespace, deque, "slots", "object"])
def test_state_in_objects_is_followed_and_not_shared(holder: Any) -> None:
    class Slots:
        __slots__ = ("k",)

    class Plain:
        pass

    kinds = {"slots": Slots, "object": Plain}

    class Block(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.state = kinds.get(holder, holder)()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            past = self.past()
            if past is not None and x.shape[1] > 4:
                k = torch.cat([past, k], 1)
                v = torch.cat([past, v], 1)
            self.keep(k)
            out: Tensor = x + self.out(F.scaled_dot_product_attention(q, k, v))
            return out

        def past(self) -> Tensor | None:
            if isinstance(self.state, deque):
                return self.state[0] if self.state else None
            return getattr(self.state, "k", None)

        def keep(self, k: Tensor) -> None:
            if isinstance(self.state, deque) and self.state:
                self.state[0] = k
            elif isinstance(self.state, deque):
                self.state.append(k)
            else:
                self.state.k = k

    model = _same(Block)
    fast = fastvar_fx.transform(model, SCHEDULE)
    fast.run()
    assert not fastvar_fx.explain(fast).refusals
    assert first(model).past() is None
    past = first(fast).past()
    assert type(past) is Tensor
    assert past.shape[1] == 4 + 9 + 8


def test_state_that_cannot_be_seen_is_an_error() -> None:
    hidden: dict[int, Tensor] = {}

    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            hidden[id(self)] = h
            out: Tensor = x + h
            return out

    with pytest.raises(ModelError, match=r"outside the module's attributes(.|\n)*in a dict"):
        transformed(Block).run()


class Keys:
    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def append(self, k: Tensor) -> Tensor:
        self.held.append(k)
        return torch.cat(self.held, 1)


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "method": lambda: Keys().append,
    "partial": lambda: functools.partial(Keys.append, Keys()),
    "lambda": lambda: (lambda keys: lambda k: keys.append(k))(Keys()),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("maps", [1, 2])
def test_a_cache_behind_a_function_is_an_error_when_it_is_traced_first(
    function: str, maps: int
) -> None:
    """With two token maps, that is at the first call, which finds out which one is pruned."""

    class Block(Attention):
        def forward(self, x: Tensor, cond: Tensor, append: Any) -> Tensor:
            q, k, _ = self.qkv(x + cond).chunk(3, -1)
            keys = append(k)
            out: Tensor = x + self.out(F.scaled_dot_product_attention(q, keys, keys))
            return out

    fast = transformed(Block)
    append = FUNCTIONS[function]()
    with pytest.raises(ModelError, match="the object that holds it, not a function") as raised:  # noqa: PT012
        for h, w in SCALES:
            x = torch.randn(2, h * w, WIDTH, dtype=torch.float64, device=DEVICE)
            first(fast)(x, x if maps == 2 else x[:, :1], append)
    assert f"(2, {4 if maps == 2 else 9}, 8)" in str(raised.value)


def test_a_nested_residual_is_part_of_its_branch() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.attend(x)
            h = h + self.fc(h)
            x = x + h
            g = self.out(x)
            out: Tensor = x + (g + self.fc(g))
            return out

    fast = transformed(Block)
    fast.run()
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step == 2 and row.layer == 0]
    assert [(row.kind, row.kept) for row in rows] == [("attention", 8), ("ffn", 8)]


def test_token_first_layouts_gather_their_tables() -> None:
    table = torch.randn(16, 1, WIDTH, dtype=torch.float64, device=DEVICE)

    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x).transpose(0, 1) * table[: x.shape[1]]
            out: Tensor = x + self.out(h.transpose(0, 1))
            return out

    class Plain(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.out(self.fc(x) * table[: x.shape[1]].transpose(0, 1))
            return out

    fast = transformed(Block)
    got = fast.run()
    assert not fastvar_fx.explain(fast).refusals
    for a, b in zip(got, transformed(Plain).run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_parts_of_tuples_that_nobody_takes_do_not_matter() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.fc(x) * self.out(x).max(-1, keepdim=True).values
            return out

    fast = transformed(Block)
    fast.run()
    assert not fastvar_fx.explain(fast).refusals


def test_blocks_with_different_constants_do_not_share_a_program() -> None:
    class Block(Attention):
        count = 0

        def __init__(self) -> None:
            super().__init__()
            Block.count += 1
            self.gate = [0.1 * Block.count]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.fc(x) * torch.tensor(self.gate, dtype=x.dtype, device=x.device)
            return out

    torch.manual_seed(0)
    model = Net(Block, depth=8).eval()
    fast = fastvar_fx.transform(model, SCHEDULE, method=Method(restore=_only_cached))
    got = fast.run()
    report = fastvar_fx.explain(fast)
    assert len({row.program for row in report.rows if row.step == 2}) == 8
    first(fast).gate[0] = 7.0
    assert not torch.equal(fast.run()[1], got[1])


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut to the keys"])
def test_keys_that_a_mask_of_a_later_step_counts_are_not_pruned(cut: bool) -> None:
    class Block(Attention):
        keys: Tensor | None = None

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            new = torch.stack((k, v))
            self.keys = new if self.keys is None else torch.cat((self.keys, new), 2)
            mask = mask[..., : self.keys.shape[2]] if cut else mask
            k, v = self.keys
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out: Tensor = x + self.fc(x)
            return out

    class Masked(Net):
        def draw(self) -> list[int]:
            past, keys = 0, []
            for h, w in ((1, 1), *SCALES):
                x = torch.randn(2, h * w, WIDTH, dtype=torch.float64, device=DEVICE)
                past += h * w
                for block in self.blocks:
                    x = block(x, x.new_empty(1, h * w, past).normal_())
                keys.append(first(self).keys.shape[2])
            return keys

    model = Masked(Block).eval()
    fast = fastvar_fx.transform(model, Schedule(((1, 1), *SCALES), (0.5, 0.5)))
    assert fast.draw() == [1, 5, 14, 14 + 8]
    kept = {(row.step, row.kind): row.kept for row in fastvar_fx.explain(fast).rows}
    assert [kept[2, "attention"], kept[2, "ffn"]] == [9, 5]
    assert [kept[3, "attention"], kept[3, "ffn"]] == [8, 8]
    (refusal,) = {
        row.refusal.code for row in fastvar_fx.explain(fast).refusals if row.refusal is not None
    }
    assert refusal == "FVX021"


def counting(
    positions: Any = None, *, said: str = "held", bias: Any = None, chunks: bool = False
) -> type[Attention]:
    """Returns a block whose positions, or whose bias of keys, depend on how many keys it has.

    Args:
        positions: Makes them from a table, the number of tokens before, and that of the map.
        said: What says how many were before: the keys "held", the loop ("given") or a counter.
        bias: Makes it from the number of all keys.
        chunks: Whether the keys of each step stay apart.
    """

    class Block(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(40, WIDTH))
            self.keys: list[Tensor] = []
            self.count = 0

        def forward(self, x: Tensor, past: int) -> Tensor:
            tokens, held = x.shape[1], sum(keys.shape[2] for keys in self.keys)
            before = {"held": held, "given": past, "counted": self.count}[said]
            self.count += tokens
            at = 0 if positions is None else positions(self.table, before, tokens)
            q, k, v = self.qkv(x + at).chunk(3, -1)
            self.keys.append(torch.stack((k, v)))
            keys = torch.cat(self.keys, 2)
            if not chunks:
                self.keys = [keys]
            mask = None if bias is None else bias(keys.shape[2]).to(x).expand(tokens, -1)
            x = x + F.scaled_dot_product_attention(q, keys[0], keys[1], attn_mask=mask)
            out: Tensor = x + self.fc(x)
            return out

    return Block


class Counted(Net):
    """Its loop says the place of each map."""

    def draw(self) -> list[int]:
        """Returns how many keys the first block has after each step."""
        past, keys = 0, []
        for h, w in ((1, 1), *SCALES):
            x = torch.randn(2, h * w, WIDTH, dtype=torch.float64, device=DEVICE)
            for block in self.blocks:
                x = block(x, past)
            past += h * w
            keys.append(sum(each.shape[2] for each in first(self).keys))
        return keys


def check_counted(block: type[Attention], *, whole: bool) -> None:
    """Checks that keys are kept whole before the last step, or pruned there too."""
    torch.manual_seed(0)
    schedule = Schedule(((1, 1), *SCALES), (0.5, 0.5))
    fast = fastvar_fx.transform(Counted(block).eval(), schedule, strict=False)
    assert fast.draw() == ([1, 5, 14, 14 + 8] if whole else [1, 5, 5 + 5, 10 + 8])
    report = fastvar_fx.explain(fast)
    assert {row.kept for row in report.rows if (row.step, row.kind) == (3, "attention")} == {8}
    found = {row.refusal for row in report.refusals if row.refusal is not None}
    assert {refusal.code for refusal in found} == ({"FVX021"} if whole else set())
    assert all("where its cache is shorter" in refusal.reason for refusal in found)


def numbers(table: Tensor, *ends: int) -> Tensor:
    return torch.arange(*ends, device=table.device)


@pytest.mark.parametrize(
    "positions",
    [
        lambda table, past, tokens: table[past : past + tokens],
        lambda table, past, tokens: table[numbers(table, past, past + tokens)],
        lambda table, past, tokens: table[numbers(table, past + 1, past + 1 + tokens)],
        lambda table, past, tokens: table[numbers(table, past + tokens)[-tokens:]],
        lambda table, past, tokens: table[: past + tokens].flip(0)[:tokens].flip(0),
        lambda table, past, tokens: table[past + tokens - 1],
        lambda table, past, tokens: table[math.isqrt(past)],
        lambda table, past, tokens: table[0] * (past / 9),
        lambda table, past, tokens: past / 9,
        lambda table, past, tokens: table[numbers(table, tokens) + torch.tensor(past)],
        lambda table, past, tokens: (
            table[0] * torch.linspace(past, past + tokens, tokens).to(table)[:, None]
        ),
    ],
    ids=[
        "slice",
        "arange",
        "one-based",
        "tail",
        "flip",
        "last",
        "level",
        "ratio",
        "number",
        "tensor",
        "line",
    ],
)
def test_keys_are_not_pruned_while_their_number_is_a_position(positions: Any) -> None:
    check_counted(counting(positions), whole=True)


def test_positions_that_depend_on_the_number_of_keys_in_python_keep_keys() -> None:
    def positions(table: Tensor, past: int, tokens: int) -> Tensor:
        return table[0].sin() if past > 3 else table[0].cos()

    check_counted(counting(positions), whole=True)


def test_keys_that_are_kept_in_chunks_are_not_pruned_while_their_number_is_a_position() -> None:
    def positions(table: Tensor, past: int, tokens: int) -> Tensor:
        return table[past : past + tokens]

    check_counted(counting(positions, chunks=True), whole=True)


@pytest.mark.parametrize("said", ["given", "counted"])
def test_positions_that_the_loop_or_a_counter_says_are_right_whatever_is_pruned(said: str) -> None:
    def positions(table: Tensor, past: int, tokens: int) -> Tensor:
        return table[past : past + tokens]

    check_counted(counting(positions, said=said), whole=False)


@pytest.mark.parametrize(
    ("bias", "whole"),
    [
        (lambda keys: -0.1 * torch.arange(keys).flip(0), True),
        (lambda keys: torch.where(torch.arange(keys) < keys - 12, -5.0, 0.0), True),
        (lambda keys: torch.zeros(keys), False),
        (lambda keys: 2.0 * (torch.arange(keys) < 1), False),
    ],
    ids=["recency", "newest", "zeros", "first"],
)
def test_keys_are_pruned_where_their_bias_does_not_depend_on_how_many_follow(
    bias: Any, whole: bool
) -> None:
    check_counted(counting(bias=bias), whole=whole)


def test_programs_hold_for_the_numpy_scalars_they_were_made_for_only() -> None:
    class Block(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.calls = np.int64(0)

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + np.int64(1)
            out: Tensor = x + self.fc(x) * float(self.calls)
            return out

    model = _same(Block)
    fast = fastvar_fx.transform(model, SCHEDULE, method=Method(restore=_only_cached))
    for dense, got in [(model.run(), fast.run()) for _ in range(3)]:
        assert torch.equal(got[1], dense[1])
    assert first(fast).calls == first(model).calls == 9
    assert not fastvar_fx.explain(fast).refusals


def _only_cached(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Any, scale: Any
) -> Tensor:
    full = fastvar_fx.ops.resize_map(cached, cached_scale, scale)
    return fastvar_fx.ops.put_tokens(full, index, kept)


@functools.cache
def _table_of(order: tuple[Tensor, ...]) -> Tensor:
    return order[0].cumsum(0) * 0.1


def test_a_memo_keyed_by_tensors_keeps_no_stand_in() -> None:
    class Block(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.order = (torch.ones(16, 1, dtype=torch.float64, device=DEVICE),)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.fc(x + _table_of(self.order)[: x.shape[1]])
            return out

    fast = transformed(Block)
    got = fast.run()
    assert not fastvar_fx.explain(fast).refusals
    assert type(_table_of(first(fast).order)) is Tensor
    assert all(map(torch.equal, fast.run(), got))


def test_a_compiled_function_in_the_forward_is_traced_through() -> None:
    @torch.compile(backend="eager")
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.fc(norm(x))
            return out

    fast = transformed(Block)
    fast.run()
    assert not fastvar_fx.explain(fast).refusals


def test_a_trunk_read_before_and_after_a_cast_that_does_nothing() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            normed = torch.empty_like(x)
            normed.copy_(F.layer_norm(x.double(), (WIDTH,)))
            out: Tensor = x.double() + self.fc(normed)
            return out

    class Plain(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.fc(F.layer_norm(x, (WIDTH,)))
            return out

    fast = transformed(Block)
    got = fast.run()
    assert not fastvar_fx.explain(fast).refusals
    for a, b in zip(got, transformed(Plain).run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@torch.library.custom_op("fvx_test::per_count", mutates_args=())
def _per_count(x: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Divides every token by how many there are, as told from outside."""
    return x / lengths[-1] * longest / lengths.shape[0]


@_per_count.register_fake
def _(x: Tensor, lengths: Tensor, longest: int) -> Tensor:
    return torch.empty_like(x)


class Counting(Attention):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(1, 3, dtype=x.dtype, device=x.device) * x.shape[1]
        out: Tensor = x + _per_count(self.fc(x), lengths, x.shape[1])
        return out


def _doubled(lengths: Tensor, kept: int) -> Tensor:
    return torch.arange(1, 3, dtype=lengths.dtype, device=lengths.device) * kept


def test_a_rule_that_forgets_the_token_count_is_found_out_and_one_that_recounts_is_not() -> None:
    @fastvar_fx.axis_rule("fvx_test::per_count")
    def forgets(site: Any) -> Any:
        site.recount("longest", lambda value, kept: kept)
        return site.stream("x")

    with pytest.raises(fastvar_fx.NothingPrunedError, match=r"FVX022[\s\S]*what you declared"):
        transformed(Counting).run()

    @fastvar_fx.axis_rule("fvx_test::per_count")
    def recounts(site: Any) -> Any:
        site.recount("lengths", _doubled)
        site.recount("longest", lambda value, kept: kept)
        return site.stream("x")

    fast = transformed(Counting)
    fast.run()
    assert not fastvar_fx.explain(fast).refusals


def test_an_op_can_be_declared_an_attention_and_selections_may_be_partial() -> None:
    @torch.library.custom_op("fvx_test::attend", mutates_args=())
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    attend.register_fake(lambda q, k, v: torch.empty_like(q))

    @fastvar_fx.axis_rule("fvx_test::attend", attention=True)
    def tokens_second(site: Any) -> Any:
        return site.stream("q")

    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            out: Tensor = x + self.out(attend(q, k, v))
            return out

    select = functools.partial(fastvar_fx.ops.pivotal_token_selection)
    fast = fastvar_fx.transform(_same(Block), SCHEDULE, method=Method(select=select))
    fast.run()
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step == 2]
    assert {(row.kind, row.kept) for row in rows} == {("attention", 8)}


def test_a_kernel_that_cannot_be_traced_is_declared() -> None:
    def kernel(x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.cpu().numpy())).to(x.device)

    fused = kernel

    class Block(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(x)
            out: Tensor = x + self.fc(fused(x))
            return out

    with pytest.raises(fastvar_fx.NothingPrunedError, match="FVX001"):
        transformed(Block).run()
    fused = fastvar_fx.register_opaque(
        kernel, fake=torch.empty_like, axes="tokenwise", schema="(Tensor x) -> Tensor"
    )
    fast = transformed(Block)
    fast.run()
    assert not fastvar_fx.explain(fast).refusals
    with pytest.raises(ValueError, match="schema"):
        fastvar_fx.register_opaque(lambda x: x, fake=torch.empty_like, axes="tokenwise")
    with pytest.raises(ValueError, match="axes is"):
        fastvar_fx.register_opaque(
            kernel,
            fake=torch.empty_like,
            axes="pointwise",  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match="namespace::op"):
        fastvar_fx.axis_rule("no_namespace")
