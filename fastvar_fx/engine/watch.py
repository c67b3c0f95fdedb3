"""Notices generations that do not run the schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt, prod
from typing import Final, NoReturn

from fastvar_fx.engine.plan import Plan
from fastvar_fx.errors import RunError, ScheduleError
from fastvar_fx.ops import Scale, as_maps
from fastvar_fx.schedule import Schedule

_MOST_RUNS: Final = 64
_FEW_STEPS: Final = 3
"""With fewer steps, calls of one length may be those of guidance."""


class Watch:
    """What the blocks saw in the current generation, and how the last ones ended.

    It notes lengths: the token counts of calls or, with `step_of`, their steps. A run is a sequence
    of lengths that grow, such as the maps of an image. Source tokens are often a run of their own.
    """

    def __init__(self, plan: Plan, like: Watch | None = None) -> None:
        """Makes one that saw nothing; with `like`, one of several threads.

        Each of them may run other steps of the same generations.
        """
        schedule, steps = plan.schedule, range(plan.schedule.steps)
        self._schedule = schedule
        self._one_of = plan.one_of
        self._told = plan.step_of is not None
        self._expected = list(steps) if self._told else [schedule.length(step) for step in steps]
        self._wanted = [self._expected[step] for step in plan.changed_steps]
        self._endings: deque[list[int]] = deque(maxlen=3)
        self._depth = 0
        self._inside: set[int] = set()
        self._fits = False
        self._ever_pruned: set[int] = like._ever_pruned if like else set()
        self._raised = ""
        self._whole = sum(map(schedule.tokens, steps))
        self._runs: list[list[int]] = []
        self._last: int | None = None  # what the last run ends with
        self._pruned: set[int] = set()
        self._layer = self._repeats = 0

    # --- what is noted --------------------------------------------------------------------------

    def saw(self, length: int, layer: int, *, pruned: bool = False) -> None:
        """Notes a call of a block.

        Raises:
            RunError: If generations do not run the schedule. If they have other lengths, as soon as
                the next one begins; else after three equal ones at the very first without a
                pruned step, because they may have been cut off.
        """
        if length == self._last:
            self._repeats += layer == self._layer
            if length == self._whole:
                self._check_constant(length)
            if pruned:  # the first block of the step may be one that does not prune
                self.changed(length)
            return
        if self._begins_anew(length):
            self._judge(whole=False)
        if self._runs and length > self._runs[-1][-1]:
            self._runs[-1].append(length)
        else:
            self._runs = [*self._runs[-_MOST_RUNS:], [length]]
        self._last, self._layer, self._repeats = length, layer, 1
        self._inside.add(length)
        if pruned:
            self.changed(length)
        if self._raised and self._strays():
            self.cut_off()
            raise RunError(self._raised)

    def changed(self, length: int) -> None:
        """Notes that a step ran otherwise than in the user's model."""
        self._pruned.add(length)
        self._ever_pruned.add(length)

    def cut_off(self) -> None:
        """Notes that the generation ended before its last step."""
        self._runs, self._last, self._pruned = [], None, set()
        self._layer = self._repeats = 0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it, generations begin and end: a loop, unless another one is around it."""
        if not self._depth:
            self._inside.clear()
        self._depth += 1
        try:
            yield
        except BaseException:
            self.cut_off()
            raise
        finally:
            self._depth -= 1

    @property
    def within(self) -> bool:
        """Whether a loop is under way."""
        return self._depth > 0

    @property
    def drew_steps(self) -> bool:
        """Whether several steps ran within `whole`: it is a loop, and not one step of one."""
        return len(self._inside) > 1

    def finished(self) -> None:
        """Judges a generation that began and ended within `whole`.

        Raises:
            RunError: If it did not run the schedule.
        """
        seen = self._seen()
        if len(seen) == 1 and seen[0] not in self._expected:
            self._check_constant(seen[0])
        if self.drew_steps:
            self._judge(whole=True)

    # --- what it means --------------------------------------------------------------------------

    def _begins_anew(self, length: int) -> bool:
        """Whether another generation begins.

        It does with a run that began before, or with source tokens of the same length again: after
        the last step, or amid steps if they are no step.
        """
        runs = self._runs
        if not runs:
            return False
        if length < runs[-1][-1] and any(run[0] == length and len(run) > 1 for run in runs):
            return True
        drawn = len(runs[-1]) > 1 and runs[-1][-1] == self._wanted[-1]
        strange = length not in self._expected and not set(self._expected).isdisjoint(runs[-1])
        return length == runs[0][0] and (drawn or strange)

    def _main(self) -> list[int]:
        """Returns the run that has most in common with the schedule."""
        return max(self._runs, key=lambda run: len(set(self._expected).intersection(run)))

    def _steps(self) -> list[int]:
        """Returns the lengths of this run, without source tokens before the first step."""
        main = self._main()
        begun = next((i for i, length in enumerate(main) if length in self._expected), 0)
        return main[begun:]

    def _captured(self) -> bool:
        """Whether the cache step was met after a structure step, or is the first step."""
        first = self._schedule.cache_step
        structure, main = self._expected[:first], self._main()
        return self._expected[first] in main and (not first or main[0] in structure)

    def _strays(self) -> bool:
        """Whether the main run has lengths that are not the schedule's."""
        strays = set(self._steps()).difference(self._expected)
        return len(strays) >= (1 if self._captured() else 2)

    def _judge(self, *, whole: bool) -> None:
        """Ends the generation.

        Lengths after the last step may be the next generation's source tokens, unless the
        generation is known to be whole.
        """
        common = set(self._expected).intersection(self._main())
        complete = self._pruned.issuperset(self._wanted)
        if self._strays() and (whole or not complete):
            self._raise()
        if complete:
            self._fits, self._raised = True, ""
            self._endings.clear()
        elif whole and not self._fits and len(common) > 1:
            self._raise()
        else:
            self._endings.append(self._seen())
            alike = len(self._endings) == 3 and all(e == self._endings[0] for e in self._endings)
            alike = alike and not self._ever_pruned
            if (alike or self._raised) and not self._captured():
                self._raise()
        self.cut_off()

    def _seen(self) -> list[int]:
        return list(dict.fromkeys(length for run in self._runs for length in run))

    def _check_constant(self, length: int) -> None:
        steps = self._schedule.steps
        if self._told or self._repeats < max(steps, _FEW_STEPS):
            return
        repeats = self._repeats
        self.cut_off()
        raise RunError(
            f"a block got {length} tokens {repeats} times in a row, as in a loop whose sequence "
            f"holds all maps from the beginning; the schedule has steps of {self._expected} "
            f"tokens. Pass step_of= to transform, which says the step of a call, and "
            f"Schedule(..., prefix=True). If the blocks take (L, B, C), let them take (B, L, C)"
        )

    def _raise(self) -> NoReturn:
        """Says what was seen, and which schedule would fit it."""
        seen = self._seen()
        met = [length for length in self._wanted if length in self._pruned]
        fit = None if self._told else fitting(self._schedule, self._steps())
        self.cut_off()
        self._endings.clear()
        unit = "the steps" if self._told else "steps of"
        what = "" if self._told else " tokens"
        such = f", such as {fit}" if fit else ""
        had = f"only {met}" if met else "none"
        if len(met) == len(self._wanted):
            had = f"others than {self._expected}"
        self._raised = (
            f"the schedule changes {unit} {self._wanted}{what}, but a generation had {had}: its "
            f"blocks saw {seen}{what}. Give the schedule that the loop runs{such}. If the loop "
            f"draws more maps by another method of its blocks than forward, let it call the blocks "
            f"themselves{self._one_of}"
        )
        raise RunError(self._raised)


