"""Marks for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *, quick: int) -> list[Any]:
    """Returns the parameters of a test of which all but the first few are `slow`.

    Args:
        cases: One value each, or a tuple of values.
        quick: How many also run in the quick run.
    """
    as_tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*case, marks=() if index < quick else pytest.mark.slow)
        for index, case in enumerate(as_tuples)
    ]
