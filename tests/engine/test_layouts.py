"""Branches that are added to the stream in another layout than (B, L, C) stay dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import fastvar_fx
from fastvar_fx import NothingPrunedError
from tests.engine.test_stored import SCHEDULE, Block, C, Model, call, check

Layout = Callable[[Tensor], Tensor]


def side(x: Tensor) -> int:
    return math.isqrt(x.shape[1])


LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "B C L": (lambda x: x.mT, lambda h: h.mT),
    "B C h w": (lambda x: x.mT.reshape(2, C, side(x), -1), lambda h: h.flatten(2).mT),
    "B h w C": (lambda x: x.reshape(2, side(x), -1, C), lambda h: h.flatten(1, 2)),
    "B L H D": (lambda x: x.view(2, -1, 4, 4), lambda h: h.flatten(2)),
    "L B C": (lambda x: x.transpose(0, 1), lambda h: h.transpose(0, 1)),
}
"""From (B, L, C), and back."""


@pytest.mark.parametrize("name", ["B C L", "B h w C", "B L H D"])
def test_a_branch_that_is_added_in_another_layout(name: str) -> None:
    there, back = LAYOUTS[name]

    class Turned(Block):
        def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            x = x + self.attend(x, shared)
            return back(there(x) + there(self.feed(x, shared)))

    check(Turned, 1, {(0, "feed"): ""}, "FVX011")


@pytest.mark.parametrize("name", ["B C h w", "B L H D", "L B C"])
def test_a_stream_in_another_layout(name: str) -> None:
    there, back = LAYOUTS[name]

    class Turned(Block):
        def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
            h = there(x)
            h = h + there(self.attend(back(h), shared))
            return back(h + there(self.feed(back(h), shared)))

    fast = fastvar_fx.transform(Model(Turned, 1).eval(), SCHEDULE)
    with pytest.raises(NothingPrunedError, match=r"(?s)FVX003.*it reads the trunk as \("):
        fast.generate(0, call)
