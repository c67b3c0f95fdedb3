"""Programs of live blocks: made once per structure and step, bound to each block's tensors.

A `BoundProgram` reads what its graph takes from the block and the call, runs the graph, and writes
the block's state back. It holds only for calls like the one it was made for; `matches` tells.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx.errors import ModelError, RunError
from fastvar_fx.plan import Plan, StepRecord
from passes.branches import find_branches
from passes.capture import (
    BlockProgram,
    LeakedTensorError,
    capture,
    fingerprint,
    placeholder_of,
    run_eagerly,
)
from passes.pipeline import (
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
from passes.sizes import Place, Varying
from passes.state import Path, Write, apply, get, roots

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
    program: StepProgram | Refusal


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
        call: Call,
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
        bound = BoundProgram(program, call) if isinstance(program, StepProgram) else None
        known.append(bound or StaysDense.of(call))
        return known[-1]

    def _with_open_sizes(
        self,
        block: Block,
        step: int,
        call: Call,
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
            if isinstance(made, StepProgram) and made.prunes == program.prunes:
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
        self, block: Block, step: int, call: Call, captured: dict[int, Tensor]
    ) -> _Entry:
        kind = (step, block.forward, *StaysDense.of(call).key)
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
            return fingerprint(call.forward, call.module, call.args, call.kwargs, call.varying)
        except RefusedError:
            if real is None:
                reference(call)  # if the real call fails too, that is the error to raise
            raise

    def _make(
        self,
        block: Block,
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
            at = Step(plan.schedule.kept(step), *scales, last=step == plan.last_step)
            return make_pruned(call, real, plan.kinds, at, plan.operators, captured, dump or None)
        except RefusedError as error:
            return error.refusal
        except (AssertionError, AttributeError, LookupError, TypeError) as error:
            log.exception("%s stays dense at step %d: the compiler failed", block.name, step)
            return Refusal("FVX020", f"{type(error).__name__}: {error}")

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
    results, _ = run_eagerly(forward, module, args, kwargs)
    shapes = {result.shape for result in results}
    origin = {"args": list(args), "kwargs": kwargs}
    likely = [path for path in paths if get(origin, path).shape in shapes] or paths
    if len(likely) == 1:
        return likely[0]
    try:
        program = capture(forward, module, args, kwargs)
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
    shown = [f"{k}: {_meta_text(v)}" for k, v in named.items()]
    return ", ".join(shown) or "no arguments"


def _meta_text(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _meta(value: Any, open_dims: Collection[int] = ()) -> tuple[Any, ...]:
    """Returns what a program needs of an input; None stands for a size that it leaves open."""
    if not isinstance(value, Tensor):
        return (type(value),)
    shape: tuple[int | None, ...] = value.shape
    if open_dims:
        shape = tuple(None if d in open_dims else size for d, size in enumerate(shape))
    return (shape, value.dtype, value.device)


def _changed_dims(was: tuple[Any, ...], now: tuple[Any, ...]) -> set[int] | None:
    """Returns the dims in which two inputs differ; None if they differ in more than that."""
    if was[1:] != now[1:] or len(was) == 1:
        return set() if was == now else None
    if len(was[0]) != len(now[0]):
        return None
    return {d for d, (a, b) in enumerate(zip(was[0], now[0], strict=True)) if a != b}


def _size(value: Any, dim: int | None) -> int | None:
    if dim is None:
        return value if type(value) is int else None
    return value.shape[dim] if isinstance(value, Tensor) and dim < value.dim() else None


def _find(origin: Any, path: Path) -> Any:
    try:
        return get(origin, path)
    except (AttributeError, LookupError, TypeError):
        return None


class BoundProgram:
    """A program bound to the live tensors of one block.

    Attributes:
        features: The branches whose features it makes or takes.
        prunes: The branches that prune.
    """

    def __init__(self, program: StepProgram, call: Call) -> None:
        captured_call = program.captured
        block = call.module
        self._conditions = captured_call.conditions
        self._places = [(_reader(block, path), dim) for path, dim in self._conditions.places]
        self.features = program.features
        self.prunes = program.prunes
        self._graph = program.graph_module
        self._reads = [_reader(block, path) for path in program.inputs]
        values = [_read(r, call.args, call.kwargs) for r in self._reads]
        self._made_at = dict(zip(program.inputs, map(_meta, values), strict=True))
        self._open = [self._conditions.dims(path) for path in program.inputs]
        self._metas = [_meta(v, dims) for v, dims in zip(values, self._open, strict=True)]
        self._form = (len(call.args), tuple(call.kwargs))
        origin = roots(block, call.args, call.kwargs)
        self._plain = {path: _find(origin, path) for path in captured_call.constants}
        self._constants = _constant_guards(block, captured_call, call)
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
        for reader, meta, dims in zip(self._reads, self._metas, self._open, strict=True):
            if _meta(_read(reader, args, kwargs), dims) != meta:
                return False
        return not self._places or self._sizes_fit(args, kwargs)

    def _sizes_fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        sizes = [_size(_read(r, args, kwargs), dim) for r, dim in self._places]
        return None not in sizes and self._conditions.hold(*sizes)

    def differs(self, call: Call) -> Varying | None:
        """Returns the sizes in which a call differs from its own, if it differs in nothing else.

        Sizes that it leaves open already are among them.
        """
        if (len(call.args), tuple(call.kwargs)) != self._form or _autocast() != self._autocast:
            return None
        origin = roots(call.module, call.args, call.kwargs)
        earlier: dict[Place, int] = {}
        for path, was in self._plain.items():
            now = _find(origin, path)
            if type(now) is int and type(was) is int:
                if now != was or (path, None) in self._conditions.places:
                    earlier[path, None] = was
            elif now != was:
                return None
        for path, meta in self._made_at.items():
            dims = _changed_dims(meta, _meta(_find(origin, path)))
            if dims is None or (dims and path == call.stream):
                return None
            for dim in dims | self._conditions.dims(path):
                earlier[path, dim] = meta[0][dim]
        return Varying(earlier) if earlier else None

    def misses_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a tensor that it reads from the block, or from a cache it is given, is gone."""
        return any(
            not isinstance(_read(reader, args, kwargs), Tensor)
            for reader, meta in zip(self._reads, self._metas, strict=True)
            if len(meta) > 1 and not _is_argument(reader)
        )

    def first_rows(
        self, batch: int, live: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> set[int]:
        """Returns which of `batch` samples comes first now, by the inputs cut to `live` samples.

        An input of `batch` samples that was sliced lies in memory that still holds all of them, and
        its offset tells its place there. One that was computed anew tells nothing.
        """
        tensors = [_read(reader, args, kwargs) for reader in self._reads]
        return {
            tensor.storage_offset() // tensor.stride(0)
            for tensor, (shape, *_) in zip(tensors, self._metas, strict=True)
            if isinstance(tensor, Tensor)
            and (shape[:1], tensor.shape[:1]) == ((batch,), (live,))
            and 0 < batch * tensor.stride(0) * tensor.element_size() == _bytes_held(tensor)
        }

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


def _bytes_held(tensor: Tensor) -> int:
    """The size of the memory that a tensor, perhaps a view, lies in."""
    return tensor.untyped_storage().nbytes()


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
        return cls(call.stream, _meta(token_map(call.stream, call.args, call.kwargs)), form)

    @property
    def key(self) -> tuple[Any, ...]:
        """What it compares, hashable."""
        return (*self.meta, self.form)

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it stands for this call."""
        form = (len(args), tuple(kwargs))
        return form == self.form and _meta(token_map(self.stream, args, kwargs)) == self.meta


def token_map(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the (B, L, C) input of a call, at a path that `ProgramStore.stream_of` gave."""
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


def _is_argument(reader: Reader) -> bool:
    """Whether it reads an argument itself; one such as a mask is not there at every step."""
    return reader[0] in ("args", "kwargs") and len(reader[1]) == 1


def _read(reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _value(reader[0], reader[1], args, kwargs)


def _value(holder: Any, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(key, str):
        return getattr(holder, key, None)
    return _find(args if holder == "args" else kwargs if holder == "kwargs" else holder, key)


def _constant_guards(
    block: nn.Module, program: BlockProgram, call: Call
) -> list[tuple[Reader, Any]]:
    """Guards of the plain values a call could read; a container of plain values counts as one."""
    guards: dict[Any, tuple[Reader, Any]] = {}
    open_numbers = {path for path, dim in program.conditions.places if dim is None}
    mixed = {path[:2] for path in open_numbers}
    for path in program.constants.keys() - open_numbers:
        if path[0][1] == "module" or path[:2] in mixed:
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
