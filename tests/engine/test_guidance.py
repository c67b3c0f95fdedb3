"""Guidance off at late steps, compared with loops that drop the unconditional rows by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import ArgumentError, ModelError, RunError, Schedule, ScheduleError
from fastvar_fx.models import hart, infinity
from fastvar_fx.models.cache import kv_caching
from fastvar_fx.models.var import VAR, build
from tests import zoo
from tests.graph_double import record

SIDES = (1, 2, 3, 4, 5)
ONES = [(side, side) for side in SIDES]
CLASSES = torch.tensor([3, 5])
SHARES = [
    pytest.param((), 1, marks=pytest.mark.slow),
    pytest.param((0.5, 0.75), 1, marks=pytest.mark.slow),  # before the cache step
    ((0.5, 0.75), 2),  # at it
    ((0.5, 0.75), 4),  # after a pruned step with guidance
    pytest.param((0.5, 0.0), 3, marks=pytest.mark.slow),  # the last step is dense
]


def tiny() -> VAR:
    return build("tiny", depth=2, scales=SIDES)


def most_likely(seen: list[Tensor]) -> Callable[[int, Tensor], Tensor]:
    def choose(_: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    return choose


def drawn(model: VAR) -> list[Tensor]:
    """The guided logits of every step."""
    seen: list[Tensor] = []
    model.infer_fhat(2, CLASSES, choose=most_likely(seen))
    return seen


def assert_same(got: list[Tensor], want: list[Tensor], atol: float = 2e-5) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# --- the packaged models --------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: VAR, until: int, cfg: float = 1.5) -> list[Tensor]:
    """The loop of a VAR, edited: at step `until` it drops the rows without a class."""
    B, seen = len(CLASSES), []
    cond = model.class_emb(torch.cat((CLASSES, torch.full_like(CLASSES, model.num_classes))))
    ada, positions = model.shared_ada_lin(cond), model._positions()
    f_hat = torch.zeros(B, model.vae.z_channels, SIDES[-1], SIDES[-1])
    x, end = model._start(cond) + positions[:, :1], 1
    with kv_caching(model):
        for step in range(len(SIDES)):
            if step == until:
                cond, ada = cond[:B], ada[:B]
                for block in model.blocks:
                    attn: Any = block.attn
                    attn.cached_k, attn.cached_v = attn.cached_k[:B], attn.cached_v[:B]
            x = x if step < until else x[:B]
            for block in model.blocks:
                x = block(x, ada)
            logits = model.get_logits(x, cond)
            if step < until:
                t = cfg * step / (len(SIDES) - 1)
                logits = (1 + t) * logits[:B] - t * logits[B:]
            seen.append(logits)
            f_hat, average = model.vae.quantize.get_next_autoregressive_input(
                step, len(SIDES), f_hat, logits.argmax(-1), SIDES
            )
            if step + 1 < len(SIDES):
                begin, end = end, end + SIDES[step + 1] ** 2
                x = model.word_embed(average.flatten(2).transpose(1, 2))
                x = (x + positions[:, begin:end]).repeat(2, 1, 1)
    return seen


@pytest.mark.parametrize(("ratios", "until"), SHARES)
def test_var_is_the_loop_that_drops_the_rows(ratios: tuple[float, ...], until: int) -> None:
    schedule = Schedule(SIDES, ratios)
    edited = fastvar_fx.transform(tiny(), schedule, live_rows="first")
    ends = dataclasses.replace(schedule, guidance_until=until)
    fast = fastvar_fx.transform(tiny(), ends, conditional="first")
    want = by_hand(edited, until)
    for _ in range(2):
        assert_same(drawn(fast), want)


def conditional_only(model: Any, until: int) -> Any:
    """A model whose loop gets the conditional logits twice from a step on."""
    get_logits, calls = model.get_logits, iter(range(len(SIDES)))

    def once(*args: Tensor) -> Tensor:
        logits: Tensor = get_logits(*args)
        rows = len(logits) // 2
        return logits if next(calls) < until else torch.cat((logits[:rows], logits[:rows]))

    object.__setattr__(model, "get_logits", once)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", [infinity, hart])
@pytest.mark.parametrize("ratios", [(), (0.5, 0.75)])
def test_text_models_run_the_conditional_rows(kind: Any, ratios: tuple[float, ...]) -> None:
    model = kind.build("tiny", depth=2)
    text = torch.randn(2, 5, model.config.text_width, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(SIDES, ratios)
    expected = conditional_only(fastvar_fx.transform(model, schedule), 3)
    ends = dataclasses.replace(schedule, guidance_until=3)
    fast = fastvar_fx.transform(model, ends, conditional="first")
    results = [m.autoregressive_infer_cfg(text, ONES, top_k=1) for m in (expected, fast)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    dense = model.autoregressive_infer_cfg(text, ONES, top_k=1)
    assert not torch.allclose(results[1], dense, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["once-per-step", "drift-corrected-grid"])
def test_methods_that_share_and_ask(method: str) -> None:
    schedule = Schedule(SIDES, (0.5, 0.75))
    expected = conditional_only(fastvar_fx.transform(tiny(), schedule, method=method), 4)
    ends = dataclasses.replace(schedule, guidance_until=4)
    fast = fastvar_fx.transform(tiny(), ends, conditional="first", method=method)
    assert_same(drawn(fast), drawn(expected))


@pytest.mark.slow
def test_steps_after_it_may_be_skipped() -> None:
    schedule = Schedule(SIDES, (0.5, 1.0))
    expected = conditional_only(fastvar_fx.transform(tiny(), schedule), 3)
    ends = dataclasses.replace(schedule, guidance_until=3)
    fast = fastvar_fx.transform(tiny(), ends, conditional="first")
    assert_same(drawn(fast)[:-1], drawn(expected)[:-1])
    with pytest.raises(ScheduleError, match=r"guidance_until=4 is a step that is skipped"):
        fastvar_fx.transform(
            tiny(), dataclasses.replace(schedule, guidance_until=4), conditional="first"
        )


@pytest.mark.slow
def test_compiled_and_recorded_generations() -> None:
    ends = Schedule(SIDES, (0.5, 0.75), guidance_until=3)
    fast = fastvar_fx.transform(tiny(), ends, conditional="first")
    want = drawn(fast)
    replay = record(fast, lambda m, labels: m.infer_fhat(2, labels), CLASSES)
    torch.manual_seed(1)
    assert torch.equal(replay(CLASSES, seed=1), fast.infer_fhat(2, CLASSES))
    fastvar_fx.compile(fast, backend="eager")
    assert_same(drawn(fast), want)


def test_caches_keep_the_conditional_rows_and_grow_in_place() -> None:
    rows: list[int] = []
    ends = Schedule(SIDES, (0.5, 0.75), guidance_until=2)
    fast = fastvar_fx.transform(tiny(), ends, conditional="first")

    def look(step: int, f_hat: Tensor) -> None:
        cache: Any = fast.blocks[1].attn
        rows.append(len(cache.cached_k))

    fast.infer_fhat(2, CLASSES, on_step=look)
    assert rows == [4, 4, 2, 2, 2]
    caches = fastvar_fx.explain(fast).caches
    assert caches is not None
    assert (caches.buffered, caches.copied) == (4, {})
    assert (caches.appended, caches.moved) == (8, 4)


def test_the_report_counts_the_three_ways_apart() -> None:
    ends = Schedule(SIDES, (0.5, 1.0), guidance_until=3)
    fast = fastvar_fx.transform(tiny(), ends, conditional="first")
    report = fastvar_fx.trace(fast, drawn)
    guidance, pruning = report.guidance, report.pruning
    assert (report.skipping.steps, guidance.steps, pruning.steps) == ((4,), (3,), (3,))
    assert guidance.flops == 2 * guidance.unguided_flops == 2 * pruning.flops
    assert pruning.pruned_flops < pruning.flops
    assert report.flops(3) == (guidance.flops, pruning.pruned_flops)
    dense = fastvar_fx.trace(fastvar_fx.transform(tiny(), Schedule(SIDES, (0.5, 1.0))), drawn)
    assert guidance.flops == dense.pruning.flops
    assert report.outside_share == pytest.approx(dense.outside_share, rel=0.02)  # but for AdaLN
    lines = str(report).splitlines()
    for begin in ("step skipping: step 4 ", "guidance off: step 3 ", "token pruning: step 3 "):
        assert any(line.startswith(begin) for line in lines)
    assert "guidance off: none" in str(dense)


def test_the_users_model_has_no_hooks_and_a_copy_has_its_own() -> None:
    model = tiny()
    fast = fastvar_fx.transform(model, Schedule(SIDES, (), guidance_until=3), conditional="first")
    want = drawn(fast)
    assert not any(module._forward_hooks for module in model.modules())
    twin = copy.deepcopy(fast)
    del fast
    assert_same(drawn(twin), want)


def test_a_head_after_an_interrupted_generation_runs_as_it_is() -> None:
    def interrupt(step: int, _: Tensor) -> None:
        if step == 4:
            raise KeyboardInterrupt

    fast = fastvar_fx.transform(tiny(), Schedule(SIDES, (), guidance_until=3), conditional="first")
    with pytest.raises(KeyboardInterrupt):
        fast.infer_fhat(2, CLASSES, on_step=interrupt)
    width = fast.word_embed.out_features
    x = torch.randn(4, 25, width)
    cond = torch.randn(4, width)
    with torch.no_grad():
        assert torch.equal(fast.get_logits(x, cond), tiny().get_logits(x, cond))


# --- loops of other forms -------------------------------------------------------------------------

WIDTH = 8


class Block(nn.Module):
    """Attention over a cache of the loop's, with a condition per row."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ada = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cond: Tensor, past: list[Tensor] | None) -> Tensor:
        q, k, v = self.qkv(self.mixed(x) + self.ada(cond)[:, None]).chunk(3, -1)
        if past:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        if past is not None:
            past[:] = k, v
        out: Tensor = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return out

    def mixed(self, x: Tensor) -> Tensor:
        return x