def fitting(schedule: Schedule, lengths: Sequence[int]) -> str | None:
    """Returns the schedule that fits the lengths of a generation, as code; None if unknown.

    It has the ratios of `schedule`, and maps of its form: its own, or square ones if it has only
    such. Lengths whose differences are such maps are those of a loop that feeds all maps so far.
    """
    grown = [after - before for before, after in zip([0, *lengths], lengths, strict=False)]
    for prefix, counts in ((False, lengths), (True, grown)):
        scales = [_scale(schedule, count) for count in counts]
        found = [scale for scale in scales if scale is not None]
        if len(found) < len(scales):
            continue
        try:
            made = Schedule(found, schedule.ratios, prefix=prefix)
        except ScheduleError:
            continue
        sides = tuple(s[0] if len(s) == 2 and s[0] == s[1] else s for s in made.scales)
        return f"Schedule({sides}, {made.ratios}{', prefix=True' * prefix})"
    return None


def _scale(schedule: Schedule, count: int) -> Scale | None:
    for scale in schedule.scales:
        if prod(scale) == count:
            return scale
    maps = as_maps(schedule.scales[0])[0]
    side = isqrt(count // maps)
    square = all(scale[-1] == scale[-2] for scale in schedule.scales)
    if not square or count < 1 or maps * side * side != count:
        return None
    return (*schedule.scales[0][:-2], side, side)
