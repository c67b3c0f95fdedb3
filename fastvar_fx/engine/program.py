"""Programs of live blocks: what a program reads and writes, and which calls it holds for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.kv_buffers import KVBuffers
from fastvar_fx.engine.structure import Structure
from passes import StepProgram
from passes.trace.capture import BlockProgram
from passes.trace.outcome import Write
from passes.trace.state import Path, Snapshot, get
from passes.trace.symbols import Place, Varying

if TYPE_CHECKING:
    from fastvar_fx.engine.executor import Executor

Match = tuple["Program | StaysDense", list[Any]]
"""A program that holds for a call, and its graph's inputs."""

_ARGUMENTS: Final = ("args", "kwargs")
_FLAGS: Final = (bool, str, type(None))
_NUMBERS: Final = (int, float)
"""The types of numbers that become inputs of a graph when they vary."""


class Program:
    """A program that reads and writes the live tensors of one block.

    It holds for calls like the one it was made for: of the same form, with inputs of the same
    shapes, dtypes and devices, the same plain values, default dtype and autocast.

    Attributes:
        made: The program, for the places of this block.
        captured: The branches whose outputs it captures (cache step) or takes (pruned step).
        prunes: The branches that prune.
        saves: FLOPs that they and steps without guidance leave out.
    """

    def __init__(self, made: StepProgram, call: BlockCall, buffers: KVBuffers | None) -> None:
        program = made.captured
        block = call.block
        self.made = made
        self.captured = made.features
        self.prunes = made.prunes
        times = 1 if call.unguided is None else 2
        self.saves = sum(times * each.flops - each.pruned_flops for each in made.branches)
        self._graph = made.graph_module
        self._buffered = made.buffered
        self._buffers = buffers
        readers = [_reader(block, path) for path in made.inputs]
        values = [reader.read(call) for reader in readers]
        self._conditions = program.conditions
        places = program.conditions.places
        self._places = [(_reader(block, path).read, dim) for path, dim in places]
        self._made_at = dict(zip(made.inputs, map(meta_of, values), strict=True))
        open_dims = [program.conditions.dims(path) for path in made.inputs]
        metas = map(_Meta.of, values, open_dims)
        self._inputs = list(zip(readers, metas, strict=True))
        self._form = call.form
        self._takes_selection = call.selection is not None
        self._asked = program.touched - {*made.inputs}
        self._aliases = [
            (_reader(block, path).read, _reader(block, first).read)
            for path, first in program.aliases.items()
        ]
        self._structure = Structure.of_arguments(call.args, call.kwargs, self._asked)
        origin = call.roots()
        self._plain = {path: find(origin, path) for path in program.constants}
        guards = _constant_guards(program, call)
        self._settings = [
            (module, path[-1][1], expected)
            for path, expected in guards.items()
            if (module := _module_of(block, path)) is not None
        ]
        self._constants = [
            (_reader(block, path).read, expected)
            for path, expected in guards.items()
            if _module_of(block, path) is None
        ]
        self._result = program.result
        self._writes = [_writer(block, write) for write in program.writes]
        self._modes = _modes()

    # --- which calls it holds for ----------------------------------------------------------------

    def inputs_of(self, call: BlockCall) -> list[Any] | None:
        """Returns the graph's inputs for a call; None if the program does not hold for it."""
        if call.form != self._form or _modes() != self._modes:
            return None
        if (call.selection is not None) != self._takes_selection:
            return None
        for module, name, expected in self._settings:
            value = getattr(module, name, None)
            if value is not expected and value != expected:
                return None
        for read, expected in self._constants:
            value = read(call)
            if value is not expected and value != expected:
                return None
        inputs = []
        for (read, _, held, name), (kind, shape, dtype, device, closed) in self._inputs:
            value = held(name) if held else read(call)
            if type(value) is not kind:
                return None
            if dtype is not None and (
                value.dtype is not dtype
                or value.device != device
                or not (value.shape == shape if closed else _fits(value.shape, shape))
            ):
                return None
            inputs.append(value)
        if self._places and not self._sizes_fit(call):
            return None
        # The dearest check comes last. Under `torch.compile`, the compiler guards what it traces.
        return inputs if call.compiling or self._built_like(call) else None

    def _built_like(self, call: BlockCall) -> bool:
        """Whether the arguments are built as those of the call that the program was made for."""
        for argument, held in self._aliases:
            if argument(call) is not held(call):
                return False
        return self._structure == Structure.of_arguments(call.args, call.kwargs, self._asked)

    def inputs(self, call: BlockCall) -> list[Any]:
        """Returns the graph's inputs for the call that the program was made for."""
        return [reader.read(call) for reader, _ in self._inputs]

    def _sizes_fit(self, call: BlockCall) -> bool:
        sizes = [_size(read(call), dim) for read, dim in self._places]
        return None not in sizes and self._conditions.hold(*sizes)

    def differs(self, call: BlockCall) -> Varying | None:
        """Returns the sizes and numbers in which a call differs, if it differs in nothing else.

        Those that it leaves open already are among them. Sizes below 2 stay apart: ops treat them
        in ways of their own.
        """
        if call.form != self._form or _modes() != self._modes:
            return None
        if (call.selection is not None) != self._takes_selection or not self._built_like(call):
            return None
        origin = call.roots()
        earlier: dict[Place, float] = {}
        for path, was in self._plain.items():
            now = find(origin, path)
            if type(now) is type(was) and type(was) in _NUMBERS:
                if now != was or (path, None) in self._conditions.places:
                    earlier[path, None] = was
            elif isinstance(now, Tensor) or now != was:
                return None
        for path, meta in self._made_at.items():
            dims = _changed_dims(meta, meta_of(find(origin, path)))
            if dims is None or (path == call.path and dims - {0}):
                return None
            for dim in dims | self._conditions.dims(path):
                earlier[path, dim] = meta[0][dim]
        return Varying(earlier) if earlier else None

    def misses_caches(self, call: BlockCall) -> bool | None:
        """Whether a tensor that it reads from the block's state, or from a cache, is gone."""
        return any(
            reader.of_state and meta.dtype is not None and not isinstance(reader.read(call), Tensor)
            for reader, meta in self._inputs
        )

    def first_rows(self, call: BlockCall, batch: int, live: int) -> set[int]:
        """Returns which of `batch` samples comes first now, from inputs cut to `live` samples.

        An input of `batch` samples that was sliced lies in memory that still holds all of them, and
        its offset says where. One that was computed anew says nothing.
        """
        return {
            tensor.storage_offset() // tensor.stride(0)
            for tensor, (_, meta) in zip(self.inputs(call), self._inputs, strict=True)
            if isinstance(tensor, Tensor)
            and meta.shape[:1] in ((batch,), (None,))
            and tensor.shape[:1] == (live,)
            and 0 < batch * tensor.stride(0) * tensor.itemsize == tensor.untyped_storage().nbytes()
        }

    # --- running it ------------------------------------------------------------------------------

    def run(
        self, call: BlockCall, inputs: list[Any], outputs: dict[int, Tensor], executor: Executor
    ) -> tuple[Any, dict[int, Tensor]]:
        """Runs the graph on the live tensors and writes the block's state.

        Args:
            call: The call.
            inputs: What `inputs_of` returned for it.
            outputs: What the cache step captured, by branch, at a pruned step.
            executor: Runs the graph.

        Returns:
            What the block returns, and what later calls need: at the cache step the outputs of its
            branches, by branch; at a pruned step the tensors of the selection, if it is shared.
        """
        graph = self._graph
        if self._buffered is not None and self._grows_in_place(call):
            graph = self._buffered.graph_module
            for growth in self._buffered.growths:
                past = growth.past(inputs[growth.input])
                inputs[growth.input] = self._buffers.grown(past, growth)  # type: ignore[union-attr]
        if outputs:
            inputs += [outputs[branch] for branch in self.captured]
            inputs += call.selection or ()
        made = executor.run_program(graph, inputs, call)
        tensors = iter(made)
        find = partial(_read, call.block, call)
        result = self._result.make(tensors, find)
        # All is found before anything is written: a write may move what others refer to.
        values = [write.value and write.value.make(tensors, find) for write, _ in self._writes]
        owners = [owner(call) for _, owner in self._writes]
        for (write, _), owner, value in zip(self._writes, owners, values, strict=True):
            write.apply(owner, value)
        # Last come the captured outputs, at the cache step, or a selection that is shared.
        last = list(tensors)
        return result, dict(zip(range(len(last)) if outputs else self.captured, last, strict=True))

    def runs(self, graph: GraphModule) -> bool:
        """Whether a graph is this program's."""
        buffered = self._buffered.graph_module if self._buffered else None
        return graph is self._graph or graph is buffered

    def _grows_in_place(self, call: BlockCall) -> bool:
        """Whether caches may grow in buffers.

        Autograd may need the caches of all steps unchanged, tensors have no identity under the
        user's own `torch.compile`, and a CUDA graph cannot write into its inputs.
        """
        if self._buffers is None or self._buffers.replayed:
            return False
        return not (torch.is_grad_enabled() or call.compiling)


