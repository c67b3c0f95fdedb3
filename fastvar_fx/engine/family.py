"""The schedules that a model may run, such as one per aspect ratio, and which of them it runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn

import torch

from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import Executor
from fastvar_fx.engine.generation import Generation, Role
from fastvar_fx.engine.plan import Plan
from fastvar_fx.errors import RunError, ScheduleError
from fastvar_fx.ops import Scale
from fastvar_fx.schedule import Schedule

Steps = Generator[Any, Any, Any]
"""A loop that yields its steps."""


class Seen(NamedTuple):
    """A call as one of the schedules sees it."""

    engine: Engine
    call: BlockCall
    role: Role


class Family:
    """The engines of a transformed model, one per schedule.

    Which one runs is what `use` says, else what the scales say that the loop hands to a method of
    the model or to a block, else what fits the token counts of the generation so far. Each thread
    may run another one.

    Attributes:
        engines: One per schedule.
        lock: Held by a block that runs, because making a program puts stand-ins into the model.
        decided: Whether there is nothing to find out: one schedule, of square maps.
        traced: What `fastvar_fx.trace` ran last.
        pruned: The module paths of the blocks that a schedule prunes.
    """

    def __init__(self, plans: Iterable[Plan], executor: Executor) -> None:
        first, *others = plans
        self._latest = Engine(first, executor)  # of any thread
        self.engines = (self._latest, *(Engine(p, executor, self._latest) for p in others))
        for index, engine in enumerate(self.engines):
            engine.family, engine.index = self, index
        self.lock: AbstractContextManager[Any] = threading.RLock()
        shapes = [scale for plan in (first, *others) for scale in plan.schedule.scales]
        self.decided = not others and all(scale[-1] == scale[-2] for scale in shapes)
        blocks = enumerate(first.blocks)
        self.pruned = [name for i, name in blocks if any(p.prunes(i) for p in (first, *others))]
        self.traced: Callable[[Any], object] | None = None
        self._used: Engine | None = None
        self._threads = threading.local()  # the choice of each, for as long as it runs

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        """Returns one for a copy of the model: without programs, and in no generation."""
        executor = self._latest.executor.anew()
        made = memo[id(self)] = Family((engine.plan for engine in self.engines), executor)
        for mine, engine in zip(made.engines, self.engines, strict=True):
            mine.generation = engine.generation.copy()
            if mine.buffers is not None and engine.buffers is not None:
                mine.buffers.replayed = engine.buffers.replayed
        made._latest = made.engines[self.current.index]
        made._used = made._latest if self._used else None
        return made

    @property
    def current(self) -> Engine:
        """The engine that ran last in this thread; of one that ran none, the last of any."""
        if self.decided or torch.compiler.is_compiling():  # nothing asks for the thread then
            return self._latest
        return self._used or self._choice.current or self._latest

    @property
    def running(self) -> Sequence[Engine]:
        """The engines whose schedules this thread may be running."""
        if self.decided:
            return self.engines
        choice = self._choice
        return (self._used,) if self._used else self._running(choice.handed) or choice.fits

    def use(self, schedule: Schedule | None) -> None:
        """Makes all generations run a schedule; None finds it out again.

        Raises:
            ScheduleError: If it is none of those that the model was transformed with.
        """
        found = [engine for engine in self.engines if engine.plan.schedule == schedule]
        if schedule is not None and not found:
            known = "; ".join(str(engine.plan.schedule.scales) for engine in self.engines)
            raise ScheduleError(
                f"use takes one of the {len(self.engines)} schedules that the model was "
                f"transformed with, of scales {known}; found {schedule}"
            )
        with self.lock:
            for engine in self.engines:
                engine.generation.leave()
        self._used = found[0] if found else None
        if found:
            self._latest = self._choice.current = found[0]

    def fitting(self, call: BlockCall) -> Sequence[Engine]:
        """Returns the engines whose schedules a call may belong to.

        Raises:
            RunError: If the loop hands in scales that have a schedule's token counts, but other
                shapes.
        """
        if self._used is not None:
            return (self._used,)
        choice = self._choice
        handed = choice.handed or _handed_scales((*call.args, *call.kwargs.values()))
        fits = self._running(handed) or choice.by_tokens(call, self.engines)
        shaped = [engine for engine in fits if _agrees(engine.plan.schedule, handed)]
        if not shaped:
            self._raise_shapes(handed)
        self._latest = choice.current = shaped[0]
        return shaped

    @property
    def _choice(self) -> _Choice:
        try:
            return self._threads.choice  # type: ignore[no-any-return]
        except AttributeError:
            made = self._threads.choice = _Choice(self.engines)
            return made

    def agreed(self, seen: Sequence[Seen]) -> Seen:
        """Returns the call as the schedule sees it that it is run for.

        Raises:
            RunError: If it is pruned in one way by one schedule and in another by the next.
        """
        captures = [each for each in seen if each.role.captures]
        unguided = {each.call.unguided for each in seen}
        if len(unguided) > 1:
            self._raise_undecided(seen[0].call, [each.engine.plan.schedule for each in seen])
        steps = [(each.engine, each.role.step) for each in seen if each.role.step is not None]
        if len(steps) == len(captures):  # none prunes
            return captures[0] if captures else seen[0]
        layer = seen[0].call.site.layer
        keys = {engine.plan.key(step, layer) for engine, step in steps}
        if len(keys) > 1 or len(steps) < len(seen):
            self._raise_undecided(seen[0].call, [each.engine.plan.schedule for each in seen])
        return seen[0]

    @contextmanager
    def handing(self, values: Iterable[Any]) -> Iterator[None]:
        """Within it, the loop runs the scales that are among its arguments, if any are."""
        choice = self._choice
        before = choice.handed
        choice.handed = _handed_scales(values) or before
        known = self._running(choice.handed)
        if known:
            self._latest = choice.current = known[0]
        try:
            yield
        finally:
            choice.handed = before

    def resumed(
        self, steps: Generator[Any, Any, Any], values: Iterable[Any]
    ) -> Generator[Any, Any, Any]:
        """Runs a generator of the loop's, which was made with some arguments, within `handing`."""
        sent = None
        try:
            while True:
                with self.handing(values):
                    value = steps.send(sent)
                sent = yield value
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    @property
    def within(self) -> bool:
        """Whether a loop that is a method of the model is under way in this thread."""
        return self.current.generation.watch.within

    @contextmanager
    def whole(self, *, judges: bool = True) -> Iterator[None]:
        """Within it, generations begin and end: a loop, unless another one is around it.

        Args:
            judges: Whether a generation that does not run its schedule is an error.

        Raises:
            RunError: At its end, if the last generation did not run its schedule, or ran fewer
                calls at its last step.
        """
        with ExitStack() as within:
            within.callback(self._end_loop)
            for engine in self.engines:
                within.enter_context(engine.generation.watch.whole())
                within.enter_context(engine.generation.skipped.whole())
            yield
        generation = self.current.generation
        if judges and not generation.watch.within:
            generation.watch.finished()
            if generation.watch.drew_steps:
                self._check_calls(generation)

    def _end_loop(self) -> None:
        generation = self.current.generation
        if generation.watch.drew_steps and not generation.watch.within:
            generation.end_loop()

    def _check_calls(self, generation: Generation) -> None:
        try:
            generation.check_calls()
        except RunError:
            generation.aborted()  # and so no error again when the next one begins
            raise

    def _running(self, scales: Sequence[Scale]) -> list[Engine]:
        """Returns the engines whose schedules run these very scales."""
        own = [(engine, engine.plan.schedule.scales) for engine in self.engines]
        return [e for e, mine in own if len(mine) == len(scales) and _same(mine, scales)]

    def _raise_shapes(self, handed: Sequence[Scale]) -> NoReturn:
        raise RunError(
            f"the loop runs scales {tuple(handed)}, but the schedule has maps of other shapes with "
            f"as many tokens: {'; '.join(str(e.plan.schedule.scales) for e in self.engines)}. Give "
            f"transform the schedule that the loop runs, or a list of all that it may run"
        )

    def _raise_undecided(self, call: BlockCall, fits: Sequence[Schedule]) -> NoReturn:
        raise RunError(
            f"{call.site.name} was called with {call.tokens} tokens, and several schedules fit the "
            f"token counts so far: {'; '.join(str(schedule.scales) for schedule in fits)}. Say "
            f"which one runs with fastvar_fx.use(model, schedule), or hand its scales to the loop"
        )