class Mixing(Block):
    """What rows of the batch are, other rows decide."""

    def mixed(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.flip(0)


class Packed(Block):
    """It also attends to texts of several lengths in a row."""

    def forward(self, x: Tensor, cond: Any, past: list[Tensor] | None) -> Tensor:
        cond, tokens, bounds = cond
        places = torch.arange(len(tokens))
        own = (places >= bounds[:-1, None, None]) & (places < bounds[1:, None, None])  # (B, 1, T)
        scores = (x @ tokens.mT).masked_fill(~own, -torch.inf)
        return super().forward(x + scores.softmax(-1) @ tokens, cond, past)


class Head(nn.Module):
    """A head with a condition per row."""

    def __init__(self) -> None:
        super().__init__()
        self.ada, self.fc = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.fc(x * self.ada(cond)[:, None])
        return out


class Net(nn.Module):
    """A loop that guides, or does not; the conditional half may come last."""

    def __init__(self, block: type[Block] = Block, head: type[Head] = Head) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(block() for _ in range(2)), head()
        self.double().eval()

    def step(
        self, x: Tensor, cond: Tensor, past: list[list[Tensor]], text: tuple[Tensor, ...] = ()
    ) -> Tensor:
        for block, own in zip(self.blocks, past, strict=True):
            x = block(x, (cond, *text) if text else cond, own)
        out: Tensor = self.head(x, cond)
        return out


@torch.no_grad()
def run(
    net: Any,
    *,
    batch: int = 2,
    last: bool = False,
    guides: bool = True,
    twice: bool = False,
    until: int = 9,
    text: tuple[Tensor, ...] = (),
) -> list[Tensor]:
    """Runs a loop; `twice` calls the blocks for each half, and `until` drops rows by hand."""
    cond = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    halves = [torch.zeros_like(cond), cond] if last else [cond, torch.zeros_like(cond)]
    both = torch.cat(halves) if guides else cond
    past: list[list[Tensor]] = [[] for _ in net.blocks]
    pasts: list[list[list[Tensor]]] = [[[] for _ in net.blocks] for _ in range(2)]
    x, outputs = cond[:, None], []
    for step, side in enumerate(SIDES):
        x = F.interpolate(x.mT, size=side * side).mT
        if step == until:
            both, kept = cond, slice(batch, None) if last else slice(batch)
            past = [[tensor[kept] for tensor in own] for own in past]
            text = (text[0], text[1][batch:] if last else text[1][: batch + 1]) if text else ()
        if twice:
            first, second = (
                net.step(x, half, own) for half, own in zip(halves, pasts, strict=True)
            )
        else:
            made = net.step(x.repeat(len(both) // batch, 1, 1), both, past, text)
            first, second = made[:batch], made[-batch:]
        first, second = (second, first) if last else (first, second)
        x = (1 + step) * first - step * second
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    ("last", "batch"), [(True, 1), pytest.param(False, 3, marks=pytest.mark.slow)]
)
def test_either_half_and_a_head_with_a_condition(last: bool, batch: int) -> None:
    schedule = Schedule(SIDES, (0.5, 0.5))
    half: Any = "last" if last else "first"
    edited = fastvar_fx.transform(Net(), schedule, live_rows=half)
    ends = dataclasses.replace(schedule, guidance_until=3)
    fast = fastvar_fx.transform(Net(), ends, conditional=half)
    want = run(edited, batch=batch, last=last, until=3)
    assert_same(run(fast, batch=batch, last=last), want, 1e-10)
    assert_same(
        run(fast, batch=batch + 1, last=last)[-1:],
        run(edited, batch=batch + 1, last=last, until=3)[-1:],
        1e-10,
    )


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_packed_texts(last: bool) -> None:
    half: Any = "last" if last else "first"
    schedule = Schedule(SIDES, (0.5, 0.5))
    edited = fastvar_fx.transform(Net(Packed), schedule, live_rows=half)
    ends = dataclasses.replace(schedule, guidance_until=3)
    fast = fastvar_fx.transform(Net(Packed), ends, conditional=half)
    for bounds in ([0, 2, 6, 7, 8], [0, 3, 4, 7, 9]):  # 8 tokens are as many as 4 rows of 2
        tokens = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2)).double()
        text = (tokens[: bounds[-1]], torch.tensor(bounds, dtype=torch.int32))
        want = run(edited, last=last, until=3, text=text)
        assert_same(run(fast, last=last, text=text), want, 1e-10)


