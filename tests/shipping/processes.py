"""Processes that export a model, and run it without a compiler; run by test_compiled.py."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

import torch

import fastvar_fx
from fastvar_fx import Schedule
from tests.compose import toy

toy.SIDES = (1, 2, 3)  # type: ignore[assignment]
toy.SCHEDULE = Schedule(toy.SIDES, (0.5,))

COMPILERS = ("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy")


class NoCompilers(MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name in COMPILERS:
            raise ImportError(f"{name} is imported")


def export(folder: str) -> None:
    fast = toy.transformed(toy.Toy())
    fastvar_fx.export(fast, folder, lambda model: model(toy.LABELS))


def load(folder: str) -> None:
    sys.meta_path.insert(0, NoCompilers())
    model = toy.Toy(seed=1)  # other weights than those of the export
    fast = fastvar_fx.load(model, folder)
    for _ in range(2):
        fast(toy.LABELS)
    assert not sys.modules.keys() & set(COMPILERS)
    del sys.meta_path[0]  # what compares tensors imports them
    toy.assert_prunes(fast, toy.by_hand(model))
    packages = fastvar_fx.explain(fast).packages
    assert packages is not None
    assert (packages.used, packages.failures) == (3, ())
    print("right")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    {"export": export, "load": load}[sys.argv[1]](sys.argv[2])
