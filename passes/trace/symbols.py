"""Sizes and numbers that vary between calls of a block become symbols of its graph.

A prompt of another length changes a dim of some inputs, and perhaps a number; another batch and
another strength do too. A graph that was captured with these as symbols holds for every value,
within the conditions that the forward and its ops put on them. Analysis and rewrite work on plain
values: those of this call. Repeating them at the values of another call, and comparing the graphs,
verifies that the result does not depend on these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from passes.graph import copy_graph, example_values
from passes.refusal import refuse
from passes.trace.state import Path, show

Symbol = Any
"""A sympy symbol. sympy and Dynamo are imported at the first trace: they take seconds to load."""
Place = tuple[Path, int | None]
"""A dim of an input tensor, or (with None) an input number."""


def _dims(places: Iterable[Place], path: Path) -> frozenset[int]:
    return frozenset(dim for p, dim in places if p == path and dim is not None)


@dataclass(frozen=True)
class Varying:
    """The sizes in which a call differs from an earlier one.

    Attributes:
        earlier: Each such place, with its value in the earlier call.
    """

    earlier: Mapping[Place, float] = field(default_factory=dict)

    def dims(self, path: Path) -> frozenset[int]:
        """Returns the dims of the input at `path` that vary."""
        return _dims(self.earlier, path)

    @property
    def numbers(self) -> tuple[Path, ...]:
        """The input numbers that vary."""
        return tuple(path for path, dim in self.earlier if dim is None)


NOTHING_VARIES: Final = Varying()


@dataclass(frozen=True)
class Conditions:
    """For which values of its symbols a program holds.

    Attributes:
        places: Where the symbols are read.
        hold: Takes their values in that order.
        text: The conditions as text; equal for calls with the same conditions.
    """

    places: tuple[Place, ...] = ()
    hold: Callable[..., bool] = lambda: True
    text: str = ""

    def dims(self, path: Path) -> frozenset[int]:
        """Returns the dims of the input at `path` that are symbols."""
        return _dims(self.places, path)


class Symbols:
    """The symbols of one capture: makes the stand-ins that carry them.

    Attributes:
        mode: The fake mode of the capture.
        numbers: The stand-ins of the numbers that vary, by path.
    """

    def __init__(self, varying: Varying) -> None:
        import torch._functorch.config
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        shapes = ShapeEnv(allow_scalar_outputs=True, duck_shape=False)
        # A kernel that gets a stand-in must fail rather than read memory that does not exist.
        with torch._functorch.config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
            self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
        self.numbers: dict[Path, SymInt | SymFloat] = {}
        self._varying = varying
        self._shapes = shapes
        self._places: dict[Symbol, tuple[Place, float]] = {}

    def tensor(self, path: Path, tensor: Tensor) -> Tensor:
        """Returns a fake of an input, with symbols for the dims that vary."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        dims = self._varying.dims(path)
        if not dims:
            return self.mode.from_tensor(tensor, static_shapes=True)
        # A view would be rebuilt from its base, whose sizes must not become conditions; nor must
        # those of a buffer, which show as gaps between the rows of a view.
        stride = tensor.stride() if 0 in tensor.stride() else _dense_stride(tensor)
        plain = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
        kinds = [
            DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(tensor.dim())
        ]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        source = self._source()
        fake = self.mode.from_tensor(plain, source=source, symbolic_context=context)
        for dim in dims:
            self._note(fake.shape[dim], (path, dim), tensor.shape[dim])
        return fake

    def number(self, path: Path, value: float) -> None:
        """Makes the stand-in of a number that varies."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = self._source()
        symbol = self._shapes.create_unspecified_symbol(
            value, source, dynamic_dim=DimDynamic.DYNAMIC
        )
        shapes, whole = self._shapes, isinstance(value, int)
        make: Any = shapes.create_symintnode if whole else shapes.create_symfloatnode
        made = make(symbol, hint=value, source=source)
        self.numbers[path] = made
        self._note(made, (path, None), value)

    def _source(self) -> Any:
        """Returns what symbols are named after: equal calls must have equal names."""
        from torch._dynamo.source import ConstantSource

        return ConstantSource(f"size{len(self._places)}")

    def _note(self, size: Any, place: Place, value: float) -> None:
        if _is_size(size):
            self._places[size.node.expr] = (place, value)
        else:
            refuse("FVX001", f"{show(place[0])} has a size of 0 or 1, which is fixed")

    def conditions(self) -> Conditions:
        """Returns what the capture so far requires of the sizes."""
        if not self._places:
            return Conditions()
        names = [str(symbol) for symbol in self._places]
        asked = [guard.expr for guard in self._shapes.guards]
        # torch assumes that symbolic dims are at least 2, and emits no guard for it.
        least = [s >= 2 for s, ((_, dim), _) in self._places.items() if dim is not None]
        text = " and ".join(f"({_as_python(expr)})" for expr in [*asked, *least])
        # sympy's own evaluation is too slow to run at every call; the text is printed from its
        # expressions, whose names are the symbols'.
        hold = eval(f"lambda {', '.join(names)}: {text or 'True'}")
        places = tuple(place for place, _ in self._places.values())
        return Conditions(places, hold, f"{names}: {text}")

    def now(self) -> dict[Symbol, float]:
        """Returns the symbols' values in the captured call."""
        return {symbol: value for symbol, (_, value) in self._places.items()}

    def earlier(self) -> dict[Symbol, float]:
        """Returns the symbols' values in the earlier call."""
        return {s: self._varying.earlier[place] for s, (place, _) in self._places.items()}

    def read_from_inputs(self, graph_module: GraphModule, paths: Iterable[Path]) -> None:
        """Computes all sizes in a graph from those of its inputs.

        A size that is read off a value of a branch would change with the kept tokens. What is
        computed from an input float stays as it is: sympy would order the arithmetic anew.
        """
        graph = graph_module.graph
        sized = [n for n in graph.nodes if n.op == "call_function" and self._knows(n)]
        if not sized:
            return
        known = set(graph.nodes)
        inputs = dict(zip(paths, graph.find_nodes(op="placeholder"), strict=True))
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            self._replace(sized, inputs)
        made = [node for node in graph.nodes if node not in known]
        for node in made:
            node.meta["val"] = node.target(*example_values(node.args))
        for node in [*reversed(sized), *reversed(made)]:
            if not node.users:
                graph.erase_node(node)

    def _replace(self, sized: Sequence[Node], inputs: Mapping[Path, Node]) -> None:
        from torch.utils._sympy.interp import sympy_interp
        from torch.utils._sympy.reference import PythonReferenceAnalysis

        tracer = GraphAppendingTracer(sized[0].graph)
        symbols = {
            symbol: Proxy(_read_size(inputs[path], dim), tracer)
            for symbol, ((path, dim), _) in self._places.items()
        }
        for node in sized:
            made = sympy_interp(PythonReferenceAnalysis, symbols, node.meta["val"].node.expr)
            node.replace_all_uses_with(made.node if isinstance(made, Proxy) else made)

    def _knows(self, node: Node) -> bool:
        size = node.meta.get("val")
        if not _is_size(size):
            return False
        symbols = size.node.expr.free_symbols
        return symbols <= self._places.keys() and all(symbol.is_integer for symbol in symbols)


