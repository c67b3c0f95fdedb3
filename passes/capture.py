"""Capture: one call of a live module becomes one functional FX graph, a block program.

The graph's inputs are everything the call reads (parameters, buffers, state, tensor arguments),
its outputs the call's result followed by the state it wrote. No tensor is baked in, so moving,
casting and loading weights after the capture keep working, and blocks that run the same ops on the
same places share one program.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
import torch._dynamo.config
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta, set_stack_trace
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from passes.graphs import memory_owner, written
from passes.refusal import (
    Refusal,
    RefusedError,
    error_line,
    innermost_user_frame,
    kernel_advice,
    refuse,
)
from passes.sizes import NOTHING_VARIES, Conditions, Symbols, Varying, at_sizes
from passes.spelling import PlainSpelling
from passes.state import Path, Roots, Snapshot, Write, roots, show

Forward = Callable[..., Any]

_SMALL: Final = 4096
"""Constants of up to this many elements are compared by value, larger ones by identity."""


class LeakedTensorError(Exception):
    """A forward kept a tensor in a place that no snapshot sees; a stand-in is left there now."""


@dataclass(frozen=True)
class BlockProgram:
    """A captured call.

    Attributes:
        graph_module: Takes the tensors at `inputs`, returns result leaves, then written tensors.
        inputs: Where each input is read, in the order of the placeholders.
        result: The structure of what the call returns.
        result_leaves: Its leaves; a tensor's place holds `...`, other leaves are as returned.
        writes: What the call changed; a tensor's place among the leaves holds `...`.
        constants: The plain values the call could read, by path; it holds only while they do.
        conditions: For which values of the sizes that vary it holds.
        earlier: The same program at the sizes of an earlier call, if some vary.
    """

    graph_module: GraphModule
    inputs: tuple[Path, ...]
    result: pytree.TreeSpec
    result_leaves: tuple[Any, ...]
    writes: tuple[Write, ...]
    constants: dict[Path, Any] = field(repr=False)
    conditions: Conditions = field(default_factory=Conditions)
    earlier: BlockProgram | None = field(default=None, repr=False)

    @property
    def result_count(self) -> int:
        """How many outputs of the graph are leaves of the result."""
        return sum(leaf is ... for leaf in self.result_leaves)


def run_eagerly(
    forward: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a call for real on copies of all tensors it may overwrite, and undoes its writes.

    It fills caches that must not be filled while tracing, and is the reference of the validation.

    Returns:
        The tensors of the result and the tensors written, in the order of a program's outputs.
    """
    origin = roots(module, args, kwargs)
    snapshot = Snapshot(origin)
    clones = {id(t): _private(t) for t in snapshot.tensors.values()}

    def private(_: Path, value: Any) -> Any:
        return clones.get(id(value), value)

    try:
        snapshot.substitute(private)
        with torch.compiler.set_stance("force_eager"):
            result = forward(*origin["args"], **origin["kwargs"])
        writes = list(snapshot.writes(private))
    finally:
        snapshot.restore()
    written = [leaf for write in writes for leaf in write.leaves if isinstance(leaf, Tensor)]
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)], written


