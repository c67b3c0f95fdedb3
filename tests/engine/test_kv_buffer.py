"""KV caches grow in place: the values of `cat`, in one buffer, whatever the loop does to them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.kv_buffers import KVBuffers
from passes.analyse.caches import Copied, Growth, find_growing
from passes.rewrite.kv_append import append_in_place
from tests import zoo
from tests.devices import DEVICE

WIDTH, HEADS = 8, 2
SCALES = ((1, 1), (2, 3), (3, 4), (4, 5), (5, 6))
SCHEDULE = Schedule(SCALES, (0.5, 0.4))
CACHE_STEP = 2
FINAL = 1 + 6 + 12 + 10 + 18
"""The keys of a generation: all of the first three steps, the kept ones of the last two."""

Heads = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention with a KV cache, then a feed-forward; subclasses differ in how they keep `k, v`."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.reset()

    def reset(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def caches(self) -> list[Tensor]:
        return [cache for cache in (self.k, self.v) if cache is not None]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = torch.cat((self.k, k), self.dim), torch.cat((self.v, v), self.dim)
        self.k, self.v = k, v
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.append(k, v)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1))  # (B, L, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D)
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc(F.gelu(x))
        return out


class TokensFirst(Block):
    """Caches (B, L, H, D)."""

    dim = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.append(k.transpose(1, 2), v.transpose(1, 2))
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


class Packed(Block):
    """One cache (2, B, H, L, D), grown by `concat` along a negative dim."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.stack((k, v))
        self.k = new if self.k is None else torch.concat([self.k, new], dim=-2)
        k, v = self.k.unbind(0)
        return k, v


