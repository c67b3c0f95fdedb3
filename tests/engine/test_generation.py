"""The state machine of a generation, driven call by call without any graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvar_fx import CaptureMismatchError, ModelError, RunError, Schedule
from fastvar_fx.engine.call import BlockCall, BlockSite, TokenMaps
from fastvar_fx.engine.executor import EAGER
from fastvar_fx.engine.family import Family
from fastvar_fx.engine.generation import DENSE, PASS, Generation
from fastvar_fx.engine.plan import Plan
from fastvar_fx.methods import Method
from passes.analyse.branches import KINDS

SCHEDULE = Schedule((1, 2, 3, 4, 5), (0.5, 0.5))  # captures at step 2: 9 tokens
DEPTH = 2


def plan_of(schedule: Schedule = SCHEDULE, skipped: tuple[int, ...] = (), **options: Any) -> Plan:
    settings: dict[str, Any] = {
        "schedule": schedule,
        "skipped_steps": skipped,
        "blocks": tuple(f"blocks.{i}" for i in range(DEPTH)),
        "kinds": KINDS,
        "step_of": None,
        "strict": True,
        "dump_dir": None,
        "method": Method(),
        "live_rows": None,
        "buffers_caches": True,
    }
    return Plan(**(settings | options))


class Driver:
    """Calls blocks as a loop does, and captures a tensor per call of the cache step."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        maps: TokenMaps = {}
        self.sites = [
            BlockSite(i, f"blocks.{i}", nn.Identity.forward, maps, prunes=True)
            for i in range(DEPTH)
        ]
        self.block = nn.Identity().eval()

    def call(self, x: Tensor, layer: int = 0) -> Any:
        made = BlockCall(self.sites[layer], self.block, (x,), {})
        role = self.generation.at(made)
        if role != PASS:
            self.generation.ran(made, role, x, {0: torch.full_like(x, float(layer))})
        return role

    def step(self, step: int, *, batch: int = 2, layers: range = range(DEPTH)) -> list[Any]:
        tokens = self.generation.plan.schedule.tokens(step)
        return [self.call(torch.zeros(batch, tokens, 4), layer) for layer in layers]


def driver(*args: Any, **options: Any) -> Driver:
    return Driver(Generation(plan_of(*args, **options)))


def roles(found: list[Any]) -> list[int | None]:
    return [role.step for role in found]


# --- a generation ------------------------------------------------------------------------------


def test_structure_steps_are_dense_then_one_captures_then_the_rest_is_pruned() -> None:
    loop = driver()
    for _ in range(2):
        assert loop.step(0) == loop.step(1) == [DENSE, DENSE]
        captured = loop.step(2)
        assert [(role.step, role.captures) for role in captured] == [(2, True), (2, True)]
        assert roles(loop.step(3)) == [3, 3]
        last = loop.step(4)
        assert roles(last) == [4, 4]
        assert [role.captured[0].mean().item() for role in last] == [0.0, 1.0]
    assert loop.generation.dense_calls == {1: 4, 4: 4}


def test_what_was_captured_is_freed_with_the_last_call_and_counted_at_its_most() -> None:
    loop = driver()
    for step in range(3):
        loop.step(step)
    held = DEPTH * 2 * 9 * 4 * 4  # blocks, samples, tokens, width, bytes
    assert loop.generation.captured_bytes == held
    loop.step(3)
    loop.step(4, layers=range(1))
    assert loop.generation.captured_bytes == held  # the step may be drawn again
    loop.step(4, layers=range(1, 2))
    assert loop.generation.captured_bytes == 0
    assert loop.generation.peak_captured_bytes == held


def test_lengths_that_are_no_step_run_dense() -> None:
    loop = driver()
    assert loop.call(torch.zeros(2, 77, 4)) == DENSE
    assert loop.generation.dense_calls == {77: 1}


def test_step_of_decides_where_it_is_given() -> None:
    steps = iter([0, None, 2, 3, 4])
    loop = driver(step_of=lambda block, args, kwargs: next(steps))
    found = [loop.call(torch.zeros(2, 9, 4)).step for _ in range(5)]
    assert found == [None, None, 2, 3, 4]


def test_a_block_in_training_mode_is_refused_only_where_it_prunes() -> None:
    loop = driver()
    loop.block.train()
    assert loop.step(0) == [DENSE, DENSE]
    with pytest.raises(ModelError, match=r"blocks\.0 is in training mode"):
        loop.step(2)


# --- several calls per step --------------------------------------------------------------------


def test_each_call_of_a_step_gets_what_its_counterpart_captured() -> None:
    loop = driver()
    for _ in range(2):
        loop.step(0)
    for value in (1.0, 2.0):
        made = BlockCall(loop.sites[0], loop.block, (torch.zeros(2, 9, 4),), {})
        role = loop.generation.at(made)
        assert role.captures
        loop.generation.ran(made, role, made.x, {0: torch.tensor([value])})
    for step in (3, 4):
        found = [loop.step(step, layers=range(1))[0] for _ in range(2)]
        assert [role.captured[0].item() for role in found] == [1.0, 2.0]
    assert loop.generation.captured_bytes == 0


def test_more_calls_than_the_cache_step_had_are_an_error() -> None:
    loop = driver()
    for step in (0, 0, 1, 1, 2, 3):
        loop.step(step)
    with pytest.raises(RunError, match=r"2\. time in step 3, but ran only 1 times"):
        loop.step(3)