class StaysDense:
    """Takes the place of a program where a call was refused: the block runs dense.

    It holds for calls of the same kind, while the flags of the block's modules are as they were.
    """

    prunes: Final = ()

    def __init__(self, call: BlockCall) -> None:
        self._kind = call_kind(call)
        plain = Snapshot(call.roots()).constants
        self._flags = [
            (module, path[-1][1], value)
            for path, value in plain.items()
            if isinstance(value, _FLAGS) and (module := _module_of(call.block, path)) is not None
        ]

    def inputs_of(self, call: BlockCall) -> list[Any] | None:
        """Returns an empty list if the call was refused; else None."""
        if call_kind(call) != self._kind:
            return None
        changed = any(getattr(module, name, None) != value for module, name, value in self._flags)
        return None if changed else []

    def inputs(self, call: BlockCall) -> list[Any]:
        """Returns no inputs."""
        return []

    def misses_caches(self, call: BlockCall) -> bool | None:
        """Nothing is known of the block's caches."""
        return None

    def first_rows(self, call: BlockCall, batch: int, live: int) -> set[int]:
        """Nothing is known of the block's inputs."""
        return set()

    def run(
        self, call: BlockCall, inputs: list[Any], outputs: dict[int, Tensor], executor: Executor
    ) -> tuple[Any, dict[int, Tensor]]:
        """Runs the block's own forward."""
        return executor.run_dense(call), {}


