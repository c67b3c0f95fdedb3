"""The whole thing on random models: equal to FastVAR written by hand, exact where it promises."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import fastvar_fx
from fastvar_fx import Method, Schedule
from tests import reference, zoo
from tests.marks import mostly_slow


def schedule_of(case: zoo.Case) -> Schedule:
    drawn = case.schedule
    return Schedule(drawn.scales, drawn.ratios, cache_step=drawn.cache_step, layers=case.layers)


def fingerprint_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a transform could have changed."""
    modules = dict(model.named_modules())
    tensors = {name: t.clone() for name, t in model.state_dict(keep_vars=True).items()}
    return {
        "classes": {name: type(m) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "tensors": tensors,
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint_of(model)
    assert after["classes"] == before["classes"]
    assert after["attributes"] == before["attributes"]
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name])


@zoo.examples(12, quick=5, long=60)
@given(zoo.cases(some_layers=True))
def test_equals_the_method_written_by_hand(case: zoo.Case) -> None:
    model = case.model()
    before = fingerprint_of(model)
    want = reference.reference_of(case, model)
    fast = fastvar_fx.transform(model, schedule_of(case), on_full="cache")
    got = fast.generate(case.batch, case.seed, keep_cache=True)
    assert not fastvar_fx.explain(fast).refusals
    torch.testing.assert_close(got, want.hidden, rtol=0, atol=1e-9)
    assert fast.kv_lengths() == want.kv_lengths
    fast.reset_cache()
    again = fast.generate(case.batch, case.seed)
    assert torch.equal(again, got)
    assert_untouched(model, before)


@zoo.examples(8, quick=4, long=25)
@given(zoo.cases())
def test_shape_and_dtype_are_kept(case: zoo.Case) -> None:
    model = case.model(torch.float32)
    dense = model.generate(case.batch, case.seed)
    fast = fastvar_fx.transform(model, schedule_of(case), on_full="cache")
    pruned = fast.generate(case.batch, case.seed)
    assert (pruned.shape, pruned.dtype) == (dense.shape, dense.dtype)
    start = sum(h * w for h, w in case.schedule.scales[: case.schedule.texture_start])
    torch.testing.assert_close(pruned[:, :start], dense[:, :start], rtol=0, atol=1e-6)


@zoo.examples(12, quick=4, long=20)
@given(zoo.cases())
def test_ratio_zero_is_bit_identical(case: zoo.Case) -> None:
    model = case.model(torch.float32)
    zeros = Schedule(case.schedule.scales, [0.0] * len(case.schedule.ratios))
    fast = fastvar_fx.transform(model, zeros)
    assert torch.equal(fast.generate(case.batch, case.seed), model.generate(case.batch, case.seed))


@pytest.mark.slow
@zoo.examples(10, quick=4, long=20)
@given(zoo.cases())
def test_samples_do_not_depend_on_their_batch(case: zoo.Case) -> None:
    fast = fastvar_fx.transform(case.model(), schedule_of(case), on_full="cache")
    together = fast.generate(case.batch, case.seed)
    for sample in range(case.batch):
        alone = fast.generate(1, case.seed, first=sample)
        torch.testing.assert_close(alone[0], together[sample], rtol=0, atol=1e-9)


@zoo.examples(10, quick=4, long=20)
@given(zoo.cases())
def test_keeping_all_tokens_in_any_order_changes_nothing(case: zoo.Case) -> None:
    """A side input that is not gathered by position would show here."""
    model = case.model()
    drawn = case.schedule
    fast = fastvar_fx.transform(
        model,
        Schedule(drawn.scales, drawn.ratios, cache_step=drawn.cache_step, layers=case.layers),
        on_full="cache",
        method=Method(select=_last_tokens, restore=_kept_or_cached),
    )
    want = reference.reference_generate(
        model, case.batch, case.seed, drawn.scales, drawn.ratios, drawn.cache_step,
        case.layers, select=_last_tokens,
    ).hidden  # fmt: skip
    torch.testing.assert_close(fast.generate(case.batch, case.seed), want, rtol=0, atol=1e-9)


def _last_tokens(x: torch.Tensor, kept: int) -> torch.Tensor:
    """Keeps the last tokens, last first: an order and a choice of the user's own."""
    first = x.shape[1] - 1
    order = torch.arange(first, first - kept, -1, device=x.device)
    return order.expand(x.shape[0], kept)


def _kept_or_cached(
    kept: torch.Tensor,
    index: torch.Tensor,
    cached: torch.Tensor,
    cached_scale: tuple[int, ...],
    scale: tuple[int, ...],
) -> torch.Tensor:
    return reference.restore(
        cached, (cached_scale[0], cached_scale[1]), (scale[0], scale[1]), kept, index
    )


