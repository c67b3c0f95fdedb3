"""What a transformed block does at a call: which step it is, which program runs, what is cached.

The path of a call: `BlockRuntime.call` reads the token count; structure steps run the user's own
forward; at the cache step and the pruned steps a `BoundProgram` reads the block's tensors, runs the
graph and writes the state back. Programs are made on the first call of a step, by `ProgramStore`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx import ops
from fastvar_fx.errors import CaptureMismatchError, ModelError, NothingPrunedError, RunError
from fastvar_fx.schedule import Schedule
from passes.branches import Kind, find_branches
from passes.capture import LeakedTensorError, capture, fingerprint, placeholder_of
from passes.pipeline import (
    BranchReport,
    Call,
    Dump,
    Reference,
    StepProgram,
    make_capture,
    make_pruned,
    reference,
)
from passes.prune import Step
from passes.refusal import Refusal, RefusedError
from passes.state import Path, Write, apply, get

log = logging.getLogger(__name__)

StepOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], int | None]
"""Tells the step of a block call, (block, args, kwargs) -> index; None if it is no step."""

_CAPTURED: Final = -1
"""The position of a block that has captured and not yet pruned."""


@dataclass
class StepRecord:
    """What one block does at one step, for the report."""

    layer: int
    block: str
    step: int
    tokens: int
    branches: tuple[BranchReport, ...]
    program: int | None
    refusal: Refusal | None = None


@dataclass
class Plan:
    """What is fixed for all blocks of a transformed model, and what they noted."""

    schedule: Schedule
    kinds: tuple[Kind, ...]
    step_of: StepOf | None
    strict: bool
    dump_dir: FilePath | None
    last_layer: int
    operators: ops.Operators
    records: dict[tuple[int, int], StepRecord] = field(default_factory=dict)
    dense_calls: Counter[int] = field(default_factory=Counter)
    early_calls: Counter[int] = field(default_factory=Counter)
    trace_seconds: float = 0.0

    def __post_init__(self) -> None:
        schedule = self.schedule
        self.pruned_steps = schedule.pruned_steps
        self.cache_tokens = schedule.tokens(schedule.cache_step)
        steps = (schedule.cache_step, *self.pruned_steps) if self.pruned_steps else ()
        self.step_of_tokens = {schedule.tokens(step): step for step in steps}
        self.watch = GenerationWatch(schedule)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A copy has met no step yet."""
        memo[id(self)] = made = replace(
            self, records={}, dense_calls=Counter(), early_calls=Counter(), trace_seconds=0.0
        )
        return made

    @property
    def pruned_anything(self) -> bool:
        """Whether any branch of any block prunes at a step that was met."""
        return any(b.kept is not None for r in self.records.values() for b in r.branches)


@dataclass
class _Entry:
    """A program in the store, and the calls it stands for."""

    number: int
    step: int
    fingerprint: tuple[Any, ...]
    program: StepProgram | Refusal