# --- reading inputs ------------------------------------------------------------------------------


class _Reader(NamedTuple):
    """How a value is read at a call; it reads None where there is none.

    Attributes:
        read: Returns the value at a call.
        of_state: Whether a block keeps it from call to call, in itself or in a cache. An argument
            such as a mask is not there at every step, and a weight always is.
        held: Returns a parameter or buffer of the module by its name: a quicker way to read one.
        name: Its name.
    """

    read: Callable[[BlockCall], Any]
    of_state: bool
    held: Callable[[str], Any] | None = None
    name: str = ""


def _reader(block: nn.Module, path: Path) -> _Reader:
    (_, root), *rest = path
    key = rest[0][1]
    if root in _ARGUMENTS and len(rest) == 1:
        if root == "kwargs":
            return _Reader(lambda call: call.kwargs.get(key), of_state=False)
        return _Reader(lambda call: call.args[key] if key < len(call.args) else None, False)
    module = _module_of(block, path)
    if module is None:
        return _Reader(partial(_read_inside, block, root, tuple(rest)), of_state=True)
    name = rest[-1][1]
    for registry in ("_parameters", "_buffers"):  # a module's own `__getattr__` is slow
        entries: dict[str, Any] = getattr(module, registry)
        if name in entries:
            read = partial(_read_entry, entries, name)
            return _Reader(read, registry == "_buffers", entries.get, name)
    return _Reader(lambda call: getattr(module, name, None), of_state=True)


def _module_of(block: nn.Module, path: Path) -> nn.Module | None:
    """Returns the module that a value of the block is an attribute of, if it is one."""
    (_, root), *rest = path
    if root in _ARGUMENTS or not _is_module_path(rest):
        return None
    module = get(block, tuple(rest[:-1]))
    return module if isinstance(module, nn.Module) else None


def _read_entry(entries: dict[str, Any], name: str, call: BlockCall) -> Any:
    return entries.get(name)


def _read_inside(block: nn.Module, root: str, path: Path, call: BlockCall) -> Any:
    return find(_root(block, root, call), path)


def _read(block: nn.Module, call: BlockCall, path: Path) -> Any:
    return get(_root(block, path[0][1], call), path[1:])


def _root(block: nn.Module, root: str, call: BlockCall) -> Any:
    return block if root == "module" else call.args if root == "args" else call.kwargs


