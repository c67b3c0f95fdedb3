"""`fastvar_fx.measure`: each pruned step timed dense and pruned, and what `explain` says of it."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.models.var import VAR, build

SCALES = (1, 2, 3, 4, 6, 8)
SCHEDULE = Schedule(SCALES, (0.5, 0.75))


@pytest.fixture(scope="module")
def model() -> VAR:
    return build("tiny", scales=SCALES, depth=2)


def run(model: Any) -> Tensor:
    latents: Tensor = model.infer_fhat(1, 3, g_seed=0)
    return latents


def times(dense: float, pruned: float) -> Comparison:
    return Comparison(Spread.of([dense]), Spread.of([pruned]))


def test_dense_and_pruned_take_turns(model: VAR) -> None:
    fast = fastvar_fx.transform(model, SCHEDULE)
    results: list[Tensor] = []
    report = fastvar_fx.measure(fast, lambda m: results.append(run(m)), repeats=2)
    assert list(report.step_times) == [4, 5]
    assert all(min(t.dense.low, t.pruned.low) > 0 for t in report.step_times.values())
    dense, pruned = run(model), run(fastvar_fx.transform(model, SCHEDULE))
    assert not torch.equal(dense, pruned)
    expected = [pruned, *[dense, pruned] * 3]
    assert [torch.equal(a, b) for a, b in zip(results, expected, strict=True)] == [True] * 7
    assert torch.equal(run(fast), pruned)
    assert fastvar_fx.explain(fast).step_times == report.step_times
    assert set(json.loads(report.to_json())["step_times"]["5"]) == {
        "ms_dense",
        "ms_pruned",
        "speedup",
        "limit",
        "pays",
        "unusable",
        "reason",
    }


def test_skipped_steps_stay_skipped(model: VAR) -> None:
    fast = fastvar_fx.transform(model, Schedule(SCALES, (0.5, 1)))
    report = fastvar_fx.measure(fast, run, repeats=1)
    assert list(report.step_times) == [4]


def test_what_explain_says(model: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {4: times(0.002, 0.002), 5: times(0.006, 0.002)}
    verbs = import_module("fastvar_fx.transform")
    monkeypatch.setattr(verbs, "time_steps", lambda *_: found)
    report = fastvar_fx.measure(fastvar_fx.transform(model, SCHEDULE), run)
    assert report.slower_steps == (4,)
    told = "pruning does not pay here; schedule.without(4) leaves the step dense"
    assert str(report).splitlines()[-2:] == [
        f"step 4: 2 ms dense, 2 ms pruned: {told}",
        "step 5: 6 ms dense, 2 ms pruned: 3.00x",
    ]
    left = SCHEDULE.without(*report.slower_steps)
    fast = fastvar_fx.transform(model, left)
    rows = fastvar_fx.trace(fast, run).rows
    assert {(row.step, row.tokens, row.kept) for row in rows} == {(3, 16, 16), (5, 64, 16)}


def test_a_failed_run_leaves_the_model_pruning(model: VAR) -> None:
    fast = fastvar_fx.transform(model, SCHEDULE)
    calls: list[None] = []

    def fails_dense(m: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("prompt")
        run(m)

    with pytest.raises(KeyError, match="prompt"):
        fastvar_fx.measure(fast, fails_dense)
    assert torch.equal(run(fast), run(fastvar_fx.transform(model, SCHEDULE)))


def test_bad_input(model: VAR) -> None:
    fast = fastvar_fx.transform(model, SCHEDULE)
    with pytest.raises(ValueError, match="repeats is at least 1; found 0"):
        fastvar_fx.measure(fast, run, repeats=0)
    with pytest.raises(fastvar_fx.ModelError, match="VAR is not transformed"):
        fastvar_fx.measure(model, run)
