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
    """A pruning ratio of a place: what it loses, and the FLOPs that it saves."""

    ratio: float
    loss: float
    saved: float


DENSE = Option(0.0, 0.0, 0.0)

Curves = Mapping[Place, Sequence[Option]]
"""The ratios that each place may have, besides 0."""


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
        loss: The most that may be lost.
    """
    pieces = [(piece, place) for place, options in curves.items() for piece in _hull(options)]
    pieces.sort(key=lambda each: each[0][0])  # ties stay in order, and a hull's slopes rise
    chosen = dict.fromkeys(curves, DENSE)
    saved = lost = 0.0
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


def _hull(options: Sequence[Option]) -> Iterator[tuple[float, Option]]:
    """Yields the corners of the lower convex hull after `DENSE`, each with the slope up to it."""
    at = DENSE
    while True:
        further = [option for option in options if option.saved > at.saved]
        if not further:
            return
        slopes = [((o.loss - at.loss) / (o.saved - at.saved), -o.saved, o) for o in further]
        slope, _, at = min(slopes, key=lambda each: each[:2])
        yield slope, at


def as_ratios(
    chosen: Mapping[Place, Option], steps: Sequence[int], depth: int
) -> tuple[tuple[Ratio, ...], ...]:
    """Returns the ratios of some steps, of each one per layer, as `Schedule` takes them.

    A kind that a layer has no place for gets the ratio of the layer's other ones, if they agree.
    """

    def of_layer(step: int, layer: int) -> Ratio:
        own = {p.kind: o.ratio for p, o in chosen.items() if (p.step, p.layer) == (step, layer)}
        alike = len(set(own.values())) == 1
        return next(iter(own.values())) if alike else ByKind(**own)

    return tuple(tuple(of_layer(step, layer) for layer in range(depth)) for step in steps)
