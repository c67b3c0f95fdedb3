"""Loops that are not tidy, each compared with FastVAR edited into the blocks by hand.

What else public loops do is tested elsewhere:

    keys and values in attributes, dicts, tuples, arguments, returned; no cache at all      test_zoo
    a block's output changed in place by the loop; all steps in inference mode              test_zoo
    schedules that are never met; generations cut off; exceptions in a block            test_runtime
    chunk modules and plain lists are found                                              test_blocks

Positions are sliced by the query's length in every block here.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvar_fx
from fastvar_fx import CaptureMismatchError, RunError, Schedule, ScheduleError
from fastvar_fx.engine.engine import Engine
from tests.marks import mostly_slow
from tests.reference import pivotal_indices

WIDTH = 8
SCALES = ((1, 1), (2, 3), (3, 4), (4, 5), (5, 6))
SCHEDULE = Schedule(SCALES, (0.5, 0.4))


class Block(nn.Module):
    """Attention with a KV cache and a table of positions, then a feed-forward."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(1, 64, WIDTH))
        self.reset()

    def reset(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def cut(self, rows: slice) -> None:
        """What a loop does to the caches where it drops samples."""
        assert self.k is not None
        assert self.v is not None
        self.k, self.v = self.k[rows], self.v[rows]

    def attend(self, x: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k = q * at(self.table), k * at(self.table)
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)
        self.k, self.v = k, v
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v))
        return out

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, lambda table: table[:, : x.shape[1]])  # by the query's length
        return x + self.feed(x)


class ByHand(nn.Module):
    """A block with FastVAR edited in; it is told the step, and which samples go on."""

    def __init__(self, block: Block, schedule: Schedule, step: Callable[[], int | None]) -> None:
        super().__init__()
        self.block, self.schedule, self.step = block, schedule, step
        self.reset()

    def reset(self) -> None:
        self.block.reset()
        self.captured: dict[tuple[str, int], Tensor] = {}
        self.calls: Counter[tuple[str, int]] = Counter()

    def cut(self, rows: slice) -> None:
        self.block.cut(rows)
        self.captured = {key: feature[rows] for key, feature in self.captured.items()}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch("attention", x, self.attend)
        return x + self.branch("ffn", x, lambda kept, index: self.block.feed(kept))

    def attend(self, kept: Tensor, index: Tensor) -> Tensor:
        return self.block.attend(kept, lambda table: table[0, index])

    def branch(self, name: str, x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        step, schedule = self.step(), self.schedule
        index = torch.arange(x.shape[1]).expand(x.shape[:2])
        if step is None:
            return run(x, index)
        call = self.calls[name, step]
        self.calls[name, step] += 1
        if step not in schedule.pruned_steps:
            out = run(x, index)
            if step == schedule.cache_step:
                self.captured[name, call] = out
            return out
        index = pivotal_indices(x, schedule.kept(step))
        kept = run(x.gather(1, index[..., None].expand(-1, -1, WIDTH)), index)
        cached_scale, scale = schedule.scales[schedule.cache_step], schedule.scales[step]
        full = resized(self.captured[name, call], cached_scale, scale)
        return full.scatter(1, index[..., None].expand_as(kept), kept)


def resized(cached: Tensor, cached_scale: Sequence[int], scale: Sequence[int]) -> Tensor:
    """Area interpolation, each of the joint maps by itself."""
    *_, h, w = cached_scale
    images = cached.reshape(-1, h, w, WIDTH).permute(0, 3, 1, 2)  # (B * m, C, h, w)
    images = F.interpolate(images, size=tuple(scale[-2:]), mode="area")
    return images.flatten(2).transpose(1, 2).reshape(cached.shape[0], -1, WIDTH)


class Net(nn.Module):
    """Blocks whose loop is each test's own; `step` is where it is, None outside the schedule."""

    step: int | None = None

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks: Any = nn.ModuleList(block() for _ in range(2))
        self.double().eval()

    def run(self, x: Tensor, step: int | None = None) -> Tensor:
        self.step = step
        for block in self.blocks:
            x = block(x)
        return x

    def reset(self) -> None:
        for block in self.blocks:
            block.reset()

    def cut(self, rows: slice) -> None:
        for block in self.blocks:
            block.cut(rows)


def by_hand(
    schedule: Schedule = SCHEDULE, block: type[Block] = Block, edited: type[ByHand] = ByHand
) -> Net:
    net = Net(block)
    net.blocks = nn.ModuleList(edited(b, schedule, lambda: net.step) for b in net.blocks)
    return net


def transformed(
    schedule: Schedule = SCHEDULE, block: Callable[[], nn.Module] = Block, **options: Any
) -> Net:
    return fastvar_fx.transform(Net(block), schedule, **options)


def tokens(count: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + count)
    return torch.randn(batch, count, WIDTH, generator=generator, dtype=torch.float64)


def steps(
    net: Net, which: Iterable[int], schedule: Schedule = SCHEDULE, **draw: Any
) -> list[Tensor]:
    return [net.run(tokens(schedule.tokens(step), **draw), step) for step in which]


def generation(net: Net, schedule: Schedule = SCHEDULE, **draw: Any) -> list[Tensor]:
    net.reset()
    return steps(net, range(schedule.steps), schedule, **draw)


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def assert_all_pruned(fast: Net) -> None:
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step in SCHEDULE.pruned_steps]
    assert len(rows) == 8
    assert all(row.kept == SCHEDULE.kept(row.step) for row in rows)


