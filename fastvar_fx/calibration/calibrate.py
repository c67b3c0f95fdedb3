"""Finds the schedule that loses least at a speed-up, or is fastest at a loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Final

from torch import nn

from fastvar_fx.calibration.divide import Curves, Option, Place, as_ratios, divide
from fastvar_fx.calibration.journal import Journal
from fastvar_fx.calibration.measure import (
    Branches,
    Run,
    Subject,
    alone,
    in_context,
    measured,
    name_of,
    total_flops,
)
from fastvar_fx.calibration.reference import Guidance
from fastvar_fx.errors import ArgumentError, ScheduleError
from fastvar_fx.measuring.runs import Progress, no_progress
from fastvar_fx.schedule import Schedule

LEVELS: Final = (0.5, 0.75, 0.9, 1.0)
"""The ratios that a branch may have, besides 0."""

_ATTEMPTS: Final = 4
"""How often a plan is made that does not meet the budget."""
_MORE: Final = 1.1
"""By how much more than it missed the budget the next one is asked for."""
_REFINED: Final = 3
"""How often a plan is improved by what its branches lose in its context, at most."""


def calibrate(  # noqa: PLR0913
    model: nn.Module,
    run: Run | Sequence[Run],
    schedule: Schedule,
    *,
    speedup: float | None = None,
    loss: float | None = None,
    logits: str | None = None,
    guidance: float | Sequence[float] | None = None,
    levels: Sequence[float] = LEVELS,
    file: str | Path | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Schedule:
    """Returns the schedule whose ratios per step, layer and kind of branch suit a model best.

    Each branch that can prune is pruned alone at each of the levels, in a generation whose blocks
    get at each step what they got in the dense one. What it loses is how much the logits of the
    step change. No gradients are needed. The ratios are those at which a further FLOP saved would
    lose as much in every branch, and the cache step is the one with which the plan as a whole
    then loses least. The plan is improved by moving each branch up and down a level in it.

    With `guidance`, losses are those of the guided logits, and the plan may also end guidance at
    the step at which it then loses least.

    The number of generations is that of the runs, times branches, levels, and choices of the cache
    step, which is the one before the steps that may prune, or a later one, so that fewer prune;
    and twice the branches for each improvement. Guidance adds a few for each step.

    Args:
        model: The dense model, as for `transform`.
        run: Runs one generation: the same one each time, such as from a fixed seed. Or several
            such functions, of other seeds or prompts, whose losses are averaged.
        schedule: The scales that the loop draws. The steps from the first of a ratio above 0 on may
            prune, at any ratio; the last steps of ratio 1 stay skipped, and guidance as it is.
        speedup: Dense FLOPs of the blocks over those of the plan, above 1.
        loss: In place of `speedup`, what the plan may lose: bits per token of the generation with
            `logits`, else the mean squared relative difference of what the last block returns.
        logits: Module path of what returns the logits (B, L, V), such as "head": losses are then
            divergences of their distributions. Without it, what the last block returns counts.
        guidance: The strength t of the guidance at each of the K steps, or a number for all: the
            loop draws from `(1 + t) * conditional - t * unconditional` logits. It needs `logits`
            and, as an option of `transform`, `conditional`. None leaves guidance as it is, and
            compares the logits of both halves of the batch.
        levels: The ratios that a branch may have besides 0, in (0, 1]. Few levels make few
            programs. A method that needs kept tokens, such as "tome", takes none of 1.
        file: A JSON file that keeps what was measured: an interrupted calibration goes on where it
            was, and one with another `speedup` measures only its plan. It has to be for the same
            arguments, and the runs have to draw the same logits, bit for bit, dense and pruned.
        progress: Called with a few words before each generation.
        **options: Passed on to `transform`, such as `method`.

    Raises:
        ArgumentError: If both or neither of `speedup` and `loss` are given, `guidance` without what
            it needs, a value is out of range, or the file holds another calibration or cannot be
            written.
        ScheduleError: If the schedule prunes no step, is for another model, or the speed-up or the
            loss cannot be met; the error names one that can.
        NothingPrunedError: If no branch can be pruned, or the run met none of the pruned steps.
        RunError: If the run is not the same each time, a loss is not finite, or the run has no
            guidance where it is given.

    Example:
        >>> plan = calibrate(var, draw, Schedule.preset("var-512"), speedup=2)  # doctest: +SKIP
        >>> fast = fastvar_fx.transform(var, plan)  # doctest: +SKIP
    """
    runs = tuple(run) if isinstance(run, Sequence) else (run,)
    _check(schedule, runs, levels)
    _check_budget(speedup, loss)
    subject = Subject(
        model=model,
        runs=runs,
        schedule=schedule,
        levels=tuple(sorted(set(map(float, levels)))),
        logits=logits,
        guidance=_guidance(guidance, schedule.steps, logits, options.get("conditional")),
        options=options,
        progress=progress,
    )
    journal = Journal(Path(file) if file is not None else None, _asked(subject))
    branches = Branches.of(subject)
    _identify(subject, branches, journal)
    budget = Budget.of(subject, speedup, loss)
    search = _Search(subject, journal, branches, budget)
    ends = search.ends()  # first: it is soon known whether guidance can end
    by_span = [alone(subject, journal, branches, steps) for steps in subject.spans]
    best = search.best_of(ends, by_span)
    if best is None or (loss is not None and not best.saved):
        raise ScheduleError(search.refusal(ends, by_span))
    for _ in range(_REFINED if best.prunes else 0):
        curves = in_context(subject, journal, best.ratios, best.until, branches.depth)
        better = search.best(curves, best)
        if better is None or budget.rank(better) >= budget.rank(best):
            break
        best = better
    progress(best.text(budget))
    return search.schedule(best)


@dataclass(frozen=True)
class Budget:
    """What a plan is to save, or may lose.

    Attributes:
        flops: FLOPs of a dense generation, by step.
        without: FLOPs of those that the schedule's skipped steps and end of guidance save.
        tokens: Tokens of a generation.
        saving: What a plan is to save besides; None if it is as much as the loss permits.
        loss: What it may lose, as a sum over the tokens; None for no bound.
    """

    flops: Sequence[int]
    without: float
    tokens: int
    saving: float | None
    loss: float | None

    @classmethod
    def of(cls, subject: Subject, speedup: float | None, loss: float | None) -> Budget:
        """Returns the budget of a calibration."""
        flops, left = total_flops(subject)
        total = sum(flops)
        without = float(total - left)
        tokens = sum(map(subject.schedule.tokens, range(subject.drawn_steps)))
        saving = None if speedup is None else max(total - total / speedup - without, 0.0)
        return cls(flops, without, tokens, saving, None if loss is None else loss * tokens)

    def rank(self, plan: Plan) -> float:
        """Returns what is less for a better plan."""
        return -plan.saved if self.saving is None else plan.loss

    def speedup(self, saved: float) -> float:
        """Returns the speed-up at which a plan saves so many FLOPs."""
        total = sum(self.flops)
        left = total - self.without - saved
        return total / left if left > 0 else math.inf

    def refusal(self, plans: Sequence[Plan]) -> str:
        """Returns why the budget cannot be met, and what can.

        Args:
            plans: Those that save most, if a speed-up was asked, else those that lose least.
        """
        if self.saving is None:
            least = min(plan.loss for plan in plans) / self.tokens
            return (
                f"nothing can be pruned at a loss of {(self.loss or 0) / self.tokens:.3g} per "
                f"token: the least that a plan loses is {1.005 * least:.3g}. Give a higher loss"
            )
        most = math.floor(100 * self.speedup(max(plan.saved for plan in plans))) / 100
        return (
            f"a speed-up of {self.speedup(self.saving):.4g} cannot be met: with every branch at "
            f"the highest level, it is {most:.2f}. Let more steps prune, by ratios above 0, allow "
            f"higher levels, or ask for less"
        )


@dataclass(frozen=True)
class Plan:
    """Ratios and an end of guidance, and what they save and lose as measured.

    Attributes:
        ratios: The ratio of each place.
        saved: FLOPs that pruning and the end of guidance save.
        loss: What the plan loses, as a sum over the tokens.
        until: The first step without guidance; None to leave guidance as the schedule has it.
    """

    ratios: Mapping[Place, float]
    saved: float
    loss: float
    until: int | None = None

    @property
    def prunes(self) -> bool:
        """Whether some place drops tokens."""
        return any(self.ratios.values())

    def text(self, budget: Budget) -> str:
        """Returns a line on the plan."""
        does = [f"is {budget.speedup(self.saved):.2f}x as fast by FLOPs"]
        if self.prunes:
            does.append(f"restores from step {min(place.step for place in self.ratios) - 1}")
        if self.until is not None:
            does.append(f"has no guidance from step {self.until} on")
        return f"the plan {', '.join(does)}, and loses {self.loss / budget.tokens:.4g} per token"


@dataclass(frozen=True)
class _Search:
    """Looks for plans that meet a budget."""

    subject: Subject
    journal: Journal
    branches: Branches
    budget: Budget

    def schedule(self, plan: Plan) -> Schedule:
        """Returns the schedule of a plan."""
        steps = sorted({place.step for place in plan.ratios})
        ratios = as_ratios(plan.ratios, steps, self.branches.depth)
        return self.subject.pruning(steps, ratios, plan.until)

    def best_of(self, ends: Sequence[Plan], by_span: Sequence[Curves]) -> Plan | None:
        """Returns the best plan of all choices of the end of guidance and of the cache step.

        Args:
            ends: Plans that only end guidance, in order of what they lose.
            by_span: What each place may save and lose alone, for each choice of the cache step.
        """
        best: Plan | None = None
        most = math.inf if self.budget.loss is None else self.budget.loss
        for end in ends:
            if end.loss >= (best.loss if best and self.budget.loss is None else most):
                break
            found = [self.best(_unguided(curves, end.until), end) for curves in by_span]
            plans = [plan for plan in (best, *found) if plan is not None]
            best = min(plans, key=self.budget.rank, default=None)
        return best

    def ends(self) -> list[Plan]:
        """Returns plans that only end guidance, or do nothing; in order of what they lose.

        The conditional half runs as it does with guidance, so that a step without guidance loses
        the same whichever was the first: the earliest end is measured for all.
        """
        nothing, ends = Plan({}, 0.0, 0.0), self.subject.ends
        if not ends:
            return [nothing]
        name, steps, depth = name_of({}, ends[0]), self.subject.steps, self.branches.depth
        found = measured(self.subject, self.journal, {name: {}}, steps, depth, ends[0])[name]
        plans = [nothing]
        for until in ends:
            loss = sum(lost for step, lost in found.loss.items() if step >= until)
            plans.append(Plan({}, self._ended(until), loss, until))
        return sorted(plans, key=lambda plan: plan.loss)

    def _ended(self, until: int | None) -> float:
        """Returns the FLOPs that an end of guidance saves."""
        return (
            0.0 if until is None else sum(self.budget.flops[until : self.subject.drawn_steps]) / 2
        )

    def best(self, curves: Curves, base: Plan) -> Plan | None:
        """Returns the best plan of some curves; None if none meets the budget.

        A plan as a whole saves and loses something else than its branches, for attention saves less
        at a step if those before have dropped keys: it is made again until it meets the budget. The
        last one saves all that can be saved.

        Args:
            curves: What each place may save and lose more than in `base`.
            base: A plan, whose end of guidance stays.
        """
        saving, loss = self.budget.saving, self.budget.loss
        asked = None if saving is None else saving - base.saved
        most = None if loss is None else loss - base.loss
        for attempt in range(1, _ATTEMPTS + 1):
            plan = self._measured(divide(curves, saving=asked, loss=most), base.until)
            if saving is not None and asked is not None and plan.saved < saving:
                last = attempt == _ATTEMPTS - 1
                asked = math.inf if last else asked + _MORE * (saving - plan.saved)
            elif loss is not None and most is not None and plan.loss > loss:
                most -= _MORE * (plan.loss - loss)
            else:
                return plan
        return None

    def refusal(self, ends: Sequence[Plan], by_span: Sequence[Curves]) -> str:
        """Returns why no plan meets the budget, and what can be met; see `best_of`."""
        if self.budget.saving is None:
            plans = [end for end in ends if end.saved]
            plans += [self._measured(divide(curves, saving=1.0), None) for curves in by_span]
        else:
            until = max(ends, key=lambda end: end.saved).until
            all_curves = [_unguided(curves, until) for curves in by_span]
            plans = [self._measured(divide(c, saving=math.inf), until) for c in all_curves]
        return self.budget.refusal(plans)

    def _measured(self, chosen: Mapping[Place, Option], until: int | None) -> Plan:
        """Returns the plan of some options and an end of guidance, run as a whole."""
        ratios = {place: option.ratio for place, option in chosen.items()}
        steps = sorted({place.step for place in ratios})
        if not any(ratios.values()) and until is None:
            return Plan(ratios, 0.0, 0.0)
        name, depth = name_of(ratios, until), self.branches.depth
        found = measured(self.subject, self.journal, {name: ratios}, steps, depth, until)[name]
        saved = self._ended(until) + sum(found.saved.values())
        return Plan(ratios, saved, sum(found.loss.values()), until)


def _unguided(curves: Curves, until: int | None) -> Curves:
    """Returns what places save where the blocks run half of the batch from a step on."""
    return {
        place: [replace(o, saved=o.saved / 2) for o in options]
        if until is not None and place.step >= until
        else options
        for place, options in curves.items()
    }


def _guidance(
    strengths: float | Sequence[float] | None, steps: int, logits: str | None, half: Any
) -> Guidance | None:
    """Returns how guided logits are made.

    Raises:
        ArgumentError: If it is unknown, or something else is asked for.
    """
    if strengths is None:
        return None
    if logits is None:
        raise ArgumentError(
            "guidance compares guided logits: give logits, the module path of what returns them"
        )
    if half is None:
        raise ArgumentError(
            'guidance= needs conditional="first" or "last": the half of the batch whose logits the '
            "loop weights positively"
        )
    each: Sequence[Any] = strengths if isinstance(strengths, Sequence) else [strengths] * steps
    numbers = all(isinstance(t, (int, float)) and math.isfinite(t) for t in each)
    if not numbers or len(each) != steps:
        raise ArgumentError(
            f"guidance is the strength of each of the {steps} steps of the schedule, or a number "
            f"for all; found {strengths!r}"
        )
    return Guidance(tuple(map(float, each)), half)


def _asked(subject: Subject) -> dict[str, Any]:
    """Returns what is known of the measurements before a generation runs, as plain data."""
    return {
        "schedule": subject.schedule.to_json(),
        "levels": subject.levels,
        "logits": subject.logits,
        "guidance": subject.guidance and asdict(subject.guidance),
    }


def _identify(subject: Subject, branches: Branches, journal: Journal) -> None:
    """Adds to a journal what comes out, dense and pruned, which all else that counts changes."""
    if journal.is_kept:
        changes = "batch, seeds, prompts, weights, dtype or number of threads"
        journal.belongs_to({f"dense generations ({changes})": subject.dense_fingerprints()})
        changes = "method or options of transform"
        journal.belongs_to({f"pruned generations ({changes})": branches.fingerprint})


def _check(schedule: Schedule, runs: Sequence[Any], levels: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"calibrate takes a fastvar_fx.Schedule with the scales that the loop draws; found "
            f"{type(schedule).__name__}"
        )
    if not runs or not all(map(callable, runs)):
        raise ArgumentError(
            f"run is a function that runs one generation of the model that it gets, or a list of "
            f"such functions; found {runs}"
        )
    numbers = isinstance(levels, Collection) and all(
        isinstance(level, Real) and 0 < float(level) <= 1 for level in levels
    )
    if not numbers or not len(levels):
        raise ArgumentError(
            f"levels is a list of pruning ratios in (0, 1], such as {LEVELS}; found {levels!r}"
        )
    if not set(schedule.pruned_steps) - set(schedule.full_steps):
        raise ScheduleError(
            f"the schedule prunes no step that is drawn, ratios {schedule.ratios}: give the steps "
            f"that may prune ratios above 0 and below 1; the values do not matter"
        )


def _check_budget(speedup: float | None, loss: float | None) -> None:
    if (speedup is None) == (loss is None):
        raise ArgumentError(f"give either a speed-up or a loss; found {speedup} and {loss}")
    asked, above = (speedup, 1) if loss is None else (loss, 0)
    if not isinstance(asked, (int, float)) or not asked > above or speedup == math.inf:
        raise ArgumentError(f"speedup is above 1 and finite, and loss above 0; found {asked!r}")
