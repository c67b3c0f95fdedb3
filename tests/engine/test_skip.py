"""Loops that skip their last steps, each by what it offers, and loops that cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvar_fx
from fastvar_fx import ModelError, RunError, Schedule, ScheduleError
from fastvar_fx.engine.copy_model import copy_structure
from fastvar_fx.engine.skipping import Skipped
from fastvar_fx.models.var import build

SIDES = (1, 2, 3, 4, 6)
K, WIDTH, CODE, VOCAB = len(SIDES), 16, 4, 11
Add = Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Attention over all tokens so far, and a feed-forward."""

    cached = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def keys(self, k: Tensor) -> Tensor:
        return k

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        k = self.keys(k)
        if self.cached:
            if self.k is not None and self.v is not None:
                k, v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
            self.k, self.v = k, v
        x = x + self.proj(torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v)
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Quantizer(nn.Module):
    """Sums maps up at the final resolution, in place, behind a convolution that has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CODE, CODE, 3, padding=1)

    def add(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        side = SIDES[-1]
        f_hat.add_(self.conv(F.interpolate(h_BChw, (side, side), mode="bicubic")))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, (SIDES[si + 1], SIDES[si + 1]), mode="area")


class Accumulator(Quantizer):
    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.add(si, SN, f_hat, h_BChw)


class Net(nn.Module):
    """A small VAR; its subclasses differ in what their loops offer."""

    quantizer: type[Quantizer] = Quantizer

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.start = nn.Parameter(torch.randn(2, 1, WIDTH))
        self.word, self.head = nn.Linear(CODE, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.codes = nn.Embedding(VOCAB, CODE)
        self.proxy = (self.quantizer(),)  # not a registered module, as in VAR
        self.seen: list[int] = []

    def _loop(self, batch: int, seed: int, until: int, add: Add) -> Tensor:
        """Returns the sum of the first `until` maps, (B, CODE, 6, 6)."""
        f_hat = torch.zeros(batch, CODE, SIDES[-1], SIDES[-1])
        x = self.start[:batch] * (1 + seed)
        self.seen = []
        for block in self.blocks:
            block.k = block.v = None  # type: ignore[assignment]
        for si, side in enumerate(SIDES):
            if si >= until:
                break
            for block in self.blocks:
                x = block(x)
            self.seen.append(x.shape[1])
            h = self.codes(self.head(x).argmax(-1)).mT.reshape(batch, CODE, side, side)
            f_hat, following = add(si, K, f_hat, h)
            x = self.word(following.flatten(2).mT)
        return f_hat

    def by_hand(self, until: int, batch: int = 2, seed: int = 0) -> Tensor:
        """The same loop, edited: it leaves out the last steps."""
        return self._loop(batch, seed, until, self.proxy[0].add)


class Accumulates(Net):
    quantizer = Accumulator

    def generate(self, batch: int = 2, seed: int = 0) -> Tensor:
        quantizer: Any = self.proxy[0]
        return self._loop(batch, seed, K, quantizer.get_next_autoregressive_input)


class Stops(Net):
    def generate(self, batch: int = 2, seed: int = 0, trunk_scale: int = 1000) -> Tensor:
        return self._loop(batch, seed, trunk_scale, self.proxy[0].add)


class DrawsTheLastStepApart(Net):
    """As HART does: the last map is drawn behind the loop and added by hand."""

    quantizer = Accumulator

    def generate(self, batch: int = 2, seed: int = 0) -> Tensor:
        return draw_apart(self, batch, seed)


def draw_apart(net: Net, batch: int = 2, seed: int = 0) -> Tensor:
    quantizer: Any = net.proxy[0]

    def add(si: int, SN: int, f_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if si == SN - 1:
            return f_hat + h, f_hat
        f_hat, following = quantizer.get_next_autoregressive_input(si, SN, f_hat, h)
        return f_hat, following

    return net._loop(batch, seed, K, add)


class Adds(Net):
    """Offers nothing."""

    def generate(self, batch: int = 2, seed: int = 0) -> Tensor:
        return self._loop(batch, seed, K, self.proxy[0].add)


def model_of(kind: type[Net], block: type[Block] = Block) -> Any:
    torch.manual_seed(0)
    return kind(block).eval().requires_grad_(False)


def shorter(kind: type[Net], ratios: tuple[float, ...], block: type[Block] = Block) -> Any:
    """The model that prunes alike and whose schedule ends before the skipped steps."""
    drawn = tuple(ratio for ratio in ratios if ratio < 1)
    schedule = Schedule(SIDES[: K - len(ratios) + len(drawn)], drawn)
    return fastvar_fx.transform(model_of(kind, block), schedule)


LOOPS = pytest.mark.parametrize("kind", [Accumulates, Stops])


# --- loops that skip -----------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("ratios", [(1,), (1, 1), (0.3, 0.6, 1), (0.5, 1, 1)])
def test_equals_the_loop_that_leaves_the_steps_out(
    kind: type[Net], ratios: tuple[float, ...]
) -> None:
    model = model_of(kind)
    fast, edited = fastvar_fx.transform(model, Schedule(SIDES, ratios)), shorter(kind, ratios)
    until = K - ratios.count(1)
    for batch, seed in ((2, 0), (2, 1), (1, 0)):
        assert torch.equal(fast.generate(batch, seed), edited.by_hand(until, batch, seed))
        assert torch.equal(fast.blocks[1].k, edited.blocks[1].k)
    assert len(fast.seen) == (K if kind is Accumulates else until)
    assert not any("_fastvar" in name for m in model.modules() for name in vars(m))
    assert torch.equal(model.generate(), model_of(kind).by_hand(K))


def test_the_callers_trunk_scale_counts_if_it_is_lower() -> None:
    fast = fastvar_fx.transform(model_of(Stops), Schedule(SIDES, (1, 1)))
    for steps in (1, 2):
        assert torch.equal(fast.generate(2, 0, steps), fast.by_hand(steps))
    assert torch.equal(fast.generate(trunk_scale=None), fast.by_hand(K - 2))
    assert torch.equal(fast.generate(trunk_scale=K - 1), fast.by_hand(K - 2))
    with pytest.raises(TypeError, match="unexpected"):
        fast.generate(scale=3)


def test_layers_that_do_not_prune_skip_too() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (0.5, 1), layers=(1,)))
    fast.generate()
    lengths = [block.k.shape[1] for block in fast.blocks]
    assert lengths == [30, 22]  # steps of 1, 4, 9 and 16 tokens, 8 of 16 in the one that prunes


@pytest.mark.parametrize("ratios", [(1,), (1, 1), (0.5, 1)])
def test_the_in_tree_var_skips(ratios: tuple[float, ...]) -> None:
    model = build("tiny", scales=SIDES, depth=2)
    fast = fastvar_fx.transform(model, Schedule(SIDES, ratios))
    drawn = tuple(0.0 if ratio == 1 else ratio for ratio in ratios)
    sums: list[Tensor] = []
    plain = fastvar_fx.transform(model, Schedule(SIDES, drawn))
    plain.infer_fhat(2, 1, g_seed=0, on_step=lambda _, f_hat: sums.append(f_hat))
    want = sums[K - 1 - ratios.count(1)]
    assert torch.equal(fast.infer_fhat(2, 1, g_seed=0), want)
    assert not torch.equal(want, sums[-1])
    image = fast.autoregressive_infer_cfg(2, 1, g_seed=0)
    assert torch.equal(image, model.vae.decode(want))


def test_a_rule_of_the_users_own() -> None:
    class Own(Net):
        steps = K

        def generate(self) -> Tensor:
            return self._loop(2, 0, self.steps, self.proxy[0].add)

    def stop_at(fast: nn.Module, skipped: Skipped) -> bool:
        fast.steps = skipped.first  # type: ignore[assignment]
        assert skipped.steps == (3, 4)
        assert skipped.scales[3] == (4, 4)
        return True

    model = model_of(Own)
    fast = fastvar_fx.transform(model, Schedule(SIDES, (1, 1)), on_full=stop_at)
    assert torch.equal(fast.generate(), model.by_hand(K - 2))
    assert model.steps == K


def test_a_rule_of_the_users_own_may_let_the_blocks_pass() -> None:
    """The loop has an accumulator of another name: the rule tells what the loop has drawn."""

    def pass_blocks(fast: Any, skipped: Skipped) -> bool:
        add = fast.proxy[0].add

        def adding(si: int, SN: int, f_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            kept = f_hat.clone()
            f_hat, following = add(si, SN, f_hat, h)
            skipped.drew(si)
            return (kept if si in skipped.steps else f_hat), following

        fast.proxy[0].add = adding
        return True

    fast = fastvar_fx.transform(model_of(Adds), Schedule(SIDES, (0.5, 1)), on_full=pass_blocks)
    want = shorter(Adds, (0.5, 1)).by_hand(K - 1)
    assert torch.equal(fast.generate(), want)
    assert torch.equal(fast.generate(), want)


def test_cache_draws_the_steps_from_the_captured_features() -> None:
    fast = fastvar_fx.transform(model_of(Adds), Schedule(SIDES, (0.5, 1)), on_full="cache")
    fast.generate()
    report = fastvar_fx.explain(fast)
    assert {(row.step, row.kept) for row in report.rows} == {(2, 9), (3, 8), (4, 0)}
    assert (report.skipping.steps, report.pruning.steps) == ((), (3, 4))


# --- copies, failures, compilation ---------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda fast: copy_structure(fast)[0]])
def test_copies_skip_on_their_own(kind: type[Net], duplicate: Callable[[Any], Any]) -> None:
    fast = fastvar_fx.transform(model_of(kind), Schedule(SIDES, (1, 1)))
    want = fast.generate()
    other = duplicate(fast)
    assert other.generate.__self__ is other
    with torch.no_grad():
        for net in (fast, other):
            net.start = nn.Parameter(net.start + (net is other))
    assert torch.equal(fast.generate(), want)
    assert torch.equal(other.generate(), other.by_hand(K - 2))


def test_a_copy_is_in_no_generation() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (0.5, 1)))
    fast._loop(2, 0, K - 1, fast.proxy[0].get_next_autoregressive_input)
    other = copy.deepcopy(fast)
    x = torch.randn(2, SIDES[-1] ** 2, WIDTH)
    assert fast.blocks[0](x) is x
    assert not torch.equal(other.blocks[0](x), x)


@LOOPS
@pytest.mark.parametrize("step", range(K))
def test_an_exception_leaves_nothing_behind(kind: type[Net], step: int) -> None:
    fast = fastvar_fx.transform(model_of(kind), Schedule(SIDES, (0.5, 1, 1)))
    want = fast.generate()

    def fail(module: nn.Module, args: Any) -> None:
        if args[0].shape[1] == SIDES[step] ** 2:
            raise ZeroDivisionError

    hook = fast.head.register_forward_pre_hook(fail)
    if kind is Accumulates or step < K - 2:
        with pytest.raises(ZeroDivisionError):
            fast.generate()
    hook.remove()
    assert torch.equal(fast.generate(), want)


def test_a_loop_outside_of_the_model_that_stops_early() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (0.5, 1)))
    quantizer: Any = fast.proxy[0]
    add = quantizer.get_next_autoregressive_input
    want = fast.generate()
    for until in (*range(1, K), K, K - 1, K):
        got = fast._loop(2, 0, until, add)
    assert torch.equal(got, want)


def test_features_are_freed_after_the_last_drawn_step() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (0.5, 1)))
    bytes_at: list[int] = []
    fast.head.register_forward_hook(
        lambda *_: bytes_at.append(fastvar_fx.explain(fast).captured_bytes)
    )
    fast.generate()
    features = 2 * 2 * 2 * 9 * WIDTH * 4  # blocks, branches, samples, tokens, width, bytes
    assert bytes_at == [0, 0, features, 0, 0]
    report = fastvar_fx.explain(fast)
    assert (report.captured_bytes, report.peak_captured_bytes) == (0, features)
    assert "captured features: 0 B held now, 4.5 KiB at most" in str(report)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_blocks_skip() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (0.5, 1, 1), layers=(1,)))
    fastvar_fx.trace(fast, lambda m: m.generate())
    want = [fast.generate(2, seed) for seed in (0, 1)]
    for block in fast.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert torch.equal(fast.generate(), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [fast.generate(2, seed) for seed in (0, 1)]
    assert all(map(torch.equal, got, want))


@pytest.mark.usefixtures("fresh_dynamo")
@LOOPS
def test_a_compiled_loop_skips(kind: type[Net]) -> None:
    model = model_of(kind)
    model.blocks = model.blocks[:1]
    fast = fastvar_fx.transform(model, Schedule(SIDES, (0.5, 1)))
    fastvar_fx.trace(fast, lambda m: m.generate())
    want = fast.generate()
    compiled: Any = torch.compile(fast.generate, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(compiled(), want)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(), want)


# --- loops that cannot ---------------------------------------------------------------------------


def test_a_loop_that_offers_nothing_is_an_error() -> None:
    message = r"Adds cannot skip steps \[3, 4\](.|\n)*trunk_scale(.|\n)*get_next_autoregressive"
    with pytest.raises(ModelError, match=rf'{message}(.|\n)*on_full="cache"(.|\n)*own'):
        fastvar_fx.transform(model_of(Adds), Schedule(SIDES, (1, 1)))


def test_a_last_step_drawn_past_the_accumulator_is_an_error() -> None:
    fast = fastvar_fx.transform(model_of(DrawsTheLastStepApart), Schedule(SIDES, (0.5, 1)))
    for _ in range(2):
        with pytest.raises(RunError, match=r'step 4 \(36 tokens\).*outside its.*on_full="cache"'):
            fast.generate()
    fast = fastvar_fx.transform(
        model_of(DrawsTheLastStepApart), Schedule(SIDES, (0.5, 1)), on_full="cache"
    )
    assert torch.isfinite(fast.generate()).all()


def test_it_is_one_where_the_loop_is_no_method_too() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (0.5, 1)))
    want = fast.generate()
    with pytest.raises(RunError, match="outside its accumulator"):
        fastvar_fx.trace(fast, draw_apart)
    draw_apart(fast)
    with pytest.raises(RunError, match="outside its accumulator"):
        fast.generate()
    assert torch.equal(fast.generate(), want)


def test_a_last_step_drawn_in_parts_is_an_error() -> None:
    class InParts(Net):
        quantizer = Accumulator

        def generate(self) -> Tensor:
            quantizer: Any = self.proxy[0]
            f_hat = self._loop(2, 0, K - 1, quantizer.get_next_autoregressive_input)
            for _ in range(2):
                x = torch.zeros(2, 18, WIDTH)
                for block in self.blocks:
                    x = block(x)
            return f_hat + x.mean()

    fast = fastvar_fx.transform(model_of(InParts), Schedule(SIDES, (0.5, 1)))
    with pytest.raises(RunError, match=r"step 4 .*outside its accumulator"):
        fast.generate()


@pytest.mark.parametrize("ratios", [(1,), (0.5, 1)])
def test_a_step_that_is_drawn_all_the_same_is_an_error(ratios: tuple[float, ...]) -> None:
    class Ignores(Net):
        def generate(self, trunk_scale: int = 1000) -> Tensor:
            return self._loop(2, 0, K, self.proxy[0].add)

    schedule = Schedule(SIDES, ratios)
    fast = fastvar_fx.transform(model_of(Ignores), schedule)
    with pytest.raises(RunError, match=r"step 4 \(36 tokens\).*although it was asked to skip it"):
        fast.generate()
    fast = fastvar_fx.transform(model_of(Adds), schedule, on_full=lambda fast, skipped: True)
    with pytest.raises(RunError, match=r"step 4 \(36 tokens\).*although it was asked to skip it"):
        fast.generate()


def test_a_rule_that_does_not_apply_is_an_error() -> None:
    def never(fast: nn.Module, skipped: Skipped) -> bool:
        """A loop with a dial."""
        return False

    with pytest.raises(ModelError, match=r"Tried: never \(A loop with a dial\)\. Pass"):
        fastvar_fx.transform(model_of(Stops), Schedule(SIDES, (1,)), on_full=never)
    with pytest.raises(ValueError, match="found 'skipp'"):
        fastvar_fx.transform(model_of(Stops), Schedule(SIDES, (1,)), on_full="skipp")  # type: ignore[arg-type]


@pytest.mark.parametrize("ratios", [(1, 0.5), (0.5, 1, 0), (1, 0.4, 1)])
def test_a_step_skipped_in_the_middle_is_an_error(ratios: tuple[float, ...]) -> None:
    schedule = Schedule(SIDES, ratios)
    with pytest.raises(ScheduleError, match=r'steps \[\d\] are in the middle.*on_full="cache"'):
        fastvar_fx.transform(model_of(Stops), schedule)
    fast = fastvar_fx.transform(model_of(Stops), schedule, on_full="cache")
    fast.generate()
    middle = K - len(ratios) + ratios.index(1)
    assert {row.kept for row in fastvar_fx.explain(fast).rows if row.step == middle} == {0}


def test_blocks_that_return_more_than_a_map_cannot_pass() -> None:
    class Two(Block):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    class First(Accumulates):
        def _loop(self, *args: Any) -> Tensor:
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, out: out[0])
            return super()._loop(*args)

    fast = fastvar_fx.transform(model_of(First, Two), Schedule(SIDES, (1,)))
    with pytest.raises(RunError, match=r'blocks\.0 returns more.*on_full="cache"'):
        fast.generate()


def test_another_number_of_steps_is_an_error() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES[:-1], (1,)))
    with pytest.raises(RunError, match="draws 5 steps, but the schedule has 4"):
        fast.generate()


def test_a_sum_that_grows_with_the_steps_is_an_error() -> None:
    class Grows(Accumulator):
        def add(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
            side = SIDES[min(si + 1, SN - 1)]
            grown = F.interpolate(f_hat, (side, side)) + F.interpolate(h_BChw, (side, side))
            return grown, grown

    class Growing(Accumulates):
        quantizer = Grows

    fast = fastvar_fx.transform(model_of(Growing), Schedule(SIDES, (1, 1)))
    with pytest.raises(RunError, match=r"step 3 .* at \(4, 4\) by then, not at the final \(6, 6\)"):
        fast.generate()


# --- the report ----------------------------------------------------------------------------------


class Uncached(Block):
    cached = False


class Refused(Block):
    """Keys are shifted by a token, so that the attention cannot drop any."""

    def keys(self, k: Tensor) -> Tensor:
        return k.roll(1, 1)


def block_flops(model: Any, until: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model.by_hand(until)
    blocks = type(model.blocks[0]).__name__
    return sum(counter.get_flop_counts()[blocks].values())


@pytest.mark.parametrize("block", [Block, Uncached, Refused])
@pytest.mark.parametrize("ratios", [(0.5, 1), (0.5, 1, 1), (0.2, 0.3, 0.5, 1)])
def test_skipped_flops_are_those_of_dense_steps(
    block: type[Block], ratios: tuple[float, ...]
) -> None:
    fast = fastvar_fx.transform(model_of(Accumulates, block), Schedule(SIDES, ratios))
    assert fastvar_fx.explain(fast).skipping.flops is None
    fast.generate()
    assert bool(fastvar_fx.explain(fast).refusals) == (block is Refused)
    dense = model_of(Accumulates, block)
    want = block_flops(dense, K) - block_flops(dense, K - ratios.count(1))
    assert fastvar_fx.explain(fast).skipping.flops == want


def test_the_report_tells_skipping_and_pruning_apart() -> None:
    fast = fastvar_fx.transform(model_of(Stops), Schedule(SIDES, (0.5, 1), layers=(1,)))
    assert "step skipping: step 4 left out, 36 of 66 tokens (54.5 %), FLOPs not traced" in str(
        fastvar_fx.explain(fast)
    )
    report = fastvar_fx.trace(fast, lambda m: m.generate())
    lines = str(report).splitlines()
    skipping = (
        "step skipping: step 4 left out, 36 of 66 tokens (54.5 %), 599K FLOPs in 1 of 2 blocks"
    )
    pruning = (
        "token pruning: step 3 pruned, 8 of 16 tokens (50.0 %), 193K -> 88.1K FLOPs, limit 2.19x"
    )
    assert skipping in lines
    assert pruning in lines
    assert report.pruning.flops == report.flops(3)[0]


def test_a_schedule_that_only_skips_captures_nothing() -> None:
    fast = fastvar_fx.transform(model_of(Accumulates), Schedule(SIDES, (1, 1)))
    report = fastvar_fx.trace(fast, lambda m: m.generate())
    assert report.rows == ()
    assert (report.skipping.tokens, report.pruning.steps) == (52, ())
    outside = 4 * 66 * WIDTH * VOCAB + 4 * 101 * CODE * WIDTH + 3 * 4 * 36 * CODE * CODE * 9
    inside = 2 * (4 * 14 * 8 * WIDTH * WIDTH + 8 * WIDTH * (1 * 1 + 4 * 5 + 9 * 14))
    assert report.outside_share == outside / (outside + inside)
    assert str(report).splitlines() == [
        "the schedule only skips steps: what is drawn runs as it is",
        "step skipping: steps 3, 4 left out, 52 of 66 tokens (78.8 %), FLOPs not traced",
        "guidance off: none",
        "token pruning: none",
        "outside the blocks: 33.5 % of the matrix-product FLOPs of a dense generation",
    ]
