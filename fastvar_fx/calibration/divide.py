"""Divides a budget of FLOPs among branches: equal slopes of what is lost to what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastvar_fx.schedule import ByKind, Ratio
from passes.analyse.branches import Kind


class Place(NamedTuple):
    """The branches of a kind, in a layer and at a step."""

    step: int
    layer: int
    kind: Kind


@dataclass(frozen=True)
class Option:
    """A pruning ratio of a place: what it loses, and the FLOPs that it saves.

    Both may be differences to another plan, and negative.
    """

    ratio: float
    loss: float
    saved: float


DENSE = Option(0.0, 0.0, 0.0)

Curves = Mapping[Place, Sequence[Option]]
"""The ratios that each place may have."""


def divide(
    curves: Curves, *, saving: float | None = None, loss: float | None = None
) -> dict[Place, Option]:
    """Returns the ratio of each place that loses least for what is saved in all.

    The loss of a plan is taken to be the sum of those of its places. Then the best plans are those
    in which a further FLOP saved would lose as much in each place (Lagrange). They are found by
    going down the lower convex hulls of all curves, the flattest piece first.

    Args:
        curves: The ratios that each place may have.
        saving: FLOPs to save at least; all that can be saved, if that is less.
        loss: The most that may be lost, unless the options that save least lose more.
    """
    chosen = {place: _first(options) for place, options in curves.items()}
    pieces = [(piece, place) for place, options in curves.items() for piece in _hull(options)]
    pieces.sort(key=lambda each: each[0][0])  # ties stay in order, and a hull's slopes rise
    saved = sum(option.saved for option in chosen.values())
    lost = sum(option.loss for option in chosen.values())
    for (_, option), place in pieces:
        before = chosen[place]
        if saving is not None and saved >= saving:
            break
        if loss is not None and lost + option.loss - before.loss > loss:
            break
        chosen[place] = option
        saved += option.saved - before.saved
        lost += option.loss - before.loss
    return chosen


def _first(options: Sequence[Option]) -> Option:
    """Returns the option that saves least."""
    return min(options, key=lambda option: (option.saved, option.loss))


def _hull(options: Sequence[Option]) -> Iterator[tuple[float, Option]]:
    """Yields the corners of the lower convex hull after the first, each with the slope up to it."""
    at = _first(options)
    while True:
        further = [option for option in options if option.saved > at.saved]
        if not further:
            return
        slopes = [((o.loss - at.loss) / (o.saved - at.saved), -o.saved, o) for o in further]
        slope, _, at = min(slopes, key=lambda each: each[:2])
        yield slope, at


def as_ratios(
    ratios: Mapping[Place, float], steps: Sequence[int], depth: int
) -> tuple[tuple[Ratio, ...], ...]:
    """Returns the ratios of some steps, of each one per layer, as `Schedule` takes them.

    Kinds that a layer has no place for get the ratio of its places, if these agree.
    """

    def of_layer(step: int, layer: int) -> Ratio:
        own = {p.kind: r for p, r in ratios.items() if (p.step, p.layer) == (step, layer)}
        alike = len(set(own.values())) == 1
        return next(iter(own.values())) if alike else ByKind(**own)

    return tuple(tuple(of_layer(step, layer) for layer in range(depth)) for step in steps)
