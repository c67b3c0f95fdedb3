"""`calibrate`: what it measures, what it finds, and how it goes on where it was."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastvar_fx
from fastvar_fx import ArgumentError, NothingPrunedError, RunError, Schedule, ScheduleError
from fastvar_fx.calibration import calibrate as calibration
from fastvar_fx.calibration.figure import draw_plan
from fastvar_fx.calibration.journal import Found, Journal
from fastvar_fx.calibration.measure import Branches, Subject, saved_flops
from fastvar_fx.calibration.reference import Guidance, Reference
from fastvar_fx.engine.engine import Engine
from fastvar_fx.measuring.runs import Runs, no_progress
from fastvar_fx.methods import Method, interpolated
from fastvar_fx.models.var import VAR, build
from fastvar_fx.ops import take_tokens
from fastvar_fx.schedule import ByKind
from passes.analyse.rules.attention import FLOP_FORMULAS

SCALES = (1, 2, 3, 4, 6)
SCHEDULE = Schedule(SCALES, (0.5, 0.5))


@pytest.fixture(scope="module")
def net() -> VAR:
    return build("tiny", scales=SCALES, depth=2, width=64, heads=2, vocab_size=64)


def draw(model: Any, seed: int = 0) -> Tensor:
    return torch.as_tensor(model.infer_fhat(1, 3, g_seed=seed))


def unseeded(model: Any) -> Tensor:
    """Draws other tokens each time; the class and the batch are the same."""
    return torch.as_tensor(model.infer_fhat(1, 3))


def last_logits(model: Any) -> Tensor:
    seen: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda *args: seen.append(args[-1]))
    draw(model)
    hook.remove()
    return seen[-1].double()


def recorded(fast: VAR, dense: Schedule, guidance: Guidance | None = None) -> Reference:
    """Returns a reference of the dense generation from seed 0."""
    reference = Reference(fast, "head", guidance)
    fastvar_fx.use(fast, dense)
    with reference.recording():
        draw(fast)
    return reference


# --- what is measured -----------------------------------------------------------------------------


def test_losses_are_divergences_of_the_logits_in_bits(net: VAR) -> None:
    dense, last = (Schedule(SCALES, [r]) for r in (0.0, 0.75))
    fast = fastvar_fx.transform(net, [dense, last], strict=False)
    reference = recorded(fast, dense)
    fastvar_fx.use(fast, last)
    with reference.comparing() as losses:
        unseeded(fast)
    # By hand: up to the last step both draw the same, so that the logits can be compared.
    p, q = (last_logits(m).log_softmax(-1) for m in (net, fastvar_fx.transform(net, last)))
    want = float((p.exp() * (p - q)).sum(-1).mean(0).sum() / math.log(2))
    assert losses == pytest.approx({4: want}, rel=1e-4)
    assert want > 1e-3


def test_what_the_loop_draws_does_not_matter(net: VAR) -> None:
    dense = Schedule(SCALES, [0.0, 0.0])
    fast = fastvar_fx.transform(net, [dense, SCHEDULE], strict=False)
    reference = Reference(fast, None)
    fastvar_fx.use(fast, dense)
    with reference.recording():
        draw(fast, seed=1)
    assert reference.calls == dict.fromkeys(range(5), 1)
    fastvar_fx.use(fast, SCHEDULE)
    found = []
    for seed in (2, 3):
        with reference.comparing() as losses:
            draw(fast, seed)
        found.append(dict(losses))
    assert found[0] == found[1]
    assert all(found[0].values())
    with pytest.raises(RunError, match="same batch"), reference.comparing():
        fast.infer_fhat(2, 3, g_seed=0)
    with pytest.raises(RunError, match=r"step 0 differs .* same classes"), reference.comparing():
        fast.infer_fhat(1, 4, g_seed=1)


def test_saved_flops_are_those_of_a_dense_generation_less_those_of_the_plan(net: VAR) -> None:
    ratios: Any = [(0.5, ByKind(attention=0.75)), (ByKind(ffn=1.0), 0.5)]
    fast = fastvar_fx.transform(net, Schedule(SCALES, ratios))
    fastvar_fx.trace(fast, draw)
    counts = []
    for model in (net, fast):
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            draw(model)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == sum(saved_flops(Engine.of(fast)).values())


def test_losses_with_guidance_are_those_of_guided_logits(net: VAR) -> None:
    dense, *others = (
        Schedule(SCALES, (0.0, r), guidance_until=until)
        for r, until in ((0.0, None), (0.75, None), (0.0, 4), (0.75, 4))
    )
    early = Schedule(SCALES, (0.0, 0.0), guidance_until=1)
    fast = fastvar_fx.transform(net, [dense, *others, early], conditional="first", strict=False)
    reference = recorded(fast, dense, Guidance(net.guidance_strengths(), "first"))
    found = []
    for schedule in others:
        fastvar_fx.use(fast, schedule)
        with reference.comparing() as losses:
            unseeded(fast)
        assert list(losses) == [4]
        found.append(losses[4])
    pruned = fastvar_fx.transform(net, others[0])
    guided = [by_hand(logits, 1.5) for logits in (last_logits(net), last_logits(pruned))]
    conditional = [by_hand(logits, 0) for logits in (last_logits(net), last_logits(pruned))]
    p, q = guided
    want = [divergence(p, q), divergence(p, conditional[0]), divergence(p, conditional[1])]
    assert found == pytest.approx(want, rel=1e-4)
    assert min(want) > 1e-3
    fastvar_fx.use(fast, early)
    with reference.comparing() as losses:
        unseeded(fast)
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] == pytest.approx(found[1], rel=1e-4), "whichever step was the first"


def by_hand(logits: Tensor, t: float) -> Tensor:
    return ((1 + t) * logits[:1] - t * logits[1:]).log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum() / math.log(2))


@pytest.mark.parametrize("guidance", [None, Guidance((0.0, 0.4, 0.8, 1.2, 1.6), "first")])
def test_tokens_that_nothing_may_draw_lose_nothing(net: VAR, guidance: Guidance | None) -> None:
    """Those of a restricted vocabulary, whose logits are -inf."""
    dense = Schedule(SCALES, (0.0, 0.0))
    fast = fastvar_fx.transform(net, [dense, SCHEDULE], strict=False)
    found = []
    for low in (-1e4, -math.inf):
        hook = fast.head.register_forward_hook(lambda *args, low=low: masked(args[-1], low))
        reference = Reference(fast, "head", guidance)
        fastvar_fx.use(fast, dense)
        with reference.recording():
            forced(fast)
        fastvar_fx.use(fast, SCHEDULE)
        with reference.comparing() as losses:
            forced(fast)
        found.append(losses)
        hook.remove()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert min(found[0].values()) > 1e-3


def masked(logits: Tensor, low: float) -> Tensor:
    return logits.masked_fill(torch.arange(logits.shape[2]) >= 10, low)


def forced(model: Any) -> None:
    """Draws the first token everywhere, whatever the logits are."""
    model.infer_fhat(1, 3, choose=lambda _, logits: logits[..., 0].long() * 0)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    """Such as where logits are -inf but for the highest ones, which pruning changes."""
    small = build("tiny", scales=(1, 2, 3), depth=1, width=32, heads=1, vocab_size=64)

    def highest(_module: object, _args: object, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits < logits.topk(4).values[..., -1:], -math.inf)

    small.head.register_forward_hook(highest)
    schedule = Schedule((1, 2, 3), (0.5,))
    with pytest.raises(RunError, match=r"loss of layer 0 attention .*, run 1 at step 2 is inf"):
        fastvar_fx.calibrate(small, forced, schedule, loss=0.5, logits="head", levels=(0.5,))


def test_steps_that_attend_to_pruned_ones_lose_too(net: VAR) -> None:
    dense, early = (Schedule(SCALES, (r, 0.0)) for r in (0.0, 0.75))
    fast = fastvar_fx.transform(net, [dense, early], strict=False)
    reference = recorded(fast, dense)
    fastvar_fx.use(fast, early)
    with reference.comparing() as losses:
        draw(fast)
    assert all(losses[step] > 1e-3 for step in (3, 4))


# --- what is found --------------------------------------------------------------------------------


class StopError(Exception):
    """Ends a calibration early."""


@pytest.mark.slow
def test_a_plan_saves_what_is_asked_at_one_step(net: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_REFINED", 1)
    texts: list[str] = []
    plan = fastvar_fx.calibrate(
        net,
        draw,
        Schedule(SCALES, (0.5,)),
        speedup=1.2,
        levels=(0.75,),
        logits="head",
        progress=texts.append,
    )
    assert plan.cache_step == 3
    assert plan.ratios_at(4) == (0.0, 0.75)
    assert [text for text in texts if "lower" in text or "higher" in text]
    assert "restores from step 3" in texts[-1]
    fast = fastvar_fx.transform(net, plan)
    draw(fast)
    assert 1.2 <= block_flops(net) / block_flops(fast) < 1.6


@pytest.mark.slow
def test_steps_that_are_drawn_from_the_cache_save_once(net: VAR) -> None:
    texts: list[str] = []
    plan = fastvar_fx.calibrate(
        net,
        draw,
        Schedule(SCALES, (0.5, 1.0)),
        speedup=2.2,
        levels=(0.75,),
        progress=texts.append,
        on_full="cache",
    )
    fast = fastvar_fx.transform(net, plan, on_full="cache")
    draw(fast)
    (said,) = re.findall(r"is ([\d.-]+)x as fast", texts[-1])
    assert float(said) == pytest.approx(block_flops(net) / block_flops(fast), abs=0.006)


@pytest.mark.slow
def test_a_plan_ends_guidance_where_that_loses_less_than_pruning(net: VAR, tmp_path: Path) -> None:
    """And prunes, or ends it earlier, for what this does not save."""
    file = tmp_path / "measured.json"
    find: Any = partial(
        fastvar_fx.calibrate,
        net,
        draw,
        Schedule(SCALES, (0.5,)),
        levels=(0.75,),
        logits="head",
        conditional="first",
        file=file,
    )
    weak = [0.0, 0.0, 0.0, 0.01, 0.01]
    texts: list[str] = []
    plan = find(speedup=1.3, guidance=weak, progress=texts.append)
    assert plan.guidance_until is not None
    assert not plan.pruned_steps
    assert texts[-1].count("no guidance from step") == 1
    assert "restores" not in texts[-1]
    fast = fastvar_fx.transform(net, plan, conditional="first")
    draw(fast)
    assert block_flops(net) / block_flops(fast) >= 1.3
    both = find(speedup=2.2, guidance=weak)
    assert both.guidance_until is not None
    assert both.pruned_steps == (4,)
    fast = fastvar_fx.transform(net, both, conditional="first")
    draw(fast)
    assert block_flops(net) / block_flops(fast) >= 2.2
    with pytest.raises(ScheduleError, match=r"cannot be met.* it is \d"):
        find(speedup=50, guidance=weak)
    with pytest.raises(ScheduleError, match="the least that a plan loses"):
        find(loss=1e-12, guidance=weak)
    with pytest.raises(ArgumentError, match="holds a calibration with other guidance; give"):
        find(speedup=1.1)
    strong = find(speedup=1.05, guidance=1.5, file=None)
    assert strong.guidance_until is None
    given = Schedule(SCALES, (0.5,), guidance_until=4)
    kept = fastvar_fx.calibrate(
        net,
        draw,
        given,
        speedup=1.5,
        levels=(0.75,),
        logits="head",
        guidance=weak,
        conditional="first",
    )
    assert kept.guidance_until == 4


@pytest.mark.slow
def test_a_plan_saves_what_is_asked_and_goes_on_where_it_was(net: VAR, tmp_path: Path) -> None:
    ran = []
    file = tmp_path / "measured.json"

    def run(model: Any) -> Tensor:
        ran.append(model)
        return draw(model)

    def stop(text: str) -> None:
        if ": 3 of" in text:
            raise StopError

    find = partial(
        fastvar_fx.calibrate,
        net,
        run=run,
        schedule=SCHEDULE,
        levels=(0.75,),
        logits="head",
        file=file,
    )
    with pytest.raises(StopError):
        find(speedup=1.3, progress=stop)
    ran.clear()
    texts: list[str] = []
    plan = find(speedup=1.3, progress=texts.append)
    probes = [text for text in texts if text.startswith("layer")]
    assert len(probes) == 2 * 2 * 2 - 2  # layers, kinds, spans; two were there
    assert probes[0].startswith("layer 1 attention 0.75 from step 2")
    fast = fastvar_fx.transform(net, plan)
    draw(fast)
    assert block_flops(net) / block_flops(fast) >= 1.3
    ran.clear()
    texts.clear()
    slower = find(loss=0.1, progress=texts.append)
    assert not [text for text in texts if text.startswith("layer")]  # they are known
    assert slower != plan
    with pytest.raises(ScheduleError, match=r"cannot be met.* it is \d"):
        find(speedup=50)
    with pytest.raises(ScheduleError, match="the least that a plan loses"):
        find(loss=1e-9)
    with pytest.raises(ArgumentError, match="other levels, logits; give"):
        find(speedup=1.3, levels=(0.5,), logits=None)
    with pytest.raises(ArgumentError, match=r"other pruned generations \(method or .*; give"):
        find(speedup=1.3, method="drift-corrected")
    for others in ([draw, draw], partial(draw, seed=1), lambda model: model.infer_fhat(2, 3)):
        with pytest.raises(ArgumentError, match=r"other dense generations \(batch, .*; give"):
            find(speedup=1.3, run=others)
    draw_plan(plan, "a plan", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_a_refusal_rounds_to_what_can_be_met() -> None:
    most, less = (
        calibration.Plan({}, saved=saved, loss=loss) for saved, loss in ((399.9, 9), (333, 1.234))
    )
    budget = calibration.Budget(flops=[1000], without=0, tokens=100, saving=900, loss=None)
    assert "speed-up of 10 cannot be met: " in budget.refusal([less, most])
    assert "it is 1.66. Let more" in budget.refusal([less, most]), "1000 / 600.1"
    assert "a speed-up of inf cannot be met" in replace(budget, saving=1000).refusal([most])
    budget = replace(budget, saving=None, loss=1e-2)
    assert "at a loss of 0.0001 per token" in budget.refusal([most, less])
    assert "that a plan loses is 0.0124. Give" in budget.refusal([most, less]), "0.01234"


def test_a_journal_is_read_back(tmp_path: Path) -> None:
    file, about = tmp_path / "measured.json", {"levels": (0.5,), "logits": None}
    found = Found({3: 0.5, 4: 0.25}, {3: 8.0, 4: 16.0})
    Journal(file, about).put("layer 0", found)
    Journal(file, about).put("layer 1", found)
    assert Journal(file, about).found == {"layer 0": found, "layer 1": found}
    assert [each.name for each in tmp_path.iterdir()] == ["measured.json"]
    with pytest.raises(ArgumentError, match="holds a calibration with other logits; give another"):
        Journal(file, about | {"logits": "head"})
    journal = Journal(file, about)
    with pytest.raises(ArgumentError, match="holds a calibration with other runs; give another"):
        journal.belongs_to({"runs": "1"})


def test_fingerprints_differ_with_whatever_changes_what_comes_out(net: VAR) -> None:
    runs = [
        *(draw, draw, lambda model: draw(model, seed=1)),
        lambda model: model.infer_fhat(1, 4, g_seed=0),
        lambda model: model.infer_fhat(2, 3, g_seed=0),
    ]
    subject = subject_of(net, runs)
    first, *others = subject.dense_fingerprints()
    assert [each == first for each in others] == [True, False, False, False]
    changed = deepcopy(net)
    assert subject_of(changed, [draw]).dense_fingerprints() == [first]
    with torch.no_grad():
        changed.head.weight[5:7] *= 1.01
    assert subject_of(changed, [draw]).dense_fingerprints() != [first]
    methods = [by("bilinear"), by("bilinear"), by("nearest")]
    methods.append(replace(methods[0], take=lambda x, index: 2 * take_tokens(x, index)))
    prints = [Branches.of(subject_of(net, [draw], method=m)).fingerprint for m in methods]
    assert [each == prints[0] for each in prints] == [True, True, False, False]


def subject_of(model: VAR, runs: Any, **options: Any) -> Subject:
    return Subject(
        model=model,
        runs=runs,
        schedule=Schedule(SCALES, (0.5,)),
        levels=(0.5,),
        logits="head",
        guidance=None,
        options=options,
        progress=no_progress,
    )


def by(mode: Any) -> Method:
    return Method(restore=interpolated(mode))


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_names_one_that_can(tmp_path: Path) -> None:
    """Also where only the level 1 is allowed, and after an interruption."""
    small = build("tiny", scales=(1, 2, 3), depth=1, width=32, heads=1, vocab_size=64)
    schedule = Schedule((1, 2, 3), (0.5,))
    given: Any = {"levels": (1.0,), "logits": "head", "file": tmp_path / "measured.json"}
    find: Any = partial(fastvar_fx.calibrate, small, draw, schedule, **given)

    def stop(text: str) -> None:
        if ": 2 of" in text:
            raise StopError

    with pytest.raises(StopError):
        find(speedup=50, progress=stop)
    texts: list[str] = []
    with pytest.raises(ScheduleError) as refused:
        find(speedup=50, progress=texts.append)
    assert len([text for text in texts if text.startswith("layer")]) == 1, "the other one was there"
    assert "a speed-up of 50 cannot be met" in str(refused.value)
    (met,) = re.findall(r"\d+\.\d+", str(refused.value))
    plan = find(speedup=float(met))
    assert plan.ratios == ((1.0,),)
    with pytest.raises(ScheduleError, match=f"a speed-up of .* cannot be met: .*, it is {met}"):
        find(speedup=float(met) + 0.01)
    with pytest.raises(ScheduleError, match=r"the least that a plan loses is .*higher") as refused:
        find(loss=1e-9)
    *_, least = re.findall(r"\d+\.\d+", str(refused.value))
    assert find(loss=float(least)).ratios_at(2) == (0.0, 1.0)


def test_what_cannot_be_calibrated(net: VAR, tmp_path: Path) -> None:
    find: Any = partial(fastvar_fx.calibrate, net, draw)
    for arguments in ({}, {"speedup": 2, "loss": 1}, {"speedup": 1}, {"loss": 0}):
        with pytest.raises(ArgumentError, match=r"speed-?up"):
            find(SCHEDULE, **arguments)
    for asked in ("2", math.nan, math.inf):
        with pytest.raises(ArgumentError, match=f"speedup is above 1.*found {asked!r}"):
            find(SCHEDULE, speedup=asked)
    for runs in ([], "draw", [draw, 3]):
        with pytest.raises(ArgumentError, match="run is a function that runs one generation"):
            fastvar_fx.calibrate(net, runs, SCHEDULE, speedup=2)  # type: ignore[arg-type]
    for levels in ((), (0.0, 0.5), (1.5,), 0.5, None, ("a",), "1", (math.nan,)):
        with pytest.raises(ArgumentError, match="levels is a list of pruning ratios in"):
            find(SCHEDULE, speedup=2, levels=levels)
    for ratios in ((), (0.0,), (1.0,)):
        with pytest.raises(ScheduleError, match="prunes no step that is drawn"):
            find(Schedule(SCALES, ratios), speedup=2)
    guided = partial(find, SCHEDULE, speedup=2, logits="head", conditional="first")
    for strengths in ("1.5", math.nan, [0.5] * 4, [0.5] * 4 + ["1"]):
        with pytest.raises(ArgumentError, match="guidance is the strength of each of the 5 steps"):
            guided(guidance=strengths)
    with pytest.raises(ArgumentError, match="give logits, the module path"):
        guided(guidance=1.5, logits=None)
    with pytest.raises(ArgumentError, match='needs conditional="first" or "last"'):
        guided(guidance=1.5, conditional=None)
    for found, batch in ((3, 3), (2, 4)):
        with pytest.raises(RunError, match=f"two halves, .* found logits of a batch of {found}"):
            Guidance((1.5,), "first").guided(torch.zeros(found, 4, 8), 0, batch)
    with pytest.raises(ScheduleError, match="takes a fastvar_fx"):
        find("var-256", speedup=2)
    with pytest.raises(ScheduleError, match="ratios for 3 layers, but the model has 2"):
        find(Schedule(SCALES, [(0.5, 0.5, 0.5)]), speedup=2)
    with pytest.raises(NothingPrunedError, match="token_merging needs at least one kept token"):
        find(Schedule(SCALES, (0.5,)), speedup=1.1, levels=(1.0,), method="tome")
    with pytest.raises(NothingPrunedError, match="never came to one"):
        find(Schedule((1, 2, 3, 4, 6, 8), (0.5,)), speedup=2)
    with pytest.raises(ArgumentError, match="has none at 'heads'"):
        Reference(fastvar_fx.transform(net, SCHEDULE), "heads")
    with pytest.raises(ArgumentError, match="is a folder; give a file"):
        Journal(tmp_path, {})
    with pytest.raises(ArgumentError, match="none, which is no folder; give a file"):
        Journal(tmp_path / "none" / "measured.json", {})
    other = tmp_path / "other.json"
    for text in (
        *("", "[]", '{"about": [1], "found": {}}', '{"about": {}, "found": [1]}'),
        *('{"about": {}, "found": {"a": [1]}}', '{"about": {}, "found": {"a": [{"x": 1}, {}]}}'),
    ):
        other.write_text(text)
        with pytest.raises(ArgumentError, match="holds no calibration; give another file"):
            Journal(other, {})
    with pytest.raises(ArgumentError, match="holds no calibration"):
        find(SCHEDULE, speedup=2, file=other)
    about = {"schedule": SCHEDULE.to_json(), "levels": [0.5], "logits": "head", "guidance": None}
    other.write_text(json.dumps({"about": about, "found": {}}))
    with pytest.raises(ArgumentError, match=r"with other dense generations \(batch"):
        find(SCHEDULE, speedup=2, file=other, levels=(0.5,), logits="head")


def block_flops(model: Any) -> int:
    """Counts what the blocks of a model run in a generation."""
    runs = Runs(partial(draw, model), model, ("blocks.0", "blocks.1"), SCHEDULE)
    runs.count()
    return sum(runs.flops)
