"""When and how much to prune: the scales of a generation and the ratios of its last steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from types import MappingProxyType
from typing import Any, Final

from fastvar_fx.errors import ScheduleError, did_you_mean
from fastvar_fx.ops import Scale, kept_tokens


@dataclass(frozen=True, kw_only=True)
class ByKind:
    """Pruning ratios in [0, 1] of the branches of a block that differ by kind; 0 is dense."""

    attention: float = 0.0
    cross_attention: float = 0.0
    ffn: float = 0.0


Ratio = float | ByKind
"""The pruning ratio of all branches of a block, or one of each kind."""


@dataclass(frozen=True, init=False)
class Schedule:
    """The scales a model draws and the pruning ratios of its last N steps.

    A step has one ratio, or one per kind of branch, as in {"attention": 0.5, "ffn": 0.75}, or a
    sequence with either of these for each layer.

    Attributes:
        scales: The K token maps, coarse to fine, as (h, w), or (m, h, w) for m joint maps.
        ratios: Pruning ratios in [0, 1] of the last N = len(ratios) steps: of each a number or a
            `ByKind`, or a tuple with one of these per layer. 0 leaves a step dense, the number 1
            on the last steps skips them (see `transform`).
        cache_step: 0-based index of the step whose branch outputs are captured (the paper's K-N).
        layers: Indices of the blocks that prune, ascending; None means all.
        prefix: Whether the blocks get all maps so far at every step, as in loops without a KV
            cache. The last map prunes; those before it stay whole.
        guidance_until: From this step on, blocks run the conditional half of the batch only and
            hand its output to both halves; None leaves guidance on.

    Source: FastVAR, arXiv 2503.23367; the presets hold its settings for Infinity and HART.

    Example:
        >>> schedule = Schedule((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (0.5, 0.75))
        >>> schedule.cache_step, schedule.tokens(9), schedule.kept(9)
        (7, 1024, 256)
    """

    scales: tuple[Scale, ...]
    ratios: tuple[Ratio | tuple[Ratio, ...], ...]
    cache_step: int
    layers: tuple[int, ...] | None
    prefix: bool
    guidance_until: int | None

    def __init__(
        self,
        scales: Iterable[int | Sequence[int]],
        ratios: Iterable[GivenRatio | Sequence[GivenRatio]],
        *,
        cache_step: int | None = None,
        layers: Iterable[int] | None = None,
        prefix: bool = False,
        guidance_until: int | None = None,
    ) -> None:
        """Checks and stores a schedule.

        Args:
            scales: Token maps coarse to fine; an int n means n x n, else (h, w) or (m, h, w).
            ratios: Pruning ratios in [0, 1] of the last steps: of each a number, or a mapping from
                the kinds "attention", "cross_attention" and "ffn" to numbers, of which those left
                out stay dense, or a sequence with either of these for each layer of the model.
            cache_step: 0-based; None means the last step before the pruned ones.
            layers: Blocks that prune, counted from 0; None means all.
            prefix: Whether the blocks get all maps so far at every step.
            guidance_until: The first step without guidance, in [1, K - 1]; None for none.

        Raises:
            ScheduleError: If a value is out of its range or they contradict each other.
        """
        maps = tuple(map(_scale, _listed("scales", scales)))
        dropped = tuple(map(_of_step, _listed("ratios", ratios)))
        if cache_step is None:
            cache_step = len(maps) - len(dropped) - 1
        vars(self).update(  # attributes are frozen
            scales=maps,
            ratios=dropped,
            cache_step=cache_step,
            layers=_layers(layers),
            prefix=prefix,
            guidance_until=guidance_until,
        )
        self._check()

    def _check(self) -> None:
        if not isinstance(self.prefix, bool):
            raise ScheduleError(f"prefix is True or False; found {self.prefix!r}")
        if not self.scales:
            raise ScheduleError("a schedule needs at least one scale; found none")
        if len({len(scale) for scale in self.scales}) > 1:
            raise ScheduleError(
                f"scales mix (h, w) and (m, h, w): {self.scales}; give all of them one form"
            )
        for before, after in zip(self.scales, self.scales[1:], strict=False):
            if prod(after) < prod(before):
                raise ScheduleError(
                    f"scales run coarse to fine, no token map smaller than the one before; found "
                    f"{after} after {before}"
                )
        if len(self.ratios) >= len(self.scales):
            raise ScheduleError(
                f"{len(self.ratios)} ratios for {len(self.scales)} scales leave none to capture; "
                f"give at most {len(self.scales) - 1}"
            )
        first_pruned = len(self.scales) - len(self.ratios)
        if not _is_index(self.cache_step) or self.cache_step >= first_pruned:
            raise ScheduleError(
                f"cache_step={self.cache_step!r} must lie before the first pruned step: "
                f"in [0, {first_pruned - 1}], counted from 0"
            )
        self._check_depth()
        self._check_guidance()

    def _check_depth(self) -> None:
        depths = {len(entry) for entry in self.ratios if isinstance(entry, tuple)}
        if len(depths) > 1:
            raise ScheduleError(
                f"steps with a ratio per layer have one for each layer of the same model; found "
                f"{' and '.join(map(str, sorted(depths)))} layers"
            )
        beyond = [layer for layer in self.layers or () if depths and layer >= max(depths)]
        if beyond:
            raise ScheduleError(
                f"layers={self.layers} has {beyond}, but the ratios are those of {max(depths)} "
                f"layers, 0 to {max(depths) - 1}"
            )

    def _check_guidance(self) -> None:
        until = self.guidance_until
        if until is not None and not (_is_index(until) and 1 <= until < self.steps):
            raise ScheduleError(
                f"guidance_until is the first step without guidance, in [1, {self.steps - 1}] "
                f"counted from 0, or None; found {until!r}. A generation without any guidance is "
                f"for the loop to run"
            )

    # --- what a step does ----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """K, how many steps a generation has."""
        return len(self.scales)

    @property
    def depth(self) -> int | None:
        """How many layers have ratios of their own; None where all layers have the same."""
        return next((len(entry) for entry in self.ratios if isinstance(entry, tuple)), None)

    def ratio(self, step: int, layer: int | None = None, kind: str | None = None) -> float:
        """Returns the pruning ratio of a branch; 0 before the last N steps.

        Args:
            step: The step.
            layer: The index of the block; needed where the step has a ratio per layer.
            kind: "attention", "cross_attention" or "ffn"; needed where its ratios differ by kind.

        Raises:
            ScheduleError: If the ratios of the step differ and one of these is missing.
        """
        if layer is not None and not self.prunes_layer(layer):
            return 0.0
        entry = self.entry(step)
        if isinstance(entry, tuple) and layer is not None:
            entry = entry[layer]
        if isinstance(entry, ByKind) and kind is not None:
            ratio: float = getattr(entry, kind)
            return ratio
        if isinstance(entry, float):
            return entry
        ratios = self.ratios_at(step)
        if len(ratios) > 1:
            raise ScheduleError(
                f"step {step} has no ratio of its own, its branches have {ratios}: ask for that of "
                f"a layer and a kind, or give a schedule with one ratio per step"
            )
        return ratios[0]

    def entry(self, step: int) -> Ratio | tuple[Ratio, ...]:
        """Returns what `ratios` has for a step; 0 before the last N steps."""
        first = self.steps - len(self.ratios)
        return self.ratios[step - first] if step >= first else 0.0

    def ratios_at(self, step: int) -> tuple[float, ...]:
        """Returns the pruning ratios of a step's branches, each once, ascending."""
        entry = self.entry(step)
        if isinstance(entry, tuple):
            entries = [each for layer, each in enumerate(entry) if self.prunes_layer(layer)]
        else:
            entries = [entry]
        return tuple(sorted({ratio for each in entries for ratio in _by_kind(each)}))

    def tokens(self, step: int) -> int:
        """Returns L, the token count of a step's map."""
        return prod(self.scales[step])

    def length(self, step: int) -> int:
        """Returns how many tokens the blocks get at a step: with `prefix`, of all maps so far."""
        return sum(map(self.tokens, range(step + 1))) if self.prefix else self.tokens(step)

    def kept(self, step: int, layer: int | None = None, kind: str | None = None) -> int:
        """Returns how many tokens a branch keeps: L - int(L * ratio); see `ratio`."""
        return kept_tokens(self.tokens(step), self.ratio(step, layer, kind))

    def kept_counts(self, step: int) -> tuple[int, ...]:
        """Returns how many tokens the branches of a step keep, each number once, ascending."""
        counts = {kept_tokens(self.tokens(step), ratio) for ratio in self.ratios_at(step)}
        return tuple(sorted(counts))

    @property
    def pruned_steps(self) -> tuple[int, ...]:
        """The steps with a ratio above 0 that drops at least one token."""
        return tuple(s for s in range(self.steps) if self.kept_counts(s)[0] < self.tokens(s))

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The last steps, as far as their ratio is the number 1: those that a loop may skip.

        A step with a 1 for each layer is drawn, and every branch is its resized cache.
        """
        steps = range(self.steps)
        first = next((s + 1 for s in reversed(steps) if self.entry(s) != 1), 0)
        return tuple(steps[first:])

    def guided(self, step: int) -> bool:
        """Whether guidance is on at a step."""
        return self.guidance_until is None or step < self.guidance_until

    def prunes_layer(self, layer: int) -> bool:
        """Whether the block of index `layer` prunes."""
        return self.layers is None or layer in self.layers

    def extend(self, *scales: int | Sequence[int], ratio: float | None = None) -> Schedule:
        """Returns a schedule with steps appended, for a higher resolution without training.

        The cache step, the layers and the first step without guidance stay. For Infinity, whose
        tokens are 16 x 16 pixels, `extend((84, 84))` is 1344 x 1344 and
        `extend((84, 84), (128, 128))` 2048 x 2048.

        Args:
            scales: Token maps of the form that the others have, each larger than the one before.
            ratio: Pruning ratio in [0, 1] of the new steps; None means what the last step has.

        Raises:
            ScheduleError: If no scale is given, a map does not grow, or the schedule ends in
                steps of ratio 1 and `ratio` is lower.

        Example:
            >>> Schedule((1, 2, 3, 4), (0.5,)).extend((6, 6), (9, 9)).ratios
            (0.5, 0.5, 0.5)
        """
        if not scales:
            raise ScheduleError("extend takes the scales to append, such as (84, 84); found none")
        added = self.entry(self.steps - 1) if ratio is None else _ratio(ratio)
        if self.full_steps and ratio is not None and ratio < 1:
            raise ScheduleError(
                f"steps {list(self.full_steps)} have ratio 1 and are skipped, so new ones of ratio "
                f"{ratio:g} would leave a step skipped in the middle of the schedule. Give the "
                f"steps before them ratios below 1 first, or extend with ratio=1"
            )
        ratios = (*self.ratios, *[added] * len(scales))
        made = replace(self, scales=(*self.scales, *map(_scale, scales)), ratios=ratios)
        for step in range(self.steps, made.steps):
            if made.tokens(step) <= made.tokens(step - 1):
                raise ScheduleError(
                    f"an extension grows: each map has more tokens than the one before; found "
                    f"{made.scales[step]} after {made.scales[step - 1]}"
                )
        return made

    def without(self, *steps: int) -> Schedule:
        """Returns a schedule that leaves steps dense which this one prunes; the rest stays.

        Where pruning does not pay is what `fastvar_fx.measure` finds out.

        Args:
            steps: Pruned steps, counted from 0.

        Raises:
            ScheduleError: If a step is none of `pruned_steps`.

        Example:
            >>> Schedule((1, 2, 3, 4), (0.5, 0.75)).without(2).ratios
            (0.0, 0.75)
        """
        strange = [step for step in steps if step not in self.pruned_steps]
        if strange:
            raise ScheduleError(
                f"without leaves pruned steps dense, {list(self.pruned_steps)} here; found "
                f"{strange}"
            )
        first = self.steps - len(self.ratios)
        ratios = [0.0 if first + i in steps else entry for i, entry in enumerate(self.ratios)]
        return replace(self, ratios=tuple(ratios))

    # --- as data -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Returns the schedule as a JSON object; `from_json` reads it back equal."""
        return json.dumps(vars(self), default=_of_kinds)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Reads a schedule from JSON.

        Raises:
            ScheduleError: If it is no JSON object, has unknown or missing keys, or bad values.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ScheduleError(f"a schedule is read from a JSON object; {error}") from error
        known = {each.name for each in fields(cls)}
        if not isinstance(data, dict) or not {"scales", "ratios"} <= data.keys() <= known:
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ScheduleError(
                f"a schedule has the keys scales and ratios, and may have cache_step, layers, "
                f"prefix and guidance_until; found {found}"
            )
        try:
            return cls(**data)
        except TypeError as error:
            raise ScheduleError(
                f"a schedule's JSON has a value of a wrong type: {error}"
            ) from error

    @classmethod
    def preset(cls, name: str) -> Schedule:
        """Returns a named schedule; `presets()` lists them.

        Raises:
            ScheduleError: If there is no such name; the message offers close ones.
        """
        if name not in _PRESETS:
            raise ScheduleError(f"no preset is named {name!r}; {did_you_mean(name, _PRESETS)}")
        return _PRESETS[name]


def presets() -> MappingProxyType[str, Schedule]:
    """Returns the named schedules: the paper's for HART and Infinity, HART's ratios for VAR."""
    return MappingProxyType(_PRESETS)


def span_text(values: Sequence[float]) -> str:
    """Returns a number, or the least and the largest of several in ascending order: `0.5-0.75`."""
    ends = dict.fromkeys((values[0], values[-1]))
    return "-".join(f"{value:.7g}" for value in ends)


def _scale(value: object) -> Scale:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, Sequence) or len(sides) not in (2, 3):
        raise ScheduleError(f"a scale is an int n, (h, w) or (m, h, w); found {value!r}")
    if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides):
        raise ScheduleError(f"the sides of a scale are positive integers; found {value!r}")
    return tuple(sides)