class _Choice:
    """What is known of the schedule that a thread's loop runs.

    Attributes:
        current: The engine that ran last.
        handed: The scales that the loop was called with.
        fits: The engines that fit the token counts of the generation so far.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.current: Engine | None = None
        self.handed: Sequence[Scale] = ()
        self.fits: Sequence[Engine] = engines
        self._seen: list[int] = []  # the token counts of the generation, each once

    def by_tokens(self, call: BlockCall, engines: Sequence[Engine]) -> Sequence[Engine]:
        """Returns the engines whose schedules begin with the token counts of the generation."""
        tokens = call.tokens
        if self._seen and tokens == self._seen[-1]:
            return self.fits
        known = tokens in self._seen  # a generation begins, or a step is drawn again
        seen = self._seen[: self._seen.index(tokens) + 1] if known else [*self._seen, tokens]
        fits = [engine for engine in engines if engine.lengths[: len(seen)] == seen]
        if fits:
            for engine in self.fits:
                if engine not in fits:
                    engine.generation.leave()
            self._seen, self.fits = seen, fits
            return fits
        paused = [engine for engine in engines if engine.generation.expects(call)]
        return paused if len(paused) == 1 else self.fits


def _handed_scales(values: Iterable[Any]) -> Sequence[Scale]:
    """Returns the first of some values that is a list of (h, w) or (m, h, w), of ints."""
    for value in values:
        if isinstance(value, (list, tuple)) and len(value) > 1 and all(map(_is_scale, value)):
            return [tuple(scale) for scale in value]
    return ()


def _is_scale(value: Any) -> bool:
    sides = isinstance(value, (list, tuple)) and len(value) in (2, 3)
    return sides and all(type(side) is int and side > 0 for side in value)


def _agrees(schedule: Schedule, handed: Sequence[Scale]) -> bool:
    """Whether scales are those of a schedule, or have other token counts."""
    pairs = list(zip(schedule.scales, handed, strict=False))
    alike = all(math.prod(scale) == math.prod(other) for scale, other in pairs)
    return not alike or _same(schedule.scales, handed)


def _same(scales: Sequence[Scale], handed: Sequence[Scale]) -> bool:
    """Whether (m, h, w) or (h, w) are the same maps, as far as there are some in both."""
    pairs = zip(scales, handed, strict=False)
    return all(a[-2:] == b[-2:] and math.prod(a) == math.prod(b) for a, b in pairs)
