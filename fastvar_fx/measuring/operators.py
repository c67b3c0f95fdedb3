"""The operators alone, at the shapes of one step of Infinity: their share of a dense branch.

The residual stream and the captured outputs are in float32 and the branches in the model's dtype,
as in that model. On a GPU, calls are recorded as a CUDA graph, so that launching costs nothing, and
run on inputs that together exceed the cache, so that they are read from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from fastvar_fx.measuring.clock import Clock
from fastvar_fx.measuring.runs import Budget
from fastvar_fx.models.infinity import CONFIGS, Block
from fastvar_fx.models.maps import template
from fastvar_fx.models.rope import pair_table
from fastvar_fx.ops import (
    cached_token_restoration,
    drift_corrected_restoration,
    kept_tokens,
    pivotal_token_selection,
    take_tokens,
)
from passes.rewrite.side_input import take_side

PTS, TAKE, CTR, CORRECTED, SIDE = "PTS", "take", "CTR", "corrected", "side"
OPERATORS: Final = (PTS, TAKE, CTR, CORRECTED, SIDE)
"""What is measured: selection, gather of the stream, restoration as published and with the drift
corrected, gather of a RoPE table."""

EAGER, COMPILED = "eager", "compiled"
"""How it runs."""

_STREAM: Final = torch.float32
_RATIO: Final = 0.5
_REPEATS: Final = 5
_COLD_BYTES: Final = 2**28
"""The inputs of a measurement take about this much together, several times a GPU's cache."""
_MOST_SETS: Final = 12

INFINITY: Final = CONFIGS["2b"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A square token map of some samples.

    Attributes:
        rows: Samples R; guidance makes two of an image.
        tokens: Tokens L, the square of the map's side.
        width: Features C, a multiple of the width of a head.
    """

    rows: int
    tokens: int
    width: int

    @property
    def side(self) -> int:
        """Side of the map."""
        return isqrt(self.tokens)

    @property
    def kept(self) -> int:
        """Tokens that are kept, half of them."""
        return kept_tokens(self.tokens, _RATIO)

    @property
    def head_width(self) -> int:
        """Width of a head: that of Infinity-2B, or half the width if that is less."""
        return min(INFINITY.width // INFINITY.heads, self.width // 2)


INFINITY_2B: Final = tuple(
    Shape(rows=rows, tokens=tokens, width=INFINITY.width)
    for rows in (2, 8)
    for tokens in (1600, 4096)
)
"""The last but two and the last step at 1024 x 1024, for one image and for four."""


@dataclass(frozen=True, kw_only=True)
class AtShape:
    """What was measured at a shape.

    Attributes:
        shape: The shape.
        copy_gb_per_s: Rate of a plain copy of the stream, read and written, in 10^9 bytes per s.
        branches: Seconds of a dense branch, "attention" and "ffn".
        seconds: Seconds of each operator, by form; operators left out for lack of time are missing.
    """

    shape: Shape
    copy_gb_per_s: float
    branches: dict[str, float]
    seconds: dict[str, dict[str, float]]

    def gb_per_s(self, form: str) -> dict[str, float]:
        """Returns the bytes that each operator at least reads and writes, over its seconds."""
        return {
            name: 1e-9 * _bytes(name, self.shape) / seconds
            for name, seconds in self.seconds.get(form, {}).items()
        }

    def share(self, form: str) -> float | None:
        """Returns the time of PTS, take and CTR over that of a dense branch, the mean of both."""
        found = self.seconds.get(form, {})
        if not {PTS, TAKE, CTR} <= found.keys():
            return None
        return 2 * (found[PTS] + found[TAKE] + found[CTR]) / sum(self.branches.values())

    def correction(self, form: str) -> float | None:
        """Returns the time that correcting the drift adds to CTR, over that of a dense branch."""
        found = self.seconds.get(form, {})
        if not {CTR, CORRECTED} <= found.keys():
            return None
        return 2 * (found[CORRECTED] - found[CTR]) / sum(self.branches.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; times in microseconds."""
        return {
            "rows": self.shape.rows,
            "tokens": self.shape.tokens,
            "width": self.shape.width,
            "kept": self.shape.kept,
            "copy_gb_per_s": self.copy_gb_per_s,
            "branches_us": {name: 1e6 * seconds for name, seconds in self.branches.items()},
            "us": {f: {k: 1e6 * s for k, s in found.items()} for f, found in self.seconds.items()},
            "gb_per_s": {form: self.gb_per_s(form) for form in self.seconds},
            "share": {form: self.share(form) for form in self.seconds},
            "correction": {form: self.correction(form) for form in self.seconds},
        }


def measure_operators(
    shapes: Sequence[Shape] = INFINITY_2B,
    device: torch.device | str = "cuda",
    *,
    budget: Budget | None = None,
    backend: str = "inductor",
) -> list[AtShape]:
    """Returns the times of the operators at each shape, with those of a copy and a dense branch.

    Args:
        shapes: The shapes.
        device: Where to run; branches are in bfloat16 on a GPU, else in float32.
        budget: Time for all of it. Only compiled operators are left out to meet it.
        backend: What compiles.
    """
    budget, device = budget or Budget(), torch.device(device)
    with torch.no_grad():
        measured = [_measure(shape, device) for shape in shapes]
        return [_with_compiled(at, device, budget, backend) for at in measured]


def _measure(shape: Shape, device: torch.device) -> AtShape:
    inputs = _inputs(shape, device)
    copies = [partial(torch.empty_like(each.x).copy_, each.x) for each in inputs]
    moved = 2 * inputs[0].x.nbytes
    branches = {name: _seconds([run], device) for name, run in _dense_branches(shape, device)}
    return AtShape(
        shape=shape,
        copy_gb_per_s=1e-9 * moved / _seconds(copies, device),
        branches=branches,
        seconds={EAGER: {name: _time(name, inputs, device) for name in OPERATORS}},
    )


def _with_compiled(at: AtShape, device: torch.device, budget: Budget, backend: str) -> AtShape:
    inputs, found, longest = _inputs(at.shape, device), dict[str, float](), 0.0
    for name in OPERATORS:
        if budget.allows(longest):
            begun = budget.spent
            found[name] = _time(name, inputs, device, backend)
            longest = max(longest, budget.spent - begun)
    return replace(at, seconds={**at.seconds, COMPILED: found})


# --- operators --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the operators take at a shape.

    Attributes:
        x: The stream (R, L, C).
        index: The tokens to keep (R, kept).
        kept: A branch's output at these (R, kept, C).
        cached: The branch's output at the map of half the side (R, L / 4, C).
        table: A RoPE table (L, c / 2), for heads of width c.
    """

    x: Tensor
    index: Tensor
    kept: Tensor
    cached: Tensor
    table: Tensor


def _inputs(shape: Shape, device: torch.device) -> list[_Inputs]:
    """Returns different inputs of a shape, as many as exceed a cache."""
    nbytes = shape.rows * shape.tokens * shape.width * _STREAM.itemsize
    sets = min(_MOST_SETS, -(-_COLD_BYTES // nbytes))
    return [_some_inputs(shape, device) for _ in range(sets)]


def _some_inputs(shape: Shape, device: torch.device) -> _Inputs:
    draw = partial(torch.randn, device=device, dtype=_STREAM)
    x = draw(shape.rows, shape.tokens, shape.width)
    return _Inputs(
        x=x,
        index=pivotal_token_selection(x, shape.kept),
        kept=draw(shape.rows, shape.kept, shape.width),
        cached=draw(shape.rows, (shape.side // 2) ** 2, shape.width),
        table=draw(shape.tokens, shape.head_width // 2),
    )


def _call(name: str, i: _Inputs) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Returns an operator and its arguments."""
    rows, tokens, _ = i.x.shape
    side, cached_side = isqrt(tokens), isqrt(i.cached.shape[1])
    # The table meets queries (R, H, L, c / 2).
    layout = ((None,) * 4, ((2, tokens, 0),), 0, (rows, -1, -1, -1))
    captured = (i.kept, i.index, i.cached, (cached_side, cached_side), (side, side))
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
        PTS: (pivotal_token_selection, (i.x, i.index.shape[1])),
        TAKE: (take_tokens, (i.x, i.index)),
        CTR: (cached_token_restoration, captured),
        CORRECTED: (drift_corrected_restoration, captured),
        SIDE: (take_side, (i.table, i.index, *layout)),
    }
    return calls[name]


