"""Loops without a KV cache: every step's sequence is all maps so far, and the last map prunes.

Compared with FastVAR edited into the blocks by hand: at a pruned step the branch runs on all tokens
of the earlier maps and the kept tokens of the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import RunError, Schedule, ScheduleError, methods
from fastvar_fx.methods import Method

WIDTH, HEADS = 8, 2
SCALES = ((1, 1), (2, 3), (3, 4), (4, 5), (5, 6))
SCHEDULE = Schedule(SCALES, (0.5, 0.4), prefix=True)
TOTAL = 69
Mask = Tensor | None


class Block(nn.Module):
    """Attention with a mask and a table of positions, both for the whole sequence, then an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.table = nn.Buffer(torch.randn(TOTAL, WIDTH))

    def attend(self, h: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """Attention of tokens (B, n, C), with their rows of the table and of the mask."""
        q, k, v = self.qkv(self.norm1(h)).chunk(3, dim=-1)
        q, k, v = ((x.unflatten(-1, (HEADS, -1)).transpose(1, 2)) for x in (q * table, k, v))
        return self.proj(self.product(q, k, v, mask).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    def feed(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(h))))
        return out

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        x = x + self.attend(x, self.table[: x.shape[1]], mask)
        return x + self.feed(x)


class Manual(Block):
    """Scores, softmax and product are its own, and bool masks fill."""

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        scores = q @ k.mT * 0.3
        if mask is not None:
            hides = mask.dtype is torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask
        return scores.softmax(-1) @ v


class OwnMask(Block):
    """Its mask is a buffer of all steps, which it slices."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Buffer(block_causal())

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        return super().forward(x, self.mask[: x.shape[1], : x.shape[1]])


class Layer(nn.TransformerEncoderLayer):
    """What torch has."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, src_mask=None if mask is None else ~mask)


def block_causal() -> Tensor:
    """Whether a token (row) sees another one (column): those of its own map and of earlier ones."""
    steps = torch.tensor([k for k, (h, w) in enumerate(SCALES) for _ in range(h * w)])
    return steps[:, None] >= steps


def as_bool(length: int) -> Tensor:
    return block_causal()[:length, :length]


def as_bias(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 1, TOTAL, TOTAL, generator=generator, dtype=torch.float64)
    return bias.masked_fill(~block_causal(), -torch.inf)[..., :length, :length]


def no_mask(length: int) -> None:
    return None