def _dense_stride(tensor: Tensor) -> list[int]:
    """Returns the strides of a tensor without gaps, whose dims of size 1 are the outermost."""
    stride, size = [0] * tensor.dim(), 1
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.shape[d] == 1, tensor.stride(d)))
    for dim in order:
        stride[dim] = size
        size *= tensor.shape[dim]
    return stride


def _is_size(value: Any) -> TypeGuard[Any]:
    return isinstance(value, (SymInt, SymFloat, SymBool))


def _read_size(node: Node, dim: int | None) -> Node:
    size = torch.ops.aten.sym_size.int
    return node if dim is None else node.graph.call_function(size, (node, dim))


def _as_python(condition: Any) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    class Exact(PythonPrinter):
        def _print_Float(self, expr: Any) -> str:  # noqa: N802
            return repr(float(expr))

    text: str = Exact().doprint(condition)
    return text


def at_sizes(graph_module: GraphModule, values: Mapping[Symbol, float]) -> GraphModule:
    """Returns a copy of a graph whose example values have plain sizes, `values` for the symbols."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def plain(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            with mode:
                shape, stride = (
                    [_plain_size(size, values) for size in sizes]
                    for sizes in (value.shape, value.stride())
                )
                return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return _plain_size(value, values)

    graph, copies = copy_graph(graph_module.graph)
    for made in copies.values():
        if isinstance(made.meta.get("val"), SymFloat) and made.op == "call_function":
            # As Python computes it, to the last bit: sympy orders the arithmetic anew.
            made.meta["val"] = made.target(*example_values(made.args))  # type: ignore[operator]
        elif "val" in made.meta:
            made.meta["val"] = pytree.tree_map(plain, made.meta["val"])
    return GraphModule(graph_module, graph)


def _plain_size(value: Any, values: Mapping[Symbol, float]) -> Any:
    if not _is_size(value):
        return value
    found = value.node.expr.xreplace(values)
    return {SymInt: int, SymFloat: float, SymBool: bool}[type(value)](found)
