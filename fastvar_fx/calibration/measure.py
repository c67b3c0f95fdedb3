"""Measures what each branch loses and saves at each ratio: one generation for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fastvar_fx.calibration.divide import Curves, Option, Place
from fastvar_fx.calibration.reference import Losses, Reference
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import find_blocks
from fastvar_fx.errors import ArgumentError, NothingPrunedError
from fastvar_fx.measuring.runs import Progress, Runs
from fastvar_fx.schedule import ByKind, Ratio, Schedule
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
        options: Further arguments of `transform`.
        progress: Called with a few words before each run.
    """

    model: nn.Module
    runs: Sequence[Run]
    schedule: Schedule
    levels: Sequence[float]
    logits: str | None
    options: Mapping[str, Any]
    progress: Progress

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that may prune: from the first that the schedule prunes to the last drawn."""
        last = self.schedule.steps - len(self.schedule.full_steps)
        return tuple(range(self.schedule.pruned_steps[0], last))

    def transformed(self, *schedules: Schedule) -> Any:
        """Returns the model, transformed to run some schedules."""
        return transform(self.model, schedules, strict=False, **self.options)

    @property
    def dense(self) -> Schedule:
        """The schedule with every drawn step dense."""
        return self.pruning(self.steps, [0.0] * len(self.steps))

    def pruning(self, steps: Sequence[int], ratios: Sequence[Any]) -> Schedule:
        """Returns the schedule with the ratios of its last drawn steps, others being dense.

        The cache step is the last one before these.
        """
        full = self.schedule.full_steps
        return replace(self.schedule, ratios=(*ratios, *[1.0] * len(full)), cache_step=steps[0] - 1)

    @property
    def spans(self) -> list[tuple[int, ...]]:
        """The steps that may prune together: the last ones, up to all of them.

        Each is another choice of the cache step, the one before them.
        """
        return [self.steps[i:] for i in range(len(self.steps))]


class Probe(NamedTuple):
    """One branch that prunes alone, at all steps after the cache step.

    Attributes:
        cache_step: The step that it is restored from.
        layer: The index of its block.
        kind: What it is.
        ratio: Its pruning ratio.
        run: Which of the generations runs.
    """

    cache_step: int
    layer: int
    kind: Kind
    ratio: float
    run: int

    def __str__(self) -> str:
        """Its name in a file and for progress."""
        return (
            f"layer {self.layer} {self.kind} {self.ratio:g} from step {self.cache_step}, "
            f"run {self.run + 1}"
        )


class Found(NamedTuple):
    """What is lost and the FLOPs that are saved in a generation, by step."""

    loss: Losses
    saved: dict[int, int]


class Journal:
    """What was found so far; kept in a file, if there is one, so that a calibration can go on."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """Reads what an earlier calibration has found.

        Args:
            path: The file; None to keep nothing.
            about: What the findings depend on, as plain data.

        Raises:
            ArgumentError: If the file holds something else.
        """
        self._path = path
        self._about = json.loads(json.dumps(about))
        self.found: dict[str, Found] = {}
        if path is None or not path.exists():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            about, found = data["about"], data["found"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"{path} holds no calibration; give another file, or delete it"
            ) from error
        if about != self._about:
            differs = [key for key in self._about if about.get(key) != self._about[key]]
            raise ArgumentError(
                f"{path} holds a calibration with other {', '.join(differs)}; give another file, "
                f"or delete it"
            )
        self.found = {
            key: Found(*({int(step): n for step, n in part.items()} for part in parts))
            for key, parts in found.items()
        }

    def put(self, key: str, found: Found) -> None:
        """Adds what was found, and writes the file whole or not at all."""
        self.found[key] = found
        if self._path is None:
            return
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps({"about": self._about, "found": self.found}), encoding="utf-8")
        part.replace(self._path)


def measured(subject: Subject, journal: Journal) -> tuple[list[Curves], int]:
    """Returns the curves of all branches for each of the spans, and how many blocks there are.

    Args:
        subject: What is calibrated.
        journal: What was found before; what is missing is measured.

    Raises:
        NothingPrunedError: If no branch of the model can be pruned.
    """
    branches, depth = _branches(subject)
    runs = range(len(subject.runs))

    def probes(steps: Sequence[int], layer: int, kind: Kind, ratio: float) -> list[Probe]:
        return [Probe(steps[0] - 1, layer, kind, ratio, run) for run in runs]

    each = [
        (steps, *branch, ratio)
        for steps in subject.spans
        for branch in branches
        for ratio in subject.levels
    ]
    wanted = sorted((probe for one in each for probe in probes(*one)), key=lambda p: p.run)
    missing = [probe for probe in wanted if str(probe) not in journal.found]
    if missing:
        _measure(subject, journal, missing, depth)
    curves: list[Curves] = [
        {
            Place(step, *branch): [
                _option(journal, probes(steps, *branch, ratio), step) for ratio in subject.levels
            ]
            for step in steps
            for branch in branches
        }
        for steps in subject.spans
    ]
    return curves, depth


def _option(journal: Journal, probes: Sequence[Probe], step: int) -> Option:
    """Returns the mean over the runs of what a branch loses and saves at a step."""
    found = [journal.found[str(probe)] for probe in probes]
    loss = sum(each.loss[step] for each in found) / len(found)
    return Option(probes[0].ratio, loss, sum(each.saved[step] for each in found) / len(found))


def _branches(subject: Subject) -> tuple[list[tuple[int, Kind]], int]:
    """Returns the branches that can prune, as (layer, kind), and how many blocks there are."""
    subject.progress("tracing")
    subject.transformed(subject.schedule)  # raises if it is for another model
    steps = subject.steps
    fast = subject.transformed(subject.pruning(steps, [subject.levels[0]] * len(steps)))
    rows = trace(fast, subject.runs[0]).rows
    found = {(row.layer, cast("Kind", row.kind)) for row in rows if row.kept < row.tokens}
    if not found:
        raise NothingPrunedError(f"there is nothing to calibrate: {explain(fast)}")
    return sorted(found), len(Engine.of(fast).plan.blocks)


def _measure(subject: Subject, journal: Journal, probes: Sequence[Probe], depth: int) -> None:
    """Measures what is missing; the probes are in the order of the runs."""
    schedules = {probe[:-1]: _alone(subject, probe, depth) for probe in probes}
    dense = subject.dense
    fast = subject.transformed(dense, *schedules.values())
    reference, recorded = Reference(fast, subject.logits), None
    for number, probe in enumerate(probes):
        run = subject.runs[probe.run]
        if probe.run != recorded:
            use(fast, dense)
            with reference.recording():
                run(fast)
            recorded = probe.run
        subject.progress(f"{probe}: {number + 1} of {len(probes)}")
        use(fast, schedules[probe[:-1]])
        journal.put(str(probe), _compared(fast, reference, run))


def _alone(subject: Subject, probe: Probe, depth: int) -> Schedule:
    """Returns the schedule in which one branch prunes alone."""
    layers: list[Ratio] = [0.0] * depth
    layers[probe.layer] = ByKind(**{probe.kind: probe.ratio})
    steps = next(steps for steps in subject.spans if steps[0] - 1 == probe.cache_step)
    return subject.pruning(steps, [tuple(layers)] * len(steps))


def _compared(fast: nn.Module, reference: Reference, run: Run) -> Found:
    """Runs a generation of the schedule in use, and returns what it loses and saves."""
    with reference.comparing() as loss:
        run(fast)
    engine = Engine.of(fast)
    steps = engine.plan.pruned_steps
    return Found(loss, {step: reference.calls[step] * saved_flops(engine, step) for step in steps})


def as_a_whole(subject: Subject, schedule: Schedule) -> tuple[float, float]:
    """Returns what a schedule loses and the FLOPs that it saves, means over the runs."""
    if schedule.pruned_steps == schedule.full_steps:
        return 0.0, 0.0
    subject.progress(f"a plan from step {schedule.cache_step}")
    dense = subject.dense
    fast = subject.transformed(dense, schedule)
    reference = Reference(fast, subject.logits)
    loss = saved = 0.0
    for run in subject.runs:
        use(fast, dense)
        with reference.recording():
            run(fast)
        use(fast, schedule)
        found = _compared(fast, reference, run)
        loss += sum(found.loss.values()) / len(subject.runs)
        saved += sum(found.saved.values()) / len(subject.runs)
    return loss, saved


def saved_flops(engine: Engine, step: int) -> int:
    """Returns the FLOPs that pruning saves at each call of a step.

    Those of dense attention count all keys of earlier steps, also where these were pruned.
    """
    schedule, plan = engine.plan.schedule, engine.plan
    saved = 0
    for (layer, at), record in engine.store.records.items():
        for branch in record.branches if at == step else ():
            saved += branch.flops - branch.pruned_flops
            if branch.keys is not None and branch.keys > record.tokens:
                earlier = [s for s in plan.pruned_steps if s < step]
                kept = {
                    s: plan.kept(s, layer).get(branch.kind, schedule.tokens(s)) for s in earlier
                }
                dropped = sum(schedule.tokens(s) - count for s, count in kept.items())
                saved += branch.attended_flops * dropped // branch.keys
    return saved


def total_flops(subject: Subject) -> list[int]:
    """Returns the FLOPs of the blocks at each step of a dense generation."""
    blocks = tuple(find_blocks(subject.model, subject.options.get("blocks")))
    run = partial(subject.runs[0], subject.model)
    counted = Runs(run, subject.model, blocks, subject.schedule)
    with torch.no_grad():
        counted.count()
    return counted.flops
