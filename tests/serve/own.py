"""A user's module for the server: a tiny model, and a draw function that seeds give orders to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastvar_fx import transform
from fastvar_fx.models.var import VAR
from fastvar_fx.sampling.drawing import draw_var
from tests.sampling.own import SCHEDULE, var

__all__ = ["SCHEDULE", "draw", "transformed", "var"]

FAIL, BREAK, WAIT = range(2**31, 2**31 + 3)
_broken: set[VAR] = set()


def transformed() -> VAR:
    return transform(var(), SCHEDULE)


def draw(model: VAR, seeds: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Draws; the file `batches` lists the seeds of each batch, `process` is the last that drew.

    The seed FAIL fails, and BREAK also does from then on with every other. WAIT waits for the file
    `go`.
    """
    folder = Path(os.environ["FOLDER"])
    with (folder / "batches").open("a") as log:
        log.write(json.dumps([*seeds]) + "\n")
    (folder / "process").write_text(str(os.getpid()))
    if BREAK in seeds:
        _broken.add(model)
    if FAIL in seeds or model in _broken:
        raise ValueError("no such picture")
    while WAIT in seeds and not (folder / "go").exists():
        time.sleep(0.01)
    return draw_var(model, seeds, classes)