class _Meta(NamedTuple):
    """What a program needs of an input.

    Attributes:
        kind: Its type.
        shape: Its shape, with None for a size that is left open.
        dtype: Its dtype; None for what is no tensor.
        device: Its device.
        closed: Whether no size is left open.
    """

    kind: Any
    shape: tuple[int | None, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    closed: bool = True

    @classmethod
    def of(cls, value: Any, open_dims: Collection[int]) -> _Meta:
        if not isinstance(value, Tensor):
            return cls(type(value))
        shape = tuple(None if d in open_dims else size for d, size in enumerate(value.shape))
        return cls(type(value), shape, value.dtype, value.device, not open_dims)


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether a shape differs in open sizes alone."""
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(b is None or a == b for a, b in pairs)


def call_kind(call: BlockCall) -> tuple[Any, ...]:
    """Returns the form of a call, and the shape, dtype and device of its token map."""
    return (call.form, *meta_of(call.x))


def meta_of(value: Any) -> tuple[Any, ...]:
    """Returns the shape, dtype and device of a tensor; else the type."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else (type(value),)


def _changed_dims(was: tuple[Any, ...], now: tuple[Any, ...]) -> set[int] | None:
    """Returns the dims in which two inputs differ; None if they differ in more than that."""
    if was[1:] != now[1:] or len(was) == 1:
        return set() if was == now else None
    if len(was[0]) != len(now[0]):
        return None
    changed = {d: min(a, b) for d, (a, b) in enumerate(zip(was[0], now[0], strict=True)) if a != b}
    return set(changed) if min(changed.values(), default=2) > 1 else None


def _size(value: Any, dim: int | None) -> float | None:
    if dim is None:
        return value if type(value) in _NUMBERS else None
    return value.shape[dim] if isinstance(value, Tensor) and dim < value.dim() else None


def find(origin: Any, path: Path) -> Any:
    """Returns the value at a path; None if there is none."""
    try:
        return get(origin, path)
    except (AttributeError, LookupError, TypeError):
        return None


def _constant_guards(program: BlockProgram, call: BlockCall) -> dict[Path, Any]:
    """Returns the plain values a call could read; a container of plain values counts as one.

    They are what this block's own call holds: blocks that share a program may differ in them.
    """
    origin = call.roots()
    guards: dict[Path, Any] = {}
    open_numbers = {path for path, dim in program.conditions.places if dim is None}
    mixed = {path[:2] for path in open_numbers}
    for path in program.constants.keys() - open_numbers:
        top = path[:2]
        if path[0][1] in _ARGUMENTS and top not in mixed and _is_plain(find(origin, top)):
            # A copy: the loop may change the container.
            guards[top] = pytree.tree_map(lambda leaf: leaf, find(origin, top))
        else:
            guards[path] = find(origin, path)
    return guards


def _is_plain(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return not any(isinstance(leaf, Tensor) or hasattr(leaf, "__dict__") for leaf in leaves)


def autocast_dtypes() -> tuple[torch.dtype | None, torch.dtype | None]:
    """Returns the dtypes of the surrounding autocast, on the CPU and the GPU.

    The ops of a graph obey it, and the dtypes of its values depend on it.
    """
    on_cpu, on_gpu = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    if not (on_cpu or on_gpu):
        return (None, None)
    return (
        torch.get_autocast_dtype("cpu") if on_cpu else None,
        torch.get_autocast_dtype("cuda") if on_gpu else None,
    )


def _modes() -> tuple[torch.dtype | None, ...]:
    """The default dtype and the surrounding autocast, which the dtypes of a graph depend on."""
    return (torch.get_default_dtype(), *autocast_dtypes())


# --- writing state -------------------------------------------------------------------------------


class _Writer(NamedTuple):
    """Replays a write of a call.

    Attributes:
        write: What the call changed.
        owner: Returns the container that it changed.
    """

    write: Write
    owner: Callable[[BlockCall], Any]


def _writer(block: nn.Module, write: Write) -> _Writer:
    (_, root), *rest = write.path
    if root == "module" and _is_module_path(rest):
        owner = get(block, tuple(rest))
        if isinstance(owner, nn.Module):
            return _Writer(write, lambda call: owner)
    return _Writer(write, lambda call: get(_root(block, root, call), tuple(rest)))


def _is_module_path(path: Sequence[Any]) -> bool:
    return all(kind == "attr" for kind, _ in path)