class Net(nn.Module):
    """Its loop appends a map to those before, and changes it by what the blocks return."""

    def __init__(self, block: Callable[[], nn.Module], mask: Callable[[int], Mask]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.mask, self.calls = mask, 0
        self.double().eval()

    @torch.no_grad()
    def generate(self, constant: bool = False, first: int = 0) -> list[Tensor]:
        """Returns what the blocks return at every step.

        With `constant`, the sequence holds all maps from the beginning.
        """
        generator = torch.Generator().manual_seed(first)
        noise = torch.randn(2, TOTAL, WIDTH, generator=generator, dtype=torch.float64)
        x, done, outputs = noise.clone(), 0, []
        for h, w in SCALES:
            start, done = done, done + h * w
            out = x if constant else x[:, :done]
            for block in self.blocks:
                self.calls += 1
                out = block(out, self.mask(out.shape[1]))
            outputs.append(out)
            x = x.clone()
            x[:, start:done] += 0.5 * out[:, start:done].tanh()
        return outputs


class ByHand(nn.Module):
    """A block with FastVAR edited in."""

    def __init__(self, block: Any, schedule: Schedule, method: Method) -> None:
        super().__init__()
        self.block, self.schedule, self.method = block, schedule, method
        self.step = -1

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        self.step = (self.step + 1) % self.schedule.steps
        if isinstance(self.block, OwnMask):
            mask = self.block.mask

        def attend(kept: Tensor, index: Tensor) -> Tensor:
            samples = enumerate(zip(kept, index, strict=True))
            return torch.cat([attended(one, at, number) for number, (one, at) in samples])

        def attended(one: Tensor, at: Tensor, sample: int) -> Tensor:
            seen = mask
            if seen is not None:
                seen = seen[sample, 0] if seen.dim() == 4 else seen
                seen = seen[at][:, at]
            if isinstance(self.block, Layer):
                h, hidden = self.block.norm1(one[None]), None if seen is None else ~seen
                out: Tensor = self.block.self_attn(h, h, h, attn_mask=hidden)[0]
                return out
            return self.block.attend(one[None], self.block.table[at], seen)  # type: ignore[no-any-return]

        def feed(kept: Tensor, index: Tensor) -> Tensor:
            if isinstance(self.block, Layer):
                return self.block._ff_block(self.block.norm2(kept))
            return self.block.feed(kept)  # type: ignore[no-any-return]

        x = x + self.branch("attention", x, attend)
        return x + self.branch("ffn", x, feed)

    def branch(self, name: str, x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        step, schedule, method = self.step, self.schedule, self.method
        sizes = [h * w for h, w in SCALES]
        begin = sum(sizes[:step])
        end = begin + sizes[step]
        everything = torch.arange(x.shape[1]).expand(x.shape[:2])
        if step not in schedule.pruned_steps:
            out = run(x, everything)
            if step == schedule.cache_step:
                self.captured = getattr(self, "captured", {}) | {name: out[:, begin:end]}
            return out
        known = {"scale": schedule.scales[step], "cached": self.captured[name]}
        asked = {key: known[key] for key in method.asks["select"]}
        chosen = method.select(x[:, begin:end], schedule.kept(step), **asked)
        index = chosen[0] if isinstance(chosen, tuple) else chosen
        index = torch.cat((everything[:, :begin], index + begin, everything[:, end:]), dim=1)
        tokens = method.take(x[:, begin:end], chosen)
        out = run(torch.cat((x[:, :begin], tokens, x[:, end:]), dim=1), index)
        scales = schedule.scales[schedule.cache_step], schedule.scales[step]
        count = out.shape[1] - (x.shape[1] - end)
        last = method.restore(out[:, begin:count], chosen, self.captured[name], *scales)
        return torch.cat((out[:, :begin], last, out[:, count:]), dim=1)


def by_hand(block: Callable[[], nn.Module], mask: Callable[[int], Mask], method: str) -> Net:
    net = Net(block, mask)
    chosen = methods.method_of(method)
    net.blocks = nn.ModuleList(ByHand(block, SCHEDULE, chosen) for block in net.blocks)
    return net


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("block", "mask"),
    [
        (Block, as_bool), (Block, as_bias), (Block, no_mask),
        (Manual, as_bool), (Manual, as_bias), (OwnMask, no_mask), (Layer, as_bool),
    ],
)  # fmt: skip
def test_the_last_map_prunes_and_those_before_stay_whole(
    block: Callable[[], nn.Module], mask: Callable[[int], Mask]
) -> None:
    fast = fastvar_fx.transform(Net(block, mask), SCHEDULE)
    hand = by_hand(block, mask, "fastvar")
    for first in (0, 1, 0):
        assert_close(fast.generate(first=first), hand.generate(first=first))
    rows = fastvar_fx.explain(fast).rows
    assert len(rows) == 12
    lengths = {2: (19, 19), 3: (39, 29), 4: (69, 57)}  # of all maps so far, and without the dropped
    assert all((row.tokens, row.kept) == lengths[row.step] for row in rows)
    assert "longest sequence that ran dense: 19 tokens" in str(fastvar_fx.explain(fast))
    dense = Net(block, mask).generate()
    assert_close(fast.generate()[:3], dense[:3])
    assert not torch.allclose(fast.generate()[4], dense[4], atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        *("drift-corrected", "once-per-block", "once-per-step", "depthvar"),
        *("uniform-grid", "nearest-kept", "tome"),
    ],
)
def test_every_method_prunes_the_last_map_alone(method: str) -> None:
    fast = fastvar_fx.transform(Net(Block, as_bool), SCHEDULE, method=method)
    if methods.method_of(method).once:
        fast.generate()
        assert {row.kept for row in fastvar_fx.explain(fast).rows if row.step == 4} == {57}
        return
    assert_close(fast.generate(), by_hand(Block, as_bool, method).generate())