# --- calls that are no step ----------------------------------------------------------------------


@pytest.mark.parametrize("source", [[30], [20, 30, 30], [17], [7, 6], [12], [12, 30, 17, 12]])
def test_tokens_before_the_first_step(source: list[int]) -> None:
    """Source tokens as many as a pruned step's or the cache step's, or context of any length."""

    def edit(net: Net, last: int = 5) -> list[Tensor]:
        net.reset()
        prefilled = [net.run(tokens(count, seed=1)) for count in source]
        return prefilled + steps(net, range(last))

    fast, hand = transformed(), by_hand()
    want = edit(hand)
    assert_close(edit(fast), want)
    assert_all_pruned(fast)
    for last in (2, 3, 4):  # a generation that is abandoned
        edit(fast, last)
        assert_close(edit(fast), want)
    early = {count: n * 2 * 7 for count, n in Counter(source).items() if count in (20, 30)}
    assert fastvar_fx.explain(fast).early_calls == early


def test_a_late_scale_that_the_loop_draws_otherwise_is_an_error() -> None:
    """The cache step is met every time, and then nothing is pruned."""
    fast = transformed(Schedule((*SCALES[:3], (4, 6), (5, 7)), (0.5, 0.4)))
    generation(fast)
    with pytest.raises(RunError, match=r"\[24, 35\] tokens.*\n?.*saw \[1, 6, 12, 20, 30\] tokens"):
        generation(fast)


def test_features_of_an_abandoned_generation_are_freed_by_the_next() -> None:
    fast = transformed()
    generation(fast)
    fast.reset()
    steps(fast, range(4))
    tracks = [track for tracks in Engine.of(fast).generation._tracks for track in tracks]
    features = [weakref.ref(f) for track in tracks for f in track.outputs.values()]
    del tracks
    assert len(features) == 4
    assert all(feature() is not None for feature in features)
    fast.reset()
    steps(fast, [0])
    assert all(feature() is None for feature in features)


# --- scales --------------------------------------------------------------------------------------


def test_joint_maps_are_ranked_together_and_resized_each_by_itself() -> None:
    schedule = Schedule(((2, 1, 2), (2, 2, 3), (2, 3, 4), (2, 4, 5)), (0.5, 0.7))
    fast, hand = transformed(schedule), by_hand(schedule)
    assert_close(generation(fast, schedule), generation(hand, schedule))
    index = pivotal_indices(tokens(24), 12)  # the first block's choice at step 2
    assert (index < 12).sum(dim=1).tolist() != [6, 6]