class Halved(Block):
    """Caches that are used in another dtype than they are kept in."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept_k, kept_v = super().append(k.bfloat16(), v.bfloat16())
        return kept_k.type_as(k), kept_v.type_as(v)


class Net(nn.Module):
    def __init__(
        self, block: Callable[[], Block] = Block, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks: Any = nn.ModuleList(block() for _ in range(2))
        self.to(DEVICE, dtype).eval()

    def step(self, step: int, batch: int = 2, seed: int = 0) -> Tensor:
        """Runs one step; its input depends on the step and the seed only."""
        generator = torch.Generator().manual_seed(100 * seed + step)
        h, w = SCALES[step]
        x = torch.randn(4, h * w, WIDTH, generator=generator, dtype=torch.float64)[:batch]
        x = x.to(self.blocks[0].fc.weight)
        for block in self.blocks:
            x = block(x)
        return x

    def steps(self, seed: int = 0, steps: range = range(5)) -> Iterator[Tensor]:
        """A generation, step by step; it starts with empty caches."""
        if steps.start == 0:
            for block in self.blocks:
                block.reset()
        for step in steps:
            yield self.step(step, seed=seed)

    def caches(self) -> list[Tensor]:
        return [cache for block in self.blocks for cache in block.caches()]


def pair(block: Callable[[], Block] = Block, dtype: torch.dtype = torch.float64) -> tuple[Net, Net]:
    """The same model twice: its caches in buffers, and copied as they grow."""
    net = Net(block, dtype)
    return fastvar_fx.transform(net, SCHEDULE), fastvar_fx.transform(net, SCHEDULE, kv_buffer=False)


def assert_equal(got: list[Tensor], want: list[Tensor], *, exact: bool = True) -> None:
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


def buffered(net: Net) -> fastvar_fx.engine.report.Caches:
    caches = fastvar_fx.explain(net).caches
    assert caches is not None
    return caches


# --- the buffers alone -------------------------------------------------------------------------


@st.composite
def growths(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """What is done to which of the caches so far, with how many rows and how much to spare."""
    acts = st.sampled_from(("newest", "newest", "any", "slice", "edit", "resize", "forget"))
    count = st.integers(0, 3)
    return draw(st.lists(st.tuples(acts, st.integers(0, 9), count, count), max_size=12))


@given(growths(), st.sampled_from((0, 1, 2)))
def test_no_entry_that_a_tensor_sees_is_overwritten(
    acts: list[tuple[str, int, int, int]], dim: int
) -> None:
    buffers = KVBuffers()
    caches = [torch.randn(2, 3, 2, device=DEVICE)]
    values = [caches[0].clone()]
    for act, choice, rows, spare in acts:
        at = len(caches) - 1 if act == "newest" else choice % len(caches)
        past = caches[at]
        if act == "slice":
            caches.append(past.narrow(dim, 0, past.shape[dim] // 2))
            values.append(caches[-1].clone())
        elif act == "resize":  # the very tensor, but it sees fewer entries
            past.data = past.narrow(dim, 0, (past.shape[dim] + 1) // 2)
            values[at] = past.clone()
        elif act == "edit":
            caches[at] = past + 1
            values[at] = values[at] + 1
        elif act == "forget" and len(caches) > 1:
            del caches[at], values[at], past
        else:
            shape = [rows if d == dim else n for d, n in enumerate(past.shape)]
            new = torch.randn(shape, device=DEVICE)
            foreseen = max(0, 12 - past.shape[dim] - rows) if spare else 0
            grown = buffers.grown(past, Growth(0, 0, dim, rows, foreseen))
            grown.narrow(dim, past.shape[dim], rows).copy_(new)
            caches.append(grown)
            values.append(torch.cat((values[at], new), dim))
    assert_equal(caches, values)


def test_a_cache_grows_in_place_as_long_as_its_length_was_foreseen() -> None:
    buffers = KVBuffers()
    first = buffers.grown(torch.zeros(1, 2, device=DEVICE), Growth(0, 0, 1, 3, 6))
    second = buffers.grown(first, Growth(0, 0, 1, 4, 2))
    assert second.data_ptr() == first.data_ptr()
    assert second.shape == (1, 9)
    again = buffers.grown(first, Growth(0, 0, 1, 4, 2))
    more = buffers.grown(second, Growth(0, 0, 1, 3, 0))  # 2 were foreseen
    assert len({tensor.data_ptr() for tensor in (second, again, more)}) == 3
    assert (buffers.appended, buffers.moved) == (1, 3)


def test_buffers_are_freed_with_the_caches() -> None:
    buffers = KVBuffers()
    cache = buffers.grown(torch.zeros(1, 2, device=DEVICE), Growth(0, 0, 1, 3, 6))
    assert len(buffers) == 1
    del cache
    assert len(buffers) == 0


# --- generations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        (Block, torch.float64),
        (Block, torch.float32),
        (Block, torch.bfloat16),
        (TokensFirst, torch.float64),
        (Packed, torch.float64),
        (Halved, torch.float64),
    ],
)
def test_caches_stay_in_one_buffer_and_hold_what_cat_gives(
    block: type[Block], dtype: torch.dtype
) -> None:
    fast, copying = pair(block, dtype)
    # A GPU's fused attention may choose another kernel for keys that lie apart.
    exact = DEVICE.type == "cpu" or dtype == torch.float64
    count = len(fast.blocks) * (1 if block is Packed else 2)
    for seed in range(2):
        addresses: dict[int, list[int]] = {}
        steps = zip(fast.steps(seed), copying.steps(seed), strict=True)
        for step, (got, want) in enumerate(steps):
            assert_equal([got, *fast.caches()], [want, *copying.caches()], exact=exact)
            addresses[step] = [cache.data_ptr() for cache in fast.caches()]
        assert addresses[2] == addresses[3] == addresses[4] != addresses[1]
        assert all(cache.shape[block.dim + (block is Packed)] == FINAL for cache in fast.caches())
    caches = buffered(fast)
    assert (caches.buffered, caches.copied) == (count, {})
    assert (caches.appended, caches.moved) == (2 * 2 * count, 2 * count)


class Biased(Block):
    """Its attention has a value per key, so that it prunes at the last step only."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Buffer(torch.randn(30, 69))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.append(k, v)
        bias = self.bias[: q.shape[self.dim], : k.shape[self.dim]]
        return F.scaled_dot_product_attention(q, k, v, bias)


def test_caches_whose_attention_prunes_at_the_last_step_only_stay_in_one_buffer() -> None:
    fast, copying = pair(Biased)
    for seed in range(2):
        for got, want in zip(fast.steps(seed), copying.steps(seed), strict=True):
            assert_equal([got, *fast.caches()], [want, *copying.caches()])
    kept = {row.step: row.kept for row in fastvar_fx.explain(fast).rows if row.kind == "attention"}
    assert kept[3] == SCHEDULE.tokens(3)
    assert kept[4] == SCHEDULE.kept(4)
    caches = buffered(fast)
    assert (caches.appended, caches.moved) == (2 * 2 * 4, 2 * 4)


def test_opting_out_copies() -> None:
    _, copying = pair()
    kept = [copying.caches()[0] for _ in copying.steps()]  # so that no address comes back
    assert len({cache.data_ptr() for cache in kept}) == len(SCALES)
    assert fastvar_fx.explain(copying).caches is None
    assert "KV caches" not in str(fastvar_fx.explain(copying))


