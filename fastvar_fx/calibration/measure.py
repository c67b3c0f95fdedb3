"""Measures what branches lose and save at each ratio: one generation for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fastvar_fx.calibration.divide import DENSE, Curves, Option, Place, as_ratios
from fastvar_fx.calibration.journal import Found, Journal
from fastvar_fx.calibration.reference import (
    Guidance,
    Losses,
    Reference,
    fingerprint,
    watched_module,
)
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import find_blocks, module_at
from fastvar_fx.errors import NothingPrunedError, RunError
from fastvar_fx.measuring.runs import Progress, Runs
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import explain, trace, transform, use
from passes.analyse.branches import Kind

Run = Callable[[Any], object]
"""Runs one generation of a model."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is calibrated.

    Attributes:
        model: The dense model.
        runs: Generations of it, each the same whenever it is run.
        schedule: The scales, and which steps may prune.
        levels: The ratios that a branch may have, ascending, in (0, 1].
        logits: As for `Reference`.
        guidance: As for `Reference`; with it, a plan may end guidance.
        options: Further arguments of `transform`.
        progress: Called with a few words before each run.
    """

    model: nn.Module
    runs: Sequence[Run]
    schedule: Schedule
    levels: Sequence[float]
    logits: str | None
    guidance: Guidance | None
    options: Mapping[str, Any]
    progress: Progress

    @property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of the blocks."""
        return tuple(find_blocks(self.model, self.options.get("blocks")))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that may prune: from the first that the schedule prunes to the last drawn."""
        return tuple(range(self.schedule.pruned_steps[0], self.drawn_steps))

    def transformed(self, *schedules: Schedule) -> Any:
        """Returns the model, transformed to run some schedules."""
        return transform(self.model, schedules, strict=False, **self.options)

    def fingerprint(self, model: nn.Module) -> AbstractContextManager[Callable[[], str]]:
        """Returns a context for a generation of the model or a transform; see `fingerprint`."""
        last = module_at(model, self.blocks[-1])
        return fingerprint(watched_module(model, self.logits, last))

    def dense_fingerprints(self) -> list[str]:
        """Returns the fingerprint of each run of the dense model."""
        found = []
        for number, run in enumerate(self.runs, 1):
            self.progress(f"dense, run {number}")
            with self.fingerprint(self.model) as digest:
                run(self.model)
            found.append(digest())
        return found

    @property
    def dense(self) -> Schedule:
        """The schedule with every drawn step dense."""
        return self.pruning(self.steps, [0.0] * len(self.steps))

    @property
    def drawn_steps(self) -> int:
        """How many steps the loop draws."""
        return self.schedule.steps - len(self.schedule.full_steps)

    @property
    def ends(self) -> range:
        """The steps at which a plan may end guidance, if the schedule does not."""
        free = self.guidance is not None and self.schedule.guidance_until is None
        return range(1, self.drawn_steps if free else 1)

    def pruning(
        self, steps: Sequence[int], ratios: Sequence[Any], until: int | None = None
    ) -> Schedule:
        """Returns the schedule with the ratios of its last drawn steps, others being dense.

        The cache step is the last one before these.

        Args:
            steps: The steps.
            ratios: Their ratios.
            until: The first step without guidance; None to leave guidance as it is.
        """
        full = self.schedule.full_steps
        pruned = replace(
            self.schedule, ratios=(*ratios, *[1.0] * len(full)), cache_step=steps[0] - 1
        )
        return pruned if until is None else replace(pruned, guidance_until=until)

    @property
    def spans(self) -> list[tuple[int, ...]]:
        """The steps that may prune together: the last ones, up to all of them.

        Each is another choice of the cache step, the one before them.
        """
        return [self.steps[i:] for i in range(len(self.steps))]


def alone(subject: Subject, journal: Journal, branches: Branches, steps: Sequence[int]) -> Curves:
    """Returns what each branch loses and saves at each level, all else being dense.

    Args:
        subject: What is calibrated.
        journal: What was found before; what is missing is measured.
        branches: The branches that can prune.
        steps: The steps at which they do; they are restored from the one before.
    """
    depth, origin = branches.depth, f"from step {steps[0] - 1}"
    named = {
        (branch, level): f"layer {branch[0]} {branch[1]} {level:g} {origin}"
        for branch in branches.found
        for level in subject.levels
    }
    dense = {Place(step, *branch): 0.0 for step in steps for branch in branches.found}
    plans = {
        name: dense | {Place(step, *branch): level for step in steps}
        for (branch, level), name in named.items()
    }
    found = measured(subject, journal, plans, steps, depth)
    return {
        place: [
            DENSE,
            *(_option(r, found[named[place[1:], r]], place.step) for r in subject.levels),
        ]
        for place in dense
    }


def in_context(
    subject: Subject,
    journal: Journal,
    ratios: Mapping[Place, float],
    until: int | None,
    depth: int,
) -> Curves:
    """Returns what a plan loses and saves more if a branch prunes by a level less or more.

    A token that one branch has dropped is worth less to the next one, so that branches lose less
    together than the sum of what they lose alone.

    Args:
        subject: What is calibrated.
        journal: What was found before; what is missing is measured.
        ratios: The ratios of the plan.
        until: Its first step without guidance; None to leave guidance as it is.
        depth: How many blocks there are.
    """
    levels = (0.0, *subject.levels)
    steps = sorted({place.step for place in ratios})
    plans = {"": dict(ratios)}
    for layer, kind in sorted({place[1:] for place in ratios}):
        for way, by in (("lower", -1), ("higher", 1)):
            moved = {
                place: _moved(levels, ratio, by) if place[1:] == (layer, kind) else ratio
                for place, ratio in ratios.items()
            }
            if moved != ratios:
                plans[f", layer {layer} {kind} {way}"] = moved
    mine = name_of(ratios, until)
    named = {f"{mine}{name}": plan for name, plan in plans.items()}
    found = measured(subject, journal, named, steps, depth, until)
    loss, saved = found[mine]
    curves: dict[Place, list[Option]] = {place: [Option(r, 0, 0)] for place, r in ratios.items()}
    for name, plan in named.items():
        for place in (place for place, ratio in plan.items() if ratio != ratios[place]):
            option = _option(plan[place], found[name], place.step)
            more = option.loss - loss[place.step], option.saved - saved[place.step]
            curves[place].append(Option(option.ratio, *more))
    return curves


def name_of(ratios: Mapping[Place, float], until: int | None) -> str:
    """Returns a name for a plan, the same for the same ratios and the same end of guidance."""
    ends = "" if until is None else f" without guidance from step {until}"
    return f"plan {sha256(repr(sorted(ratios.items())).encode()).hexdigest()[:8]}{ends}"


def _moved(levels: Sequence[float], ratio: float, by: int) -> float:
    """Returns the next lower or higher level; the end ones stay."""
    return levels[min(max(levels.index(ratio) + by, 0), len(levels) - 1)]


def _option(ratio: float, found: Found, step: int) -> Option:
    return Option(ratio, found.loss[step], found.saved[step])


class Branches(NamedTuple):
    """The branches that can prune.

    Attributes:
        found: Each as its layer and kind.
        depth: How many blocks there are.
        fingerprint: That of the generation in which all of them prune.
    """

    found: Sequence[tuple[int, Kind]]
    depth: int
    fingerprint: str

    @classmethod
    def of(cls, subject: Subject) -> Branches:
        """Finds them in a generation in which all that can do prune, at a level below 1 if any.

        Raises:
            NothingPrunedError: If none can.
        """
        subject.progress("tracing")
        subject.transformed(subject.schedule)  # raises if it is for another model
        steps, depth = subject.steps, len(subject.blocks)
        level = max((level for level in subject.levels if level < 1), default=1.0)
        fast = subject.transformed(subject.pruning(steps, [(level,) * depth] * len(steps)))
        with subject.fingerprint(fast) as digest:
            rows = trace(fast, subject.runs[0]).rows
        found = {(row.layer, cast("Kind", row.kind)) for row in rows if row.kept < row.tokens}
        if not found:
            raise NothingPrunedError(f"there is nothing to calibrate: {explain(fast)}")
        return cls(sorted(found), depth, digest())


def measured(
    subject: Subject,
    journal: Journal,
    plans: Mapping[str, Mapping[Place, float]],
    steps: Sequence[int],
    depth: int,
    until: int | None = None,
) -> dict[str, Found]:
    """Returns what plans lose and save, means over the runs; what is missing is measured.

    Args:
        subject: What is calibrated.
        journal: What was found before.
        plans: The ratios of their branches, by name; others are dense.
        steps: The steps that may prune in them.
        depth: How many blocks there are.
        until: Their first step without guidance; None to leave guidance as it is.
    """
    runs = range(len(subject.runs))
    for number in runs:
        missing = [name for name in plans if _named(name, number) not in journal.found]
        if missing:
            schedules = {
                name: subject.pruning(steps, as_ratios(plans[name], steps, depth), until)
                for name in missing
            }
            _measure(subject, journal, schedules, number)
    found = {name: [journal.found[_named(name, run)] for run in runs] for name in plans}
    return {
        name: Found(*(_means([each[part] for each in of_name], steps) for part in range(2)))
        for name, of_name in found.items()
    }


def _named(name: str, run: int) -> str:
    return f"{name}, run {run + 1}"


def _means(parts: Sequence[Mapping[int, float]], steps: Sequence[int]) -> dict[int, float]:
    """Returns the means of what is known by step; 0 at those of `steps` where nothing is."""
    known = sorted({*steps, *(step for part in parts for step in part)})
    return {step: sum(part.get(step, 0) for part in parts) / len(parts) for step in known}


def _measure(
    subject: Subject, journal: Journal, schedules: Mapping[str, Schedule], number: int
) -> None:
    """Measures schedules in one of the runs."""
    run, dense = subject.runs[number], subject.dense
    fast = subject.transformed(dense, *schedules.values())
    reference = Reference(fast, subject.logits, subject.guidance)
    use(fast, dense)
    with reference.recording():
        run(fast)
    for count, (name, schedule) in enumerate(schedules.items(), 1):
        subject.progress(f"{_named(name, number)}: {count} of {len(schedules)}")
        use(fast, schedule)
        with reference.comparing() as loss:
            run(fast)
        _check_finite(loss, _named(name, number))
        saved = saved_flops(Engine.of(fast))
        total = {
            step: float(reference.calls[step] * n)
            for step, n in saved.items()
            if step not in dense.full_steps  # drawn from the cache in the dense generation too
        }
        journal.put(_named(name, number), Found(loss, total))


def _check_finite(loss: Losses, name: str) -> None:
    """Raises a `RunError` if a loss is infinite or NaN."""
    for step, lost in loss.items():
        if not math.isfinite(lost):
            raise RunError(
                f"the loss of {name} at step {step} is {lost}: what is compared there, dense or "
                f"pruned, holds NaN or infinities. Logits may be -inf only where they are so in "
                f"both: mask the same ones each time, with guidance those of both halves; and run "
                f"a model that overflows in float16 in bfloat16 or float32"
            )


def saved_flops(engine: Engine) -> dict[int, int]:
    """Returns the FLOPs that pruning saves at each call of each pruned step.

    Those of dense attention count all keys of earlier steps, also where these were pruned.
    """
    schedule, plan = engine.plan.schedule, engine.plan
    saved = dict.fromkeys(plan.pruned_steps, 0)
    for (layer, step), record in engine.store.records.items():
        for branch in record.branches if step in saved else ():
            saved[step] += branch.flops - branch.pruned_flops
            if branch.keys is not None and branch.keys > record.tokens:
                earlier = [s for s in plan.pruned_steps if s < step]
                kept = {
                    s: plan.kept(s, layer).get(branch.kind, schedule.tokens(s)) for s in earlier
                }
                dropped = sum(schedule.tokens(s) - count for s, count in kept.items())
                saved[step] += branch.attended_flops * dropped // branch.keys
    return saved


def total_flops(subject: Subject) -> tuple[list[int], int]:
    """Returns the FLOPs of the blocks in a dense generation.

    Returns:
        Those of the model at each step, and those in all that are left where the schedule skips
        steps or ends guidance.
    """
    fast = subject.transformed(subject.dense)
    subject.runs[0](fast)  # tracing would be counted
    drawn = Engine.of(fast).plan.drawn_steps
    left = _flops(subject, fast, drawn)
    return _flops(subject, subject.model, subject.schedule.steps), sum(left)


def _flops(subject: Subject, model: Any, drawn: int) -> list[int]:
    """Returns the FLOPs of the blocks at each step of a generation."""
    run = partial(subject.runs[0], model)
    counted = Runs(run, model, subject.blocks, subject.schedule, drawn)
    with torch.no_grad():
        counted.count()
    return counted.flops
