"""A model measured dense and pruned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastvar_fx import Schedule, transform
from fastvar_fx.errors import ArgumentError, RunError, ScheduleError
from fastvar_fx.measuring.clock import per_step
from fastvar_fx.measuring.demo import Measurement, measure_both
from fastvar_fx.measuring.runs import Budget
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.ops import pivotal_token_selection


def test_measuring_changes_neither_images_nor_model(
    subject: Subject, measured: Measurement
) -> None:
    assert torch.equal(measured.dense_images, subject.run(subject.model))
    assert not torch.equal(measured.pruned_images, measured.dense_images)
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in subject.model.modules()]
    assert not any(after or before for after, before in hooks)


def test_measured_flops_agree_with_the_report(measured: Measurement) -> None:
    first = measured.steps[4]
    dense, pruned = measured.report.flops(first.step)
    assert first.dense_flops - first.pruned_flops == dense - pruned > 0


def test_kept_shares_add_up_to_the_kept_tokens(measured: Measurement) -> None:
    assert measured.selections == {4: 4, 5: 4}
    for step in measured.steps[4:]:
        share = measured.kept_shares[step.step]
        assert share.shape == step.scale
        assert share.sum().item() == pytest.approx(step.kept)
        assert set((4 * share).flatten().tolist()) <= {0, 1, 2, 3, 4}


def test_kept_tokens_are_those_of_the_block_and_branch_that_they_name(
    subject: Subject, measured: Measurement
) -> None:
    rows = [row for row in measured.report.rows if row.kept < row.tokens]
    named = [(each.step, each.block, each.branch) for each in measured.kept_tokens]
    assert named == [(row.step, row.block, row.branch) for row in rows]
    fast = transform(subject.model, subject.schedule)
    read: dict[tuple[int, str], Tensor] = {}
    for name in ("blocks.0", "blocks.1"):

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            read[args[0].shape[1], name] = args[0]

        fast.get_submodule(name).register_forward_pre_hook(note)
    subject.generate(fast)
    by_attention = [each for each in measured.kept_tokens if each.branch == "attn"]
    assert len(by_attention) == 4
    for each in by_attention:  # attention, the first branch, reads what the block gets
        tokens, kept = each.tokens.numel(), subject.schedule.kept(each.step)
        index = pivotal_token_selection(read[tokens, each.block], kept)[0]
        assert each.tokens.flatten().nonzero().flatten().tolist() == index.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["once-per-block", "once-per-step", "depthvar", "tome", "uniform-grid"]
)
def test_kept_tokens_of_other_methods(subject: Subject, method: str) -> None:
    found = measure_both(replace(subject, run_by_step=None), method=method, repeats=1)
    assert found.method == found.as_dict()["method"] == method
    assert found.selections == {4: 4, 5: 4}
    by_branch: dict[tuple[int, str], list[Tensor]] = {}
    for each in found.kept_tokens:
        assert each.tokens.sum() == subject.schedule.kept(each.step)
        by_branch.setdefault((each.step, each.block), []).append(each.tokens)
    assert len(by_branch) == 4
    if method != "tome":
        assert all(torch.equal(attention, ffn) for attention, ffn in by_branch.values())


def test_a_method_that_is_unknown(subject: Subject) -> None:
    with pytest.raises(ArgumentError, match="no method is named 'fastvr'; did you mean fastvar"):
        measure_both(subject, method="fastvr")


def test_growth_ends_in_the_images_and_parts_after_the_cache_step(measured: Measurement) -> None:
    grown = measured.growth
    assert grown is not None
    assert torch.equal(grown.dense[-1:], measured.dense_images[:1])
    assert torch.equal(grown.pruned[-1:], measured.pruned_images[:1])
    equal = [torch.equal(a, b) for a, b in zip(grown.dense, grown.pruned, strict=True)]
    assert equal == [True] * 4 + [False] * 2


def test_a_budget_ends_the_repeats(subject: Subject) -> None:
    told: list[str] = []
    undrawn = replace(subject, run_by_step=None)
    result = measure_both(undrawn, repeats=9, budget=Budget(0), progress=told.append)
    assert (result.repeats, result.growth) == (1, None)
    assert told[3:] == ["dense, run 1 of 9", "pruned, run 1 of 9"]


def test_passes_are_told_apart_by_step() -> None:
    schedule = Schedule((1, 1, 2, 3), (0.5,))
    assert per_step([(1, 1), (1, 2), (4, 3), (9, 4)], schedule) == [1, 2, 3, 4]
    context_and_halves = [(30, 9), (9, 9), (1, 1), (1, 1), (4, 2), (4, 3), (9, 4), (9, 4)]
    assert per_step(context_and_halves, schedule) == [1, 1, 5, 8]
    prompt_first = Schedule((1, 2, 3), (0.5,))
    assert per_step([(30, 9), (4, 2), (9, 4)], prompt_first) == [9, 2, 4]
    assert per_step([(1, 1), (4, 2)], prompt_first, drawn=2) == [1, 2, 0]
    with pytest.raises(RunError, match=r"steps of \[1, 1, 4, 9\] tokens, but .* \[1, 1, 4\]"):
        per_step([(1, 1), (1, 2), (4, 3)], schedule)


def test_nothing_to_compare(subject: Subject) -> None:
    with pytest.raises(ScheduleError, match="nothing to compare"):
        measure_both(
            Subject("tiny", subject.model, Schedule((1, 2, 3, 4, 6, 8), (0,)), subject.run)
        )
