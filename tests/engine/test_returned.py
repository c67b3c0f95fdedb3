"""What a call returns that it was handed is the object of this call, at any depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastvar_fx
from fastvar_fx import Schedule
from tests.by_hand import Pruner

C, H = 16, 2
SCALES = (1, 2, 3, 4, 5)
SCHEDULE = Schedule(SCALES, (0.5, 0.6))
LENGTHS = [1, 5, 14, 14 + SCHEDULE.kept(3), 14 + SCHEDULE.kept(3) + SCHEDULE.kept(4)]


class Cache:
    """Keys and values of all layers, as language models hand them around."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def get(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self.layers[layer] if layer < len(self.layers) else None

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer < len(self.layers):
            self.layers[layer] = (k, v)
        else:
            self.layers.append((k, v))


class Registered(Cache):
    """The same, known to pytree."""


pytree.register_pytree_node(
    Registered, lambda cache: ([cache.layers], None), lambda *_: pytest.fail("it was made anew")
)


class Lazy:
    """An object per layer, made when it is first used."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def get(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return (self.layers[layer].k, self.layers[layer].v) if layer < len(self.layers) else None

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer == len(self.layers):
            self.layers.append(Layer())
        self.layers[layer].k, self.layers[layer].v = k, v


class Layer:
    k: Tensor
    v: Tensor


class Dict(dict[Any, Tensor]):
    def get(self, layer: int) -> Any:  # type: ignore[override]
        return (self["k", layer], self["v", layer]) if ("k", layer) in self else None

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        self["k", layer], self["v", layer] = k, v


class Nested(dict[int, dict[str, Tensor]]):
    def get(self, layer: int) -> Any:  # type: ignore[override]
        return (self[layer]["k"], self[layer]["v"]) if layer in self else None

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.setdefault(layer, {})
        self[layer]["k"], self[layer]["v"] = k, v


CACHES = [Cache, Registered, Lazy, Dict, Nested]


class Pair(NamedTuple):
    x: Tensor
    cache: Any


@dataclass
class Output:
    x: Tensor
    cache: Any
    extra: dict[str, Any]


class Slotted:
    __slots__ = ("cache", "x")

    def __init__(self, x: Tensor, cache: Any) -> None:
        self.x, self.cache = x, cache


Wrap = Callable[[Tensor, Any], Any]
WRAPS: dict[str, tuple[Wrap, Callable[[Any], tuple[Tensor, Any]]]] = {
    "tuple": (lambda x, cache: (x, cache), lambda out: out),
    "named tuple": (Pair, tuple),
    "dict": (lambda x, cache: {"x": x, "cache": cache}, lambda out: (out["x"], out["cache"])),
    "dataclass": (
        lambda x, cache: Output(x, cache, {"all": [cache], "n": 2}),
        lambda out: (out.x, out.extra["all"][0]),
    ),
    "slots": (Slotted, lambda out: (out.x, out.cache)),
    "nested": (lambda x, cache: (x, [Pair(x, {"c": cache})]), lambda o: (o[0], o[1][0].cache["c"])),
}


class Block(nn.Module):
    def __init__(self, layer: int, wrap: Wrap) -> None:
        super().__init__()
        self.layer, self.wrap = layer, wrap
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def attend(self, x: Tensor, cache: Any) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, L, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        past = cache.get(self.layer)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        cache.put(self.layer, k, v)
        out: Tensor = self.out(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, C)
        )
        return out

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out

    def forward(self, x: Tensor, cache: Any) -> Any:
        x = x + self.attend(x, cache)
        return self.wrap(x + self.feed(x), cache)


class ByHand(nn.Module):
    """FastVAR by hand around the live submodules of a block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.pruner = block, Pruner(SCHEDULE)

    def forward(self, x: Tensor, cache: Any) -> Any:
        block, run = self.block, self.pruner.run
        x = x + run("attn", x, lambda tokens, _: block.attend(tokens, cache))
        return block.wrap(x + run("ffn", x, lambda tokens, _: block.feed(tokens)), cache)


