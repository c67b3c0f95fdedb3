"""Per-token values that a block stores: caches prune, anything else keeps its branch dense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import Schedule
from tests.by_hand import Pruner

C, H = 16, 2
SCALES = (1, 2, 3, 4, 5)
SCHEDULE = Schedule(SCALES, (0.5, 0.6))


class Block(nn.Module):
    """Attention with a cache and a feed-forward; `attend` and `feed` may leave values behind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.reset()

    def reset(self) -> None:
        self.k: Any = None
        self.v: Any = None

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        return k, v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join(self, y: Tensor) -> Tensor:
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        q, k, v = self.heads(x)
        return self.join(F.scaled_dot_product_attention(q, *self.grow(k, v)))

    def feed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        x = x + self.attend(x, shared)
        return x + self.feed(x, shared)


class Chunks(Block):
    """A cache that is a list of what each step appended."""

    def reset(self) -> None:
        self.k, self.v = [], []

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.append(k)
        self.v.append(v.double())
        return torch.cat(self.k, 2), torch.cat([part.float() for part in self.v], 2)


class ByStep(Block):
    """A cache that is a dict of what each step appended."""

    def reset(self) -> None:
        self.k, self.v = {}, {}

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k[len(self.k)], self.v[len(self.v)] = k, v
        return torch.cat([*self.k.values()], 2), torch.cat([*self.v.values()], 2)


class Tuples(Block):
    """A cache that is a tuple of what each step appended."""

    def reset(self) -> None:
        self.k, self.v = (), ()

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k, self.v = (*self.k, k), (*self.v, v)
        return torch.cat(self.k, 2), torch.cat(self.v, 2)


class Half(Block):
    """A cache of another dtype."""

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().grow(k.double(), v.double())
        return k.float(), v.float()


class Behind(Block):
    """A cache that new entries are put in front of."""

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None:
            k, v = torch.cat([k, self.k], 2), torch.cat([v, self.v], 2)
        self.k, self.v = k, v
        return k, v


class Map(Block):
    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        q, k, v = self.heads(x)
        k, v = self.grow(k, v)
        self.map = (q @ k.mT).softmax(-1)
        return self.join(self.map @ v)


class Maps(Map):
    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        out = super().attend(x, shared)
        shared.setdefault("maps", []).append(self.map)
        del self.map
        return out


class Newest(Block):
    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.newest = k
        return super().grow(k, v)


class Gates(Block):
    """A history that no step reads."""

    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        gate: Tensor = self.up(x).sigmoid()
        past = getattr(self, "gates", x[:, :0, :1].expand(-1, -1, 2 * C))
        self.gates = torch.cat([past, gate], 1) if past.shape[1] < 50 else gate
        return super().attend(x, shared) * gate[..., :C]

    def reset(self) -> None:
        super().reset()
        vars(self).pop("gates", None)


class Residual(Block):
    """Values of the first block, for all that come after it."""

    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        q, k, v = self.heads(x)
        if "v" in shared:
            v = v + shared["v"]
        else:
            shared["v"] = v
        return self.join(F.scaled_dot_product_attention(q, *self.grow(k, v)))


class Listed(Block):
    """The same in a list that every block appends to."""

    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        q, k, v = self.heads(x)
        values = shared.setdefault("values", [])
        values.append(v)
        return self.join(F.scaled_dot_product_attention(q, *self.grow(k, v + values[0])))


class Fed(Block):
    def feed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        self.fed = super().feed(x, shared)
        return self.fed


class Hidden(Block):
    def feed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        hidden = F.gelu(self.up(x))
        shared.setdefault("hidden", []).append(hidden[..., :4].clone())
        out: Tensor = self.down(hidden)
        return out


