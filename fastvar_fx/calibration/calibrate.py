"""Finds the schedule that loses least at a speed-up, or is fastest at a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from torch import nn

from fastvar_fx.calibration.divide import Curves, as_ratios, divide
from fastvar_fx.calibration.measure import (
    Journal,
    Run,
    Subject,
    as_a_whole,
    measured,
    total_flops,
)
from fastvar_fx.errors import ArgumentError, ScheduleError
from fastvar_fx.measuring.runs import Progress, no_progress
from fastvar_fx.methods import method_of
from fastvar_fx.schedule import Schedule

LEVELS: Final = (0.5, 0.75, 0.9, 1.0)
"""The ratios that a branch may have, besides 0."""

_ATTEMPTS: Final = 4
"""How often a plan is made again that saves less than the sum of its parts."""
_MORE: Final = 1.001
"""By how much more than it lacked it is then asked to save."""


def calibrate(  # noqa: PLR0913
    model: nn.Module,
    run: Run | Sequence[Run],
    schedule: Schedule,
    *,
    speedup: float | None = None,
    loss: float | None = None,
    logits: str | None = None,
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
    then loses least.

    The number of generations is that of the runs, times branches, levels, and choices of the cache
    step: it may be that of the schedule, or a later one, which leaves fewer steps to prune.

    Args:
        model: The dense model, as for `transform`.
        run: Runs one generation: the same one each time, such as from a fixed seed. Or several
            such functions, of other seeds or prompts, whose losses are averaged.
        schedule: The scales that the loop draws. Its steps of a ratio above 0 may prune, at any
            ratio; its last steps of ratio 1 stay skipped, and guidance stays as it is.
        speedup: Dense FLOPs of the blocks over those of the plan, above 1.
        loss: In place of `speedup`, what the plan may lose as a sum over its branches: bits per
            token of the generation with `logits`, else the mean squared relative difference of
            what the last block returns.
        logits: Module path of what returns the logits (B, L, V), such as "head": losses are then
            divergences of their distributions. Without it, what the last block returns counts.
        levels: The ratios that a branch may have besides 0, in (0, 1]. Few levels make few
            programs. A method that needs kept tokens, such as "tome", takes none of 1.
        file: A JSON file that keeps what was measured: an interrupted calibration goes on where it
            was, and one with another `speedup` measures nothing again.
        progress: Called with a few words before each generation.
        **options: Passed on to `transform`, such as `method`.

    Raises:
        ArgumentError: If both or neither of `speedup` and `loss` are given, a value is out of
            range, or the file holds another calibration.
        ScheduleError: If the schedule prunes no step, is for another model, or the speed-up cannot
            be met; the error names the largest.
        NothingPrunedError: If no branch can be pruned, or the run met none of the pruned steps.
        RunError: If the run is not the same each time.

    Example:
        >>> plan = calibrate(var, draw, Schedule.preset("var-512"), speedup=2)  # doctest: +SKIP
        >>> fast = fastvar_fx.transform(var, plan)  # doctest: +SKIP
    """
    _check(schedule, speedup, loss, levels)
    subject = Subject(
        model=model,
        runs=tuple(run) if isinstance(run, Sequence) else (run,),
        schedule=schedule,
        levels=tuple(sorted(set(map(float, levels)))),
        logits=logits,
        options=options,
        progress=progress,
    )
    journal = Journal(Path(file) if file is not None else None, _about(subject))
    by_span, depth = measured(subject, journal)
    flops = total_flops(subject)
    budget = Budget.of(subject, flops, speedup, loss)
    plans = [
        plan for curves in by_span if (plan := _planned(subject, curves, depth, budget)) is not None
    ]
    if not plans:
        raise ScheduleError(budget.refusal(by_span))
    best = min(plans, key=lambda plan: plan.rank(budget))
    if not best.saved and loss is not None:
        raise ScheduleError(budget.too_little(by_span))
    progress(best.text(budget))
    return best.schedule