@pytest.mark.parametrize(
    "model", mostly_slow(zoo.refusable_models(), quick=5), ids=lambda model: model.name
)
def test_refused_branches_name_the_line_and_the_rest_prunes(model: zoo.Refusable) -> None:
    scales, ratios = zoo.REFUSABLE_SCALES, (0.5, 0.4)
    fast = fastvar_fx.transform(model.model, Schedule(scales, ratios))
    got = fast.generate(2, 0)
    report = fastvar_fx.explain(fast)
    file, line = model.line()
    where = {row.refusal.where for row in report.refusals if row.refusal is not None}
    assert where == {f"{file}:{line}"}
    assert {(row.layer, row.kind) for row in report.refusals} == {(model.layer, model.branch)}
    pruned = [row for row in report.rows if row.kept < row.tokens]
    assert len(pruned) == len(ratios) * 3  # block 0 whole, and the other branch of block 1
    want = reference.reference_generate(
        model.model, 2, 0, scales, ratios, refused={(model.layer, model.branch)}
    )
    torch.testing.assert_close(got, want.hidden, rtol=0, atol=1e-9)
    assert f"{file}:{line}" in str(report)


def test_a_transformed_model_is_a_model_of_its_class() -> None:
    spec = zoo.complete_spec({})
    model = zoo.ZooModel(spec, 2, ((1, 1), (2, 3), (4, 4)))
    fast = fastvar_fx.transform(model, Schedule(model.scales, (0.5,)))
    assert type(fast) is type(model)
    assert isinstance(fast.blocks[0], type(model.blocks[0]))
    assert type(fast.blocks[0]).__name__ == type(model.blocks[0]).__name__
    assert list(fast.state_dict()) == list(model.state_dict())
    for (name, theirs), (other, ours) in zip(
        model.named_parameters(), fast.named_parameters(), strict=True
    ):
        assert name == other
        assert ours is theirs


def test_a_forward_set_on_a_block_is_the_one_that_prunes() -> None:
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.old_forward(*args, **kwargs)
        return result.mul(2.0)

    model: Any = zoo.ZooModel(zoo.complete_spec({}), 2, ((1, 1), (2, 3), (4, 4)))
    schedule = Schedule(model.scales, (0.5,))
    plain = fastvar_fx.transform(model, schedule).generate(2, 0)
    for block in model.blocks:
        block.old_forward = block.forward
        block.forward = types.MethodType(doubled, block)
    dense = model.generate(2, 0)
    fast: Any = fastvar_fx.transform(model, schedule)
    report = fastvar_fx.trace(fast, lambda m: m.generate(2, 0))
    assert any(row.kept == 8 for row in report.rows)
    assert not torch.equal(fast.generate(2, 0), plain)
    assert torch.equal(model.generate(2, 0), dense)


def test_weights_can_change_after_the_transform() -> None:
    model = zoo.ZooModel(zoo.complete_spec({}), 2, ((1, 1), (2, 3), (4, 4)))
    other = zoo.ZooModel(zoo.complete_spec({}), 2, ((1, 1), (2, 3), (4, 4)), weight_seed=1)
    schedule = Schedule(model.scales, (0.5,))
    fast = fastvar_fx.transform(model, schedule)
    fast.generate(2, 0)
    fast.load_state_dict(copy.deepcopy(other.state_dict()))
    want = fastvar_fx.transform(other, schedule).generate(2, 0)
    assert torch.equal(fast.generate(2, 0), want)
    assert torch.equal(fast.generate(3, 0), fastvar_fx.transform(other, schedule).generate(3, 0))


def test_equal_blocks_share_one_program() -> None:
    model = zoo.ZooModel(zoo.complete_spec({}), 3, ((1, 1), (2, 3), (4, 4)))
    fast = fastvar_fx.transform(model, Schedule(model.scales, (0.5,)))
    report = fastvar_fx.trace(fast, lambda m: m.generate(2, 0))
    assert {row.program for row in report.rows if row.step == 2} == {1}


def test_only_the_asked_kinds_prune() -> None:
    spec = zoo.complete_spec({"cross": "plain"})
    model = zoo.ZooModel(spec, 1, ((1, 1), (2, 3), (4, 4)))
    fast = fastvar_fx.transform(model, Schedule(model.scales, (0.5,)), branches=("ffn",))
    fast.generate(1, 0)
    pruned = {row.kind for row in fastvar_fx.explain(fast).rows if row.kept < row.tokens}
    assert pruned == {"ffn"}
    kinds = {row.kind for row in fastvar_fx.explain(fast).rows}
    assert kinds == {"attention", "cross_attention", "ffn"}
    assert not any(row.refusal for row in fastvar_fx.explain(fast).rows)


def test_graphs_are_dumped_before_and_after(tmp_path: Any) -> None:
    model = zoo.ZooModel(zoo.complete_spec({}), 1, ((1, 1), (2, 3), (4, 4)))
    fast = fastvar_fx.transform(model, Schedule(model.scales, (0.5,)), dump_dir=tmp_path)
    fast.generate(1, 0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "00_blocks.0_step1.0_capture.py",
        "00_blocks.0_step1.1_capture_outputs.py",
        "01_blocks.0_step2.0_capture.py",
        "01_blocks.0_step2.1_prune.py",
    ]
    pruned = (tmp_path / names[-1]).read_text()
    assert "pivotal_token_selection" in pruned
    assert "cached_token_restoration" in pruned
