"""What `.ci/gpu` runs beside the tests.

on_gpu.py about                   names the card, its driver and torch
on_gpu.py bench ARGUMENT...       is `fastvar-fx bench`
on_gpu.py operators SECONDS       measures the operators; prints JSON, a line for each shape

With --rehearse before these, doubles take the place of what needs a GPU or minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from unittest import mock

import torch

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.cli import main as command_line
from fastvar_fx.measuring import operators, presets, rows
from fastvar_fx.measuring.presets import PRESETS
from fastvar_fx.measuring.runs import Budget
from tests.graph_double import OfCompiled, doubled

_SHAPES = [operators.Shape(rows=2, tokens=side**2, width=32) for side in (4, 8)]
_PRESET = PRESETS["infinity-tiny"].at(Schedule((1, 2, 3), (0.5, 1.0)))
_BACKEND = "aot_eager"


def about(rehearse: bool) -> None:
    card = "no GPU: a rehearsal on the CPU"
    if not rehearse:
        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU; .ci/gpu --rehearse runs on the CPU")
        found = torch.cuda.get_device_properties(0)
        card = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, driver {driver()}"
    print(f"{card}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version[:6]}")


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def measure_operators(rehearse: bool, seconds: float) -> None:
    budget = Budget(seconds)
    measured = (
        operators.measure_operators(_SHAPES, "cpu", budget=budget, backend=_BACKEND)
        if rehearse
        else operators.measure_operators(budget=budget)
    )
    for at in measured:
        print(json.dumps(at.as_dict()))


@contextmanager
def stand_ins() -> Iterator[None]:
    """A tiny preset, graphs by their double, and a compiler that is quick."""
    quick = partial(fastvar_fx.compile, backend=_BACKEND)
    with ExitStack() as stack:
        stack.enter_context(doubled(OfCompiled))
        stack.enter_context(mock.patch.object(presets, "PRESETS", {"rehearsal": _PRESET}))
        stack.enter_context(mock.patch.object(rows, "recorder", return_value=fastvar_fx.cuda_graph))
        stack.enter_context(mock.patch.object(rows, "compile_regions", quick))
        yield


def main(arguments: list[str]) -> int:
    rehearse = arguments[:1] == ["--rehearse"]
    verb, *rest = arguments[rehearse:]
    if verb == "bench":
        with stand_ins() if rehearse else nullcontext():
            return command_line([verb, *rest])
    if verb == "operators":
        measure_operators(rehearse, float(rest[0]))
    else:
        about(rehearse)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
