"""The operators alone: what is timed, and how bytes and shares are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvar_fx.measuring.operators import (
    COMPILED,
    CORRECTED,
    CTR,
    EAGER,
    INFINITY_2B,
    OPERATORS,
    PTS,
    SIDE,
    TAKE,
    AtShape,
    Shape,
    measure_operators,
)
from fastvar_fx.measuring.runs import Budget

SHAPE = Shape(rows=2, tokens=16, width=32)
FOUND = AtShape(
    shape=SHAPE,
    copy_gb_per_s=1.0,
    branches={"attention": 6e-6, "ffn": 2e-6},
    seconds={EAGER: {PTS: 1e-6, TAKE: 2e-6, CTR: 4e-6, CORRECTED: 5e-6, SIDE: 8e-6}},
)


def test_the_shapes_are_those_of_infinity_2b_at_1024() -> None:
    assert {(shape.rows, shape.tokens) for shape in INFINITY_2B} == {
        (rows, tokens) for rows in (2, 8) for tokens in (1600, 4096)
    }
    assert {(s.width, s.head_width, s.side**2 - s.tokens) for s in INFINITY_2B} == {(2048, 128, 0)}


def test_rates_count_each_byte_once() -> None:
    token, index = 32 * 4, 8 * 8  # bytes; 8 of 16 tokens are kept
    table = 8 * 4  # half of a head of 16 features
    by_hand = {
        PTS: 16 * token + index,
        TAKE: 2 * 8 * token + index,
        CTR: (8 + 4 + 16) * token + index,
        CORRECTED: (8 + 4 + 16) * token + index,
        SIDE: 2 * 8 * table + index,
    }
    rates = FOUND.gb_per_s(EAGER)
    for name, seconds in FOUND.seconds[EAGER].items():
        assert rates[name] == pytest.approx(1e-9 * 2 * by_hand[name] / seconds)
    assert FOUND.gb_per_s(COMPILED) == {}


def test_the_share_is_of_the_mean_branch() -> None:
    assert FOUND.share(EAGER) == pytest.approx((1 + 2 + 4) / ((6 + 2) / 2))
    assert FOUND.share(COMPILED) is None
    assert replace(FOUND, seconds={EAGER: {PTS: 1e-6}}).share(EAGER) is None


def test_the_correction_is_what_it_takes_beyond_ctr() -> None:
    assert FOUND.correction(EAGER) == pytest.approx((5 - 4) / ((6 + 2) / 2))
    assert FOUND.correction(COMPILED) is None


def test_all_is_measured_and_what_is_compiled_only_if_there_is_time() -> None:
    torch._dynamo.reset()
    (found,) = measure_operators([SHAPE], "cpu", backend="eager")
    assert found.shape == SHAPE
    assert found.copy_gb_per_s > 0
    assert set(found.branches) == {"attention", "ffn"}
    assert [tuple(found.seconds[form]) for form in (EAGER, COMPILED)] == [OPERATORS, OPERATORS]
    for seconds in (found.branches, *found.seconds.values()):
        assert min(seconds.values()) > 0
    (eager,) = measure_operators([SHAPE], "cpu", budget=Budget(0), backend="eager")
    assert tuple(eager.seconds[EAGER]) == OPERATORS
    assert eager.as_dict()["share"][COMPILED] is None
    torch._dynamo.reset()