Change = Callable[[Tensor, int], Tensor]
"""(x, how many samples it has) -> x in another layout."""
Layout = tuple[Change, Change]
"""From (B, L, C) to a layout, and back."""

LAYOUTS: dict[str, Layout] = {
    "B L C": (lambda x, _: x, lambda x, _: x),
    "B C L": (lambda x, _: x.mT, lambda x, _: x.mT),
    "B C h w": (
        lambda x, _: x.mT.reshape(len(x), WIDTH, math.isqrt(x.shape[1]), -1),
        lambda x, _: x.flatten(2).mT,
    ),
    "B h w C": (
        lambda x, _: x.reshape(len(x), math.isqrt(x.shape[1]), -1, WIDTH),
        lambda x, _: x.flatten(1, 2),
    ),
    "L B C": (lambda x, _: x.transpose(0, 1), lambda x, _: x.transpose(0, 1)),
    "BL C": (lambda x, _: x.flatten(0, 1), lambda x, n: x.view(n, -1, WIDTH)),
    "LB C": (
        lambda x, _: x.transpose(0, 1).flatten(0, 1),
        lambda x, n: x.view(-1, n, WIDTH).transpose(0, 1),
    ),
    "BLC": (lambda x, _: x.flatten(), lambda x, n: x.view(n, -1, WIDTH)),
}


