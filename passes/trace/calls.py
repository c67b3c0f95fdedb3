"""A live call: run for real with no effect, or on fake tensors that nothing may keep."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx.traceback import set_stack_trace
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.refusal import Refusal, RefusedError, refuse
from passes.trace.canonical_ops import CanonicalOps
from passes.trace.kernels import kernel_advice
from passes.trace.outcome import Outcome, Recipe, Write
from passes.trace.recipes import PACKED, SCRIPTED, SHARDED, recipe_for_error
from passes.trace.state import Path, Roots, Snapshot, get, is_sharded, rewrapped, roots, show
from passes.trace.symbols import NOTHING_VARIES, Conditions, Symbols, Varying
from passes.user_frames import error_line, first_line, innermost_user_frame, line_of

Forward = Callable[..., Any]

TRACING: Final = threading.RLock()
"""Held while a call is traced: torch's tracing serves one thread, whatever the models."""

_MEMO: Final = functools._lru_cache_wrapper
_NOT_HOLDERS: Final = (types.FrameType, types.ModuleType, types.FunctionType, type, _MEMO)
_DEPTH: Final = 4
"""How many containers deep a memo may hold a tensor: a dict in an object in a tuple, say."""


@dataclass(frozen=True)
class Rows:
    """Entries of a tensor along one dim.

    Attributes:
        dim: The dim.
        first: The first entry.
        count: How many there are.
    """

    dim: int
    first: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """Returns a view of these entries."""
        return tensor.narrow(self.dim, self.first, self.count)


@dataclass(frozen=True)
class Call:
    """One live call of a block, to be captured.

    Attributes:
        forward: The block's own forward, bound to it.
        module: The block.
        args: The call's arguments.
        kwargs: The call's keyword arguments.
        stream: Path of its (B, L, C) input from the roots; not needed for the capture alone.
        varying: The sizes that its program leaves open.
        cut: Inputs that are taken to be shorter on stand-ins, with their sizes by dim.
        cut_lines: The user's lines at which what meets the stream is taken to be as short as it is.
        rows: Inputs of which the call gets some entries alone.
    """

    forward: Forward
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Path = ()
    varying: Varying = NOTHING_VARIES
    cut: Mapping[Path, Mapping[int, int]] = field(default_factory=dict)
    cut_lines: Collection[str] = ()
    rows: Mapping[Path, Rows] = field(default_factory=dict)

    def taken(self, path: Path, value: Any) -> Any:
        """Returns what the call gets of a value."""
        return self.rows[path].of(value) if path in self.rows else value

    def roots(self) -> Roots:
        """Returns what paths start from."""
        return roots(self.module, self.args, self.kwargs)


Reference = tuple[list[Tensor], list[Tensor]]
"""What a real call returned, and what it wrote."""


def reference(call: Call) -> Reference:
    """Runs a call for real, with no effect.

    It runs on copies of all tensors that it may overwrite, and its writes are undone. Call it
    before anything is traced: it fills memoised helpers, such as a table of position ids, that
    would otherwise be filled while tracing.

    Returns:
        The tensors of the result and the tensors written, in the order of a program's outputs.
    """
    with undone(call) as trial:
        outcome = trial.outcome(trial.run())
    return outcome.results, outcome.written


@contextlib.contextmanager
def undone(call: Call) -> Iterator[Trial]:
    """Lets a call be run for real: within it, copies stand in the place of tensors.

    At the end, everything that the call can reach is as it was.
    """
    trial = Trial(call)
    try:
        trial.snapshot.substitute(trial.copy_of)
        yield trial
    finally:
        trial.snapshot.restore()


class Trial:
    """A call that runs on copies of all tensors that it may overwrite.

    Attributes:
        snapshot: What the call can reach.
    """

    def __init__(self, call: Call) -> None:
        self._forward = call.forward
        self._origin = call.roots()
        self.snapshot = Snapshot(self._origin)
        tensors = self.snapshot.tensors.items()
        self._copies = {id(t): _private(call.taken(path, t)) for path, t in tensors}

    def copy_of(self, _: Path, value: Any) -> Any:
        """Returns what stands in the place of a value."""
        return self._copies.get(id(value), value)

    def run(self) -> Any:
        """Runs the call, and returns its result."""
        with _UNCOMPILED:
            return self._forward(*self._origin["args"], **self._origin["kwargs"])

    def outcome(self, result: Any) -> Outcome:
        """Returns what the call returned, which is `result`, and what it changed."""
        return Outcome(self.snapshot, result, self.copy_of)


