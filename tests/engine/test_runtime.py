"""Generations that go as planned, and all the ways in which they do not."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import (
    CaptureMismatchError,
    FastVARError,
    ModelError,
    NothingPrunedError,
    RunError,
    Schedule,
    ScheduleError,
)
from tests import zoo

SCALES = ((1, 1), (2, 3), (3, 4), (4, 5), (5, 6))
SCHEDULE = Schedule(SCALES, (0.5, 0.4))


def model_of(depth: int = 2, **options: Any) -> zoo.ZooModel:
    return zoo.ZooModel(zoo.complete_spec(options), depth, SCALES)


class Block(nn.Module):
    """A plain block without a cache; its calls can be driven one by one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v)
        out: Tensor = x + self.fc2(torch.relu(self.fc1(self.norm(x))))
        return out


class Net(nn.Module):
    """Blocks in a list; the loop is outside."""

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def step(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tokens(step: int, batch: int = 2, seed: int = 0) -> Tensor:
    h, w = SCALES[step]
    return torch.randn(batch, h * w, 8, generator=torch.Generator().manual_seed(seed + step))


def run(net: Net, steps: Any = range(5), batch: int = 2) -> list[Tensor]:
    return [net.step(tokens(step, batch)) for step in steps]


def fast_net(schedule: Schedule = SCHEDULE, **options: Any) -> Net:
    torch.manual_seed(0)
    return fastvar_fx.transform(Net().eval(), schedule, **options)


# --- what holds ----------------------------------------------------------------------------------


def test_same_seed_same_generation_and_batch_may_change_between() -> None:
    fast = fastvar_fx.transform(model_of(), SCHEDULE)
    one = fast.generate(1, 7)
    three = fast.generate(3, 7)
    assert torch.equal(fast.generate(1, 7), one)
    assert torch.equal(fast.generate(3, 7), three)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_an_abandoned_generation_leaves_nothing_behind(stop: int) -> None:
    fast, fresh = fast_net(), fast_net()
    want = run(fresh)
    run(fast)
    run(fast, range(stop))
    assert all(map(torch.equal, run(fast), want))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_an_exception_inside_a_block_leaves_nothing_behind(step: int) -> None:
    fast = fast_net()
    want = run(fast)
    hook = fast.blocks[1].register_forward_pre_hook(_raise)
    hook.remove()
    run(fast, range(step))
    hook = fast.blocks[1].register_forward_pre_hook(_raise)
    with pytest.raises(ZeroDivisionError):
        fast.step(tokens(step))
    hook.remove()
    assert all(map(torch.equal, run(fast), want))


def _raise(module: nn.Module, args: Any) -> None:
    raise ZeroDivisionError


def test_features_are_freed_after_the_last_pruned_step() -> None:
    fast = fast_net()
    run(fast)
    before = _live_tensors()
    run(fast, range(3))
    assert _live_tensors() == before + 4  # two branches of two blocks
    run(fast, range(3, 5))
    assert _live_tensors() == before


def _live_tensors() -> int:
    gc.collect()
    return sum(type(found) is Tensor for found in gc.get_objects())


def test_a_transformed_model_is_freed() -> None:
    fast = fast_net()
    run(fast)
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None


def test_lengths_that_are_no_step_run_dense() -> None:
    """Context tokens of a length of their own, longer than the cache step's."""
    fast, net = fast_net(), fast_net(Schedule(SCALES, (0.0,)))
    want = run(fast)
    context = torch.randn(2, 77, 8)
    assert torch.equal(fast.step(context), net.step(context))
    assert all(map(torch.equal, run(fast), want))
    assert fastvar_fx.explain(fast).dense_calls[77] == 2


def test_source_tokens_as_many_as_the_last_scale_run_dense() -> None:
    fast, net = fast_net(), fast_net(Schedule(SCALES, (0.0,)))
    want = run(fast_net())
    for _ in range(2):
        source = tokens(4, seed=9)
        assert torch.equal(fast.step(source), net.step(source))
        assert all(map(torch.equal, run(fast), want))
    assert fastvar_fx.explain(fast).early_calls == {30: 4}


def test_a_block_that_runs_twice_in_a_step_is_restored_call_by_call() -> None:
    fast = fast_net()
    twice = [fast.step(fast.step(tokens(step))) for step in range(5)]
    other = fastvar_fx.transform(_unrolled(fast), SCHEDULE)
    want = [other.step(tokens(step)) for step in range(5)]
    for a, b in zip(twice, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _unrolled(net: Net) -> Net:
    """The same weights in four blocks, run once each."""
    unrolled = Net(4).eval()
    for i, block in enumerate(unrolled.blocks):
        block.load_state_dict(net.blocks[i % 2].state_dict())
    return unrolled


def test_step_of_tells_steps_that_token_counts_do_not() -> None:
    steps = iter(range(4))
    scales = ((1, 1), (2, 2), (4, 4), (4, 4))
    schedule = Schedule(scales, (0.5,))
    with pytest.raises(ScheduleError, match="step_of="):
        fast_net(schedule)
    fast = fast_net(schedule, step_of=lambda block, args, kwargs: next(steps))
    fast.blocks = fast.blocks[:1]
    for h, w in scales:
        fast.step(torch.randn(2, h * w, 8))
    kept = {row.step: row.kept for row in fastvar_fx.explain(fast).rows}
    assert kept == {2: 16, 3: 8}


def test_joint_maps_are_resized_each_by_itself() -> None:
    scales = ((2, 1, 1), (2, 2, 2), (2, 4, 4))
    fast = fast_net(Schedule(scales, (1.0,)), on_full="cache")
    net = fast_net(Schedule(scales, (0.0,)))
    captured = torch.randn(2, 8, 8)
    branches = net.step(captured) - captured
    fast.step(torch.randn(2, 2, 8))
    fast.step(captured)
    out = fast.step(torch.zeros(2, 32, 8))
    maps = branches.reshape(4, 2, 2, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(out, maps.reshape(2, 32, 8), rtol=1e-5, atol=1e-6)


# --- bad input -----------------------------------------------------------------------------------


def test_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        fastvar_fx.transform(Net(), SCHEDULE)
    fast = fast_net().train()
    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        run(fast)


def test_transforming_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="already transformed"):
        fastvar_fx.transform(fast_net(), SCHEDULE)


def test_no_model_no_schedule_no_blocks() -> None:
    with pytest.raises(ModelError, match="found int"):
        fastvar_fx.transform(3, SCHEDULE)  # type: ignore[type-var]
    with pytest.raises(ScheduleError, match="found str"):
        fastvar_fx.transform(Net().eval(), "var-256")  # type: ignore[arg-type]
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    with pytest.raises(ModelError, match="Seen: Linear, ReLU, Sequential"):
        fastvar_fx.transform(net, SCHEDULE)
    with pytest.raises(ModelError, match="did you mean blocks"):
        fastvar_fx.transform(Net().eval(), SCHEDULE, blocks="block")
    with pytest.raises(ModelError, match="0 belong to Net"):
        fastvar_fx.transform(Net().eval(), SCHEDULE, blocks=[nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="kinds of"):
        fastvar_fx.transform(Net().eval(), SCHEDULE, branches=("mlp",))
    with pytest.raises(ScheduleError, match=r"layers \[5\].*2 blocks"):
        fastvar_fx.transform(Net().eval(), Schedule(SCALES, (0.5,), layers=(0, 5)))
    with pytest.raises(ModelError, match="not transformed"):
        fastvar_fx.explain(Net())


def test_texture_steps_without_the_cache_step_are_an_error() -> None:
    fast = fast_net()
    want = run(fast)
    with pytest.raises(RunError, match=r"step 3 \(20 tokens\).*cache step 2 \(12 tokens\)"):
        run(fast, [0, 1, 3])
    assert all(map(torch.equal, run(fast), want))


def test_a_pruned_step_may_not_be_left_out() -> None:
    fast = fast_net()
    with pytest.raises(RunError, match=r"step 4 \(30 tokens\) came without the steps before"):
        run(fast, [0, 1, 2, 4])


def test_a_batch_that_does_not_fit_the_capture_is_an_error() -> None:
    fast = fast_net()
    want = run(fast)
    run(fast, range(3))
    with pytest.raises(CaptureMismatchError, match=r"batch 3 on cpu.*\n?.*batch 2 on cpu"):
        run(fast, [3], batch=3)
    assert all(map(torch.equal, run(fast), want))


def test_a_dtype_that_does_not_fit_the_capture_is_an_error() -> None:
    fast = fast_net()
    want = run(fast)
    run(fast, range(3))
    fast.bfloat16()
    with pytest.raises(CaptureMismatchError, match=r"bfloat16(.|\n)*float32"):
        fast.step(tokens(3).bfloat16())
    fast.float()
    assert len(run(fast)) == len(want)


def test_a_schedule_that_the_run_never_meets_is_an_error() -> None:
    schedule = Schedule((2, 3, 6, 7), (0.5,))
    fast = fast_net(schedule)
    with pytest.raises(NothingPrunedError, match=r"\[49\] tokens.*\[1, 6, 12, 20, 30\]"):
        fastvar_fx.trace(fast, run)
    fast = fast_net(schedule)
    run(fast)
    with pytest.raises(RunError, match=r"\[49\] tokens.*\[1, 6, 12, 20, 30\]"):
        run(fast)


def test_generations_that_all_end_early_are_an_error() -> None:
    fast = fast_net()
    for _ in range(3):
        run(fast, range(2))
    with pytest.raises(RunError, match=r"\[1, 6\] tokens"):
        run(fast, range(2))


def test_nothing_to_prune_is_an_error_unless_not_strict(caplog: Any) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x.transpose(1, 2)).transpose(1, 2)
            out: Tensor = x + self.fc2(self.fc1(y))
            return out

    net = Net().eval()
    net.blocks = nn.ModuleList(Conv() for _ in range(2)).eval()
    net.spare = nn.ModuleList([Conv()]).eval()  # blocks that no loop calls
    with pytest.raises(NothingPrunedError, match=r"FVX013(.|\n)*test_runtime.py"):
        run(fastvar_fx.transform(net, SCHEDULE))
    relaxed = fastvar_fx.transform(net, SCHEDULE, strict=False)
    assert all(map(torch.equal, run(relaxed), run(net)))
    assert "FVX013" in caplog.text


def test_all_errors_share_one_base() -> None:
    for error in (ModelError, ScheduleError, RunError, CaptureMismatchError, NothingPrunedError):
        assert issubclass(error, FastVARError)


def test_a_block_without_a_token_map_says_what_it_was_given() -> None:
    class Odd(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[None])[0]

    net = Net().eval()
    net.blocks = nn.ModuleList(Odd() for _ in range(2)).eval()
    fast = fastvar_fx.transform(net, SCHEDULE)
    with pytest.raises(RunError, match=r"without a \(B, L, C\) token map.*\(6, 8\)"):
        fast.step(torch.randn(6, 8))


def test_blocks_that_share_a_program_differ_in_what_they_do_not_use() -> None:
    class Numbered(Block):
        index = 0

    net = Net(4).eval()
    net.blocks = nn.ModuleList(Numbered() for _ in range(4)).eval()
    for index, block in enumerate(net.blocks):
        vars(block).update(index=index, rate=0.1 * index)
    fast = fastvar_fx.transform(net, SCHEDULE)
    run(fast)
    report = fastvar_fx.explain(fast)
    assert {(row.step, row.program) for row in report.rows} == {(2, 0), (3, 1), (4, 2)}
    run(fast)
    assert fastvar_fx.explain(fast).trace_seconds == report.trace_seconds


def test_a_value_that_the_loop_changes_is_not_baked_in() -> None:
    class Scaled(Block):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.scale * self.fc2(self.fc1(x))
            return out

    def net(scale: float) -> Net:
        torch.manual_seed(0)
        made = Net(2).eval()
        made.blocks = nn.ModuleList(Scaled() for _ in range(2)).eval()
        for block in made.blocks:
            vars(block)["scale"] = scale
        return made

    fast = fastvar_fx.transform(net(1.0), SCHEDULE)
    run(fast)
    for block in fast.blocks:
        vars(block)["scale"] = 3.0
    want = run(fastvar_fx.transform(net(3.0), SCHEDULE))
    assert all(map(torch.equal, run(fast), want))


@pytest.mark.parametrize("spare", [0, 1])
def test_a_schedule_that_does_not_fit_is_an_error_every_time(spare: int) -> None:
    net = Net().eval()
    net.spare = nn.ModuleList(Block() for _ in range(spare)).eval()  # blocks that no loop calls
    fast = fastvar_fx.transform(net, Schedule((2, 3, 6, 7), (0.5,)))
    run(fast)
    for _ in range(3):
        with pytest.raises(RunError, match="but a generation had none"):
            run(fast)


def test_after_a_generation_of_another_schedule_the_right_one_runs() -> None:
    fast = fast_net()
    want = run(fast)
    for length in (1, 5, 7, 8):
        fast.step(torch.randn(2, length, 8))
    with pytest.raises(RunError, match="but a generation had none"):
        run(fast)
    for _ in range(3):
        assert all(map(torch.equal, run(fast), want))


def test_generations_that_begin_behind_the_cache_step_are_an_error() -> None:
    fast = fast_net()
    drafted = torch.randn(2, 39, 8)  # what another model drew, all its scales at once
    for _ in range(3):
        fast.step(drafted)
        run(fast, range(3, 5))
    with pytest.raises(RunError, match=r"\[20, 30\] tokens.*saw \[39, 20, 30\]"):
        fast.step(drafted)


def test_generations_cut_off_after_the_cache_step_are_fine() -> None:
    fast = fast_net()
    want = run(fast)
    for _ in range(5):
        run(fast, range(3))
    assert all(map(torch.equal, run(fast), want))


def test_a_late_scale_that_does_not_fit_is_reported() -> None:
    fast = fast_net(Schedule((*SCALES[:4], (5, 7)), (0.5, 0.4)))
    run(fast)
    assert fastvar_fx.explain(fast).unmet == {4: 35}
    assert "step 4 (35 tokens) was not met yet" in str(fastvar_fx.explain(fast))


def test_a_copy_of_a_warm_model_is_a_model_of_its_own() -> None:
    fast = fastvar_fx.transform(model_of(), SCHEDULE)
    want = fast.generate(2, 0)
    copied = copy.deepcopy(fast)
    assert torch.equal(copied.generate(2, 0, keep_cache=True), want)
    assert all(length == 0 for length in fast.kv_lengths())
    assert torch.equal(fast.generate(2, 0), want)


def test_a_passing_failure_while_tracing_does_not_stick() -> None:
    fast, fresh = fast_net(), fast_net()
    want = run(fresh)
    run(fast, range(3))
    hook = fast.blocks[1].get_submodule("qkv").register_forward_pre_hook(_raise)
    with pytest.raises(ZeroDivisionError):
        fast.step(tokens(3))
    hook.remove()
    assert all(map(torch.equal, run(fast), want))
    assert not fastvar_fx.explain(fast).refusals


def test_dropout_that_is_switched_on_later_is_not_lost() -> None:
    class Dropped(Block):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.drop(self.fc2(self.fc1(x)))
            return out

    net = Net().eval()
    net.blocks = nn.ModuleList(Dropped() for _ in range(2)).eval()
    fast = fastvar_fx.transform(net, SCHEDULE, strict=False)
    run(fast)
    for block in fast.blocks:
        block.get_submodule("drop").train()
    assert not torch.equal(run(fast)[-1], run(fast)[-1])