class GenerationWatch:
    """Notices whole generations that pass without a pruned step, where the schedule has some."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._known = {schedule.tokens(step) for step in range(schedule.steps)}
        self._current: list[int] = []
        self._ended: list[list[int]] = []

    def fits(self) -> None:
        """The cache step or a pruned step was met."""
        self._current, self._ended = [], []

    def saw(self, tokens: int) -> None:
        """A dense call was met; a length that comes back means that another generation began.

        Raises:
            RunError: If generations end without a pruned step: at once if their lengths are not
                the schedule's, else, for they may have been cut off, after three alike.
        """
        if tokens not in self._current:
            self._current.append(tokens)
            return
        if tokens == self._current[-1]:
            return
        self._ended = [*self._ended[-2:], self._current]
        self._current = [tokens]
        strange = [length for length in self._ended[-1] if length not in self._known]
        alike = len(self._ended) == 3 and self._ended[0] == self._ended[1] == self._ended[2]
        if len(strange) >= 2 or alike:
            seen = self._current = self._ended[-1]  # so that the next run is told too
            wanted = [self._schedule.tokens(step) for step in self._schedule.pruned_steps]
            raise RunError(
                f"the schedule prunes steps of {wanted} tokens, but the last generation had none: "
                f"its blocks saw {seen} tokens. Give the schedule that the loop runs"
            )


class ProgramStore:
    """The programs of a transformed model: one per structure and step, shared by equal blocks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._entries: list[_Entry] = []
        self._met: set[tuple[Any, ...]] = set()
        self._streams: dict[tuple[type, int, tuple[str, ...]], Path | Refusal] = {}

    def find_or_make(
        self, block: BlockRuntime, step: int, call: Call, captured: dict[int, Tensor]
    ) -> BoundProgram | StaysDense:
        """Returns the program for a live call."""
        started = time.perf_counter()
        try:
            entry = self._find_or_make(block, step, call, captured)
        except RefusedError as error:
            entry = _Entry(-1, step, (), error.refusal)
        except LeakedTensorError as error:
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
        )
        if refused:
            log.info("%s stays dense at step %d: %s", block.name, step, program)
            return StaysDense.of(call)
        assert isinstance(program, StepProgram)
        return BoundProgram(program, call)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramStore:
        """Programs are bound to live modules: a copy of the model makes its own."""
        memo[id(self)] = made = ProgramStore(copy.deepcopy(self._plan, memo))
        return made

    def _find_or_make(
        self, block: BlockRuntime, step: int, call: Call, captured: dict[int, Tensor]
    ) -> _Entry:
        kind = (step, type(call.module).__mro__[1], *StaysDense.of(call).key)
        real = None if kind in self._met else reference(call)
        self._met.add(kind)
        metas = tuple((i, _meta(t)) for i, t in sorted(captured.items()))
        mark = (metas, *self._fingerprint(call, real))
        for entry in self._entries:
            if entry.step == step and entry.fingerprint == mark:
                return entry
        program = self._make(block, step, call, real or reference(call), captured)
        entry = _Entry(len(self._entries), step, mark, program)
        self._entries.append(entry)
        return entry

    @staticmethod
    def _fingerprint(call: Call, real: Reference | None) -> tuple[Any, ...]:
        try:
            return fingerprint(call.forward, call.module, call.args, call.kwargs)
        except RefusedError:
            if real is None:
                reference(call)  # if the real call fails too, that is the error to raise
            raise

    def _make(
        self,
        block: BlockRuntime,
        step: int,
        call: Call,
        real: Reference,
        captured: dict[int, Tensor],
    ) -> StepProgram | Refusal:
        plan = self._plan
        number = len(self._entries)
        dump = plan.dump_dir and Dump(plan.dump_dir, f"{number:02}_{block.name}_step{step}")
        try:
            if step == plan.schedule.cache_step:
                return make_capture(call, real, plan.kinds, dump or None)
            scales = (plan.schedule.scales[plan.schedule.cache_step], plan.schedule.scales[step])
            at = Step(plan.schedule.kept(step), *scales)
            return make_pruned(call, real, plan.kinds, at, plan.operators, captured, dump or None)
        except RefusedError as error:
            return error.refusal

    def stream_of(
        self, forward: Any, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Path:
        """Returns where the (B, L, C) input of such a call is.

        Raises:
            RunError: If no argument can be the token map.
        """
        key = (type(block), len(args), tuple(kwargs))
        if key not in self._streams:
            self._streams[key] = _find_stream(forward, block, args, kwargs)
        found = self._streams[key]
        if isinstance(found, Refusal):
            raise RunError(
                f"a block of {type(block).__name__} was called without a (B, L, C) token map; "
                f"found {_describe(args, kwargs)}. Name the transformer blocks with blocks="
            )
        return found


def _find_stream(
    forward: Any, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Path | Refusal:
    places: list[tuple[Path, Any]] = [((("item", i),), v) for i, v in enumerate(args)]
    places = [((("item", "args"), *path), value) for path, value in places]
    places += [((("item", "kwargs"), ("item", k)), v) for k, v in kwargs.items()]
    maps = [path for path, value in places if _is_map(value)]
    if len(maps) == 1:
        return maps[0]
    refusal = Refusal("FVX003", "no argument is a (B, L, C) tensor")
    if not maps:
        return refusal
    program = capture(forward, block, args, kwargs)
    for path in maps:
        stream = placeholder_of(program, path)
        try:
            if stream is not None:
                find_branches(program.graph_module.graph, stream, program.result_count)
                return path
        except RefusedError as error:
            refusal = error.refusal
    return refusal


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    shown = [f"{k}: {_meta_text(v)}" for k, v in named.items()]
    return ", ".join(shown) or "no arguments"


def _meta_text(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _describe_batch(size: int, device: torch.device, dtype: torch.dtype | None) -> str:
    return f"batch {size} on {device}, {str(dtype).removeprefix('torch.')}"


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.dtype, tensor.device)


class BoundProgram:
    """A program bound to the live tensors of one block.

    Attributes:
        features: The branches whose features it makes or takes.
    """

    def __init__(self, program: StepProgram, call: Call) -> None:
        captured_call = program.captured
        block = call.module
        self.features = program.features
        self._graph = program.graph_module
        self._reads = [_reader(block, path) for path in program.inputs]
        self._metas = [_meta(_read(r, call.args, call.kwargs)) for r in self._reads]
        self._form = (len(call.args), tuple(call.kwargs))
        self._constants = _constant_guards(block, captured_call.constants, call)
        self._results = captured_call.result_count
        self._single = captured_call.result.is_leaf()
        self._result_spec = captured_call.result
        self._result_leaves = captured_call.result_leaves
        self._writes = [_writer(block, write) for write in captured_call.writes]
        self._written = sum(leaf is ... for w in captured_call.writes for leaf in w.leaves)
        self._autocast = _autocast()

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it stands for this call: same form, shapes, dtypes, devices and plain values."""
        if (len(args), tuple(kwargs)) != self._form or _autocast() != self._autocast:
            return False
        for (holder, key), expected in self._constants:
            if _value(holder, key, args, kwargs) != expected:
                return False
        for reader, meta in zip(self._reads, self._metas, strict=True):
            tensor = _read(reader, args, kwargs)
            if not isinstance(tensor, Tensor) or _meta(tensor) != meta:
                return False
        return True

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], features: Sequence[Tensor]
    ) -> tuple[Any, Sequence[Tensor]]:
        """Runs the graph on the live tensors and writes the block's state.

        Returns:
            What the block returns, and the features if this is the cache step's program.
        """
        inputs = [_read(reader, args, kwargs) for reader in self._reads]
        outputs = self._graph(*inputs, *features)
        place = self._results
        for writer in self._writes:
            place = writer(outputs, place, args, kwargs)
        return self._result(outputs), outputs[self._results + self._written :]

    def _result(self, outputs: Sequence[Tensor]) -> Any:
        if self._single:
            return outputs[0]
        leaves = _fill_tensors(self._result_leaves, outputs, 0)
        return pytree.tree_unflatten(leaves, self._result_spec)


def _fill_tensors(leaves: Sequence[Any], outputs: Sequence[Tensor], place: int) -> list[Any]:
    filled = []
    for leaf in leaves:
        filled.append(outputs[place] if leaf is ... else leaf)
        place += leaf is ...
    return filled


@dataclass(frozen=True)
class StaysDense:
    """Stands in the place of a program where a call was refused."""

    stream: Path
    meta: tuple[Any, ...]
    form: tuple[int, tuple[str, ...]]

    @classmethod
    def of(cls, call: Call) -> StaysDense:
        """Remembers the call's form and the shape, dtype and device of its token map."""
        form = (len(call.args), tuple(call.kwargs))
        return cls(call.stream, _meta(_token_map(call.stream, call.args, call.kwargs)), form)

    @property
    def key(self) -> tuple[Any, ...]:
        """What it compares, hashable."""
        return (*self.meta, self.form)

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it stands for this call."""
        form = (len(args), tuple(kwargs))
        return form == self.form and _meta(_token_map(self.stream, args, kwargs)) == self.meta


def _token_map(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    (_, root), (_, key) = path
    return args[key] if root == "args" else kwargs[key]  # type: ignore[no-any-return]


Reader = tuple[Any, Any]
"""(holder, key): an attribute of a module; or ("args" | "kwargs", path) to look up in the call."""


def _reader(block: nn.Module, path: Path) -> Reader:
    (_, root), *rest = path
    if root != "module":
        return (root, tuple(rest))
    if all(kind == "attr" for kind, _ in rest):
        holder = get(block, tuple(rest[:-1]))
        if isinstance(holder, nn.Module):
            return (holder, rest[-1][1])
    return (block, tuple(rest))


def _read(reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _value(reader[0], reader[1], args, kwargs)


def _value(holder: Any, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(key, str):
        return getattr(holder, key, None)
    origin = args if holder == "args" else kwargs if holder == "kwargs" else holder
    try:
        return get(origin, key)
    except (AttributeError, LookupError):
        return None


def _constant_guards(
    block: nn.Module, constants: Iterable[Path], call: Call
) -> list[tuple[Reader, Any]]:
    """Guards of the plain values a call could read; a container of plain values counts as one."""
    guards: dict[Any, tuple[Reader, Any]] = {}
    for path in constants:
        if path[0][1] == "module":
            guards[path] = _guard(_reader(block, path), call)
            continue
        top = path[:2]
        whole = get({"args": list(call.args), "kwargs": call.kwargs}, top)
        leaves = pytree.tree_leaves(whole)
        if any(isinstance(leaf, Tensor) or hasattr(leaf, "__dict__") for leaf in leaves):
            guards[path] = _guard(_reader(block, path), call)
        else:
            guards[top] = (_reader(block, top), pytree.tree_map(lambda leaf: leaf, whole))
    return list(guards.values())


def _guard(reader: Reader, call: Call) -> tuple[Reader, Any]:
    """Expects what this block's own call holds: blocks that share a program may differ in it."""
    return reader, _read(reader, call.args, call.kwargs)


def _writer(block: nn.Module, write: Write) -> Callable[..., int]:
    (_, root), *rest = write.path
    count = sum(leaf is ... for leaf in write.leaves)
    owner = get(block, tuple(rest)) if root == "module" and _is_module_path(rest) else None
    fixed = owner if isinstance(owner, nn.Module) and not write.deleted else None

    def replay(
        outputs: Sequence[Tensor], place: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        if fixed is not None and count == 1 and len(write.leaves) == 1:
            setattr(fixed, write.step[1], outputs[place])
            return place + 1
        origin = block if root == "module" else args if root == "args" else kwargs
        container = get(origin, tuple(rest))
        apply(write, container, _fill_tensors(write.leaves, outputs, place))
        return place + count

    return replay


def _is_module_path(path: Sequence[Any]) -> bool:
    return all(kind == "attr" for kind, _ in path)


def _autocast() -> tuple[Any, ...]:
    """The surrounding autocast, which the ops of a graph obey and its dtypes depend on."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )


class BlockRuntime:
    """The state of one transformed block.

    Attributes:
        layer: Its index among the blocks.
        name: Its module path in the model.
    """

    def __init__(
        self, layer: int, name: str, forward: Any, plan: Plan, store: ProgramStore
    ) -> None:
        self.layer = layer
        self.name = name
        self._forward = forward
        self._plan = plan
        self._store = store
        self._step_of_tokens = plan.step_of_tokens
        self._limit = plan.cache_tokens
        self._cache_step = plan.schedule.cache_step
        self._positions = {step: i for i, step in enumerate(plan.pruned_steps)}
        self._streams: dict[tuple[int, tuple[str, ...]], Path] = {}
        self._programs: dict[int, list[BoundProgram | StaysDense]] = {}
        self._began = False
        self._features: list[dict[int, Tensor]] | None = None
        self._dtype: torch.dtype | None = None
        self._position = _CAPTURED
        self._call = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRuntime:
        """A copy starts anew: no features, no programs."""
        plan, store = copy.deepcopy((self._plan, self._store), memo)
        return BlockRuntime(self.layer, self.name, self._forward, plan, store)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call of the block."""
        step = self._step(block, args, kwargs)
        if step is None:
            return self._dense(block, args, kwargs)
        if block.training:
            raise ModelError(
                f"{self.name} is in training mode and the schedule prunes; call model.eval() first"
            )
        if step == self._cache_step:
            return self._capture(block, args, kwargs)
        return self._pruned(step, block, args, kwargs)

    # --- steps ---------------------------------------------------------------------------------

    def _step(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Tells the step, if it is the cache step or a pruned one."""
        if self._plan.step_of is not None:
            step = self._plan.step_of(block, args, kwargs)
            if step is not None and (step == self._cache_step or step in self._positions):
                return step
            if step is None or step < self._cache_step:
                self._begin(self._stream(block, args, kwargs).shape[1])
            return None
        tokens = self._stream(block, args, kwargs).shape[1]
        if tokens < self._limit:
            self._begin(tokens)
            return None
        step = self._step_of_tokens.get(tokens)
        if step is None:
            self._note_dense(tokens)
        return step

    def _stream(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Returns the block's (B, L, C) input."""
        form = (len(args), tuple(kwargs))
        path = self._streams.get(form)
        if path is None:
            bound = partial(self._forward, block)
            path = self._streams[form] = self._store.stream_of(bound, block, args, kwargs)
        return _token_map(path, args, kwargs)

    def _begin(self, tokens: int) -> None:
        """A structure step: whatever an earlier generation left is stale."""
        self._note_dense(tokens)
        if self._features is not None:
            self._forget()
        if not self._began:
            self._began = True

    def _note_dense(self, tokens: int) -> None:
        if not torch.compiler.is_compiling():
            self._plan.dense_calls[tokens] += 1
            if self.layer == self._plan.last_layer:
                self._plan.watch.saw(tokens)

    def _forget(self) -> None:
        """Frees the captured features and the place in the generation."""
        self._features = None
        self._position = _CAPTURED
        self._call = 0

    def _dense(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._forward(block, *args, **kwargs)

    # --- the cache step ------------------------------------------------------------------------

    def _capture(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        repeated = self._features is not None and self._position == _CAPTURED and self._began
        program = self._program(self._cache_step, block, args, kwargs, {})
        if program is None:
            result, features = self._dense(block, args, kwargs), {}
        else:
            result, made = program.run(args, kwargs, ())
            features = dict(zip(program.features, made, strict=True))
        if not torch.compiler.is_compiling():
            self._plan.watch.fits()
        self._position = _CAPTURED
        self._call = 0
        self._dtype = self._stream(block, args, kwargs).dtype
        if repeated and self._features is not None:
            self._features = [*self._features, features]
        else:
            self._features = [features]
        return result

    # --- pruned steps --------------------------------------------------------------------------

    def _pruned(
        self, step: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        position = self._positions[step]
        if self._features is None or position not in (self._position, self._position + 1):
            return self._out_of_order(step, block, args, kwargs)
        self._call = self._call + 1 if position == self._position else 0
        self._position = position
        if not torch.compiler.is_compiling():
            self._plan.watch.fits()
        captured = self._captured(step, block, args, kwargs)
        program = self._program(step, block, args, kwargs, captured)
        last = position == len(self._positions) - 1 and self._call == len(self._features) - 1
        if last:
            self._forget()
            self._began = False
        if program is None:
            return self._dense(block, args, kwargs)
        return program.run(args, kwargs, [captured[i] for i in program.features])[0]

    def _captured(
        self, step: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[int, Tensor]:
        """Returns the features of this call of the step, checked against the live batch."""
        assert self._features is not None
        if self._call >= len(self._features):
            raise RunError(
                f"{self.name} runs for the {self._call + 1}. time in step {step}, but ran only "
                f"{len(self._features)} times in the cache step {self._cache_step}; give a "
                f"cache_step at which every block runs as often as in the pruned steps"
            )
        captured = self._features[self._call]
        x = self._stream(block, args, kwargs)
        live = (x.shape[0], x.device, x.dtype)
        for feature in captured.values():
            was = (feature.shape[0], feature.device, self._dtype)
            if live != was:
                self._forget()
                raise CaptureMismatchError(
                    f"{self.name} at step {step}: asked to restore {_describe_batch(*live)} from "
                    f"what the cache step {self._cache_step} captured, {_describe_batch(*was)}. "
                    f"Keep batch, device and dtype within one generation"
                )
        return captured

    def _out_of_order(
        self, step: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A pruned step's length without this generation's capture: source tokens, or a mistake."""
        self._forget()
        if self._began:
            self._began = False
            schedule = self._plan.schedule
            raise RunError(
                f"{self.name}: step {step} ({schedule.tokens(step)} tokens) came without the steps "
                f"before it: the features of cache step {self._cache_step} "
                f"({schedule.tokens(self._cache_step)} tokens) or of the pruned step before are "
                f"missing. Dense so far: {sorted(self._plan.dense_calls)} tokens. Give the "
                f"schedule that the loop runs: scales {schedule.scales}"
            )
        if not torch.compiler.is_compiling():
            self._plan.early_calls[self._plan.schedule.tokens(step)] += 1
        return self._dense(block, args, kwargs)

    # --- programs ------------------------------------------------------------------------------

    def _program(
        self,
        step: int,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        captured: dict[int, Tensor],
    ) -> BoundProgram | None:
        """Returns the program of this step that stands for this call, making it if need be."""
        known = self._programs.setdefault(step, [])
        for program in known:
            if program.matches(args, kwargs):
                return program if isinstance(program, BoundProgram) else None
        if torch.compiler.is_compiling():
            raise RunError(
                f"{self.name} has no program for this call of step {step}; run "
                f"fastvar_fx.trace(model, run) with these shapes before torch.compile"
            )
        path = self._streams[len(args), tuple(kwargs)]
        call = Call(partial(self._forward, block), block, args, kwargs, path)
        made = self._store.find_or_make(self, step, call, captured)
        known.append(made)
        self._check_anything_pruned(step)
        return made if isinstance(made, BoundProgram) else None

    def _check_anything_pruned(self, step: int) -> None:
        """After the last block has met a pruned step, something must have been pruned."""
        plan = self._plan
        if step == self._cache_step or self.layer != plan.last_layer or plan.pruned_anything:
            return
        from fastvar_fx.report import Report

        message = (
            f"the schedule prunes step {step}, but no branch of any block could be pruned:\n"
            f"{Report.of(plan)}"
        )
        if plan.strict:
            raise NothingPrunedError(message)
        log.warning("%s", message)