def laid_out(layout: Layout, *, given: bool = True, before: bool = False) -> Net:
    """Returns a loop whose head returns another layout.

    Args:
        layout: The layout.
        given: Whether the head gets the condition as an argument, and not in an attribute.
        before: Whether the head gets the layout, too.
    """
    there, back = layout

    class Other(Head):
        condition: Tensor

        def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
            cond = self.condition if cond is None else cond
            x = back(x, len(cond)) if before else x
            return there(super().forward(x, cond) + self.ada(cond)[:, None], len(cond))

    class Loop(Net):
        def step(self, x: Tensor, cond: Tensor, past: list[list[Tensor]], *_: Any) -> Tensor:
            for block, own in zip(self.blocks, past, strict=True):
                x = block(x, cond, own)
            self.head.condition = cond
            x = there(x, len(cond)) if before else x
            return back(self.head(x, cond) if given else self.head(x), len(cond))

    return Loop(head=Other)


def check_head(net: Net, batch: int = 2, *, last: bool = False) -> None:
    want = run(net, batch=batch, last=last, until=3)
    half: Any = "last" if last else "first"
    fast = fastvar_fx.transform(net, Schedule(SIDES, (), guidance_until=3), conditional=half)
    for _ in range(2):
        assert_same(run(fast, batch=batch, last=last), want, 1e-10)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "B L C"])