@pytest.mark.parametrize(
    ("scales", "ratios", "told"),
    [
        (((1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (4, 5)), (0.5,), False),
        (((1, 2), (3, 4), (3, 4), (3, 4), (4, 5), (4, 5)), (0.5, 0.4, 0.0, 0.7), True),
        (((1, 2), (2, 6), (3, 4), (4, 3)), (0.5, 0.4), True),
    ],
)
def test_scales_that_repeat(scales: Any, ratios: Any, told: bool) -> None:
    schedule = Schedule(scales, ratios)
    options: dict[str, Any] = {}
    if told:
        with pytest.raises(ScheduleError, match=r"steps \[1, 2, 3.*pass step_of="):
            transformed(schedule)
        options["step_of"] = lambda *call: fast.step
    fast: Net = transformed(schedule, **options)
    want = generation(by_hand(schedule), schedule)
    for _ in range(2):
        assert_close(generation(fast, schedule), want)
    kept = {row.step: row.kept for row in fastvar_fx.explain(fast).rows}
    assert kept == {s: schedule.kept(s) for s in (schedule.cache_step, *schedule.pruned_steps)}


# --- blocks and their calls ----------------------------------------------------------------------


class Twice(Net):
    def run(self, x: Tensor, step: int | None = None) -> Tensor:
        return super().run(super().run(x, step), step)


@pytest.mark.slow
def test_blocks_that_run_twice_in_a_step() -> None:
    fast, hand = transformed(), by_hand()
    fast.__class__ = hand.__class__ = Twice
    want = generation(hand)
    for _ in range(2):
        assert_close(generation(fast), want)
    assert_all_pruned(fast)


class OneBlock(Net):
    """Draws a step by one block alone, three times, each with caches of its own."""

    def reset(self) -> None:
        super().reset()
        self.caches: list[Any] = [(None, None)] * 3

    def run(self, x: Tensor, step: int | None = None) -> Tensor:
        self.step = step
        block = self.blocks[0]
        owner = block.block if isinstance(block, ByHand) else block
        for number, caches in enumerate(self.caches):
            owner.k, owner.v = caches
            x = block(x)
            self.caches[number] = owner.k, owner.v
        return x


def test_one_block_that_is_looped() -> None:
    fast, hand = fastvar_fx.transform(Net(), SCHEDULE, blocks="blocks.0"), by_hand()
    fast.__class__ = hand.__class__ = OneBlock
    want = generation(hand)
    for _ in range(2):
        assert_close(generation(fast), want)
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step in SCHEDULE.pruned_steps]
    assert all(row.kept == SCHEDULE.kept(row.step) for row in rows)
    assert len(rows) == 4


class Guided(Net):
    """Guidance between blocks, as Infinity's `cfg_insertion_layer`, then a write in place."""

    def run(self, x: Tensor, step: int | None = None) -> Tensor:
        self.step = step
        for block in self.blocks:
            x = block(x)
            half = x.shape[0] // 2
            x = 3 * x[:half] - 2 * x[half:]
            x = torch.cat((x, x))
            x[half:] *= 0.5
            x += 0.1
        return x


def test_guidance_between_blocks_and_outputs_changed_in_place() -> None:
    fast, hand = transformed(), by_hand()
    fast.__class__ = hand.__class__ = Guided
    want = generation(hand, batch=4)
    for _ in range(2):
        assert_close(generation(fast, batch=4), want)
    assert_all_pruned(fast)