@dataclass(frozen=True)
class Budget:
    """What a plan is to save, or may lose.

    Attributes:
        flops: FLOPs of a dense generation.
        without: FLOPs of those that skipped steps and the end of guidance save.
        tokens: Tokens of a generation.
        saving: What pruning is to save; None if it is as much as the loss permits.
        loss: What it may lose, as a sum over the tokens; None for no bound.
    """

    flops: int
    without: float
    tokens: int
    saving: float | None
    loss: float | None

    @classmethod
    def of(
        cls, subject: Subject, flops: Sequence[int], speedup: float | None, loss: float | None
    ) -> Budget:
        """Returns the budget of a calibration; `flops` are those of each step, dense."""
        schedule = subject.schedule
        without = 0.0
        for step, dense in enumerate(flops):
            skipped = step in schedule.full_steps
            without += dense if skipped else 0 if schedule.guided(step) else dense / 2
        total = sum(flops)
        drawn = [s for s in range(schedule.steps) if s not in schedule.full_steps]
        tokens = sum(map(schedule.tokens, drawn))
        saving = None if speedup is None else max(total - total / speedup - without, 0.0)
        return cls(total, without, tokens, saving, None if loss is None else loss * tokens)

    def speedup(self, saved: float) -> float:
        """Returns the speed-up at which pruning saves so many FLOPs."""
        return self.flops / (self.flops - self.without - saved)

    def refusal(self, by_span: Sequence[Curves]) -> str:
        """Returns why the budget cannot be met, and what can."""
        assert self.saving is not None
        most = max(
            sum(max(option.saved for option in options) for options in curves.values())
            for curves in by_span
        )
        return (
            f"a speed-up of {self.speedup(self.saving):.3g} cannot be met: with every branch at "
            f"the highest level, it is {self.speedup(most):.3g}. Let more steps prune, by ratios "
            f"above 0, or allow higher levels"
        )

    def too_little(self, by_span: Sequence[Curves]) -> str:
        """Returns why nothing may be pruned, and what would have to be lost."""
        options = (o for curves in by_span for each in curves.values() for o in each)
        least = min(option.loss for option in options if option.saved > 0) / self.tokens
        return (
            f"nothing can be pruned at a loss of {(self.loss or 0) / self.tokens:.3g} per token: "
            f"the least that a branch loses is {least:.3g}. Give a higher loss"
        )


@dataclass(frozen=True)
class Plan:
    """A schedule, and what it saves and loses as measured.

    Attributes:
        schedule: The schedule.
        saved: FLOPs saved by pruning.
        loss: What it loses, as a sum over the tokens.
        expected: The sum of what its branches lose alone.
    """

    schedule: Schedule
    saved: float
    loss: float
    expected: float

    def rank(self, budget: Budget) -> float:
        """Returns what is less for a better plan."""
        return -self.saved if budget.saving is None else self.loss

    def text(self, budget: Budget) -> str:
        """Returns a line on the plan."""
        lost, sums = self.loss / budget.tokens, self.expected / budget.tokens
        return (
            f"the plan is {budget.speedup(self.saved):.2f}x as fast by FLOPs, restores from step "
            f"{self.schedule.cache_step}, and loses {lost:.4g} per token (its branches alone: "
            f"{sums:.4g})"
        )


def _planned(subject: Subject, curves: Curves, depth: int, budget: Budget) -> Plan | None:
    """Returns the best plan of some curves; None if it cannot meet the budget.

    Attention saves less at a step if those before have dropped keys, and so a plan as a whole saves
    other FLOPs than its branches alone: it is made again until it saves enough.
    """
    steps = sorted({place.step for place in curves})
    asked = budget.saving
    for _ in range(_ATTEMPTS):
        chosen = divide(curves, saving=asked, loss=budget.loss)
        if asked is not None and sum(option.saved for option in chosen.values()) < asked:
            return None
        schedule = subject.pruning(steps, as_ratios(chosen, steps, depth))
        loss, saved = as_a_whole(subject, schedule)
        if budget.saving is None or saved >= budget.saving:
            return Plan(schedule, saved, loss, sum(option.loss for option in chosen.values()))
        asked = (asked or 0) * _MORE * budget.saving / saved
    return None


def _about(subject: Subject) -> dict[str, Any]:
    """Returns what the measurements depend on, as plain data."""
    options = dict(subject.options)
    method = method_of(options.pop("method", "fastvar"))
    rules = [f"{rule.__module__}.{rule.__qualname__}" for rule in (method.select, method.restore)]
    weights = sha256()
    for tensor in subject.model.parameters():
        ends = tensor.detach().flatten()[[0, -1]] if tensor.numel() else tensor
        weights.update(ends.float().cpu().numpy().tobytes())
    return {
        "schedule": subject.schedule.to_json(),
        "method": [*rules, method.once],
        "levels": subject.levels,
        "logits": subject.logits,
        "number of runs": len(subject.runs),
        "options": {name: str(value) for name, value in options.items()},
        "weights": weights.hexdigest(),
    }


def _check(
    schedule: Schedule, speedup: float | None, loss: float | None, levels: Sequence[float]
) -> None:
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"calibrate takes a fastvar_fx.Schedule with the scales that the loop draws; found "
            f"{type(schedule).__name__}"
        )
    if (speedup is None) == (loss is None):
        raise ArgumentError(f"give either speedup= or loss=; found {speedup} and {loss}")
    if (speedup is not None and not speedup > 1) or (loss is not None and not loss > 0):
        raise ArgumentError(
            f"speedup is above 1 and loss above 0; found {loss if speedup is None else speedup}"
        )
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ArgumentError(f"levels are pruning ratios in (0, 1]; found {tuple(levels)}")
    if not set(schedule.pruned_steps) - set(schedule.full_steps):
        raise ScheduleError(
            f"the schedule prunes no step that is drawn, ratios {schedule.ratios}: give the steps "
            f"that may prune ratios above 0 and below 1; the values do not matter"
        )