class Model(nn.Module):
    def __init__(self, kind: type[Block], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    @torch.no_grad()
    def generate(self, seed: int, step: Callable[[int, Any, Tensor, Any], Tensor]) -> Tensor:
        generator, maps = torch.Generator().manual_seed(seed), []
        for block in self.blocks:
            block.reset()  # type: ignore[operator]
        for side in SCALES:
            x, shared = torch.randn(2, side * side, C, generator=generator), dict[str, Any]()
            for layer, block in enumerate(self.blocks):
                x = step(layer, block, x, shared)
            maps.append(x)
        return torch.cat(maps, 1)


def call(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
    return block(x, shared)  # type: ignore[no-any-return]


def at_index(branch: Any, shared: dict[str, Any], x: Tensor, index: Tensor) -> Tensor:
    """Runs a branch on some tokens, with what another block stored for these (B, H, L, D)."""
    at = index[:, None, :, None]
    values = {key: v.take_along_dim(at, 2) for key, v in shared.items() if isinstance(v, Tensor)}
    return branch(x, shared | values)  # type: ignore[no-any-return]


def by_hand(model: Model, seed: int, dense: set[tuple[int, str]]) -> Tensor:
    """FastVAR by hand, but for the branches of `dense`, which run on all tokens."""
    pruners = [Pruner(SCHEDULE) for _ in model.blocks]

    def step(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
        for name in ("attend", "feed"):
            branch = getattr(block, name)
            if (layer, name) in dense:
                x = x + branch(x, shared)
            else:
                x = x + pruners[layer].run(name, x, partial(at_index, branch, shared))
        return x

    return model.generate(seed, step)


def check(
    kind: type[Block], depth: int, dense: dict[tuple[int, str], str], code: str = "FVX014"
) -> None:
    """Compares with FastVAR by hand; `dense` says which branches are refused, and why."""
    torch.manual_seed(0)
    model = Model(kind, depth).eval()
    fast = fastvar_fx.transform(model, SCHEDULE)
    for seed in (0, 1):
        torch.testing.assert_close(fast.generate(seed, call), by_hand(model, seed, {*dense}))
    kinds = {"attention": "attend", "ffn": "feed"}
    found = {
        (int(row.block.split(".")[1]), kinds[row.kind or ""]): row.refusal
        for row in fastvar_fx.explain(fast).rows
        if row.refusal is not None
    }
    assert found.keys() == dense.keys()
    for place, refusal in found.items():
        assert refusal.code == code
        assert dense[place] in refusal.reason


class Highway(Block):
    """A gate that decides how much of the stream stays."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)

    def gates(self, x: Tensor) -> Tensor:
        gates: Tensor = self.gate(x).sigmoid()
        return gates

    def feed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        return self.gates(x) * super().feed(x, shared)

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        x = x + self.attend(x, shared)
        gates = self.gates(x)
        return (1 - gates) * x + gates * Block.feed(self, x, shared)


def report_of(
    kind: type[Block], after_attention: Callable[[Pruner, Any, Tensor, Any], Tensor]
) -> fastvar_fx.Report:
    """Returns the report on one block, compared with what follows its attention by hand."""
    torch.manual_seed(0)
    model = Model(kind, 1).eval()
    fast, pruner = fastvar_fx.transform(model, SCHEDULE), Pruner(SCHEDULE)

    def step(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
        x = x + pruner.run("attend", x, partial(at_index, block.attend, shared))
        return after_attention(pruner, block, x, shared)

    torch.testing.assert_close(fast.generate(0, call), model.generate(0, step))
    return fastvar_fx.explain(fast)


def test_a_gated_residual_prunes_what_it_adds() -> None:
    def gated(pruner: Pruner, block: Any, x: Tensor, shared: Any) -> Tensor:
        added = pruner.run("feed", x, partial(at_index, block.feed, shared))
        made: Tensor = (1 - block.gates(x)) * x + added
        return made

    assert not report_of(Highway, gated).refusals


class Flipped(Block):
    def feed(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        return super().feed(x, shared) + x.flip(0)


class Scaled(Block):
    """A product with the stream in the place of a sum."""

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        x = x + self.attend(x, shared)
        return x * self.feed(x, shared).sigmoid()


def test_a_feed_forward_that_mixes_samples_says_so() -> None:
    check(Flipped, 1, {(0, "feed"): "flips the batch axis"}, "FVX013")


def test_what_changes_the_stream_itself_has_a_row() -> None:
    def scaled(pruner: Pruner, block: Any, x: Tensor, shared: Any) -> Tensor:
        made: Tensor = x * block.feed(x, shared).sigmoid()
        return made

    report = report_of(Scaled, scaled)
    assert [(row.kind, row.kept) for row in report.refusals] == [("ffn", 16), ("ffn", 25)]
    assert "FVX025" in str(report)
    assert report.refusals[0].flops == report.refusals[0].pruned_flops > 0


@pytest.mark.parametrize("kind", [Block, Chunks, ByStep, Tuples, Half, Behind])
def test_caches_are_pruned(kind: type[Block]) -> None:
    check(kind, 2, {})


@pytest.mark.parametrize(
    ("kind", "dense"),
    [
        (Map, {(0, "attend"): "stores it in map,"}),
        (Maps, {(0, "attend"): "stores it in [1]['maps'],"}),
        (Newest, {(0, "attend"): "stores it in newest,"}),
        (Gates, {(0, "attend"): "stores it in gates,"}),
        (Fed, {(0, "feed"): "stores it in fed,"}),
        (Hidden, {(0, "feed"): "stores it in [1]['hidden'],"}),
        (Residual, {(0, "attend"): "stores it in [1]['v'],"}),
        (Listed, {(0, "attend"): "stores it in [1]['values'],"}),
    ],
)
def test_a_branch_that_stores_anything_else_stays_dense(
    kind: type[Block], dense: dict[tuple[int, str], str]
) -> None:
    check(kind, 1, dense)


def test_the_next_block_reads_values_of_all_tokens_at_the_kept_ones() -> None:
    check(Residual, 3, {(0, "attend"): "stores it in [1]['v'],"})