GivenRatio = float | ByKind | Mapping[str, float]


def _of_step(value: Any) -> Ratio | tuple[Ratio, ...]:
    """Returns what a step's ratios are, in the form that `Schedule.ratios` has."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _of_layer(value)
    if not value:
        raise ScheduleError("a step with a ratio per layer has one for each layer; found none")
    return tuple(map(_of_layer, value))


def _of_layer(value: Any) -> Ratio:
    if isinstance(value, ByKind):
        value = vars(value)
    if not isinstance(value, Mapping):
        return _ratio(value)
    unknown = [kind for kind in value if kind not in _KINDS]
    if unknown or not value:
        raise ScheduleError(
            f"ratios by kind have the keys {', '.join(_KINDS)}; found {sorted(map(str, value))}"
        )
    made = ByKind(**{kind: _ratio(ratio) for kind, ratio in value.items()})
    ratios = _by_kind(made)
    return ratios[0] if len(set(ratios)) == 1 else made


def _by_kind(entry: Ratio) -> tuple[float, ...]:
    """Returns the ratios of all kinds."""
    return tuple(vars(entry).values()) if isinstance(entry, ByKind) else (entry,)


def _of_kinds(entry: ByKind) -> dict[str, float]:
    return {kind: ratio for kind, ratio in vars(entry).items() if ratio}


_KINDS: Final = tuple(field.name for field in fields(ByKind))


def _ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ScheduleError(f"a pruning ratio is a number in [0, 1]; found {value!r}")
    if not 0 <= value <= 1:  # nor is NaN
        raise ScheduleError(
            f"a pruning ratio lies in [0, 1], the fraction of tokens dropped; found {value!r}"
        )
    return float(value)


def _listed(name: str, values: Iterable[Any]) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        raise ScheduleError(f"{name} is a list of numbers; found {values!r}") from error


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _layers(values: Iterable[int] | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    layers = _listed("layers", values)
    if not layers or not all(map(_is_index, layers)):
        raise ScheduleError(
            f"layers lists the indices of the blocks that prune, counted from 0, or is None for "
            f"all of them; found {tuple(layers)}"
        )
    return tuple(sorted(set(layers)))


VAR_256: Final = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512: Final = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
HART_1024: Final = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
INFINITY_1024: Final = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
"""Sides of the square token maps of these models, named by the pixels of an image's side."""

_PRESETS: Final = {
    "var-256": Schedule(VAR_256, (0.5, 0.75)),
    "var-512": Schedule(VAR_512, (0.5, 0.75)),
    "hart-1024": Schedule(HART_1024, (0.5, 0.75)),
    "infinity-1024": Schedule(INFINITY_1024, (0.4, 0.5, 1.0, 1.0), layers=range(3, 28)),
}
