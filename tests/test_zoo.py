"""The zoo and its hand-edited reference agree with each other and with small sums by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference, zoo

FAST = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
SCALES: tuple[zoo.Scale, ...] = ((1, 1), (2, 2), (3, 2), (4, 4), (4, 6))
OPTIONS = [(name, value) for name, values in zoo.CHOICES.items() for value in values]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def shuffled(x: Tensor, kept: int) -> Tensor:
    """Any `kept` tokens in any order, another draw per sample."""
    generator = torch.Generator().manual_seed(x.shape[1])
    rows = [torch.randperm(x.shape[1], generator=generator)[:kept] for _ in x]
    return torch.stack(rows)


# -- the dense reference is the model -----------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_every_option_has_a_reference(name: str, value: Any) -> None:
    spec = zoo.complete_spec({name: value})
    model = zoo.ZooModel(spec, 2, SCALES)
    run = reference.reference_generate(model, 2, 3, SCALES, (0.0, 0.0))
    assert_close(model.generate(2, 3, keep_cache=True), run.hidden)
    assert model.kv_lengths() == run.kv_lengths
    assert run.kept == {}


@FAST
@given(zoo.cases(stale_masks=True))
def test_unpruned_reference_equals_the_model(case: zoo.Case) -> None:
    drawn = case.schedule
    dense = dataclasses.replace(drawn, ratios=(0.0,) * len(drawn.ratios))
    model = case.model()
    run = reference.reference_of(dataclasses.replace(case, schedule=dense), model)
    assert_close(model.generate(case.batch, case.seed, keep_cache=True), run.hidden)
    assert model.kv_lengths() == run.kv_lengths


@FAST
@given(zoo.cases(stale_masks=True))
def test_keeping_all_tokens_in_any_order_changes_nothing(case: zoo.Case) -> None:
    drawn, model = case.schedule, case.model()
    run = reference.reference_generate(
        model,
        case.batch,
        case.seed,
        drawn.scales,
        (1e-9,) * len(drawn.ratios),
        drawn.cache_step,
        select=shuffled,
    )
    assert run.kept
    assert_close(model.generate(case.batch, case.seed), run.hidden)


# -- pruning ------------------------------------------------------------------------------------


@FAST
@given(zoo.cases(stale_masks=True, some_layers=True))
def test_pruning_changes_the_texture_steps_only(case: zoo.Case) -> None:
    drawn, model = case.schedule, case.model()
    run = reference.reference_of(case, model)
    dense = zoo.split_steps(model.generate(case.batch, case.seed), drawn.scales)
    pruned = zoo.split_steps(run.hidden, drawn.scales)
    dropped = [
        step
        for (step, _, _), index in run.kept.items()
        if index.shape[1] < drawn.scales[step][0] * drawn.scales[step][1]
    ]
    first = min(dropped, default=len(drawn.scales))
    for step, (a, b) in enumerate(zip(dense, pruned, strict=True)):
        assert b.isfinite().all()
        if step < first:
            assert_close(a, b)
        else:
            assert (a - b).abs().max() > 1e-6


@FAST
@given(zoo.cases(stale_masks=True, some_layers=True))
def test_kv_caches_grow_by_the_kept_tokens(case: zoo.Case) -> None:
    drawn, model = case.schedule, case.model()
    run = reference.reference_of(case, model)
    for layer, length in enumerate(run.kv_lengths):
        expected = 0
        for step, (h, w) in enumerate(drawn.scales):
            ratio = drawn.ratios[step - drawn.texture_start] if step >= drawn.texture_start else 0
            if case.layers is not None and layer not in case.layers:
                ratio = 0
            expected += h * w - int(h * w * ratio)
        assert length == (expected if case.spec.cached else 0)


@FAST
@given(zoo.cases(), st.data())
def test_a_sample_does_not_depend_on_its_batch(case: zoo.Case, data: st.DataObject) -> None:
    drawn, model = case.schedule, case.model()
    sample = data.draw(st.sampled_from(range(case.batch)))
    together = reference.reference_of(case, model)
    alone = reference.reference_generate(
        model, 1, case.seed, drawn.scales, drawn.ratios, drawn.cache_step, first=sample
    )
    assume(together.margin > 1e-9)
    assert_close(together.hidden[sample : sample + 1], alone.hidden)


def test_kept_tokens_attend_as_if_the_dropped_keys_were_masked() -> None:
    spec = zoo.BlockSpec(rope="pairs", mask="float", pos_bias="input", qkv="gqa_expand")
    model = zoo.ZooModel(spec, 1, ((2, 2), (2, 3), (4, 4)))
    start, L = 10, 16
    run = reference.reference_generate(model, 2, 0, model.scales, (0.5,), branches=("attention",))
    index = run.kept[2, 0, "attention"]
    dropped = torch.ones(2, L, dtype=torch.bool).scatter(1, index, False)
    for sample in range(2):
        blind = zoo.ZooModel(spec, 1, model.scales)
        blind.attn_bias[:, :, :, start:][..., dropped[sample]] = -torch.inf
        dense = blind.generate(1, 0, first=sample)
        kept = start + index[sample]
        assert_close(dense[0, kept], run.hidden[sample, kept])


# -- the two operators --------------------------------------------------------------------------


def test_pivotal_indices_by_hand() -> None:
    x = torch.tensor([[[0.0], [5.0], [1.0], [-6.0]], [[3.0], [0.0], [0.0], [1.0]]])
    assert reference.pivotal_indices(x[:1], 2).tolist() == [[1, 3]]
    assert reference.pivotal_indices(x[1:], 1).tolist() == [[0]]
    assert reference.pivotal_indices(x, 0).shape == (2, 0)


def test_restore_by_hand() -> None:
    cached = torch.tensor([[[1.0], [2.0]]])  # one row of two
    index, kept = torch.tensor([[1, 6]]), torch.tensor([[[9.0], [8.0]]])
    out = reference.restore(cached, (1, 2), (2, 4), kept, index)
    assert out.flatten().tolist() == [1, 9, 2, 2, 1, 1, 8, 2]
    nothing = reference.restore(cached, (1, 2), (2, 1), kept[:, :0], index[:, :0])
    assert nothing.flatten().tolist() == [1.5, 1.5]


# -- the options and the strategies -------------------------------------------------------------


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ValueError, match="norm='batch'"):
        zoo.BlockSpec(norm="batch")
    with pytest.raises(ValueError, match="boolean"):
        zoo.BlockSpec(mask="bool", core="baddbmm")
    with pytest.raises(ValueError, match="'hf' block"):
        zoo.BlockSpec(block="hf")


@FAST
@given(zoo.schedules())
def test_schedules_tell_their_late_steps_apart(drawn: zoo.Drawn) -> None:
    counts = [h * w for h, w in drawn.scales]
    late = counts[drawn.cache_step :]
    assert 0 <= drawn.cache_step < drawn.texture_start
    assert all(counts.count(count) == 1 for count in late)
    assert any(drawn.ratios)


@FAST
@given(zoo.cases())
def test_cases_avoid_masks_that_outlive_their_keys(case: zoo.Case) -> None:
    assert not zoo.mask_outlives_keys(case.spec, case.schedule)


@pytest.mark.parametrize(
    "pinned", [{"cache": "returned"}, {"rope_source": "argument"}, {"rope": "pairs", "heads": 4}]
)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.data())
def test_pinned_options_hold(pinned: dict[str, Any], data: st.DataObject) -> None:
    spec = data.draw(zoo.block_specs(**pinned))
    assert {name: getattr(spec, name) for name in pinned} == pinned


# -- models to refuse ---------------------------------------------------------------------------

REFUSABLE = zoo.refusable_models()


@pytest.mark.parametrize("odd", REFUSABLE, ids=lambda odd: str(odd.name))
def test_refusable_models_run_and_mark_one_line(odd: zoo.Refusable) -> None:
    path, number = odd.line()
    assert path.name == "zoo.py"
    assert odd.marker in path.read_text().splitlines()[number - 1]
    scales = odd.model.scales
    dense = odd.model.generate(2, 0, keep_cache=True)
    refused = {(odd.layer, odd.branch)}
    run = reference.reference_generate(odd.model, 2, 0, scales, (0.0, 0.0))
    assert_close(dense, run.hidden)
    assert odd.model.kv_lengths() == run.kv_lengths
    pruned = reference.reference_generate(odd.model, 2, 0, scales, (0.5, 0.5), refused=refused)
    assert (dense - pruned.hidden).abs().max() > 1e-6
    assert {(layer, name) for _, layer, name in pruned.kept}.isdisjoint(refused)
    assert len(pruned.kept) == 6


@pytest.mark.parametrize("odd", REFUSABLE, ids=lambda odd: str(odd.name))
def test_refusable_branches_mix_tokens(odd: zoo.Refusable) -> None:
    """Other tokens' outputs change with one token, so pruning would not be the same sum."""
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = x.clone()
    changed[:, 0] *= 5
    with torch.no_grad():
        difference = (odd.odd(x, 4, 4) - odd.odd(changed, 4, 4)).abs().amax(dim=2)
    assert difference[:, 1:].max() > 1e-6
