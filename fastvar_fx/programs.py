"""Programs of live blocks: made once per structure and step, shared by equal blocks."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

import passes
from fastvar_fx.bound import BoundProgram, StaysDense, meta_of
from fastvar_fx.errors import ModelError, RunError
from fastvar_fx.plan import Plan, StepRecord
from passes.analyse.branches import find_branches
from passes.graph import placeholder_of
from passes.refusal import Refusal, RefusedError
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import Path, get

log = logging.getLogger(__name__)

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Block:
    """A block that programs are made for.

    Attributes:
        layer: Its index among the blocks.
        name: Its module path in the model.
        forward: Its class's own forward, a function of the block and the call's arguments.
    """

    layer: int
    name: str
    forward: Forward


@dataclass
class _Entry:
    """A program in the store, and the calls it stands for."""

    number: int
    step: int
    fingerprint: tuple[Any, ...]
    program: passes.StepProgram | Refusal


class ProgramStore:
    """The programs of a transformed model: one per structure and step, shared by equal blocks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._entries: list[_Entry] = []
        self._met: set[tuple[Any, ...]] = set()
        self._fixed: set[tuple[Any, ...]] = set()
        self._streams: dict[tuple[Forward, int, tuple[str, ...]], Path | Refusal] = {}

    def find_or_make(
        self,
        block: Block,
        step: int,
        call: passes.Call,
        captured: dict[int, Tensor],
        known: list[BoundProgram | StaysDense],
    ) -> BoundProgram | StaysDense:
        """Returns the program for a live call, and adds it to those known.

        Args:
            block: The block that is called.
            step: The step it is at.
            call: The call.
            captured: Its features by branch index, at a pruned step.
            known: Its programs of this step, none of which stands for the call. Where one differs
                from the call in sizes alone, a program that leaves these open takes its place.
        """
        started = time.perf_counter()
        try:
            entry = self._with_open_sizes(block, step, call, captured, known)
            entry = entry or self._find_or_make(block, step, call, captured)
        except RefusedError as error:
            entry = _Entry(-1, step, (), error.refusal)
        except passes.LeakedTensorError as error:
            raise ModelError(
                f"{block.name} cannot be traced: {error}. Keep such state in attributes, lists or "
                f"dicts of the block, or hand it in; then transform the model anew"
            ) from error
        self._plan.trace_seconds += time.perf_counter() - started
        program = entry.program
        refused = isinstance(program, Refusal)
        self._plan.records[block.layer, step] = StepRecord(
            block.layer,
            block.name,
            step,
            self._plan.schedule.tokens(step),
            () if refused else program.branches,  # type: ignore[union-attr]
            None if refused else entry.number,
            program if refused else None,  # type: ignore[arg-type]
            () if refused else program.caches,  # type: ignore[union-attr]
        )
        if refused:
            log.info("%s stays dense at step %d: %s", block.name, step, program)
        bound = None
        if isinstance(program, passes.StepProgram):
            bound = BoundProgram(program, call, self._plan.kv_buffers)
        known.append(bound or StaysDense.of(call))
        return known[-1]

    def _with_open_sizes(
        self,
        block: Block,
        step: int,
        call: passes.Call,
        captured: dict[int, Tensor],
        known: list[BoundProgram | StaysDense],
    ) -> _Entry | None:
        """Returns a program that stands for other sizes too and prunes as much, if there is one."""
        for program in reversed(known):
            if not isinstance(program, BoundProgram):
                continue
            varying = program.differs(call)
            if varying is None:
                continue
            place = (block.forward, step, *varying.earlier)
            if place in self._fixed:
                return None
            try:
                entry = self._find_or_make(block, step, replace(call, varying=varying), captured)
            except RefusedError as error:
                entry = _Entry(-1, step, (), error.refusal)
            made = entry.program
            if isinstance(made, passes.StepProgram) and made.prunes == program.prunes:
                known.remove(program)
                return entry
            log.info("%s at step %d: sizes stay fixed: %s", block.name, step, made)
            self._fixed.add(place)
            return None
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramStore:
        """Programs are bound to live modules: a copy of the model makes its own."""
        memo[id(self)] = made = ProgramStore(copy.deepcopy(self._plan, memo))
        return made

    def _find_or_make(
        self, block: Block, step: int, call: passes.Call, captured: dict[int, Tensor]
    ) -> _Entry:
        kind = (step, block.forward, *StaysDense.of(call).key)
        real = None if kind in self._met else passes.reference(call)
        self._met.add(kind)
        metas = tuple((i, meta_of(t)) for i, t in sorted(captured.items()))
        mark = (metas, *self._fingerprint(call, real))
        for entry in self._entries:
            if entry.step == step and entry.fingerprint == mark:
                return entry
        program = self._make(block, step, call, real or passes.reference(call), captured)
        entry = _Entry(len(self._entries), step, mark, program)
        self._entries.append(entry)
        return entry

    @staticmethod
    def _fingerprint(call: passes.Call, real: passes.Reference | None) -> tuple[Any, ...]:
        try:
            return passes.fingerprint(call)
        except RefusedError:
            if real is None:
                passes.reference(call)  # if the real call fails too, that is the error to raise
            raise

    def _make(
        self,
        block: Block,
        step: int,
        call: passes.Call,
        real: passes.Reference,
        captured: dict[int, Tensor],
    ) -> passes.StepProgram | Refusal:
        plan, schedule = self._plan, self._plan.schedule
        number = len(self._entries)
        dump = plan.dump_dir and passes.Dump(plan.dump_dir, f"{number:02}_{block.name}_step{step}")
        at = None
        if step != schedule.cache_step:
            scales = (schedule.scales[schedule.cache_step], schedule.scales[step])
            last, once = step == plan.last_step, plan.operators.selects_once
            at = passes.Step(schedule.kept(step), *scales, last=last, selects_once=once)
        context = passes.Context(
            call=call,
            real=real,
            kinds=plan.kinds,
            step=at,
            operators=plan.operators if at else None,
            captured=captured,
            later=plan.later_rows(step),
            dump=dump or None,
        )
        try:
            return passes.run(context)
        except RefusedError as error:
            return error.refusal
        except passes.PassError as error:
            if plan.strict:
                raise
            log.exception("%s stays dense at step %d", block.name, step)
            return Refusal("FVX020", str(error))

    def stream_of(
        self, forward: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Path:
        """Returns where the (B, L, C) input of such a call is.

        Raises:
            RunError: If no argument can be the token map.
        """
        key = (forward, len(args), tuple(kwargs))
        if key not in self._streams:
            self._streams[key] = _find_stream(partial(forward, module), module, args, kwargs)
        found = self._streams[key]
        if isinstance(found, Refusal):
            raise RunError(
                f"a block of {type(module).__name__} was called without a (B, L, C) token map; "
                f"found {_describe(args, kwargs)}. Name the transformer blocks with blocks="
            )
        return found


def _find_stream(
    forward: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Path | Refusal:
    values = {("args", i): value for i, value in enumerate(args)}
    values |= {("kwargs", name): value for name, value in kwargs.items()}  # type: ignore[misc]
    maps = [place for place, value in values.items() if _is_map(value)]
    paths: list[Path] = [(("item", root), ("item", key)) for root, key in maps]
    if len(paths) == 1:
        return paths[0]
    if not paths:
        return Refusal("FVX003", "no argument is a (B, L, C) tensor")
    call = passes.Call(forward, module, args, kwargs)
    results, _ = passes.reference(call)
    shapes = {result.shape for result in results}
    origin = {"args": list(args), "kwargs": kwargs}
    likely = [path for path in paths if get(origin, path).shape in shapes] or paths
    if len(likely) == 1:
        return likely[0]
    try:
        program = capture(call)
    except RefusedError:
        return likely[0]
    return next((path for path in likely if _carries_trunk(program, path)), likely[0])


def _carries_trunk(program: BlockProgram, path: Path) -> bool:
    stream = placeholder_of(program, path)
    if stream is None:
        return False
    try:
        find_branches(program.graph_module.graph, stream, program.result_count)
    except RefusedError:
        return False
    return True


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    shown = [f"{k}: {_shape_text(v)}" for k, v in named.items()]
    return ", ".join(shown) or "no arguments"


def _shape_text(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