class _Uncompiled:
    """Within it, functions that `torch.compile` has compiled run eagerly.

    The stance of the compiler is that of all threads: the last thread that leaves restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            # Without Dynamo, whose import takes seconds, nothing is compiled.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_UNCOMPILED: Final = _Uncompiled()


def _private(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def live_inputs(call: Call, paths: Sequence[Path]) -> list[Any]:
    """Reads a program's inputs from a live call; those that it might overwrite are copies."""
    origin = call.roots()
    values = [call.taken(path, get(origin, path)) for path in paths]
    return [_private(value) if isinstance(value, Tensor) else value for value in values]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a call on stand-ins showed, apart from the ops that it ran.

    Attributes:
        result: How the call's result is made.
        writes: What the call changed.
        constants: The plain values that it could read, by path.
        aliases: Places in its arguments of objects that the module holds too, and where it does.
        touched: The tensors that it used or asked anything of.
        conditions: For which values of the sizes that vary its ops stay the same.
    """

    result: Recipe
    writes: tuple[Write, ...]
    constants: dict[Path, Any] = field(repr=False)
    aliases: dict[Path, Path] = field(default_factory=dict)
    touched: frozenset[Path] = frozenset()
    conditions: Conditions = field(default_factory=Conditions)


class FakeCall:
    """A call that runs on fake tensors; afterwards it knows what it returned and changed.

    Attributes:
        snapshot: What the call can reach.
        tensors: Its tensors by path; for a tensor subclass, those that it wraps.
        symbols: The stand-ins of sizes that vary.
    """

    def __init__(self, call: Call) -> None:
        self._forward = call.forward
        self._origin = call.roots()
        self._varying = call.varying
        self._call = call
        self.snapshot = Snapshot(self._origin)
        self._refuse_untraceable(call.module)
        self.tensors = self.snapshot.inner_tensors()
        self.symbols = Symbols(call.varying)
        self._recipes: tuple[Recipe, tuple[Write, ...]] | None = None
        self._fakes: dict[int, Tensor] = {}
        self._wrappers: dict[int, Tensor] = {}
        self._used: set[int] = set()
        self._touched: frozenset[Path] = frozenset()
        self._given: list[weakref.ref[Tensor]] = []

    def _refuse_untraceable(self, module: nn.Module) -> None:
        for path, tensor in self.snapshot.tensors.items():
            if is_sharded(tensor):
                refuse("FVX001", f"{show(path[1:])} is a DTensor", advice=SHARDED)
        for name, part in module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                refuse("FVX001", f"{name} is a module of torch.jit", advice=SCRIPTED)
            for key, value in vars(part).items():
                if isinstance(value, torch.ScriptObject):
                    reason = f"{name}.{key} is an object of TorchScript"
                    refuse("FVX001", reason, advice=PACKED)

    @contextlib.contextmanager
    def stand_ins(self) -> Iterator[list[Any]]:
        """Puts fakes in the place of all tensors and of the numbers that vary, within it."""
        symbols, snapshot = self.symbols, self.snapshot
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own internals on some tensors
            self._fakes = {
                id(t): symbols.tensor(p, self._shortened(p, t)) for p, t in self.tensors.items()
            }
            self._wrappers = {
                id(tensor): rewrapped(tensor, lambda inner: self._fakes[id(inner)])
                for tensor in snapshot.tensors.values()
                if id(tensor) not in self._fakes
            }
        for path in self._varying.numbers:
            symbols.number(path, snapshot.constants[path])
        try:
            snapshot.substitute(self._fake)
            with symbols.mode, _UNCOMPILED, _explained():
                yield [*self._fakes.values(), *symbols.numbers.values()]
        finally:
            self.snapshot.restore()
            torch.clear_autocast_cache()
            tensors = snapshot.tensors.items()
            self._touched = frozenset(p for p, t in tensors if id(self._fake(p, t)) in self._used)
            self.note(self._fakes.values())
            self._fakes.clear()
            self._wrappers.clear()

    def _shortened(self, path: Path, tensor: Tensor) -> Tensor:
        tensor = self._call.taken(path, tensor)
        for dim, size in self._call.cut.get(path, {}).items():
            tensor = tensor.narrow(dim, 0, size)
        return tensor

    def _fake(self, path: Path, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._wrappers.get(id(value), self._fakes.get(id(value)))
        return self.symbols.numbers.get(path, value)

    def run(self, *_: Any) -> list[Tensor]:
        """Runs the call; the fakes it is given are those already in place."""
        with _UserCalls(self.note, self._used), CanonicalOps(), self._cutting():
            result = self._forward(*self._origin["args"], **self._origin["kwargs"])
        outcome = Outcome(self.snapshot, result, self._fake)
        self._recipes = outcome.result, outcome.writes
        return [*outcome.results, *outcome.written]

    def _cutting(self) -> AbstractContextManager[Any]:
        call = self._call
        if not call.cut_lines:
            return contextlib.nullcontext()
        tokens = get(call.roots(), call.stream).shape[1]
        return _Cutting(call.cut_lines, tokens, call.cut[call.stream][1])

    def facts(self) -> Facts:
        """Returns what the call showed, after it ran."""
        assert self._recipes is not None
        result, writes = self._recipes
        return Facts(
            result=result,
            writes=writes,
            constants=self.snapshot.constants,
            aliases=self.snapshot.aliases,
            touched=self._touched,
            conditions=self.symbols.conditions(),
        )

    def note(self, fakes: Iterable[Tensor]) -> None:
        """Adds fakes that the user's code must not hold afterwards."""
        self._given += map(weakref.ref, fakes)

    def clear_memos(self) -> list[Tensor]:
        """Clears the memos that hold a fake; returns the fakes that are held elsewhere."""
        if left := self._left():
            _clear_memos_of(left)
            left.clear()
        return self._left()

    def _left(self) -> list[Tensor]:
        return [fake for reference in self._given if (fake := reference()) is not None]


