"""Programs bound to live blocks: what a program reads and writes, and which calls it stands for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastvar_fx.kv_buffers import KVBuffers
from passes import Call, StepProgram
from passes.trace.capture import BlockProgram
from passes.trace.state import Path, Write, apply, get, roots
from passes.trace.symbols import Place, Varying

Execute = Callable[[GraphModule, Sequence[Any]], Any]


def _run_eagerly(graph_module: GraphModule, inputs: Sequence[Any]) -> Any:
    return graph_module(*inputs)


class BoundProgram:
    """A program bound to the live tensors of one block.

    It reads what its graph takes from the block and the call, runs the graph, and writes the
    block's state back. It holds for calls like the one it was made for; `matches` tells.

    Attributes:
        features: The branches whose features it makes or takes.
        prunes: The branches that prune.
    """

    def __init__(self, program: StepProgram, call: Call, buffers: KVBuffers | None = None) -> None:
        captured_call = program.captured
        block = call.module
        self.features = program.features
        self.prunes = program.prunes
        self._graph = program.graph_module
        self._buffered = program.buffered
        self._buffers = buffers
        self._reads = [_reader(block, path) for path in program.inputs]
        values = [_read(r, call.args, call.kwargs) for r in self._reads]
        self._conditions = captured_call.conditions
        self._places = [(_reader(block, path), dim) for path, dim in self._conditions.places]
        self._made_at = dict(zip(program.inputs, map(meta_of, values), strict=True))
        self._open = [self._conditions.dims(path) for path in program.inputs]
        self._metas = [meta_of(v, dims) for v, dims in zip(values, self._open, strict=True)]
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
            if meta_of(_read(reader, args, kwargs), dims) != meta:
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
            elif isinstance(now, Tensor) or now != was:
                return None
        for path, meta in self._made_at.items():
            dims = _changed_dims(meta, meta_of(_find(origin, path)))
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
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        features: Sequence[Tensor],
        execute: Execute = _run_eagerly,
    ) -> tuple[Any, Sequence[Tensor]]:
        """Runs the graph on the live tensors and writes the block's state.

        Args:
            args: Arguments of the call.
            kwargs: Keyword arguments of the call.
            features: What the cache step captured, at a pruned step.
            execute: Runs a graph on its inputs.

        Returns:
            What the block returns, and the features if this is the cache step's program.
        """
        inputs = [_read(reader, args, kwargs) for reader in self._reads]
        graph = self._into_buffers(inputs) or self._graph
        outputs = execute(graph, [*inputs, *features])
        place = self._results
        for writer in self._writes:
            place = writer(outputs, place, args, kwargs)
        return self._result(outputs), outputs[self._results + self._written :]

    def _into_buffers(self, inputs: list[Any]) -> GraphModule | None:
        """Puts grown caches in the place of caches; returns the graph that takes them, if any.

        Autograd may need the caches of all steps as they were, and under the user's own
        `torch.compile` no tensor has an identity.
        """
        if self._buffers is None or self._buffered is None or self._buffers.replayed:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        for growth in self._buffered.growths:
            inputs[growth.input] = self._buffers.grown(inputs[growth.input], growth)
        return self._buffered.graph_module

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
        return cls(call.stream, meta_of(token_map(call.stream, call.args, call.kwargs)), form)

    @property
    def key(self) -> tuple[Any, ...]:
        """What it compares, hashable."""
        return (*self.meta, self.form)

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it stands for this call."""
        form = (len(args), tuple(kwargs))
        return form == self.form and meta_of(token_map(self.stream, args, kwargs)) == self.meta


def token_map(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the (B, L, C) input of a call, at a path that `ProgramStore.stream_of` gave."""
    (_, root), (_, key) = path
    return args[key] if root == "args" else kwargs[key]  # type: ignore[no-any-return]


def meta_of(value: Any, open_dims: Collection[int] = ()) -> tuple[Any, ...]:
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