@pytest.mark.slow
@settings(max_examples=6, derandomize=True)
@given(zoo.cases(stale_masks=False))
def test_any_block_draws_the_same(case: zoo.Case) -> None:
    assume(case.spec.cached)
    ratios, cache_step = case.schedule.ratios, case.schedule.cache_step
    schedule = Schedule(case.schedule.scales, ratios, cache_step=cache_step)
    model = case.model()
    transform = partial(fastvar_fx.transform, model, schedule, on_full="cache", strict=False)
    fast, copying = transform(), transform(kv_buffer=False)
    for seed in range(2):
        got, want = (m.generate(case.batch, seed, keep_cache=True) for m in (fast, copying))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    caches = fastvar_fx.explain(fast).caches
    assert caches is not None
    assert caches.buffered > 0
    assert not caches.copied


def cut(net: Net) -> None:
    for block in net.blocks:
        block.k, block.v = block.k[:1], block.v[:1]


def pick(net: Net) -> None:
    swapped = torch.tensor([1, 0], device=DEVICE)
    for block in net.blocks:
        block.k, block.v = (cache.index_select(0, swapped) for cache in block.caches())


def edit(net: Net) -> None:
    for cache in net.caches():
        cache[:, :, :3] *= 2


def detach(net: Net) -> None:
    for block in net.blocks:
        block.k, block.v = block.k.detach(), block.v.detach()


@pytest.mark.parametrize("change", [cut, pick, edit, detach])
@pytest.mark.parametrize("step", [CACHE_STEP, 3])
def test_what_a_loop_does_to_caches_between_steps(change: Any, step: int) -> None:
    fast, copying = pair()
    batch = 1 if change is cut else 2
    for net in (fast, copying):
        list(net.steps(steps=range(step + 1)))
        change(net)
    for later in range(step + 1, len(SCALES)):
        got, want = (net.step(later, batch) for net in (fast, copying))
        assert_equal([got, *fast.caches()], [want, *copying.caches()])


def test_a_loop_that_keeps_the_caches_of_every_step() -> None:
    fast, copying = pair()
    kept, wanted = [], []
    for seed in range(2):
        for _ in zip(fast.steps(seed), copying.steps(seed), strict=True):
            kept += fast.caches()
            wanted += copying.caches()
    assert_equal(kept, wanted)


def test_a_second_continuation_of_an_earlier_state() -> None:
    fast, copying = pair()
    found: list[list[Tensor]] = []
    for net in (fast, copying):
        list(net.steps(steps=range(3)))
        earlier = net.caches()
        found.append([net.step(3), *net.caches()])
        twin = copy.deepcopy(net)
        found[-1] += [net.step(4), *net.caches()]
        restored = iter(earlier)
        for block in net.blocks:
            block.k, block.v = next(restored), next(restored)
        found[-1] += [*earlier, *twin.caches()]
    assert_equal(*found)


def test_generations_that_take_turns() -> None:
    fast, copying = pair()
    found: list[list[Tensor]] = [[], []]
    for net, results in zip((fast, copying), found, strict=True):
        states: list[Any] = [[(None, None)] * 2, [(None, None)] * 2]
        for step in range(len(SCALES)):
            for seed, state in enumerate(states):
                for block, caches in zip(net.blocks, state, strict=True):
                    block.k, block.v = caches
                results += [net.step(step, seed=seed), *net.caches()]
                states[seed] = [(block.k, block.v) for block in net.blocks]
    assert_equal(*found)
    assert (buffered(fast).appended, buffered(fast).moved) == (16, 8)


def test_exceptions_and_abandoned_generations() -> None:
    fast, copying = pair()
    list(fast.steps())
    hook = fast.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
        list(fast.steps(seed=5))
    hook.remove()
    for last in (3, 4):  # given up after the cache step, and after a pruned one
        list(fast.steps(seed=6, steps=range(last)))
        got, want = list(fast.steps(seed=7)), list(copying.steps(seed=7))
        assert_equal([*got, *fast.caches()], [*want, *copying.caches()])


def test_a_copy_made_between_steps_goes_on_by_itself() -> None:
    fast, copying = pair()
    for net in (fast, copying):
        list(net.steps())
    twin = copy.deepcopy(fast)
    held = [cache.clone() for cache in fast.caches()]
    assert_equal(list(twin.steps(seed=1)), list(copying.steps(seed=1)))
    assert_equal(fast.caches(), held)


def test_inference_mode_and_out_of_it() -> None:
    fast, copying = pair()
    for net in (fast, copying):
        list(net.steps())
    found: list[list[Tensor]] = [[], []]
    for net, results in zip((fast, copying), found, strict=True):
        with torch.inference_mode():
            results += net.steps(steps=range(4))
        results += [net.step(4), *net.caches()]
    assert_equal(*found)
    assert buffered(fast).moved == 3 * len(fast.caches())


def test_gradients_are_those_of_copied_caches() -> None:
    gradients = []
    for net in pair():
        with torch.enable_grad():
            loss = torch.cat([out.flatten() for out in net.steps()]).square().sum()
            torch.autograd.backward(loss)
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        net.zero_grad()
    # A GPU adds up the gradients of a resized map in any order.
    assert_equal(*gradients, exact=DEVICE.type == "cpu")