def _time(
    name: str, inputs: Sequence[_Inputs], device: torch.device, backend: str | None = None
) -> float:
    """Returns the seconds of an operator, eager or compiled by a backend."""
    calls = [_call(name, each) for each in inputs]
    run, _ = calls[0]
    if backend is not None:
        run = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
    return _seconds([partial(run, *arguments) for _, arguments in calls], device)


def _bytes(name: str, shape: Shape) -> int:
    """Returns the bytes that an operator at least reads and writes."""
    token, table = shape.width * _STREAM.itemsize, shape.head_width // 2 * _STREAM.itemsize
    index = shape.kept * torch.int64.itemsize
    restored = (shape.kept + (shape.side // 2) ** 2 + shape.tokens) * token
    moved = {
        PTS: shape.tokens * token,
        TAKE: 2 * shape.kept * token,
        CTR: restored,
        CORRECTED: restored,
        SIDE: 2 * shape.kept * table,
    }
    return shape.rows * (moved[name] + index)


# --- dense branches ---------------------------------------------------------------------------


def _dense_branches(
    shape: Shape, device: torch.device
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yields self-attention to this and all earlier maps, and the feed-forward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = partial(torch.randn, device=device, dtype=dtype)
    heads = shape.width // shape.head_width
    with torch.device(device):
        block = Block(shape.width, heads).to(dtype).eval()
    x, maps = draw(shape.rows, shape.tokens, shape.width), (shape.side, shape.side)
    rope = pair_table(maps, maps, shape.head_width, device)
    earlier = sum(h * w for h, w in template(1.0) if h < shape.side)
    past = draw(2, shape.rows, heads, earlier, shape.head_width)
    block.sa.caching = True

    def attention() -> Tensor:
        block.sa.cached_k, block.sa.cached_v = past
        out: Tensor = block.sa(x, rope)
        return out

    yield "attention", attention
    yield "ffn", partial(block.ffn, x)


# --- timing -----------------------------------------------------------------------------------


def _seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Returns the median seconds of a call."""

    def run() -> None:
        for call in calls:
            call()

    run()
    play = run if device.type == "cpu" else _recorded(run)
    clock, spans = Clock(device), list[float]()
    play()
    for _ in range(_REPEATS):
        begun = clock.read()
        play()
        spans.append(clock.seconds(clock.read(), begun))
    return median(spans) / len(calls)


def _recorded(run: Callable[[], object]) -> Callable[[], None]:
    """Returns replays of a CUDA graph of what has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