def test_flops_are_those_of_the_tokens_that_stay() -> None:
    fast = fastvar_fx.transform(Net(Block, as_bool), SCHEDULE)
    report = fastvar_fx.trace(fast, lambda net: net.generate())
    ffn = next(row for row in report.rows if (row.step, row.kind) == (4, "ffn"))
    assert (ffn.flops, ffn.pruned_flops) == tuple(2 * 4 * 2 * n * WIDTH * WIDTH for n in (69, 57))
    attention = next(row for row in report.rows if (row.step, row.kind) == (4, "attention"))
    each = 2 * 4 * WIDTH * WIDTH
    assert attention.flops == 2 * (69 * each + 4 * 69 * 69 * WIDTH)
    assert attention.pruned_flops == 2 * (57 * each + 4 * 57 * 57 * WIDTH)


def test_a_sequence_of_all_maps_prunes_the_map_of_the_step() -> None:
    """Later maps are there before they are drawn; `step_of` says which one is drawn."""
    net = Net(Block, as_bool)
    fast = fastvar_fx.transform(
        net, SCHEDULE, step_of=lambda *call: (fast.calls - 1) // 2 % len(SCALES)
    )
    hand = by_hand(Block, as_bool, "fastvar")
    want = hand.generate(constant=True)
    for _ in range(2):
        assert_close(fast.generate(constant=True), want)
    kept = {row.step: row.kept for row in fastvar_fx.explain(fast).rows}
    assert kept == {2: 69, 3: 69 - 10, 4: 69 - 12}


@pytest.mark.slow
def test_the_last_map_prunes_compiled() -> None:
    fast = fastvar_fx.transform(Net(Block, as_bool), SCHEDULE)
    want = fast.generate()
    fastvar_fx.compile(fast, backend="aot_eager")
    for _ in range(2):
        assert_close(fast.generate(), want)
    torch._dynamo.reset()


def test_ratio_1_draws_the_last_map_from_the_cache() -> None:
    schedule = Schedule(SCALES, (0.5, 1.0), prefix=True)
    fast = fastvar_fx.transform(Net(Block, as_bool), schedule, on_full="cache")
    hand = Net(Block, as_bool)
    hand.blocks = nn.ModuleList(ByHand(block, schedule, Method()) for block in hand.blocks)
    assert_close(fast.generate(), hand.generate())


def test_a_block_that_gets_another_sequence_than_the_schedule_says_is_an_error() -> None:
    told = Schedule(SCALES, (0.5, 0.4))
    fast = fastvar_fx.transform(Net(Block, as_bool), told, step_of=lambda *_: (fast.calls - 1) // 2)
    with pytest.raises(
        RunError, match=r"step 3 has a map of 20 tokens, but a block got 39.*\n?.*prefix=True"
    ):
        fast.generate()
    with pytest.raises(ScheduleError, match="prefix is True or False"):
        Schedule(SCALES, (0.5,), prefix=1)  # type: ignore[arg-type]


def test_running_sums_as_scales_of_one_row_are_an_error_that_names_the_schedule() -> None:
    """The maps in such a sequence would be resized as one row: rows of other maps would mix."""
    sums = [(1, 1), (1, 5), (1, 14), (1, 30)]
    with pytest.raises(ScheduleError, match=r"Schedule\(\(1, 2, 3, 4\), \(0.5,\), prefix=True\)"):
        fastvar_fx.transform(Net(Block, as_bool), Schedule(sums, (0.5,)))
    fastvar_fx.transform(Net(Block, as_bool), Schedule(sums, (0.5,)), step_of=lambda *_: 0)
    for rows in ([(1, 1), (1, 2), (1, 4), (1, 8)], [(1, 1), (5, 1), (14, 1), (29, 1)]):
        fastvar_fx.transform(Net(Block, as_bool), Schedule(rows, (0.5,)))


def test_a_schedule_keeps_its_prefix() -> None:
    assert Schedule.from_json(SCHEDULE.to_json()) == SCHEDULE
    assert SCHEDULE.extend((7, 8)).prefix
    assert SCHEDULE.without(4).prefix
    assert [SCHEDULE.length(step) for step in range(5)] == [1, 7, 19, 39, 69]
    assert [SCHEDULE.tokens(step) for step in range(5)] == [1, 6, 12, 20, 30]