class Model(nn.Module):
    """A loop that goes on with the cache that came back."""

    def __init__(self, depth: int, make: Callable[[], Any], wrap: str = "tuple") -> None:
        super().__init__()
        self.make, (pack, self.unpack) = make, WRAPS[wrap]
        self.blocks = nn.ModuleList(Block(layer, pack) for layer in range(depth))
        self.lengths: list[int] = []

    @torch.no_grad()
    def generate(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        first = cache = self.make()
        maps, self.lengths = [], []
        for side in SCALES:
            x = torch.randn(2, side * side, C, generator=generator)
            for block in self.blocks:
                x, cache = self.unpack(block(x, cache))
                assert cache is first, "the object of this generation"
            maps.append(x)
            self.lengths.append(cache.get(0)[0].shape[2])
        return torch.cat(maps, 1)


def by_hand(model: Model, seed: int) -> Tensor:
    blocks = model.blocks
    model.blocks = nn.ModuleList(ByHand(block) for block in blocks)  # type: ignore[arg-type]
    try:
        return model.generate(seed)
    finally:
        model.blocks = blocks


def check(model: Model, fast: Model, programs: int) -> None:
    for seed in (0, 1, 0):
        torch.testing.assert_close(fast.generate(seed), by_hand(model, seed))
        assert fast.lengths == LENGTHS
    report = fastvar_fx.explain(fast)
    assert not report.refusals
    assert len({row.program for row in report.rows}) == programs


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("depth", [1, 4])
def test_the_cache_of_this_call_comes_back_and_layers_share_programs(
    make: Callable[[], Any], depth: int
) -> None:
    torch.manual_seed(0)
    model = Model(depth, make).eval()
    check(model, fastvar_fx.transform(model, SCHEDULE), programs=3)


@pytest.mark.parametrize("wrap", WRAPS)
def test_whatever_holds_it(wrap: str) -> None:
    torch.manual_seed(0)
    model = Model(2, Cache, wrap).eval()
    check(model, fastvar_fx.transform(model, SCHEDULE), programs=3)


@pytest.mark.parametrize("make", CACHES)
def test_a_cache_that_the_cache_step_fills_first(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, schedule = Model(2, make).eval(), Schedule((3, 4, 5), (0.5, 0.6))
    fast = fastvar_fx.transform(model, schedule)
    x = [torch.randn(1, side * side, C) for side in (3, 4, 5)]
    for _ in range(2):
        cache, expected = make(), make()
        hands = [ByHand(block) for block in model.blocks]  # type: ignore[arg-type]
        for hand in hands:
            hand.pruner = Pruner(schedule)
        with torch.no_grad():
            for each in x:
                got = want = each
                for block, hand in zip(fast.blocks, hands, strict=True):
                    (got, _), (want, _) = block(got, cache), hand(want, expected)
                torch.testing.assert_close(got, want)
    assert not fastvar_fx.explain(fast).refusals


def test_an_object_that_is_stored_is_the_one_handed_in() -> None:
    class Keeps(Block):
        def forward(self, x: Tensor, cache: Any) -> Any:
            self.cache = cache
            return super().forward(x, self.cache)

    torch.manual_seed(0)
    model = Model(2, Cache).eval()
    model.blocks = nn.ModuleList(Keeps(i, lambda x, cache: (x, cache)) for i in range(2))
    fast = fastvar_fx.transform(model.eval(), SCHEDULE)
    for seed in (0, 1):
        got = fast.generate(seed)
        other: Any = fast.blocks[0].cache
        assert all(block.cache is other for block in fast.blocks)
        torch.testing.assert_close(got, by_hand(model, seed))


def test_a_tensor_that_the_block_holds_too() -> None:
    """Its place among the arguments holds another tensor later."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Buffer(torch.randn(C))
            self.feed = nn.Sequential(nn.Linear(C, C), nn.Linear(C, C))

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            out: Tensor = x + self.feed(x) * shift
            return out

    block = Shifted().eval()
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    fast: Any = fastvar_fx.transform(model.eval(), SCHEDULE)
    own, other = fast.blocks[0].shift, torch.randn(C)
    for shift in (own, other, own):
        hand = Pruner(SCHEDULE)
        for side in SCALES:
            x = torch.randn(1, side * side, C)
            with torch.no_grad():
                want = x + hand.run("ffn", x, lambda t, _, s=shift: block.feed(t) * s)  # type: ignore[misc]
                torch.testing.assert_close(fast.blocks[0](x, shift), want)


def counts(fast: Model) -> list[int]:
    """How many programs each block holds for each step."""
    held: list[Any] = [vars(block)["_fastvar"].site.programs for block in fast.blocks]
    return [len(programs) for steps in held for programs in steps.values()]


@pytest.mark.parametrize("make", [Cache, Dict])
def test_prompts_of_other_lengths_open_the_sizes_of_a_shared_cache(
    make: Callable[[], Any],
) -> None:
    class Prompted(Model):
        length = 0

        def make(self) -> Any:
            cache, x = make(), torch.ones(2, self.length, C)
            for block in self.blocks:
                x, _ = block(x, cache)
            return cache

    torch.manual_seed(0)
    model = Prompted(3, make).eval()
    del model.make
    fast = fastvar_fx.transform(model, SCHEDULE)
    traced = []
    for length in (6, 7, 12, 10):
        fast.length = model.length = length
        torch.testing.assert_close(fast.generate(length), by_hand(model, length))
        assert counts(fast) == [1] * 9
        traced.append(fastvar_fx.explain(fast).trace_seconds)
    assert traced[1:] == traced[1:2] * 3, "nothing is traced after the second length"
    assert len({row.program for row in fastvar_fx.explain(fast).rows}) == 3


def test_dynamic_cache_of_transformers() -> None:
    DynamicCache: Any = pytest.importorskip("transformers").DynamicCache

    class Own(DynamicCache):  # type: ignore[misc]
        def get(self, layer: int) -> Any:
            own = self.layers[layer : layer + 1]
            return (own[0].keys, own[0].values) if own else None

    class Updates(Block):
        def attend(self, x: Tensor, cache: Any) -> Tensor:
            B, L, _ = x.shape
            parts = self.qkv(self.norm(x)).view(B, L, 3, H, C // H).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            k, v = cache.update(k, v, self.layer)
            out: Tensor = F.scaled_dot_product_attention(q, k, v)
            return self.out(out.transpose(1, 2).reshape(B, L, C))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Model(4, Own).eval()
    model.blocks = nn.ModuleList(Updates(i, lambda x, cache: (x, cache)) for i in range(4))
    check(model.eval(), fastvar_fx.transform(model, SCHEDULE), programs=3)
