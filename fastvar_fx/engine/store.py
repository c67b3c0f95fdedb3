"""Programs of live blocks: made once per structure and step, shared by equal blocks."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

import passes
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.executor import Ready
from fastvar_fx.engine.generation import Role
from fastvar_fx.engine.kv_buffers import KVBuffers
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.program import Match, Program, StaysDense, call_kind, find
from fastvar_fx.engine.token_map import naming_leaks
from fastvar_fx.errors import ArgumentError, FastVARError, ModelError, raise_to_compiler
from passes.analyse.costs import BranchReport
from passes.refusal import Refusal, RefusedError
from passes.trace.state import Path

log = logging.getLogger(__name__)

_MOST: Final = 16
"""Programs per block and step, and programs per step that no block uses; the others are dropped."""
_MOST_KINDS: Final = 256
"""Kinds of calls that are remembered as met."""
_MOST_IN_VAIN: Final = 4
"""Attempts of a block to open sizes or numbers in vain, after which they stay fixed.

A value that decides the way through the forward can be opened with some earlier values only.
"""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one block does at one step, for the report.

    Attributes:
        layer: The block's index.
        block: Its module path.
        step: The step.
        tokens: The tokens that the block gets.
        branches: A report on each branch.
        program: The program's number; None if there is none.
        refusal: Why the whole block stays dense.
        guided: Whether it runs the whole batch, and not its conditional half.
        caches: Why each cache that it grows is copied, by its place; None for one in a buffer.
    """

    layer: int
    block: str
    step: int
    tokens: int
    branches: tuple[BranchReport, ...] = ()
    program: int | None = None
    refusal: Refusal | None = None
    guided: bool = True
    caches: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Entry:
    """A program in the store, what it does, and the fingerprint of the calls that it holds for."""

    number: int
    key: tuple[Any, ...]
    metas: tuple[Any, ...]
    fingerprint: passes.Fingerprint | None
    program: passes.StepProgram | Refusal
    earlier: Mapping[Any, float] | None = None
    root: _Entry | None = None

    def fits(self, key: object, metas: object, live: passes.Call, mark: object) -> bool:
        """Whether it is for calls with these marks; a refusal may depend on the earlier sizes."""
        if self.earlier is not None and self.earlier != live.varying.earlier:
            return False
        return (self.key, self.metas, self.fingerprint) == (key, metas, mark)


class _RowsFound(NamedTuple):
    """Which inputs of calls of a fingerprint range over the batch, in the order of its inputs."""

    fingerprint: passes.Fingerprint
    half: passes.Half
    dims: tuple[passes.RowDim | None, ...]


class _Pool:
    """The programs that the stores of a model's schedules share.

    Attributes:
        entries: The most recently used first.
        made: How many there were.
        used: What those are of that blocks use.
        rows: Which inputs have rows, by the fingerprints of whole calls, the newest first.
    """

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.made = 0
        self.rows: list[_RowsFound] = []
        self.used: WeakKeyDictionary[Program | StaysDense, _Entry] = WeakKeyDictionary()