def _private(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def capture(
    forward: Forward,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    varying: Varying = NOTHING_VARIES,
) -> BlockProgram:
    """Traces one call into a block program; the module and the arguments stay as they are.

    Args:
        forward: The block's own forward, bound to it.
        module: The block.
        args: The call's arguments.
        kwargs: The call's keyword arguments.
        varying: Sizes that become symbols of the graph, so that it stands for others too.

    Raises:
        RefusedError: FVX001, if the call cannot be traced, naming the user's line.
    """
    call = _FakeCall(forward, module, args, kwargs, varying)
    # A forward that calls compiled functions is traced through them.
    nested = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    with call.stand_ins() as fakes, _explained(), preserve_node_meta(), nested:
        graph_module = make_fx(
            call.run,
            pre_dispatch=True,
            tracing_mode="real",
            _error_on_data_dependent_ops=False,
        )(*fakes)
    symbols = call.symbols
    conditions = symbols.conditions()
    paths = [*call.snapshot.tensors, *symbols.numbers]
    _drop_dead_code(graph_module.graph)
    _resolve_constants(graph_module, fakes)
    symbols.read_from_inputs(graph_module, paths)
    inputs = _drop_unread_inputs(graph_module, paths)
    graph_module.graph.lint()
    graph_module.recompile()
    assert call.result is not None
    program = BlockProgram(
        graph_module,
        tuple(inputs),
        call.result,
        tuple(call.result_leaves),
        tuple(call.writes),
        call.snapshot.constants,
        conditions,
    )
    if not conditions.places:
        return program
    if not conditions.hold(*symbols.earlier().values()):
        refuse("FVX019", f"an earlier call took another way, for it needs {conditions.text}")
    now, earlier = (at_sizes(graph_module, v) for v in (symbols.now(), symbols.earlier()))
    return replace(program, graph_module=now, earlier=replace(program, graph_module=earlier))


def fingerprint(
    forward: Forward,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    varying: Varying = NOTHING_VARIES,
) -> tuple[Any, ...]:
    """Returns the ops that a call runs, with all their arguments and where their inputs stand.

    Two calls with equal fingerprints have equal block programs: every value that the forward reads
    and that makes a difference is an argument of an op. It costs a fraction of a capture.

    Raises:
        RefusedError: FVX001, if the call cannot be run on stand-ins.
        LeakedTensorError: If the forward keeps a tensor where it cannot be seen.
    """
    made: list[weakref.ref[Tensor]] = []
    mark = _record(_FakeCall(forward, module, args, kwargs, varying), made)
    if _alive(made):
        _clear_memos()
    left = _alive(made)
    if left:
        found = [holder for holder in gc.get_referrers(*left) if holder is not left]
        holders = sorted({type(holder).__name__ for holder in found} - {"frame", "FakeTensor"})
        raise LeakedTensorError(
            f"its forward keeps a tensor of shape {tuple(left[-1].shape)} outside the module's "
            f"attributes and the call's arguments, in a {' or a '.join(holders) or 'closure'}"
        )
    return mark


def _alive(made: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for ref in made if (tensor := ref()) is not None]


def _clear_memos() -> None:
    """Empties the `functools` caches of user code: a memo keyed by a tensor keeps stand-ins."""
    for memo in gc.get_objects():
        if type(memo) is functools._lru_cache_wrapper:
            package = str(getattr(memo, "__module__", "")).partition(".")[0]
            if package not in sys.stdlib_module_names | {"torch"}:
                memo.cache_clear()


def _record(call: _FakeCall, made: list[weakref.ref[Tensor]]) -> tuple[Any, ...]:
    with call.stand_ins() as fakes, _explained():
        paths = [*call.snapshot.tensors, *call.symbols.numbers]
        recorder = _Recorder(dict(zip(paths, fakes, strict=True)))
        with recorder:
            outputs = call.run(*fakes)
        named = [recorder.name(t) for t in outputs]
        structure = (call.result, tuple(call.result_leaves), _write_keys(call.writes))
        conditions = call.symbols.conditions().text
        made += [weakref.ref(tensor) for tensor in recorder.made]
    return (tuple(recorder.records), tuple(named), structure, conditions)


def _write_keys(writes: list[Write]) -> tuple[Any, ...]:
    return tuple((w.path, w.step, w.spec, w.leaves, w.deleted) for w in writes)


class _FakeCall:
    """A call that runs on fake tensors; afterwards it knows its result's and writes' structure."""

    def __init__(
        self,
        forward: Forward,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        varying: Varying,
    ) -> None:
        self._forward = forward
        self._varying = varying
        self._origin: Roots = roots(module, args, kwargs)
        self.snapshot = Snapshot(self._origin)
        self.symbols = Symbols(varying)
        self.result: pytree.TreeSpec | None = None
        self.result_leaves: list[Any] = []
        self.writes: list[Write] = []
        self._fakes: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def stand_ins(self) -> Iterator[list[Any]]:
        """Puts fakes in the place of all tensors and of the numbers that vary, for a while."""
        symbols, snapshot = self.symbols, self.snapshot
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own internals on some tensors
            self._fakes = {id(t): symbols.tensor(p, t) for p, t in snapshot.tensors.items()}
        for path in self._varying.numbers:
            symbols.number(path, snapshot.constants[path])
        try:
            snapshot.substitute(self._fake)
            with symbols.mode, torch.compiler.set_stance("force_eager"):
                yield [*self._fakes.values(), *symbols.numbers.values()]
        finally:
            self.snapshot.restore()
            torch.clear_autocast_cache()

    def _fake(self, path: Path, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._fakes[id(value)]
        return self.symbols.numbers.get(path, value)

    def run(self, *_: Any) -> list[Tensor]:
        """Runs the call; the fakes it is given are those already in place."""
        with _UserLines(), PlainSpelling():
            result = self._forward(*self._origin["args"], **self._origin["kwargs"])
        leaves, self.result = pytree.tree_flatten(result)
        if any(isinstance(leaf, SymInt) for leaf in leaves):
            refuse("FVX001", "it returns a number that depends on a size that varies")
        self.result_leaves = _mark_tensors(leaves)
        writes = list(self.snapshot.writes(self._fake))
        self.writes = [
            Write(w.path, w.step, w.spec, tuple(_mark_tensors(w.leaves)), w.deleted) for w in writes
        ]
        written = [leaf for write in writes for leaf in write.leaves]
        return [leaf for leaf in [*leaves, *written] if isinstance(leaf, Tensor)]


def _mark_tensors(leaves: Any) -> list[Any]:
    return [... if isinstance(leaf, Tensor) else leaf for leaf in leaves]


class _UserLines(TorchFunctionMode):
    """Notes the user's line of every torch call as the stack trace of the nodes it makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        set_stack_trace([innermost_user_frame()])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every op below autograd and autocast, naming tensors by origin."""

    def __init__(self, inputs: dict[Path, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[Any] = []
        tensors = {path: t for path, t in inputs.items() if isinstance(t, Tensor)}
        self._names: dict[int, Any] = {
            id(t): (path, str(t.shape), t.dtype, t.device) for path, t in tensors.items()
        }
        self._paths = {t.untyped_storage()._cdata: path for path, t in tensors.items()}
        self.made: list[Tensor] = []  # kept alive, for their ids are their names

    def name(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return (type(value), value if isinstance(value, (int, float, str)) else repr(value))
        return self._names.get(id(value)) or self._constant(value)

    def _constant(self, value: Tensor) -> Any:
        """Names a tensor that came from nowhere: an alias of an input, or one of the user's."""
        meta = _layout(value)
        if isinstance(value, FakeTensor):
            return ("alias", self._paths.get(value.untyped_storage()._cdata), meta)
        if value.numel() > _SMALL:
            return ("constant", _Same(value))
        with _disable_current_modes():
            return ("constant", meta, value.device, repr(value.tolist()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [self.name(leaf) for leaf in leaves]
        result = func(*args, **kwargs)
        for index, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._names.setdefault(id(leaf), (len(self.records), index))
                self.made.append(leaf)
        self.records.append((func, tuple(operands), spec))
        return result


class _Same:
    """Equal only for one tensor, which it keeps alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._tensor is self._tensor

    def __hash__(self) -> int:
        return id(self._tensor)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns whatever tracing raises into a refusal that names the user's line."""
    try:
        yield
    except (torch.OutOfMemoryError, RefusedError):
        raise
    except Exception as error:
        where, advice = error_line(error), kernel_advice(error)
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first}"
        if advice:
            reason = "it calls a kernel that reads the memory of its tensors"
        raise RefusedError(Refusal("FVX001", reason, where=where, advice=advice)) from error


def _drop_dead_code(graph: Graph) -> None:
    """Drops what nothing reads, such as the indices of a max or a mask that allows all."""
    graph.eliminate_dead_code(is_impure_node=_has_effect)


def _has_effect(node: Node) -> bool:
    """Whether a node without users matters: an in-place op does if its memory is read later."""
    targets = written(node)
    if not targets:
        return node.is_impure()
    owners = {memory_owner(target) for target in targets}
    if any(owner.op != "call_function" for owner in owners):
        return True
    aliases = [other for other in node.graph.nodes if memory_owner(other) in owners]
    return any(node < user for alias in aliases for user in alias.users)


def _resolve_constants(graph_module: GraphModule, fakes: list[Any]) -> None:
    """Maps constants that alias an input (`weight.data`) to it; refuses any made while tracing."""
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    by_storage = {
        _storage_key(fake): node
        for fake, node in zip(fakes, placeholders, strict=True)
        if isinstance(fake, Tensor)
    }
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(graph_module, str(node.target))
        if not isinstance(constant, Tensor):
            continue
        in_vmap = torch._C._functorch.is_functorch_wrapped_tensor(constant)
        if not (in_vmap or isinstance(constant, FakeTensor)):
            continue
        source = None if in_vmap else by_storage.get(_storage_key(constant))
        if source is None:
            refuse("FVX001", "it uses a tensor that was made while tracing", node)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        delattr(graph_module, str(node.target))


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage()._cdata, *_layout(tensor))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor lies in its storage; sizes as text, for symbols compare by what they mean."""
    offset = str(tensor.storage_offset())
    return (str(tuple(tensor.shape)), str(tensor.stride()), offset, tensor.dtype)


def _drop_unread_inputs(graph_module: GraphModule, paths: list[Path]) -> list[Path]:
    graph = graph_module.graph
    read: list[Path] = []
    for path, node in zip(paths, graph.find_nodes(op="placeholder"), strict=True):
        node.meta["fastvar"] = {"input": show(path[1:]), "root": path[0][1]}
        if node.users:
            read.append(path)
        else:
            graph.erase_node(node)
    return read


def placeholder_of(program: BlockProgram, path: Path) -> Node | None:
    """Returns the placeholder of the input at `path`, or None if the graph does not read it."""
    nodes = program.graph_module.graph.find_nodes(op="placeholder")
    return dict(zip(program.inputs, nodes, strict=True)).get(path)