# --- caches that cannot be in a buffer ---------------------------------------------------------


class Prepended(Block):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = torch.cat((k, self.k), 2), torch.cat((v, self.v), 2)
        self.k, self.v = k, v
        return k, v


class Transposed(Block):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = (torch.cat((c.mT, n), 2) for c, n in ((self.k, k), (self.v, v)))
        self.k, self.v = k.mT, v.mT
        return k, v


class Widened(Block):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = torch.cat((self.k.float(), k), 2), torch.cat((self.v.float(), v), 2)
        self.k, self.v = k.double(), v.double()
        return self.k, self.v


class Overwritten(Block):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(k, v)
        return k.mul_(1.01), v.mul_(0.99)


class ReadApart(Block):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = self.k
        k, v = super().append(k, v)
        return k, v if before is None else v + before.mean()


class Viewed(Block):
    """Heads and keys as one dim, which has no gaps in what `cat` gives."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, _, D = q.shape
        k, v = (t.view(B, -1, D).view(B, H, -1, D) for t in self.append(k, v))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Prepended, "its new entries are not joined to the end of what was stored"),
        (Transposed, "its new entries are not joined to the end of what was stored"),
        (Widened, "its new entries are not joined to the end of what was stored"),
        (Overwritten, "the block overwrites it"),
        (ReadApart, "its old entries are also read apart from the new ones"),
        (Viewed, "the block does not run on a view"),
    ],
)
def test_other_caches_are_copied_and_say_why(block: type[Block], reason: str) -> None:
    fast, copying = pair(block)
    for seed in range(2):
        got, want = list(fast.steps(seed)), list(copying.steps(seed))
        assert_equal([*got, *fast.caches()], [*want, *copying.caches()])
    report = fastvar_fx.explain(fast)
    assert report.caches is not None
    assert report.caches.copied["blocks.1.k"].startswith(reason)
    assert re.search(rf"copied as it grows: blocks.0.k \(\+\d\), for {reason}", str(report))
    assert json.loads(report.to_json())["caches"]["copied"] == report.caches.copied


def test_the_report_counts() -> None:
    fast, _ = pair()
    list(fast.steps())
    line = "KV caches: 4 in buffers, grown in place 8 times and moved 4 times"
    assert line in str(fastvar_fx.explain(fast)).splitlines()


# --- the pass alone ----------------------------------------------------------------------------


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(lambda *args: list(function(*args)), pre_dispatch=True)(*inputs)


def test_cat_becomes_a_write_into_the_room() -> None:
    past, new = torch.randn(2, 3, 4, device=DEVICE), torch.randn(2, 2, 4, device=DEVICE)

    def grow(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat((past, new), 1)
        return grown.sum(1), grown

    graph = graph_of(grow, past, new)
    found = find_growing(graph, [0], [])
    assert found == [Growth(0, 1, 1, 2)] == find_growing(graph, [], [0])
    assert find_growing(graph, [], []) == []
    assert find_growing(graph, [1], []) == [
        Copied(1, "its new entries are not joined to the end of what was stored")
    ]
    made = append_in_place(graph, [found[0]])  # type: ignore[list-item]
    targets = [node.target for node in made.graph.nodes]
    assert torch.ops.aten.cat.default not in targets
    assert torch.ops.aten.cat.default in [node.target for node in graph.graph.nodes]
    buffer = torch.full((2, 7, 4), torch.nan, device=DEVICE)
    buffer[:, :3] = past
    outputs = made(buffer[:, :5], new)
    assert_equal(outputs, list(grow(past, new)))
    assert outputs[1].data_ptr() == buffer.data_ptr()
    assert buffer[:, 5:].isnan().all()


# --- torch.compile -----------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_programs_grow_caches_in_place_and_compile_once() -> None:
    fast, copying = pair()
    fastvar_fx.compile(fast, backend="aot_eager")
    want = [list(copying.steps(seed)) for seed in range(3)]
    assert_equal(list(fast.steps(0)), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (1, 2):
            assert_equal(list(fast.steps(seed)), want[seed])
    assert_equal(fast.caches(), copying.caches())
    caches = buffered(fast)
    assert (caches.appended, caches.moved) == (24, 12)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_users_own_compilation_copies() -> None:
    fast, copying = pair()
    want = [list(copying.steps(seed)) for seed in range(2)]
    list(fast.steps())
    moved = buffered(fast).moved
    for block in fast.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert_equal(list(fast.steps(0)), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(list(fast.steps(1)), want[1])
    assert_equal(fast.caches(), copying.caches())
    assert buffered(fast).moved == moved
