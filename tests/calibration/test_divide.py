"""A budget of FLOPs is divided so that no other plan that saves as much loses less."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar_fx.calibration.divide import DENSE, Option, Place, as_ratios, divide
from fastvar_fx.schedule import ByKind

FAST = settings(deadline=None, max_examples=60, derandomize=True)
NUMBERS = st.integers(0, 20).map(float)
OPTIONS = st.lists(st.builds(Option, st.just(0.5), NUMBERS, NUMBERS), min_size=1, max_size=3)


@FAST
@given(st.lists(OPTIONS, min_size=1, max_size=4), st.floats(0, 80))
def test_no_other_plan_saves_as_much_and_loses_less(
    drawn: list[list[Option]], saving: float
) -> None:
    curves = {Place(8, i, "ffn"): [DENSE, *options] for i, options in enumerate(drawn)}
    chosen = divide(curves, saving=saving).values()
    saved, lost = sum(o.saved for o in chosen), sum(o.loss for o in chosen)
    most = sum(max(o.saved for o in options) for options in drawn)
    assert saved >= min(saving, most)
    for other in product(*([DENSE, *options] for options in drawn)):
        if sum(o.saved for o in other) >= saved:
            assert sum(o.loss for o in other) >= lost - 1e-9


@FAST
@given(st.lists(OPTIONS, min_size=1, max_size=4), st.floats(0, 40))
def test_what_may_be_lost_bounds_a_plan(drawn: list[list[Option]], loss: float) -> None:
    curves = {Place(8, i, "ffn"): [DENSE, *options] for i, options in enumerate(drawn)}
    assert sum(o.loss for o in divide(curves, loss=loss).values()) <= loss


def test_points_above_the_hull_are_passed_over() -> None:
    place = Place(8, 0, "ffn")
    options = [DENSE, Option(0.5, 4.0, 1.0), Option(0.75, 1.0, 2.0), Option(1.0, 9.0, 3.0)]
    assert divide({place: options}, saving=1.0) == {place: options[2]}
    assert divide({place: options}, saving=2.5) == {place: options[3]}
    assert divide({place: options}, loss=0.5) == {place: DENSE}


def test_differences_to_a_plan_are_traded() -> None:
    """A branch that loses much goes back by a level, and one that loses little pays for it."""
    curves = {
        Place(8, layer, "ffn"): [Option(0.75, 0, 0), Option(0.5, -gain, -1), Option(1.0, cost, 1)]
        for layer, (gain, cost) in enumerate([(9.0, 20.0), (1.0, 2.0)])
    }
    found = {place.layer: option.ratio for place, option in divide(curves, saving=0).items()}
    assert found == {0: 0.5, 1: 1.0}


def test_as_ratios() -> None:
    chosen = {
        Place(8, 0, "attention"): 0.5,
        Place(8, 0, "ffn"): 0.5,
        Place(8, 2, "attention"): 0.0,
        Place(8, 2, "ffn"): 1.0,
        Place(9, 2, "ffn"): 1.0,
    }
    ratios = as_ratios(chosen, [8, 9], 3)
    assert ratios == ((0.5, ByKind(), ByKind(ffn=1.0)), (ByKind(), ByKind(), 1.0))
