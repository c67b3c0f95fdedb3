"""Schedules that do not fit, or fit partly, are told apart from source tokens and aborts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import NothingPrunedError, RunError, Schedule
from fastvar_fx.engine.watch import Watch, fitting
from tests.engine.test_generation import plan_of

LOOP = (1, 2, 3, 4, 6, 8)
MAPS = [n * n for n in LOOP]
FRAMES = [2 * n * n for n in (1, 2, 3, 4, 6)]  # a clip of two frames


class Runs:
    """Draws generations as a loop of two blocks that follows `schedule` where it fits."""

    def __init__(self, schedule: Schedule, **options: Any) -> None:
        plan = plan_of(schedule, **options)
        self.watch = Watch(plan)
        self.expected = [schedule.length(step) for step in range(schedule.steps)]
        self.late = [self.expected[step] for step in plan.pruned_steps]
        self.cached = self.expected[schedule.cache_step]
        self.captured = False

    def draw(self, lengths: Iterable[int]) -> None:
        for length in lengths:
            if length in (self.expected[0], self.cached):
                self.captured = length == self.cached
            for layer in range(2):
                self.watch.saw(length, layer, pruned=self.captured and length in self.late)

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self.watch.whole():
            yield
        if not self.watch.within:
            self.watch.finished()

    def loop(self, lengths: Iterable[int]) -> None:
        with self.whole():
            self.draw(lengths)


def told(scales: Sequence[Any], **options: Any) -> Runs:
    return Runs(Schedule(scales, (0.5, 0.75), **options))


WRONG = [
    ((1, 2, 3, 4, 6, 9), MAPS, r"\[36, 81\] tokens, .* only \[36\].* as .*3, 4, 6, 8\)"),
    ((1, 2, 3, 4, 6), MAPS, r"\[16, 36\] tokens, .*saw \[.*36, 64\]"),
    ((1, 2, 3, 4, 6, 8, 10), MAPS, r"only \[64\].* as Schedule\(\(1, 2, 3, 4, 6, 8\)"),
    ((1, 2, 4, 6, 8), MAPS, r"saw \[.*36, 64\].* as Schedule\(\(1, 2, 3, 4, 6, 8\)"),
    ((1, 3, 5, 7, 9), MAPS, r"a generation had none.* as Schedule\(\(1, 2, 3, 4, 6, 8\)"),
    (LOOP, MAPS[:5], r"only \[36\].*another method"),
    (LOOP, MAPS[:4], r"had none.*another method"),
    (LOOP, [1, 5, 14, 30, 66, 130], r"3, 4, 6, 8\), \(0\.5, 0\.75\), prefix=True\)"),
    (LOOP, [5, 10, 14, *FRAMES], r"had none"),
]  # fmt: skip


@pytest.mark.parametrize(("scales", "lengths", "message"), WRONG)
def test_a_schedule_that_does_not_fit_is_an_error_at_the_end_of_every_generation(
    scales: Sequence[int], lengths: list[int], message: str
) -> None:
    runs = told(scales)
    for source in ([], [], [77], [77]):
        with pytest.raises(RunError, match=message):
            runs.loop([*source, *lengths])


@pytest.mark.parametrize("case", [0, 4, 7])
def test_a_loop_outside_the_model_is_told_when_the_next_generation_begins(case: int) -> None:
    scales, lengths, message = WRONG[case]
    runs = told(scales)
    runs.draw(lengths)
    for _ in range(2):
        with pytest.raises(RunError, match=message):
            runs.draw(lengths)


@pytest.mark.parametrize("source", [1, 4, 5, 7, 9, 16, 32, 36, 64, 72, 100])
@pytest.mark.parametrize(
    ("scales", "lengths"),
    [
        (LOOP, MAPS),
        ([(2, n, n) for n in (1, 2, 3, 4, 6)], [*MAPS[:5], *FRAMES]),
        (LOOP[:5], [*MAPS[:5], *FRAMES]),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_source_tokens_of_any_length(
    scales: Sequence[Any], lengths: list[int], source: int, whole: bool
) -> None:
    """As many as a map of the schedule, of an earlier frame, or another number."""
    runs = told(scales)
    draw = runs.loop if whole else runs.draw
    for _ in range(3):
        draw([source, *lengths])
    for other in (3, source, 11):
        draw([other, *lengths])


@pytest.mark.parametrize("last", range(1, 6))
def test_generations_that_are_cut_off_are_no_error(last: int) -> None:
    runs = told(LOOP)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            runs.loop(n if n != MAPS[last] else 1 // 0 for n in MAPS)
    runs.loop(MAPS)
    runs.loop(MAPS[:last])  # it has been seen that the schedule fits
    runs.loop(MAPS)


def test_a_call_of_a_part_of_the_loop_is_no_generation() -> None:
    runs = told(LOOP)
    for _ in range(3):
        for length in MAPS:  # a method that draws one step
            runs.loop([length])
    runs.loop([50])
    runs.loop([])


def test_loops_within_loops_end_with_the_outermost() -> None:
    runs = told(LOOP)
    with runs.whole():
        runs.loop(MAPS[:4])
        runs.loop(MAPS[4:])
    wrong = told(LOOP[:5])

    def halves() -> None:
        with wrong.whole():
            wrong.loop(MAPS[:3])
            wrong.loop(MAPS[3:])

    with pytest.raises(RunError, match=r"\[16, 36\] tokens, .* than \[1, 4, 9, 16, 36\]: .*64\]"):
        halves()


def test_steps_are_watched_where_they_are_told() -> None:
    runs = Runs(Schedule([(1, 70)] * 4, (0.5, 0.5)), step_of=lambda *call: 0)
    runs.late, runs.cached = [2, 3], 1
    runs.loop([0, 1, 2, 3])
    other = Runs(Schedule([(1, 70)] * 4, (0.5, 0.5)), step_of=lambda *call: 0)
    other.late, other.cached = [2, 3], 1
    with pytest.raises(RunError, match=r"the steps \[2, 3\], .* only \[2\].*saw \[0, 1, 2\]"):
        other.loop([0, 1, 2])


@pytest.mark.parametrize("whole", [True, False])
def test_a_sequence_of_constant_length_is_an_error_of_its_own(whole: bool) -> None:
    runs = told((1, 2, 4, 7))
    for _ in range(2):
        with pytest.raises(RunError, match=r"70 tokens 4 times in a row.*step_of=.*prefix=True"):
            (runs.loop if whole else runs.draw)([70] * 4)
    runs.draw([70, 70, 1, 4, 16, 49])  # source tokens, with guidance
    padded = told((1, 2, 4, 7))
    with pytest.raises(RunError, match="99 tokens 4 times in a row"):
        padded.loop([99] * 4)


def test_the_schedule_that_fits() -> None:
    wide = Schedule([(1, 2), (2, 4), (3, 6)], (0.5,))
    assert fitting(wide, [2, 8]) == "Schedule(((1, 2), (2, 4)), (0.5,))"
    assert fitting(wide, [2, 8, 32]) is None  # 4 x 8, perhaps
    clip = Schedule([(2, 1, 1), (2, 2, 2)], (0.5,))
    assert fitting(clip, [2, 8, 18]) == "Schedule(((2, 1, 1), (2, 2, 2), (2, 3, 3)), (0.5,))"
    sums = Schedule(LOOP, (0.5,), prefix=True)
    assert fitting(sums, MAPS) == "Schedule((1, 2, 3, 4, 6, 8), (0.5,))"
    assert fitting(Schedule(LOOP, (0.5, 0.5)), [1, 4]) is None


# --- models ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.fc1(x).relu())
        return out

    def other(self, x: Tensor) -> Tensor:
        return Block.forward(self, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    @torch.no_grad()
    def generate(self, lengths: Sequence[int] = MAPS, off: int = 99) -> Tensor:
        for step, length in enumerate(lengths):
            x = torch.ones(1, length, 4)
            for block in self.blocks:
                assert isinstance(block, Block)
                x = block.other(x) if step >= off else block(x)
        return x


def fast_model(scales: Sequence[int] = LOOP) -> Model:
    return fastvar_fx.transform(Model().eval(), Schedule(scales, (0.5, 0.75)))


@pytest.mark.parametrize("scales", [(1, 2, 3, 4, 6, 9), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 8, 10)])
def test_a_partly_wrong_schedule_is_an_error_of_the_first_generation_and_of_trace(
    scales: tuple[int, ...],
) -> None:
    fast = fast_model(scales)
    for run in (fast.generate, lambda: fastvar_fx.trace(fast, lambda m: m.generate())):
        with pytest.raises(RunError, match=r"as Schedule\(\(1, 2, 3, 4, 6, 8\), \(0\.5, 0\.75\)\)"):
            run()


def test_late_steps_by_another_method_are_told() -> None:
    for off in (5, 4, 3):
        fast = fast_model()
        with pytest.raises(RunError, match="another method of its blocks than forward"):
            fast.generate(off=off)
        with pytest.raises(RunError if off == 5 else NothingPrunedError):
            fastvar_fx.trace(fast, lambda m: m.generate(off=off))  # noqa: B023
    fast.generate()
    fast.generate(off=5)


def test_trace_names_the_step_that_no_block_met() -> None:
    fast = fast_model()
    x = torch.ones(1, 64, 4)

    def stepwise(model: Any) -> None:
        for length in MAPS[:5]:
            for block in model.blocks:
                block(x[:, :length])

    with pytest.raises(RunError, match=r"only \[36\]"):
        fastvar_fx.trace(fast, stepwise)
    stepwise(fast)  # outside the model: it may be cut off
    for block in fast.blocks:
        block(x)


def test_methods_of_a_transformed_model_are_those_of_its_class() -> None:
    class Other(Model):
        def generate(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().generate(*args, **kwargs) + 1

    fast = fast_model()
    assert fast.generate.__doc__ == Model.generate.__doc__
    want = fast.generate()
    fast.__class__ = Other
    assert torch.equal(fast.generate(), want + 1)