class Store:
    """The programs of a transformed model: one per structure and step, shared by equal blocks.

    Attributes:
        records: What each block does at each step met so far, by layer and step.
        trace_seconds: Time spent on tracing, analysis, rewriting and checking.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: KVBuffers | None = None,
        check: Callable[[BlockCall, int], None] = lambda call, step: None,
        ready: Callable[[BlockCall, int], Ready | None] = lambda call, step: None,
        like: Store | None = None,
    ) -> None:
        """Makes an empty store.

        Args:
            plan: What programs are to do.
            buffers: What caches grow in.
            check: Called with each call, and its step, whose program prunes nothing.
            ready: Returns the program that there is for a call, and its step, already.
            like: The store of another schedule of the model, to share programs with.
        """
        self.records: dict[tuple[int, int], StepRecord] = {}
        self.trace_seconds = 0.0
        self._plan = plan
        self._buffers = buffers
        self._check = check
        self._ready = ready
        self._pool: _Pool = like._pool if like else _Pool()
        self._met: set[tuple[Any, ...]] = set()
        self._in_vain: Counter[tuple[Any, ...]] = Counter()

    @property
    def pruned_anything(self) -> bool:
        """Whether any branch of any block prunes at a step that was met."""
        return any(b.kept is not None for r in self.records.values() for b in r.branches)

    def program_for(self, call: BlockCall, role: Role, step: int) -> Match:
        """Returns the program of a step that holds for a call of a role, and its inputs."""
        found = call.matched or call.match(step) or self._make_for(call, step, role)
        if call.compiling:
            return found
        programs = call.site.programs[step]
        if len(programs) > 2:
            _note_use(programs, found[0])
        if not found[0].prunes:
            self._check(call, step)
        return found

    def _make_for(self, call: BlockCall, step: int, role: Role) -> Match:
        if call.compiling:
            raise_to_compiler(
                f"{call.site.name} has no program for this call of step {step}; run "
                f"fastvar_fx.trace(model, run) with these shapes before torch.compile"
            )
        started = time.perf_counter()
        try:
            entry = self._find_or_make(call, step, role)
        except (RuntimeError, ValueError) as error:
            if step in self._plan.pruned_steps[1:] and not isinstance(error, FastVARError):
                self._note_kept_keys(call, error)
            raise
        self.trace_seconds += time.perf_counter() - started
        program = self._bind(call, step, entry)
        return program, program.inputs(call)

    def _bind(self, call: BlockCall, step: int, entry: _Entry) -> Program | StaysDense:
        """Binds a program to the block of a call, and records what it does."""
        site, made = call.site, entry.program
        at = StepRecord(
            layer=site.layer,
            block=site.name,
            step=step,
            tokens=call.tokens,
            guided=call.unguided is None,
        )
        program: Program | StaysDense
        if isinstance(made, Refusal):
            log.info("%s stays dense at step %d: %s", site.name, step, made)
            self.records[site.layer, step] = replace(at, refusal=made)
            program = StaysDense(call)
        else:
            self.records[site.layer, step] = replace(
                at,
                branches=made.branches,
                program=entry.number,
                refusal=made.refusal,
                caches=made.why_copied,
            )
            program = Program(made, call, self._buffers)
        known = site.programs.setdefault(step, [])
        known.insert(0, program)
        del known[_MOST:]
        self._pool.used[program] = entry.root or entry
        self._drop_unused(self._key(call, step))
        return program

    def _drop_unused(self, key: tuple[Any, ...]) -> None:
        """Drops the programs of a key that no block has used for longest, if they are many."""
        pool = self._pool
        used = {id(entry) for entry in pool.used.values()}
        unused = [e for e in pool.entries if e.key == key and id(e) not in used]
        for entry in unused[_MOST:]:
            pool.entries.remove(entry)

    def _note_kept_keys(self, call: BlockCall, error: BaseException) -> None:
        """Adds to an error of the user's code how pruning may have caused it."""
        error.add_note(
            f"since step {self._plan.pruned_steps[0]} the keys cached in {call.site.name} are "
            f"those of kept tokens: a mask over all earlier tokens no longer fits them, because "
            f'its token axis is unknown. branches=("cross_attention", "ffn") keeps all keys'
        )

    # --- finding and making -----------------------------------------------------------------------

    def _find_or_make(self, call: BlockCall, step: int, role: Role) -> _Entry:
        ready = self._ready(call, step)
        if ready is not None:
            number, program = ready
            return _Entry(number, self._key(call, step), (), None, program)
        try:
            with naming_leaks(call.site.name):
                if call.unguided is not None:
                    return self._on_half(call, step, role, call.unguided.half)
                found = self._with_open_sizes(call, step, role)
                return found or self._equal_or_new(call, step, role, call.as_captured())
        except RefusedError as error:
            return _Entry(-1, (), (), None, error.refusal)

    def _on_half(self, call: BlockCall, step: int, role: Role, half: passes.Half) -> _Entry:
        """Returns a program that runs the conditional half of the batch.

        Raises:
            ModelError: If there is none: then no other block may drop its rows either.
        """
        live, known = call.as_captured(), call.site.row_dims
        try:
            if live.stream not in known:
                known |= self._find_rows(live, half)
            rows = {}
            for path, dim in known.items():
                value = find(live.roots(), path)  # a cache may have dropped its rows before
                sizes = value.shape[dim.dim :][:1] if isinstance(value, Tensor) else ()
                if sizes == (dim.size(half.batch),):
                    rows[path] = dim.rows(half)
            entry = self._equal_or_new(call, step, role, replace(live, rows=rows))
            refusal = entry.program if isinstance(entry.program, Refusal) else None
        except RefusedError as error:
            refusal = error.refusal
        if refusal is not None:
            raise ModelError(
                f"{call.site.name} cannot drop the unconditional half of the batch at step "
                f"{step}, and guidance ends for all blocks or for none. {refusal}"
            )
        return entry

    def _find_rows(self, live: passes.Call, half: passes.Half) -> dict[Path, passes.RowDim]:
        """Returns which inputs of a call with the whole batch have rows, as equal calls do."""
        pool = self._pool
        mark = _fingerprint(live, passes.reference(live))
        for found in pool.rows:
            if (found.fingerprint, found.half) == (mark, half):
                dims = found.dims
                break
        else:
            made = passes.find_rows(live, half)
            dims = tuple(made.get(path) for path in mark.inputs)
            pool.rows = [_RowsFound(mark, half, dims), *pool.rows[: _MOST - 1]]
        pairs = zip(mark.inputs, dims, strict=True)
        return {path: dim for path, dim in pairs if dim is not None}

    def _with_open_sizes(self, call: BlockCall, step: int, role: Role) -> _Entry | None:
        """Returns a program that holds for other sizes too and prunes as much, if there is one.

        It takes the place of the block's program that differs from the call in sizes alone.
        """
        known = call.site.programs.get(step, [])
        for program in known:
            varying = program.differs(call) if isinstance(program, Program) else None
            if varying is None:
                continue
            place = (call.site.layer, step, *varying.earlier)
            if self._in_vain[place] >= _MOST_IN_VAIN:
                return None
            opened = replace(call.as_captured(), varying=varying)
            try:
                entry = self._equal_or_new(call, step, role, opened)
            except RefusedError as error:
                entry = _Entry(-1, (), (), None, error.refusal)
            made = entry.program
            if isinstance(made, passes.StepProgram) and made.prunes == program.prunes:
                known.remove(program)
                self._in_vain[place] = 0
                return entry
            log.info("%s at step %d: sizes stay fixed: %s", call.site.name, step, made)
            self._in_vain[place] += 1
        return None

    def _equal_or_new(self, call: BlockCall, step: int, role: Role, live: passes.Call) -> _Entry:
        kind = (step, call.site.forward, *call_kind(call))
        real = None if kind in self._met else passes.reference(live)
        if len(self._met) >= _MOST_KINDS:
            self._met.clear()
        self._met.add(kind)
        # The batch is that of the token map.
        outputs = sorted(role.captured.items())
        captured = tuple((i, x.shape[1:], x.dtype, x.device) for i, x in outputs)
        plan, pool = self._plan, self._pool
        key = self._key(call, step)
        mark, metas, entry = self._known(key, captured, live, real)
        if entry is None and real is None:
            real = passes.reference(live)  # after it, weights may have another dtype
            mark, metas, entry = self._known(key, captured, live, real)
        if entry is not None:
            return entry
        assert real is not None
        name = f"{pool.made:02}_{call.site.name}_step{step}"
        context = passes.Context(
            call=live,
            real=real,
            kinds=plan.kinds_at(step, call.site.layer) if role.step is not None else (),
            step=self._pruned(call, step, role),
            captured=call.left(role.captured),
            later=plan.later_rows(step, call.site.layer),
            dump=passes.Dump(plan.dump_dir, name) if plan.dump_dir else None,
        )
        program = self._make(context, name)
        refused = isinstance(program, Refusal) and program.code == "FVX019"
        earlier = live.varying.earlier if refused else None
        entry = _Entry(pool.made, key, metas, mark, program, earlier)
        pool.made += 1
        pool.entries.insert(0, entry)
        return entry

    def _known(
        self, key: Any, captured: Any, live: passes.Call, real: passes.Reference | None
    ) -> tuple[passes.Fingerprint, tuple[Any, ...], _Entry | None]:
        """Returns a call's fingerprint, what else decides, and the program that it may share."""
        mark = _fingerprint(live, real)
        metas = (*captured, *map(live.rows.get, mark.inputs))
        entries = self._pool.entries
        for entry in entries:
            if entry.fits(key, metas, live, mark):
                entries.remove(entry)
                entries.insert(0, entry)
                return mark, metas, _moved(entry, mark)
        return mark, metas, None

    def _pruned(self, call: BlockCall, step: int, role: Role) -> passes.Step | None:
        """Returns what a block keeps at a step; None for one that drops no tokens."""
        plan = self._plan
        if step not in plan.pruned_steps or role.step is None:
            return None
        around = plan.around(step, call.tokens)
        captured = {x.shape[1] for x in role.captured.values()}
        taken = call.selection is not None
        return plan.pruned(step, call.site.layer, around, captured, taken=taken)

    def _key(self, call: BlockCall, step: int) -> tuple[Any, ...]:
        """Returns what programs for a call depend on, besides the call."""
        site = call.site
        return (*self._plan.key(step, site.layer), call.selection is not None, site.prunes)

    def _make(self, context: passes.Context, name: str) -> passes.StepProgram | Refusal:
        try:
            return _compiled(context)
        except RefusedError as error:
            return error.refusal
        except passes.OperatorError as error:
            raise ArgumentError(str(error)) from error
        except passes.PassError as error:
            if self._plan.strict:
                error.add_note("this is a bug of the compiler: strict=False leaves the block dense")
                raise
            log.exception("%s stays dense", name)
            return Refusal("FVX020", str(error))


def _compiled(context: passes.Context) -> passes.StepProgram:
    try:
        return passes.run(context)
    except RefusedError as error:
        if not context.call.rows:
            raise
        return replace(passes.run(context, passes.ROWS), refusal=error.refusal)


def _moved(entry: _Entry, call: passes.Fingerprint) -> _Entry:
    """Returns an entry whose program reads and writes the places of a call."""
    made, mark = entry.program, entry.fingerprint
    if isinstance(made, Refusal) or mark is None:
        return entry
    return replace(entry, program=made.moved(mark, call), fingerprint=call, root=entry)


def _note_use(programs: list[Program | StaysDense], used: Program | StaysDense) -> None:
    """Moves a program to the front of a block's, but for the two there: guidance alternates."""
    if used in programs[2:]:
        programs.remove(used)
        programs.insert(0, used)


def _fingerprint(call: passes.Call, real: passes.Reference | None) -> passes.Fingerprint:
    try:
        return passes.fingerprint(call)
    except RefusedError:
        if real is None:
            passes.reference(call)  # if the real call fails too, that is the error to raise
        raise