class Chunk(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.module:
            x = block(x)
        return x


class Chunked(Net):
    """Infinity's two ways to its blocks: chunks, here of one, and a plain list beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.unregistered = list(self.blocks)
        self.blocks = nn.ModuleList(Chunk([block]).eval() for block in self.unregistered)

    def reset(self) -> None:
        assert all(isinstance(block, Block) for block in self.unregistered)
        for block in self.unregistered:
            block.reset()

    def run_plain(self, x: Tensor, step: int | None = None) -> Tensor:
        for block in self.unregistered:
            assert isinstance(block, Block)
            x = block(x)
        return x


def test_blocks_behind_chunks_and_in_a_plain_list() -> None:
    fast = fastvar_fx.transform(Chunked(), SCHEDULE)
    want = generation(by_hand())
    assert_close(generation(fast), want)
    assert_all_pruned(fast)
    fast.run = fast.run_plain  # type: ignore[method-assign]
    assert_close(generation(fast), want)


class OfTheLoop(Block):
    """Its keys and values stand in a list that the loop owns: one entry at first, then two."""

    def reset(self) -> None:
        self.k = self.v = None

    def forward(self, x: Tensor, kv: list[Tensor]) -> Tensor:  # type: ignore[override]
        self.k, self.v = kv or (None, None)
        x = super().forward(x)
        assert self.k is not None
        assert self.v is not None
        kv[:] = [self.k, self.v]
        self.reset()
        return x


class Owner(Net):
    def reset(self) -> None:
        self.caches: list[list[Tensor]] = [[] for _ in self.blocks]

    def run(self, x: Tensor, step: int | None = None) -> Tensor:
        for block, kv in zip(self.blocks, self.caches, strict=True):
            x = block(x, kv)
        return x


def test_caches_in_lists_of_the_loop() -> None:
    fast = fastvar_fx.transform(Owner(OfTheLoop), SCHEDULE)
    want = generation(by_hand())
    for _ in range(2):
        assert_close(generation(fast), want)
    assert_all_pruned(fast)


@torch.compile(backend="eager")
def compiled_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), norm.weight, norm.bias)


class Compiled(Block):
    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(compiled_norm(self.norm2, x))))
        return out


class Checkpointed(Block):
    reentrant = False

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().feed, x, use_reentrant=self.reentrant)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return out


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("block", [Compiled, Checkpointed, Reentrant])
def test_what_a_forward_is_wrapped_in(block: Callable[[], nn.Module]) -> None:
    fast = transformed(block=block)
    want = generation(by_hand())
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(generation(fast), want)
    assert_all_pruned(fast)


# --- guidance switched off: fewer samples than were captured -------------------------------------


def shrinking(net: Net, cuts: dict[int, slice], batch: int, anew: bool = False) -> list[Tensor]:
    """A generation that keeps `cuts[step]` of its samples from that step on."""
    net.reset()
    outputs = []
    rows = torch.arange(batch)
    for step in range(SCHEDULE.steps):
        if step in cuts:
            rows = rows[cuts[step]]
            net.cut(cuts[step])
        if step in cuts and anew:
            for block in net.blocks:
                block.k, block.v = block.k.clone(), block.v.clone()
        outputs.append(net.run(tokens(SCHEDULE.tokens(step), batch)[rows], step))
    return outputs


@pytest.mark.parametrize(
    ("kind", "batch", "cuts"),
    mostly_slow(
        [
            (Net, 3, {4: slice(1, 2)}),
            (Net, 4, {3: slice(2, 4)}),
            (Net, 4, {3: slice(0, 2)}),
            (Twice, 4, {3: slice(1, 4), 4: slice(2, 3)}),
        ],
        quick=2,
    ),
)
def test_samples_that_the_loop_drops(kind: type[Net], batch: int, cuts: dict[int, slice]) -> None:
    fast, hand = transformed(), by_hand()
    fast.__class__ = hand.__class__ = kind
    full = generation(hand, batch=batch)
    for _ in range(2):
        assert_close(shrinking(fast, cuts, batch), shrinking(hand, cuts, batch))
        assert_close(generation(fast, batch=batch), full)
    assert_all_pruned(fast)


@pytest.mark.parametrize(("which", "rows"), [("first", slice(0, 1)), ("last", slice(2, 3))])
def test_samples_that_the_loop_drops_by_making_new_caches(which: Any, rows: slice) -> None:
    hand, fast = by_hand(), transformed()
    with pytest.raises(CaptureMismatchError, match=r"batch 3, of which 1 are left.*live_rows="):
        shrinking(fast, {3: rows}, 3, anew=True)
    assert_close(generation(fast, batch=3), generation(hand, batch=3))
    told = transformed(live_rows=which)
    assert_close(shrinking(told, {3: rows}, 3, anew=True), shrinking(hand, {3: rows}, 3))


@pytest.mark.parametrize("which", ["last", None])
def test_samples_that_a_compiled_loop_drops(which: Any) -> None:
    schedule = Schedule(((2, 3), (3, 4)), (0.5,))
    fast = transformed(schedule, live_rows=which)
    fast.blocks = fast.blocks[-1:]

    def shrink(batch: int) -> list[Tensor]:
        fast.reset()
        captured = steps(fast, [0], schedule, batch=batch)
        fast.cut(slice(1, 2))
        return [*captured, fast.run(tokens(12, batch)[1:])]

    want = shrink(2)
    fast.blocks[0].compile(fullgraph=True, backend="eager")
    if which == "last":
        assert_close(shrink(2), want)
    else:
        with pytest.raises((RunError, torch._dynamo.exc.Unsupported), match="live_rows="):
            shrink(2)
    torch._dynamo.reset()


def test_caches_that_are_cut_apart_and_batches_that_grow_are_errors() -> None:
    fast = transformed()
    with pytest.raises(ValueError, match=r"live_rows is one of .*found 'middle'"):
        transformed(live_rows="middle")
    generation(fast, batch=3)
    fast.reset()
    steps(fast, range(3), batch=4)
    fast.cut(slice(0, 2))
    fast.blocks[0].v = fast.blocks[0].v.new_zeros(4, *fast.blocks[0].v.shape[1:])[2:]
    with pytest.raises(CaptureMismatchError, match=r"cut at different samples, \[0, 2\]"):
        steps(fast, [3], batch=2)
    fast.reset()
    steps(fast, range(3), batch=3)
    with pytest.raises(CaptureMismatchError, match=r"batch 4 on cpu.*\n?.*batch 3 on cpu"):
        steps(fast, [3], batch=4)
    assert_close(generation(fast), generation(by_hand()))


# --- preallocated caches -------------------------------------------------------------------------


class Preallocated(Block):
    """Keys and values stand in buffers of their full size; where, is a number."""

    def reset(self) -> None:
        self.keys = torch.zeros(2, 69, WIDTH, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)
        self.at = 0

    def attend(self, x: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        end = self.at + x.shape[1]
        self.keys[:, self.at : end] = k * at(self.table)
        self.values[:, self.at : end] = v
        self.at = end
        keys, values = self.keys[:, :end], self.values[:, :end]
        out: Tensor = self.proj(F.scaled_dot_product_attention(q * at(self.table), keys, values))
        return out


class QueriesByHand(ByHand):
    """Only the queries are pruned: every token's keys and values go into the buffers."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return super().forward(x)

    def attend(self, kept: Tensor, index: Tensor) -> Tensor:
        dense = self.block.attend(self.x, lambda table: table[:, : self.x.shape[1]])
        return dense.gather(1, index[..., None].expand(-1, -1, WIDTH))


def test_preallocated_caches_are_filled_and_their_queries_pruned() -> None:
    fast, hand = transformed(block=Preallocated), by_hand(block=Preallocated, edited=QueriesByHand)
    want = generation(hand)
    for _ in range(2):
        assert_close(generation(fast), want)
    for ours, theirs in zip(fast.blocks, hand.blocks, strict=True):
        assert_close([ours.keys, ours.values], [theirs.block.keys, theirs.block.values])
    assert_all_pruned(fast)
    attention = [row for row in fastvar_fx.explain(fast).rows if row.kind == "attention"]
    qkv, proj, attended = 2 * 3 * WIDTH * WIDTH, 2 * WIDTH * WIDTH, 4 * 69 * WIDTH
    row = attention[-1]
    assert row.flops == 2 * 30 * (qkv + proj + attended)
    assert row.pruned_flops == 2 * (30 * qkv + 18 * (qkv + proj + attended))