class _UserCalls(TorchFunctionMode):
    """Notes the user's line of every torch call for the nodes it makes, and its tensors."""

    def __init__(self, note: Callable[[Iterable[Tensor]], None], used: set[int]) -> None:
        super().__init__()
        self._note = note
        self._used = used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        set_stack_trace([innermost_user_frame()])
        self._used |= {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._note(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result


CUT: Final = torch.ops.aten.narrow_copy.default
"""The op that takes the first entries of what meets a shorter stream, see `Call.cut_lines`."""


class _Cutting(TorchFunctionMode):
    """Where some of the user's lines join the stream, of fewer tokens, and a map of all, cuts that.

    Ops that run on maps of one length are left as they are.
    """

    def __init__(self, lines: Collection[str], tokens: int, kept: int) -> None:
        super().__init__()
        self._lines, self._tokens, self._kept = lines, tokens, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lengths = set(map(_tokens_of, pytree.tree_leaves((args, kwargs))))
        if lengths >= {self._tokens, self._kept}:
            if line_of(innermost_user_frame()) in self._lines:
                args, kwargs = pytree.tree_map_only(Tensor, self._cut, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _cut(self, value: Tensor) -> Tensor:
        whole = _tokens_of(value) == self._tokens
        return CUT(value, -2, 0, self._kept) if whole else value


def _tokens_of(value: Any) -> int | None:
    """Returns how many tokens a value of shape (B, L, C) or (L, C) has."""
    return value.shape[-2] if isinstance(value, Tensor) and value.dim() in (2, 3) else None


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns whatever tracing raises into a refusal that names the user's line.

    torch logs the traceback of an op that fails on stand-ins; a refusal is no error.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(_nothing)
    try:
        yield
    except (torch.OutOfMemoryError, RefusedError):
        raise
    except Exception as error:
        where, advice = error_line(error), kernel_advice(error)
        reason = f"{type(error).__name__}: {first_line(error)}"
        if advice:
            reason = "it calls a kernel that reads the memory of its tensors"
        advice = advice or recipe_for_error(error)
        raise RefusedError(Refusal("FVX001", reason, where=where, advice=advice)) from error
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _clear_memos_of(tensors: list[Tensor]) -> None:
    """Empties the `functools` caches that hold one of these tensors, and no others."""
    seen = {id(tensors)}
    held: list[Any] = list(tensors)
    for _ in range(_DEPTH):
        seen |= {id(held), *map(id, held)}
        holders = [h for h in gc.get_referrers(*held) if id(h) not in seen]
        for memo in holders:
            if isinstance(memo, _MEMO):
                memo.cache_clear()
        held = [holder for holder in holders if not isinstance(holder, _NOT_HOLDERS)]
        if not held:
            return
