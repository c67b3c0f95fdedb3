"""Schedules: what they say about a step, what they refuse, and their form as JSON."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvar_fx
from fastvar_fx import FastVARError, Schedule, ScheduleError, presets
from fastvar_fx.schedule import ByKind

FAST = settings(deadline=None, max_examples=60, derandomize=True)
RATIOS = st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.5, 0.29, 1 / 3]))
KINDS = ("attention", "cross_attention", "ffn")
BY_KIND = st.dictionaries(st.sampled_from(KINDS), RATIOS, min_size=1)


@st.composite
def schedules(draw: st.DrawFn, by_branch: bool = True) -> Schedule:
    sides = st.integers(1, 12)
    form = draw(st.sampled_from(["int", "hw", "mhw"]))
    maps = draw(st.integers(1, 3))
    pairs = sorted(draw(st.lists(st.tuples(sides, sides), min_size=2, max_size=6)), key=_area)
    forms: dict[str, list[Any]] = {
        "int": [h for h, _ in sorted(pairs)],
        "hw": list(pairs),
        "mhw": [(maps, h, w) for h, w in pairs],
    }
    scales = forms[form]
    ratio = RATIOS
    layer = st.integers(0, 40)
    if by_branch and draw(st.booleans()):
        depth = draw(st.integers(1, 4))
        each = st.one_of(RATIOS, BY_KIND)
        ratio = st.one_of(each, st.lists(each, min_size=depth, max_size=depth))
        layer = st.integers(0, depth - 1)
    ratios = draw(st.lists(ratio, max_size=len(scales) - 1))
    last = len(scales) - len(ratios) - 1
    cache_step = draw(st.one_of(st.none(), st.integers(0, last)))
    layers = draw(st.one_of(st.none(), st.lists(layer, min_size=1)))
    until = draw(st.one_of(st.none(), st.integers(1, len(scales) - 1)))
    return Schedule(scales, ratios, cache_step=cache_step, layers=layers, guidance_until=until)


def _area(pair: tuple[int, int]) -> int:
    return pair[0] * pair[1]


# -- what it says -------------------------------------------------------------------------------


def test_defaults() -> None:
    schedule = Schedule([1, 2, 4, 6], [0.5, 0.75])
    assert schedule.scales == ((1, 1), (2, 2), (4, 4), (6, 6))
    assert schedule.ratios == (0.5, 0.75)
    assert schedule.cache_step == 1
    assert schedule.layers is None
    assert schedule.steps == 4
    assert [schedule.ratio(step) for step in range(4)] == [0.0, 0.0, 0.5, 0.75]
    assert [schedule.tokens(step) for step in range(4)] == [1, 4, 16, 36]
    assert [schedule.kept(step) for step in range(4)] == [1, 4, 8, 9]
    assert schedule.pruned_steps == (2, 3)
    assert all(schedule.prunes_layer(layer) for layer in range(100))


def test_scales_of_one_map_and_of_joint_maps() -> None:
    assert Schedule([(1, 2), [2, 4]], [0.5]).scales == ((1, 2), (2, 4))
    joint = Schedule([(3, 1, 2), (3, 2, 4)], [0.25])
    assert joint.tokens(1) == 24
    assert joint.kept(1) == 18


def test_equal_consecutive_scales_are_fine() -> None:
    assert Schedule([(1, 4), (2, 2), 2, 2], [0.5]).cache_step == 2


def test_no_ratios_prune_nothing() -> None:
    schedule = Schedule([1, 2], [])
    assert schedule.pruned_steps == ()
    assert schedule.cache_step == 1
    assert schedule.ratio(1) == 0.0


def test_a_ratio_that_drops_no_token_is_no_pruned_step() -> None:
    schedule = Schedule([1, 2, 3, 4], [0.0, 0.1, 0.5])
    assert schedule.pruned_steps == (3,)


def test_ratio_one_keeps_none() -> None:
    assert Schedule([1, 4], [1]).kept(1) == 0


def test_layers_are_sorted_and_unique() -> None:
    schedule = Schedule([1, 2], [0.5], layers=[3, 1, 1])
    assert schedule.layers == (1, 3)
    assert [schedule.prunes_layer(layer) for layer in range(5)] == [False, True, False, True, False]


def test_guidance_ends_at_a_step() -> None:
    schedule = Schedule([1, 2, 3, 4], [0.5], guidance_until=2)
    assert [schedule.guided(step) for step in range(4)] == [True, True, False, False]
    assert all(map(Schedule([1, 2], []).guided, range(2)))


def test_guidance_ends_where_it_did_in_what_is_made_of_a_schedule() -> None:
    schedule = Schedule([1, 2, 3, 4], [0.5, 0.75], prefix=True, guidance_until=2)
    for made in (schedule.extend((6, 6)), schedule.without(3)):
        assert made.guidance_until == 2
        assert made.prefix


@pytest.mark.parametrize("until", [0, 4, -1, True, 1.0, "2"])
def test_guidance_ends_at_a_step_after_the_first(until: Any) -> None:
    with pytest.raises(ScheduleError, match=r"guidance_until is the first step.*in \[1, 3\]"):
        Schedule([1, 2, 3, 4], [0.5], guidance_until=until)


def test_cache_step_may_lie_earlier() -> None:
    assert Schedule([1, 2, 3, 4], [0.5], cache_step=1).cache_step == 1


@pytest.mark.parametrize(
    ("ratios", "full"),
    [([], ()), ([0.5], ()), ([1], (3,)), ([0.5, 1, 1], (2, 3)), ([1, 0.5], ()), ([1, 0, 1], (3,))],
)
def test_full_steps_are_the_last_ones_of_ratio_one(ratios: list[float], full: Any) -> None:
    assert Schedule([1, 2, 3, 4], ratios).full_steps == full


@FAST
@given(schedules(by_branch=False))
def test_kept_counts(schedule: Schedule) -> None:
    first = schedule.steps - len(schedule.ratios)
    for step in range(schedule.steps):
        tokens, ratio = schedule.tokens(step), schedule.ratio(step)
        assert ratio == (schedule.ratios[step - first] if step >= first else 0)
        assert schedule.kept(step) == tokens - int(tokens * ratio)
        assert (step in schedule.pruned_steps) == (schedule.kept(step) < tokens)
    assert schedule.cache_step < first


def test_frozen_hashable_and_copied_by_value() -> None:
    schedule = Schedule([1, 2, 4], [0.5], layers=[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.cache_step = 0  # type: ignore[misc]
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
    changed = dataclasses.replace(schedule, ratios=(0.25,))
    assert changed.ratios == (0.25,)
    assert changed.layers == (0,)
    assert changed != schedule


# -- ratios by layer and kind ----------------------------------------------------------------------


def test_ratios_by_layer_and_kind() -> None:
    by_kind = {"attention": 0.5, "ffn": 0.75}
    schedule = Schedule([1, 2, 4, 6, 8], [by_kind, [0, by_kind, 1.0], 0.25], layers=[1, 2])
    assert schedule.ratios == (
        ByKind(attention=0.5, ffn=0.75),
        (0.0, ByKind(attention=0.5, ffn=0.75), 1.0),
        0.25,
    )
    assert schedule.depth == 3
    assert [schedule.ratio(2, layer, "ffn") for layer in range(3)] == [0, 0.75, 0.75]
    assert [schedule.ratio(3, layer, "attention") for layer in range(3)] == [0, 0.5, 1]
    assert schedule.ratio(3, 2) == 1
    assert schedule.ratio(4) == 0.25
    assert schedule.ratios_at(3) == (0, 0.5, 0.75, 1)
    assert schedule.kept(3, 1, "ffn") == 9
    assert schedule.kept_counts(3) == (0, 9, 18, 36)
    assert schedule.pruned_steps == (2, 3, 4)
    with pytest.raises(ScheduleError, match="step 3 has no ratio of its own"):
        schedule.kept(3)
    with pytest.raises(ScheduleError, match="step 2 has no ratio of its own"):
        schedule.ratio(2, 1)


def test_equal_ratios_of_all_kinds_are_one() -> None:
    assert Schedule([1, 2], [dict.fromkeys(KINDS, 0.5)]).ratios == (0.5,)
    assert Schedule([1, 2], [(0.5, 0.5)]).ratio(1) == 0.5


def test_layers_that_do_not_prune_do_not_count() -> None:
    schedule = Schedule([1, 2, 4], [(1.0, 0.5), (0.5, 0.0)], layers=[1])
    assert schedule.pruned_steps == (1,)


def test_a_step_with_a_one_for_each_layer_is_no_skipped_step() -> None:
    assert Schedule([1, 2, 4], [(1.0, 1.0)]).full_steps == ()
    assert Schedule([1, 2, 4], [dict.fromkeys(KINDS, 1)]).full_steps == (2,)


def test_extensions_keep_what_differs_by_layer() -> None:
    schedule = Schedule([1, 2, 4], [0.5, [{"ffn": 0.5}, 0.0]])
    assert schedule.extend(6).ratios == (0.5, *[(ByKind(ffn=0.5), 0.0)] * 2)
    assert schedule.extend(6, ratio=0.25).ratios[-1] == 0.25
    assert schedule.without(2).ratios == (0.5, 0.0)
    assert schedule.without(1).ratios == (0.0, (ByKind(ffn=0.5), 0.0))


@pytest.mark.parametrize(
    ("ratios", "match"),
    [
        ([[0.5, 0.5], [0.5]], "1 and 2 layers"),
        ([[]], "found none"),
        ([{"fnn": 0.5}], "keys attention, cross_attention, ffn"),
        ([{}], "keys attention, cross_attention, ffn"),
        ([{"ffn": 2}], "lies in"),
        ([[[0.5]]], "is a number"),
        (["0.5"], "is a number"),
    ],
)
def test_bad_ratios_by_layer_and_kind(ratios: Any, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        Schedule([1, 2, 4, 8], ratios)


def test_layers_beyond_the_ratios_are_refused() -> None:
    with pytest.raises(ScheduleError, match="ratios are those of 2 layers"):
        Schedule([1, 2], [(0.5, 0.5)], layers=[2])


@FAST
@given(schedules())
def test_counts_of_a_step_are_those_of_its_branches(schedule: Schedule) -> None:
    for step in range(schedule.steps):
        layers = range(schedule.depth or 1)
        pruning = [
            layer for layer in layers if schedule.depth is None or schedule.prunes_layer(layer)
        ]
        counts = {
            schedule.kept(step, layer if schedule.depth else None, kind)
            for layer in pruning
            for kind in KINDS
        }
        assert schedule.kept_counts(step) == tuple(sorted(counts))
        assert (step in schedule.pruned_steps) == (min(counts) < schedule.tokens(step))


# -- as JSON ------------------------------------------------------------------------------------


@FAST
@given(schedules())
def test_json_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_json_may_leave_out_the_options() -> None:
    read = Schedule.from_json('{"scales": [1, [2, 3]], "ratios": [0.5]}')
    assert read == Schedule([1, (2, 3)], [0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "read from a JSON object"),
        ("{", "read from a JSON object"),
        ("[1, 2]", "found list"),
        ("3", "found int"),
        ('{"scales": [1, 2]}', r"found \['scales'\]"),
        ('{"scales": [1, 2], "ratios": [0.5], "ratio": 1}', r"found \['ratio', 'ratios', 'scales"),
        ('{"scales": [1, 2], "ratios": 0.5}', "ratios is a list"),
        ('{"scales": 4, "ratios": [0.5]}', "scales is a list"),
        ('{"scales": [1, 2], "ratios": ["0.5"]}', r"number in \[0, 1\]; found '0.5'"),
        ('{"scales": [1, 2], "ratios": [NaN]}', r"lies in \[0, 1\].*found nan"),
        ('{"scales": [1, 2], "ratios": [0.5], "cache_step": "0"}', "cache_step='0'"),
        ('{"scales": [1, 2], "ratios": [0.5], "layers": 3}', "layers is a list"),
        ('{"scales": [1, 2], "ratios": [0.5], "layers": []}', "layers lists the indices"),
    ],
)
def test_json_that_is_no_schedule(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(text)


def test_json_is_an_object_of_plain_values() -> None:
    data = json.loads(Schedule([1, 2], [0.5], layers=[1]).to_json())
    scales, shared = [[1, 1], [2, 2]], {"ratios": [0.5], "cache_step": 0, "layers": [1]}
    assert data == {"scales": scales, **shared, "prefix": False, "guidance_until": None}


# -- longer schedules ---------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [None, 0.75, 1])
def test_extend_appends_steps(ratio: float | None) -> None:
    schedule = Schedule([1, 2, 3, 4], [0.25, 0.5], cache_step=0, layers=[2])
    longer = schedule.extend((5, 6), [6, 7], ratio=ratio)
    assert longer.scales == (*schedule.scales, (5, 6), (6, 7))
    added = 0.5 if ratio is None else ratio
    assert longer.ratios == (0.25, 0.5, added, added)
    assert (longer.cache_step, longer.layers) == (0, (2,))
    assert schedule == Schedule([1, 2, 3, 4], [0.25, 0.5], cache_step=0, layers=[2])
    assert Schedule.from_json(longer.to_json()) == longer


def test_extend_keeps_what_was_the_default_cache_step() -> None:
    assert Schedule([1, 2, 3], [0.5]).extend(4).cache_step == 1
    assert Schedule([1, 2, 3], []).extend(4) == Schedule([1, 2, 3, 4], [0.0])
    longer = Schedule([(2, 1, 1), (2, 2, 2)], [0.5]).extend((2, 3, 3))
    assert (longer.tokens(2), longer.cache_step) == (18, 0)


def test_without_leaves_steps_dense() -> None:
    schedule = Schedule([1, 2, 3, 4], [0.25, 0.5, 0.75], cache_step=0, layers=[2])
    left = schedule.without(2)
    assert (left.ratios, left.cache_step, left.layers) == ((0.25, 0.0, 0.75), 0, (2,))
    assert (left.pruned_steps, left.kept(2)) == ((1, 3), 9)
    assert schedule.without(1, 2, 3).pruned_steps == ()
    assert schedule.without() == schedule
    assert Schedule([1, 2, 3], [0.5, 1]).without(2).full_steps == ()


@pytest.mark.parametrize("steps", [(0,), (2, 4), (-1,)])
def test_without_takes_pruned_steps(steps: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match=r"leaves pruned steps dense, \[2, 3\] here; found"):
        Schedule([1, 2, 3, 4], [0.5, 0.75]).without(*steps)


def test_infinity_extends_to_2048() -> None:
    longer = Schedule.preset("infinity-1024").extend((84, 84), (128, 128))
    assert [longer.tokens(step) for step in longer.full_steps] == [2304, 4096, 7056, 16384]


@pytest.mark.parametrize(
    ("ratios", "scales", "ratio", "message"),
    [
        ([0.5], [], None, "scales to append.*found none"),
        ([0.5], [(4, 4)], None, r"grows: .* found \(4, 4\) after \(4, 4\)"),
        ([0.5], [(2, 8)], None, r"grows: .* found \(2, 8\) after \(4, 4\)"),
        ([0.5], [84, 84], None, r"grows: .* found \(84, 84\) after \(84, 84\)"),
        ([0.5], [(3, 5)], None, r"found \(3, 5\) after \(4, 4\)"),
        ([0.5], [(1, 8, 8)], None, r"mix \(h, w\) and \(m, h, w\)"),
        ([0.5], ["8"], None, "an int n"),
        ([0.5], [8], 1.5, r"lies in \[0, 1\].*found 1.5"),
        ([0.5], [8], "1", r"number in \[0, 1\]; found '1'"),
        ([0.5, 1], [8], 0.5, r"steps \[3\] have ratio 1 and are skipped.*in the middle"),
        ([1, 1], [8], 0, r"steps \[2, 3\] have ratio 1 and are skipped.*in the middle"),
    ],
)
def test_extensions_that_are_refused(
    ratios: list[float], scales: list[Any], ratio: Any, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule([1, 2, 3, 4], ratios).extend(*scales, ratio=ratio)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "ratios", "options", "message"),
    [
        ([], [], {}, "at least one scale; found none"),
        ([1, 2], [float("nan")], {}, r"lies in \[0, 1\].*found nan"),
        ([1, 2], [1.01], {}, "fraction of tokens dropped; found 1.01"),
        ([1, 2], [-0.1], {}, "found -0.1"),
        ([1, 2], [float("inf")], {}, "found inf"),
        ([1, 2], [True], {}, r"a number in \[0, 1\]; found True"),
        ([1, 2], ["0.5"], {}, "found '0.5'"),
        ([1, 2], [None], {}, "found None"),
        ([1, 2], [0.5, 0.5], {}, "2 ratios for 2 scales leave none to capture; give at most 1"),
        ([1], [0.5], {}, "give at most 0"),
        ([1, 2, 3], [0.5], {"cache_step": 2}, r"cache_step=2 must lie before.*in \[0, 1\]"),
        ([1, 2, 3], [0.5], {"cache_step": 7}, "cache_step=7"),
        ([1, 2, 3], [0.5], {"cache_step": -1}, "cache_step=-1"),
        ([1, 3, 2], [0.5], {}, r"coarse to fine.*found \(2, 2\) after \(3, 3\)"),
        ([(1, 4), (1, 3)], [0.5], {}, "coarse to fine"),
        ([1, (2, 2, 2)], [0.5], {}, r"mix \(h, w\) and \(m, h, w\)"),
        ([1, 0], [0.5], {}, "positive integers; found 0"),
        ([1, -2], [0.5], {}, "positive integers; found -2"),
        ([1, (2, 0)], [0.5], {}, "positive integers"),
        ([True, 2], [0.5], {}, "positive integers; found True"),
        ([1, 2.0], [0.5], {}, r"an int n, \(h, w\) or \(m, h, w\); found 2.0"),
        ([1, (2.0, 2)], [0.5], {}, "positive integers"),
        ([1, (2,)], [0.5], {}, "an int n"),
        ([1, (1, 2, 3, 4)], [0.5], {}, "an int n"),
        ([1, "22"], [0.5], {}, "positive integers; found '22'"),
        ([1, None], [0.5], {}, "found None"),
        ([1, 2], [0.5], {"layers": []}, r"layers lists the indices.*found \(\)"),
        ([1, 2], [0.5], {"layers": [-1, 2]}, r"counted from 0.*found \(-1, 2\)"),
    ],
)
def test_bad_values(
    scales: list[Any], ratios: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule(scales, ratios, **options)
    assert isinstance(caught.value, FastVARError)
    assert isinstance(caught.value, ValueError)


# -- presets ------------------------------------------------------------------------------------


def test_presets_are_the_published_settings() -> None:
    found = presets()
    assert set(found) == {"var-256", "var-512", "hart-1024", "infinity-1024"}
    sides = {name: [h for h, w in _square(schedule)] for name, schedule in found.items()}
    assert sides == {
        "var-256": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
        "var-512": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
        "hart-1024": [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
        "infinity-1024": [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64],
    }


def _square(schedule: Schedule) -> list[tuple[int, int]]:
    pairs = [(scale[0], scale[1]) for scale in schedule.scales if len(scale) == 2]
    assert all(h == w for h, w in pairs)
    assert len(pairs) == schedule.steps
    return pairs


def test_hart_preset() -> None:
    hart = Schedule.preset("hart-1024")
    assert hart.ratios == (0.5, 0.75)
    assert hart.scales[hart.cache_step] == (36, 36)
    assert hart.layers is None
    assert (hart.kept(12), hart.kept(13)) == (1152, 1024)


def test_infinity_preset() -> None:
    infinity = Schedule.preset("infinity-1024")
    assert infinity.ratios == (0.4, 0.5, 1.0, 1.0)
    assert infinity.scales[infinity.cache_step] == (24, 24)
    assert infinity.layers == tuple(range(3, 28))
    assert [infinity.kept(step) for step in range(9, 13)] == [615, 800, 0, 0]
    assert infinity.full_steps == (11, 12)


@pytest.mark.parametrize("name", ["var-256", "var-512"])
def test_var_presets_prune_all_layers_of_the_last_two_steps(name: str) -> None:
    schedule = fastvar_fx.presets()[name]
    assert schedule.pruned_steps == (8, 9)
    assert schedule.cache_step == 7
    assert schedule.layers is None


def test_unknown_preset_offers_close_names() -> None:
    with pytest.raises(ScheduleError, match="no preset is named 'infinity1024'; did you mean inf"):
        Schedule.preset("infinity1024")
    with pytest.raises(ScheduleError, match="var-256 or var-512 or hart-1024 or infinity-1024"):
        Schedule.preset("nothing like it")


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        presets()["mine"] = Schedule([1, 2], [0.5])  # type: ignore[index]
