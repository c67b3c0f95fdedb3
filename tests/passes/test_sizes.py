"""Prompts of other lengths: the second makes programs that stand for all lengths to come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from passes import verify
from passes.analyse.branches import Branch, find_branches
from passes.refusal import Refusal, RefusedError
from passes.trace.calls import Call
from passes.trace.capture import capture
from passes.trace.symbols import Conditions, Varying

C, H = 16, 2
SCALES = (1, 2, 3, 4)
SCHEDULE = fastvar_fx.Schedule(SCALES, (0.4, 0.6))

Forward = Callable[["Block", Tensor, Tensor], Tensor]


def plain(block: Block, attended: Tensor, text: Tensor) -> Tensor:
    return attended


class Block(nn.Module):
    """Attention with a cache, cross-attention to padded text, feed-forward."""

    def __init__(self, manual: bool, biased: bool, twist: Forward) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.q, self.kv, self.cross_out = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self._manual, self._biased, self._twist = manual, biased, twist

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, length: int) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(B, L, 3, H, C // H).permute(2, 0, 3, 1, 4)
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        S, bias = k.shape[2], None
        if self._biased:
            bias = torch.sin(torch.arange(L)[:, None] + 0.3 * torch.arange(S))
        if self._manual:
            keys = k.reshape(B * H, -1, C // H)
            scores = (q.reshape(B * H, L, -1) @ keys.transpose(1, 2)).view(B, H, L, S)
            y = (scores if bias is None else scores + bias).softmax(-1) @ v.reshape(B, H, S, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(B, L, C))
        T = text.shape[1]
        k, v = self.kv(text).view(B, T, 2, H, C // H).permute(2, 0, 3, 1, 4)
        q = self.q(self.norms[1](x)).view(B, L, H, C // H).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self._twist(self, self.cross_out(y.transpose(1, 2).reshape(B, L, C)), text)
        x = x + y / length
        out: Tensor = x + self.down(F.gelu(self.up(self.norms[2](x))))
        return out


class Model(nn.Module):
    def __init__(
        self,
        depth: int = 1,
        *,
        manual: bool = False,
        prefix: bool = False,
        biased: bool = False,
        twist: Forward = plain,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(manual, biased, twist) for _ in range(depth))
        self._prefix = prefix

    def draw(self, text: Tensor) -> Tensor:
        B, T, _ = text.shape
        mask = torch.zeros(B, 1, 1, T).index_fill(3, torch.tensor(T - 1), -1.0)
        blocks = cast("list[Block]", list(self.blocks))
        for block in blocks:
            block.k = block.v = None
        if self._prefix:
            y = text
            for block in blocks:
                y = block(y, text, mask, T)
        x = text.mean(1, keepdim=True)
        for step, side in enumerate(SCALES):
            for block in blocks:
                x = block(x, text, mask, T)
            if step + 1 < len(SCALES):
                size = SCALES[step + 1]
                x = F.interpolate(x.mT.reshape(B, C, side, side), size, mode="bicubic")
                x = x.flatten(2).mT
        return x


def program_counts(fast: Model) -> list[int]:
    """How many programs each block holds for each step."""
    held: list[Any] = [vars(block)["_fastvar"].site.programs for block in fast.blocks]
    return [len(programs) for steps in held for programs in steps.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manual", "prefix", "biased"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_after_the_second_length_no_other_is_traced(
    manual: bool, prefix: bool, biased: bool
) -> None:
    torch.manual_seed(0)
    model = Model(2, manual=manual, prefix=prefix, biased=biased).eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    texts = [torch.randn(2, length, C) for length in (5, 7, 12)]
    drawn = [fast.draw(text) for text in texts[:2]]
    assert program_counts(fast) == [1] * 6, "they take the place of the first ones"
    before = fastvar_fx.explain(fast).trace_seconds
    drawn += [fast.draw(text) for text in [*texts[2:], texts[0]]]
    assert fastvar_fx.explain(fast).trace_seconds == before, "nothing is traced"
    assert torch.equal(drawn.pop(), drawn[0])
    assert len({row.program for row in fastvar_fx.explain(fast).rows}) == 3, "blocks share them"
    refusals = [row.refusal for row in fastvar_fx.explain(fast).refusals]
    refused = {refusal.code for refusal in refusals if refusal is not None}
    assert refused == ({"FVX021"} if biased else set()), "a bias of all keys by their place"
    for text, image in zip(texts, drawn, strict=True):
        assert torch.equal(image, fastvar_fx.transform(model, SCHEDULE).draw(text))


def longer_than_eight(block: Block, attended: Tensor, text: Tensor) -> Tensor:
    return attended * 2 if text.shape[1] > 8 else attended


@pytest.mark.slow
def test_a_forward_that_branches_on_the_length_gets_a_program_for_each_way() -> None:
    torch.manual_seed(0)
    model = Model(twist=longer_than_eight).eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    for length in (5, 6, 12, 7, 13):
        text = torch.randn(1, length, C)
        assert torch.equal(fast.draw(text), fastvar_fx.transform(model, SCHEDULE).draw(text))
    assert max(program_counts(fast)) < 4


def first_of_each(block: Block, attended: Tensor, text: Tensor) -> Tensor:
    return attended + attended.new_tensor([float(text.shape[1])]).sum()


@pytest.mark.slow
def test_a_length_that_becomes_a_constant_is_traced_each_time() -> None:
    torch.manual_seed(0)
    model = Model(twist=first_of_each).eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    for count, length in enumerate((5, 6, 7), start=1):
        text = torch.randn(1, length, C)
        assert torch.equal(fast.draw(text), fastvar_fx.transform(model, SCHEDULE).draw(text))
        assert program_counts(fast) == [count] * 3


@pytest.mark.slow
def test_another_batch_and_another_length_at_once() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    for batch, length in ((1, 5), (2, 6), (2, 7), (1, 8), (2, 9), (1, 10)):
        text = torch.randn(batch, length, C)
        assert torch.equal(fast.draw(text), fastvar_fx.transform(model, SCHEDULE).draw(text))
    assert program_counts(fast) == [2] * 3


@pytest.mark.slow
def test_a_branch_refused_at_the_earlier_sizes_keeps_sizes_fixed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def first_refused(*args: Any) -> list[Branch]:
        first, *rest = find_branches(*args)
        return [replace(first, refusal=Refusal("FVX011", "planted")), *rest]

    monkeypatch.setattr(verify, "find_branches", first_refused)
    torch.manual_seed(0)
    model = Model().eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    caplog.set_level("INFO", logger="fastvar_fx")
    for length in (5, 6):
        text = torch.randn(1, length, C)
        assert torch.equal(fast.draw(text), fastvar_fx.transform(model, SCHEDULE).draw(text))
    assert "sizes stay fixed: FVX019" in caplog.text
    assert "FVX020" not in caplog.text
    assert not fastvar_fx.explain(fast).refusals


class Sized(nn.Module):
    def forward(self, x: Tensor, side: Tensor, number: int) -> Tensor:
        assert side.shape[0] % 2 == 0
        return x + side.sum() * number


def test_conditions() -> None:
    block, args = Sized(), (torch.randn(1, 4, C), torch.randn(6, C), 3)
    side, number = (("item", "args"), ("item", 1)), (("item", "args"), ("item", 2))
    varying = Varying({(side, 0): 4, (number, None): 5})
    program = capture(Call(block.forward, block, args, {}, varying=varying))
    conditions = program.conditions
    assert conditions.places == ((side, 0), (number, None))
    holds = {values: conditions.hold(*values) for values in ((8, 1), (7, 1), (0, 1), (2, 0))}
    assert holds == {(8, 1): True, (7, 1): False, (0, 1): False, (2, 0): True}
    assert program.earlier is not None
    shapes = [
        made.graph_module.graph.find_nodes(op="placeholder")[1].meta["val"].shape[0]
        for made in (program, program.earlier)
    ]
    assert shapes == [6, 4]
    with pytest.raises(RefusedError, match="FVX019"):
        capture(Call(block.forward, block, args, {}, varying=Varying({(side, 0): 5})))
    assert Conditions().hold()


def test_a_number_that_varies_may_be_negative() -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor, number: int) -> Tensor:
            return x + number if number > 0 else x - number

    block, x = Signed(), torch.randn(1, 4, C)
    place = ((("item", "args"), ("item", 1)), None)
    call = Call(block.forward, block, (x, 3), {}, varying=Varying({place: 2}))
    conditions = capture(call).conditions
    assert conditions.hold(7)
    assert not conditions.hold(-7)
    assert not conditions.hold(0)
