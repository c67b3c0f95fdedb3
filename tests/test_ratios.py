"""Ratios that differ by layer and kind of branch: the method by hand, programs, caches, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvar_fx
from fastvar_fx import ArgumentError, Schedule, ScheduleError
from fastvar_fx.models.var import VAR, build
from fastvar_fx.schedule import ByKind
from tests import reference, zoo

SCALES = (1, 2, 3, 4, 6)
KINDS = {"attention": "attention", "cross_attention": "cross", "ffn": "ffn"}
"""What the reference calls the kinds."""


def draw(model: Any) -> torch.Tensor:
    return torch.as_tensor(model.infer_fhat(1, 3, g_seed=0))


def net(depth: int = 3) -> VAR:
    return build("tiny", scales=SCALES, depth=depth, width=64, heads=2, vocab_size=64)


@zoo.examples(8, quick=3, long=24)
@given(zoo.cases(), st.data())
def test_equals_the_method_written_by_hand(case: zoo.Case, data: st.DataObject) -> None:
    ratio = st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0])
    by_kind = st.fixed_dictionaries(dict.fromkeys(KINDS, ratio))
    layers = st.lists(by_kind, min_size=case.depth, max_size=case.depth)
    drawn = dataclasses.replace(case.schedule, ratios=(0.0,) * len(case.schedule.ratios))
    steps = [data.draw(layers) for _ in drawn.ratios]
    if case.spec.block in ("parallel_joint", "inline_parallel"):  # one branch of all
        steps = [[dict.fromkeys(KINDS, of["attention"]) for of in step] for step in steps]
    model, schedule = case.model(), Schedule(drawn.scales, steps, cache_step=drawn.cache_step)
    named = [[{KINDS[k]: r for k, r in of.items()} for of in step] for step in steps]
    want = reference.reference_generate(
        model, case.batch, case.seed, drawn.scales, named, drawn.cache_step
    )
    prunes = any(r for step in named for of in step for k, r in of.items() if k in branches(case))
    fast = fastvar_fx.transform(model, schedule, on_full="cache", strict=prunes)
    got = fast.generate(case.batch, case.seed, keep_cache=True)
    assert not fastvar_fx.explain(fast).refusals
    torch.testing.assert_close(got, want.hidden, rtol=0, atol=1e-9)
    assert fast.kv_lengths() == want.kv_lengths
    for row in fastvar_fx.explain(fast).rows:
        dropped = schedule.kept(row.step, row.layer, row.kind) < row.tokens
        assert row.kept == (schedule.kept(row.step, row.layer, row.kind) if dropped else row.tokens)


def branches(case: zoo.Case) -> set[str]:
    return {"attention", "ffn", *(["cross"] if case.spec.cross != "none" else [])}


def test_blocks_with_equal_ratios_share_programs() -> None:
    by_kind = ByKind(attention=0.5, ffn=0.75)
    ratios: Any = [by_kind, 0.0, by_kind]
    fast = fastvar_fx.transform(net(), Schedule(SCALES, [ratios]))
    report = fastvar_fx.trace(fast, draw)
    found = {row.layer: row.program for row in report.rows if row.step == 4}
    assert found[0] == found[2]
    kept = {(row.layer, row.kind): row.kept for row in report.rows if row.step == 4}
    assert kept == {(0, "attention"): 18, (0, "ffn"): 9, (2, "attention"): 18, (2, "ffn"): 9}
    assert report.pruning.dropped == 36 - round((18 + 9) / 2)


def test_a_block_that_is_dense_at_one_of_the_pruned_steps_grows_its_cache_there() -> None:
    ratios: Any = [(0.0, 0.5, 0.5), (0.75, ByKind(ffn=0.5), 0.75)]
    model = net()
    fast = fastvar_fx.transform(model, Schedule(SCALES, ratios))
    caches = fastvar_fx.trace(fast, draw).caches
    assert caches is not None
    assert (caches.buffered, caches.copied) == (6, {})
    assert caches.moved == 6  # each has the right length for all steps from the first
    again = fastvar_fx.transform(model, Schedule(SCALES, ratios), kv_buffer=False)
    torch.testing.assert_close(draw(again), draw(fast), rtol=0, atol=0)


def test_zeros_for_each_layer_are_bit_identical() -> None:
    model = net()
    fast = fastvar_fx.transform(model, Schedule(SCALES, [(0.0,) * 3, (0.0,) * 3]))
    assert torch.equal(draw(fast), draw(model))


@pytest.mark.slow
def test_one_selection_needs_one_count() -> None:
    kinds = Schedule(SCALES, [{"attention": 0.5, "ffn": 0.75}])
    layers = Schedule(SCALES, [(0.5, 0.75, 0.0)])
    for schedule, method in ((kinds, "once-per-block"), (layers, "once-per-step")):
        with pytest.raises(ArgumentError, match="one selection for all branches"):
            fastvar_fx.transform(net(), schedule, method=method)
    some = Schedule(SCALES, [(0.0, {"ffn": 0.5}, 0.5), (0.75, 0.75, 0.0)])
    for schedule, method in ((layers, "once-per-block"), (some, "once-per-step")):
        fast = fastvar_fx.transform(net(), schedule, method=method)
        report = fastvar_fx.trace(fast, draw)
        assert not report.refusals
        for row in report.rows:
            if row.step in schedule.pruned_steps:
                assert row.kept == schedule.kept(row.step, row.layer, row.kind)


def test_ratios_for_another_depth_are_refused() -> None:
    with pytest.raises(ScheduleError, match="ratios for 2 layers, but the model has 3 blocks"):
        fastvar_fx.transform(net(), Schedule(SCALES, [(0.5, 0.5)]))
    with pytest.raises(ScheduleError, match="none of the branches"):
        fastvar_fx.transform(net(), Schedule(SCALES, [{"ffn": 0.5}]), branches="attention")


def test_a_branch_of_ratio_one_is_its_resized_cache() -> None:
    fast = fastvar_fx.transform(net(), Schedule(SCALES, [{"attention": 0.5, "ffn": 1.0}]))
    rows = fastvar_fx.trace(fast, draw).rows
    assert {(row.kind, row.kept) for row in rows if row.step == 4} == {
        ("attention", 18),
        ("ffn", 0),
    }


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(SCALES, [0.5, 0.5], layers=[1], guidance_until=4),
        Schedule(SCALES, [(0.0, 0.5, 0.0), (0.0, 0.0, 0.5)], guidance_until=4),
    ],
)
def test_guidance_ends_where_the_first_block_does_not_prune(schedule: Schedule) -> None:
    fast = fastvar_fx.transform(net(), schedule, conditional="first")
    rows = fastvar_fx.trace(fast, draw).rows
    found = {(row.step, row.layer): row.kept for row in rows if row.step in schedule.pruned_steps}
    for (step, layer), kept in found.items():
        assert kept == schedule.kept(step, layer)
