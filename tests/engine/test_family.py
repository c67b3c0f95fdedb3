"""Several schedules of one model: which one runs, and never another one's shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import RunError, Schedule, ScheduleError
from fastvar_fx.engine.engine import Engine
from fastvar_fx.models import infinity
from fastvar_fx.models.maps import TEMPLATES, template
from tests.engine.test_generation import plan_of

LANDSCAPE = ((1, 1), (2, 2), (3, 4), (4, 6), (6, 8), (8, 12))
PORTRAIT = tuple((w, h) for h, w in LANDSCAPE)
SQUARE = ((1, 1), (2, 2), (4, 4), (5, 5), (7, 7), (10, 10))
RATIOS = (0.5, 0.75)
FAMILY = [Schedule(scales, RATIOS) for scales in (LANDSCAPE, PORTRAIT, SQUARE)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scales: Any = None) -> Tensor:
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.double().eval()

    def draw(self, scales: Sequence[Any]) -> list[Tensor]:
        return list(self.steps(scales))

    def steps(self, scales: Sequence[Any]) -> Iterator[Tensor]:
        for step in range(len(scales)):
            yield self.at(scales, step)

    def at(self, scales: Sequence[Any], step: int) -> Tensor:
        h, w = scales[step]
        return self.sized(h * w)

    def sized(self, tokens: int, handed: Any = None) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(1, tokens, 8, generator=generator).double()
        for block in self.blocks:
            x = block(x, handed)
        return x


def counts(scales: Sequence[Any]) -> list[int]:
    return [h * w for h, w in scales]


def family() -> Net:
    return fastvar_fx.transform(Net(), FAMILY)


def alone(scales: Any) -> list[Tensor]:
    return fastvar_fx.transform(Net(), Schedule(scales, RATIOS)).draw(scales)


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# --- which schedule runs -----------------------------------------------------------------------


def test_the_scales_that_a_method_is_called_with_decide() -> None:
    fast = family()
    for scales in (LANDSCAPE, PORTRAIT, SQUARE, PORTRAIT, LANDSCAPE):
        same(fast.draw(scales), alone(scales))
        assert Engine.of(fast).plan.schedule.scales == scales


def test_generators_that_alternate_each_keep_their_scales() -> None:
    fast = family()
    drawn = [[], [], []]  # type: ignore[var-annotated]
    loops = [fast.steps(scales) for scales in (LANDSCAPE, PORTRAIT, SQUARE)]
    for _ in range(6):
        for image, loop in zip(drawn, loops, strict=True):
            image.append(next(loop))
    for image, scales in zip(drawn, (LANDSCAPE, PORTRAIT, SQUARE), strict=True):
        same(image, alone(scales))


def test_a_generator_of_the_user_may_be_closed_and_sent_to() -> None:
    fast = family()
    steps = fast.steps(SQUARE)
    next(steps)
    assert steps.send(None).shape[1] == 4  # type: ignore[attr-defined]
    steps.close()  # type: ignore[attr-defined]
    assert list(steps) == []


@pytest.mark.parametrize("form", [list, tuple, lambda scales: [(1, h, w) for h, w in scales]])
def test_the_scales_that_blocks_are_called_with_decide(form: Callable[[Any], Any]) -> None:
    fast = family()
    for scales in (PORTRAIT, LANDSCAPE):
        got = [fast.sized(tokens, form(scales)) for tokens in counts(scales)]
        same(got, alone(scales))


def test_token_counts_decide_where_they_differ_in_time() -> None:
    other = Schedule(((1, 1), (2, 3), (3, 5), (4, 7), (6, 9), (8, 13)), RATIOS)
    early = Schedule(((1, 1), (2, 2), (3, 4), (5, 5), (6, 7)), (0.5,))
    fast = fastvar_fx.transform(Net(), [FAMILY[2], FAMILY[0], other, early])
    for schedule in (FAMILY[2], other, FAMILY[0], early, FAMILY[2]):
        want = fastvar_fx.transform(Net(), schedule)
        tokens = counts(schedule.scales)
        same([fast.sized(n) for n in tokens], [want.sized(n) for n in tokens])
        assert Engine.of(fast).plan.schedule == schedule


def test_one_that_captures_where_another_has_a_structure_step() -> None:
    """The token counts are the same up to there, and differ after it."""
    long = Schedule(((1, 1), (2, 2), (3, 3), (4, 4), (5, 5)), (0.5,))  # captures 16 tokens
    short = Schedule(((1, 1), (2, 2), (3, 3), (6, 6)), (0.75,))  # captures 9 tokens
    fast = fastvar_fx.transform(Net(), [long, short])
    for schedule in (short, long, short, long):
        want = fastvar_fx.transform(Net(), schedule)
        tokens = counts(schedule.scales)
        same([fast.sized(n) for n in tokens], [want.sized(n) for n in tokens])


def test_two_that_fit_are_an_error_until_one_is_chosen() -> None:
    fast = family()
    *early, pruned, last = counts(PORTRAIT)
    for tokens in early:
        fast.sized(tokens)
    with pytest.raises(RunError, match=r"several schedules fit(.|\n)*fastvar_fx\.use"):
        fast.sized(pruned)
    for schedule in (FAMILY[1], FAMILY[0]):
        fastvar_fx.use(fast, schedule)
        got = [fast.sized(tokens) for tokens in (*early, pruned, last)]
        same(got, alone(schedule.scales))
    fastvar_fx.use(fast, None)
    for tokens in early:
        fast.sized(tokens)
    with pytest.raises(RunError, match="several schedules fit"):
        fast.sized(pruned)


def test_use_within_a_generation_does_not_go_on_with_an_earlier_one() -> None:
    fast = family()
    *early, pruned, _ = counts(PORTRAIT)
    for schedule in FAMILY[:2]:
        fastvar_fx.use(fast, schedule)
        for tokens in early:
            fast.sized(tokens)
    fastvar_fx.use(fast, FAMILY[0])
    with pytest.raises(RunError, match="came without the steps before it"):
        fast.sized(pruned)


def test_another_schedule_than_the_chosen_one_is_an_error_that_says_so() -> None:
    schedules = [Schedule(((1, 1), (w, 2), (4, 4), (6, 8), (8, 12)), RATIOS) for w in (2, 3)]
    fast = fastvar_fx.transform(Net(), schedules)
    fastvar_fx.use(fast, schedules[0])
    steps = r"had others than \[1, 4, 16, 48, 96\]: its blocks saw \[1, 6, 16, 48, 96\] tokens"
    with pytest.raises(RunError, match=rf"{steps}.* fastvar_fx\.use\(model, schedule\)"):
        fast.draw(schedules[1].scales)
    fastvar_fx.use(fast, None)
    assert len(fast.draw(schedules[1].scales)) == 5


def test_one_schedule_and_a_loop_of_other_shapes_is_an_error() -> None:
    fast = fastvar_fx.transform(Net(), FAMILY[0])
    same(fast.draw(LANDSCAPE), alone(LANDSCAPE))
    with pytest.raises(RunError, match=r"other shapes with(.|\n)*a list of all"):
        fast.draw(PORTRAIT)
    with pytest.raises(RunError, match="other shapes"):
        fast.sized(1, list(PORTRAIT))
    same([fast.sized(tokens) for tokens in counts(LANDSCAPE)], alone(LANDSCAPE))


def test_reports_say_which_schedule_they_show() -> None:
    fast = family()
    for schedule in (FAMILY[1], FAMILY[0]):
        fast.draw(schedule.scales)
        report = fastvar_fx.explain(fast)
        assert (report.scales, report.schedules) == (schedule.scales, 3)
        names = " ".join(f"{h}x{w}" for h, w in schedule.scales)
        assert f"\nthe schedule of scales {names}, one of 3\n" in str(report)
    fastvar_fx.use(fast, FAMILY[2])
    assert "7x7 10x10, one of 3\n" in str(fastvar_fx.explain(fast))
    assert ", one of 3" in str(fastvar_fx.trace(fast, lambda fast: fast.draw(SQUARE)))
    assert "one of" not in str(fastvar_fx.explain(fastvar_fx.transform(Net(), FAMILY[0])))


# --- what they share ---------------------------------------------------------------------------


def test_programs_are_shared_where_schedules_agree() -> None:
    fast = family()
    entries = Engine.of(fast).store._pool.entries
    fast.draw(LANDSCAPE)
    assert len(entries) == 3
    fast.draw(PORTRAIT)
    assert len(entries) == 5  # the cache step's is the same


def test_maps_in_sequences_of_other_lengths_share_no_programs() -> None:
    """A sequence of all maps has the map of a step elsewhere than one of the maps so far."""
    pair = [Schedule(sides, (0.5,) * len(sides[2:]), prefix=True) for sides in (MAPS[:4], MAPS)]
    plans = [plan_of(schedule, buffers_caches=False) for schedule in pair]
    length = pair[0].length(3)
    assert [plan.around(2, length) for plan in plans] == [(5, 16), (21, 0)]
    assert plans[0].key(2, 0) != plans[1].key(2, 0)


MAPS = (1, 2, 3, 4, 5)


@pytest.mark.slow
def test_a_copy_compiled_and_skipping() -> None:
    schedules = [Schedule(scales, (0.5, 1.0)) for scales in (LANDSCAPE, PORTRAIT)]
    model = infinity.build("tiny", depth=1)
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))

    def draw(model: Any, scales: Any) -> Tensor:
        out: Tensor = model.autoregressive_infer_cfg(text, list(scales), g_seed=0, top_k=1)
        return out

    fast = fastvar_fx.transform(model, schedules)
    draw(fast, PORTRAIT)
    copied = fastvar_fx.compile(copy.deepcopy(fast), backend="eager")
    for schedule in (*schedules, *schedules):
        want = draw(fastvar_fx.transform(model, schedule), schedule.scales)
        assert torch.equal(draw(fast, schedule.scales), want)
        torch.testing.assert_close(draw(copied, schedule.scales), want)


@pytest.mark.slow
def test_the_templates_of_infinity_on_one_model() -> None:
    maps = [template(ratio, "0.06M") for ratio in TEMPLATES]
    ratios = (0.4, 0.5)
    model = infinity.build("tiny", depth=1)
    fast = fastvar_fx.transform(model, [Schedule(scales, ratios) for scales in maps])
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    for scales in maps:
        want = fastvar_fx.transform(model, Schedule(scales, ratios))
        images = [
            m.autoregressive_infer_cfg(text, list(scales), g_seed=0, top_k=1) for m in (fast, want)
        ]
        assert torch.equal(*images)


# --- bad input ---------------------------------------------------------------------------------


def test_bad_families_are_refused() -> None:
    for bad, message in (
        ([], "or a list of them; found an empty"),
        ([FAMILY[0], LANDSCAPE], "takes a fastvar_fx.Schedule"),
        ([FAMILY[0], FAMILY[1], FAMILY[0]], "found twice"),
        ([FAMILY[0], Schedule(PORTRAIT, (0.5, 1.0))], "skip the same steps"),
    ):
        with pytest.raises(ScheduleError, match=message):
            fastvar_fx.transform(Net(), bad)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="one of the 3 schedules"):
        fastvar_fx.use(family(), Schedule(SQUARE, (0.5,)))
