"""Timed runs: how they alternate, what a spread says, and how models are compared."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fastvar_fx.measuring.clock import peak_bytes
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.measuring.runs import Budget, alternate


class Takes:
    """Pretends to take some seconds, and notes its turn."""

    def __init__(self, name: str, seconds: float, turns: list[str], done: int = 0) -> None:
        self.name, self.takes, self.turns = name, seconds, turns
        self.seconds = [seconds] * done

    def time(self) -> None:
        self.turns.append(self.name)
        self.seconds.append(self.takes)


class Left(Budget):
    """A budget that is spent by what is timed."""

    def __init__(self, seconds: float, timed: Sequence[Takes]) -> None:
        super().__init__(seconds)
        self.timed = timed

    @property
    def spent(self) -> float:
        return sum(sum(each.seconds) for each in self.timed)


def test_runs_alternate() -> None:
    turns: list[str] = []
    told: list[str] = []
    timed = {name: Takes(name, 1, turns) for name in "ab"}
    alternate(timed, 3, progress=told.append)
    assert "".join(turns) == "ababab"
    assert told[:3] == ["a, run 1 of 3", "b, run 1 of 3", "a, run 2 of 3"]


def test_earlier_runs_count() -> None:
    turns: list[str] = []
    timed = {"a": Takes("a", 1, turns, done=1), "b": Takes("b", 1, turns)}
    alternate(timed, 2)
    assert "".join(turns) == "bab"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "abc"), (7, "abc"), (8, "abcc"), (10, "abcac"), (12, "abcaca"), (21, "abcabcabc")],
)
def test_a_run_begins_only_if_there_is_time(seconds: float, expected: str) -> None:
    turns: list[str] = []
    a, b, c = Takes("a", 2, turns), Takes("b", 4, turns), Takes("c", 1, turns)
    alternate({"a": a, "b": b, "c": c}, 3, budget=Left(seconds, (a, b, c)))
    assert "".join(turns) == expected


def test_a_spread_needs_three_runs() -> None:
    for seconds in ([1.0], [1.0, 9.0]):
        spread = Spread.of(seconds)
        assert (spread.iqr, spread.relative, spread.unusable) == (None, None, False)
        assert spread.doubt == "spread unknown: fewer than 3 timed runs"
    steady = Spread.of([1.0, 1.0, 1.0])
    assert (steady.runs, steady.iqr, steady.unusable, steady.doubt) == (3, 0, False, None)


def test_what_spreads_by_more_than_a_fifth_is_unusable() -> None:
    # The quartiles of three runs lie half-way between them.
    assert not Spread.of([0.85, 1.0, 1.2]).unusable
    spread = Spread.of([0.8, 1.0, 1.3])
    assert spread.relative == pytest.approx(0.25)
    assert spread.unusable
    assert spread.doubt is not None
    assert spread.doubt.startswith("interquartile range 25% of the median, above 20%")
    steady = Spread.of([2.0, 2.0, 2.0])
    for pair in ((steady, spread), (spread, steady)):
        compared = Comparison(*pair)
        assert compared.unusable
        assert compared.as_dict()["unusable"] is True
        assert "interquartile range 25%" in compared.as_dict()["reason"]
    assert Comparison(steady, steady).as_dict()["reason"] is None


def test_a_skipped_step_takes_no_time() -> None:
    assert not Spread.of([0.0, 0.0, 0.0]).unusable


def test_peak_memory_on_a_cpu() -> None:
    before = torch.zeros(1000)

    def run() -> None:
        first = torch.ones(1000)  # 4000 bytes
        second = first + before  # 4000 more
        del first, second
        torch.ones(500)

    assert peak_bytes(run, torch.device("cpu")) == 8000