def test_heads_of_any_layout(layout: str) -> None:
    check_head(laid_out(LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["B L C", "B C L", "B h w C", "L B C", "BL C"])
def test_heads_for_as_many_rows_as_tokens(layout: str) -> None:
    check_head(laid_out(LAYOUTS[layout]), batch=8, last=True)


@pytest.mark.parametrize("layout", ["B C h w", "L B C", "LB C"])
def test_heads_that_get_another_layout_or_hold_the_condition(layout: str) -> None:
    check_head(laid_out(LAYOUTS[layout], before=True))
    check_head(laid_out(LAYOUTS[layout], given=False))


def test_a_head_without_a_condition_that_has_as_many_tokens_as_rows() -> None:
    net = laid_out(LAYOUTS["L B C"])
    nn.init.zeros_(net.head.ada.weight)
    check_head(net, batch=8)


def test_a_head_whose_rows_are_unknown_is_an_error() -> None:
    mean: Layout = (lambda x, _: x.mean(0), lambda x, n: x.expand(n, *x.shape))
    ends = Schedule(SIDES, (), guidance_until=3)
    fast = fastvar_fx.transform(laid_out(mean), ends, conditional="first")
    with pytest.raises(RunError, match=r"head returns \(16, 8\) at step 3, which has no guidance"):
        run(fast)


def ending(block: type[Block] = Block, ratios: tuple[float, ...] = ()) -> Net:
    ends = Schedule(SIDES, ratios, guidance_until=3)
    return fastvar_fx.transform(Net(block), ends, conditional="first")


def test_which_half_is_conditional_is_not_guessed() -> None:
    ends = Schedule(SIDES, (0.5,), guidance_until=3)
    with pytest.raises(ArgumentError, match=r'ends guidance at step 3.*conditional="first" or'):
        fastvar_fx.transform(Net(), ends)
    with pytest.raises(ValueError, match=r"conditional is one of \('first', 'last'\)"):
        fastvar_fx.transform(Net(), ends, conditional="both")  # type: ignore[arg-type]


def test_a_loop_without_guidance_is_an_error_also_after_one_with_it() -> None:
    fast = ending()
    run(fast, batch=2)
    with pytest.raises(RunError, match=r"the first and the second half of the batch of 4 .* hold"):
        run(fast, batch=4, guides=False)
    with pytest.raises(RunError, match=r"found a batch of 3\. A loop without guidance"):
        run(fast, batch=3, guides=False)
    assert_same(run(fast, batch=2), run(Net(), batch=2, until=3), 1e-10)


def test_a_loop_with_two_calls_is_an_error() -> None:
    with pytest.raises(RunError, match="call of the blocks for each half"):
        run(ending(), batch=2, twice=True)


@pytest.mark.parametrize("ratios", [(), (0.5, 0.5)])
def test_a_block_that_mixes_rows_is_an_error(ratios: tuple[float, ...]) -> None:
    message = r"blocks.0 cannot drop the unconditional half.*FVX024.*aten.flip.*test_guidance.py"
    with pytest.raises(ModelError, match=message):
        run(ending(Mixing, ratios))


def test_a_schedule_of_other_scales_is_an_error() -> None:
    ends = Schedule((1, 2, 3, 4, 6), (), guidance_until=4)
    fast = fastvar_fx.transform(Net(), ends, conditional="first")
    with pytest.raises(fastvar_fx.NothingPrunedError, match=r"changes steps of \[36\] tokens"):
        fastvar_fx.trace(fast, run)


def test_packages_have_no_steps_without_guidance(tmp_path: Path) -> None:
    with pytest.raises(fastvar_fx.PackageError, match=r"guidance_until is 3\. Leave it out"):
        fastvar_fx.export(ending(), tmp_path / "packages", run)


class Prefix(Net):
    """A loop without caches, whose blocks get all maps so far; the first token differs by row."""

    def draw(self, until: int = 9) -> list[Tensor]:
        cond = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).double()
        outputs: list[Tensor] = []
        x = cond[:, None]
        for step, side in enumerate(SIDES):
            if step:
                new = outputs[-1][:2].mean(1, keepdim=True) * torch.arange(side * side)[:, None]
                x = torch.cat((x, new.sin().repeat(len(x) // 2, 1, 1)), 1)
            if step == until:
                x, cond = x[:2], cond[:2]
            out = x
            for block in self.blocks:
                out = block(out, cond, None)
            made = self.head(out[:, -side * side :], cond)
            outputs.append(3 * made[:2] - 2 * made[-2:])
        return outputs


def test_loops_that_feed_all_maps_so_far() -> None:
    schedule = Schedule(SIDES, (0.5, 0.5), prefix=True)
    with torch.no_grad():
        want = fastvar_fx.transform(Prefix(), schedule, live_rows="first").draw(until=3)
        ends = dataclasses.replace(schedule, guidance_until=3)
        fast = fastvar_fx.transform(Prefix(), ends, conditional="first")
        assert_same(fast.draw(), want, 1e-10)


# --- the zoo --------------------------------------------------------------------------------------


class Guidance(nn.Module):
    """Classifier-free guidance on the features before the head, until a step.

    From then on both halves are the conditional one: what a loop computes that has dropped the
    others, for a sample does not depend on the rest of the batch.
    """

    def __init__(self, norm: nn.Module, steps: int, until: int | None = None) -> None:
        super().__init__()
        self.norm, self.steps = norm, steps
        self.until = steps if until is None else until
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        conditional, unconditional = self.norm(x).chunk(2)
        # The zoo's loop leaves the last step out.
        step, self.calls = self.calls % (self.steps - 1), self.calls + 1
        if step < self.until:
            conditional = 2 * conditional - unconditional
        return torch.cat((conditional, conditional))


def guided(case: zoo.Case, until: int | None = None) -> zoo.ZooModel:
    model: Any = case.model()
    model.final_norm = Guidance(model.final_norm, len(case.schedule.scales), until)
    made: zoo.ZooModel = model
    return made


@st.composite
def guided_cases(draw: st.DrawFn) -> tuple[zoo.Case, int]:
    case = draw(zoo.cases().filter(lambda case: case.batch % 2 == 0))
    counts = [h * w for h, w in case.schedule.scales]
    late = [k for k in range(1, len(counts)) if {*counts[:k]}.isdisjoint(counts[k:])]
    return case, draw(st.sampled_from(late))


@pytest.mark.slow
@zoo.examples(4, quick=3, long=20)
@given(guided_cases())
def test_zoo_models_run_the_conditional_rows(drawn: tuple[zoo.Case, int]) -> None:
    case, until = drawn
    scales, ratios = case.schedule.scales, case.schedule.ratios
    options: dict[str, Any] = {"on_full": "cache", "strict": False}
    schedule = Schedule(scales, ratios, cache_step=case.schedule.cache_step)
    expected = fastvar_fx.transform(guided(case, until), schedule, **options)
    ends = dataclasses.replace(schedule, guidance_until=until)
    fast = fastvar_fx.transform(guided(case), ends, conditional="first", **options)
    want = expected.generate(case.batch, case.seed)
    for _ in range(2):
        got = fast.generate(case.batch, case.seed)
        rows, tokens = case.batch // 2, sum(h * w for h, w in scales[:until])
        torch.testing.assert_close(got[:rows], want[:rows], rtol=0, atol=1e-9)
        assert torch.equal(got[rows:, tokens:], got[:rows, tokens:])