# --- generations cut off -----------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(5))
def test_another_generation_may_begin_at_any_time(stop: int) -> None:
    loop = driver()
    for step in range(stop):
        loop.step(step)
    for step in range(5):
        assert roles(loop.step(step)) == [None if step < 2 else step] * DEPTH


@pytest.mark.parametrize("stop", range(5))
def test_a_generation_may_be_cut_off_between_two_blocks(stop: int) -> None:
    loop = driver()
    for step in range(stop):
        loop.step(step)
    loop.step(stop, layers=range(1))
    for step in range(5):
        found = loop.step(step)
        assert roles(found) == [None if step < 2 else step] * DEPTH


@pytest.mark.parametrize("missing", [2, 3])
def test_a_step_left_out_is_an_error(missing: int) -> None:
    loop = driver()
    for step in range(missing):
        loop.step(step)
    with pytest.raises(RunError, match=r"came without the steps before it"):
        loop.step(missing + 1)


def test_reset_frees_and_waits_for_another_generation() -> None:
    loop = driver()
    for step in range(4):
        loop.step(step)
    loop.generation.reset()
    assert loop.generation.captured_bytes == 0
    assert loop.step(4) == [DENSE, DENSE]  # source tokens: nothing has begun
    assert loop.generation.early_calls == {25: 2}
    for step in range(5):
        loop.step(step)
    assert loop.generation.captured_bytes == 0


def test_source_tokens_before_a_generation_run_dense() -> None:
    loop = driver()
    for _ in range(2):
        assert loop.step(3) == [DENSE, DENSE]
        assert [roles(loop.step(step)) for step in range(5)] == [
            [None, None], [None, None], [2, 2], [3, 3], [4, 4],
        ]  # fmt: skip


def test_a_copy_is_in_no_generation() -> None:
    family = Family([plan_of()], EAGER)
    engine = family.current
    loop = Driver(engine.generation)
    for step in range(3):
        loop.step(step)
    copied = copy.deepcopy(family).current
    assert copied.generation.captured_bytes == 0
    assert engine.generation.captured_bytes > 0
    assert copied.plan is engine.plan
    other = Driver(copied.generation)
    assert [roles(other.step(step)) for step in range(2, 5)] == [[2, 2], [3, 3], [4, 4]]


# --- what is live ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "kept"), [("first", 0.0), ("last", 1.0)])
def test_samples_that_the_loop_drops_are_dropped_from_what_was_captured(
    rows: str, kept: float
) -> None:
    loop = driver(live_rows=rows)
    loop.step(0)
    made = BlockCall(loop.sites[0], loop.block, (torch.zeros(4, 9, 4),), {})
    role = loop.generation.at(made)
    halves = torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(4, 1, 1)
    loop.generation.ran(made, role, made.x, {0: halves})
    for step in (3, 4):
        (role,) = loop.step(step, layers=range(1))
        assert role.captured[0].flatten().tolist() == [kept, kept]


def test_a_batch_that_shrinks_without_evidence_is_an_error() -> None:
    loop = driver()
    for step in range(3):
        loop.step(step, batch=4)
    with pytest.raises(CaptureMismatchError, match=r"captured batch 4, of which 2 are left"):
        loop.step(3, batch=2)
    assert loop.generation.captured_bytes == 4 * 9 * 4 * 4  # the other block's


def test_a_batch_that_grows_and_another_dtype_are_errors() -> None:
    loop = driver()
    for step in range(3):
        loop.step(step)
    with pytest.raises(CaptureMismatchError, match=r"batch 3 on cpu(.|\n)*batch 2 on cpu"):
        loop.step(3, batch=3)
    for step in range(3):
        loop.step(step)
    with pytest.raises(CaptureMismatchError, match=r"bfloat16(.|\n)*float32"):
        loop.call(torch.zeros(2, 16, 4, dtype=torch.bfloat16))


# --- skipped steps, and none at all ------------------------------------------------------------


def test_blocks_pass_their_input_at_skipped_steps_once_the_loop_has_drawn_the_rest() -> None:
    loop = driver(Schedule((1, 2, 3, 4, 5), (0.5, 1.0)), skipped=(4,))
    for step in range(5):
        found = loop.step(step)
        assert found == [PASS, PASS] if step == 4 else roles(found) == [(None, step)[step > 1]] * 2
        loop.generation.skipped.drew(step)
    loop.generation.check_ended()


def test_a_skipped_step_that_is_drawn_is_an_error() -> None:
    loop = driver(Schedule((1, 2, 3, 4, 5), (0.5, 1.0)), skipped=(4,))
    for step in range(5):
        loop.step(step)
    with pytest.raises(RunError, match="although it was asked to skip it"):
        loop.generation.check_ended()
    for step in range(5):
        loop.step(step)
        loop.generation.skipped.drew(min(step, 3))
    loop.step(4)
    with pytest.raises(RunError, match="outside its accumulator"):
        loop.generation.check_ended()


def test_all_steps_are_dense_on_demand() -> None:
    loop = driver()
    with loop.generation.running_dense():
        assert all(loop.step(step) == [DENSE, DENSE] for step in range(5))
    assert roles(loop.step(2)) == [2, 2]
