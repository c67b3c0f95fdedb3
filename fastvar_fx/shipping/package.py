"""One graph as an AOTInductor package: compiled into a file, and run from it without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastvar_fx.engine import inductor_linears
from fastvar_fx.errors import PackageError, RunError, raise_to_compiler
from passes.graph import memory_owner, outputs_of, written

_TOLERANCE: Final = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference of a compiled element, by its size plus the root mean square; 16 epsilons for
other dtypes."""
_ALIGNED: Final = 16
"""Bytes that Inductor takes the memory of an input on a GPU to be aligned to."""
_CPU: Final = torch.device("cpu")
_DTYPES: Final = {name: v for name, v in vars(torch).items() if isinstance(v, torch.dtype)}
_MAY_DIFFER: Final = 0.05
"""Share of the elements of a pruned program that may differ: selection may break ties otherwise."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a compiled graph takes and returns, as data.

    Attributes:
        inputs: Shape, strides and dtype of each; None for a number, which is compiled in.
        written: Positions of the inputs that it writes into.
        same: Outputs that are inputs, as (output, input).
        outputs: How many outputs it has.
        precision: The coarsest dtype that it computes in, floating point.
    """

    inputs: tuple[tuple[tuple[int, ...], tuple[int, ...], str] | None, ...]
    written: tuple[int, ...]
    same: tuple[tuple[int, int], ...]
    outputs: int
    precision: str

    @classmethod
    def of(cls, graph_module: GraphModule, examples: Sequence[Any]) -> Signature:
        """Returns the signature of a graph for inputs like the examples."""
        graph = graph_module.graph
        places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        targets = [memory_owner(target) for node in graph.nodes for target in written(node)]
        outputs = list(map(_kept, outputs_of(graph)))
        return cls(
            inputs=tuple(map(_layout, examples)),
            written=tuple(sorted({places[node] for node in targets if node in places})),
            same=tuple((i, places[node]) for i, node in enumerate(outputs) if node in places),
            outputs=len(outputs),
            precision=_precision(graph_module, examples),
        )

    @classmethod
    def from_data(cls, data: Any) -> Signature:
        """Reads what `as_data` returned, also from JSON."""
        inputs = (x and (tuple(x[0]), tuple(x[1]), str(x[2])) for x in data["inputs"])
        same = tuple((int(output), int(place)) for output, place in data["same"])
        written = tuple(map(int, data["written"]))
        return cls(
            inputs=tuple(inputs),
            written=written,
            same=same,
            outputs=int(data["outputs"]),
            precision=str(data["precision"]),
        )

    def as_data(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)


def _precision(graph_module: GraphModule, examples: Sequence[Any]) -> str:
    """Returns the coarsest dtype of floating-point values in a graph."""
    values = [*examples, *(node.meta.get("val") for node in graph_module.graph.nodes)]
    dtypes = {x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return str(coarsest).removeprefix("torch.")


def _kept(node: Node) -> Node:
    """Follows ops that write in place and return what they wrote into."""
    while any(target := written(node)):
        node = target[0]
    return node


def _layout(value: Any) -> tuple[tuple[int, ...], tuple[int, ...], str] | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(value.shape), value.stride(), str(value.dtype).removeprefix("torch.")


class Package:
    """A compiled graph in a file.

    Attributes:
        file: The file.
        signature: What it takes and returns.
    """

    def __init__(self, file: Path, signature: Signature) -> None:
        self.file = file
        self.signature = signature
        self._runners: dict[torch.device, Any] = {}
        self._metas = [
            None if each is None else (each[1], torch.Size(each[0]), _DTYPES[each[2]])
            for each in signature.inputs
        ]

    def forward(self, *inputs: Any) -> list[Any]:
        """Returns the graph's outputs.

        Raises:
            RunError: With gradients enabled, or for inputs of other shapes or dtypes.
        """
        if torch.compiler.is_compiling():
            raise_to_compiler("a model that runs on packages is compiled already: call it eagerly")
        if torch.is_grad_enabled():
            raise RunError(
                "packages compute no gradients, and gradients are enabled; run the loop within "
                "torch.no_grad()"
            )
        tensors, copies = [], {}
        for place, (value, meta) in enumerate(zip(inputs, self._metas, strict=True)):
            if meta is None:
                continue
            if (value.stride(), value.shape, value.dtype) != meta or value.is_cuda:
                value = copies[place] = self._fitting(place, value, *meta)
            tensors.append(value)
        device = next((t.device for t in tensors if not t.is_cpu), _CPU)
        with _without_autocast(device):
            made: list[Any] = self._runner(device).boxed_run(tensors)
        for place in copies.keys() & self.signature.written:
            if copies[place] is not inputs[place]:
                inputs[place].copy_(copies[place])
        for output, place in self.signature.same:
            made[output] = inputs[place]
        return made

    def _fitting(
        self, place: int, value: Tensor, strides: Any, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """Returns an input in the form that the code was compiled for."""
        if value.shape != shape or value.dtype is not dtype:
            raise RunError(
                f"{self.file.name} was compiled for {list(shape)} {dtype} as input {place}; found "
                f"{list(value.shape)} {value.dtype}"
            )
        if value.is_cuda and value.data_ptr() % _ALIGNED:
            return _copy(value, strides)
        pairs = zip(value.stride(), strides, shape, strict=True)
        return value if all(a == b or n == 1 for a, b, n in pairs) else _copy(value, strides)

    def _runner(self, device: torch.device) -> Any:
        if device not in self._runners:
            index = device.index if device.type == "cuda" else -1
            loader = torch._C._aoti.AOTIModelPackageLoader
            self._runners[device] = loader(str(self.file), "model", False, 1, index)
        return self._runners[device]


def register_ops() -> None:
    """Registers the ops of this package that compiled code may call."""
    inductor_linears.registered_op()


def compile_package(
    graph_module: GraphModule,
    examples: Sequence[Any],
    file: Path,
    surrounding: Sequence[torch.dtype | None],
) -> Signature:
    """Compiles a graph into a file, and checks what it computes.

    Args:
        graph_module: The graph.
        examples: Its inputs: the code holds for their shapes, strides and dtypes, and for the very
            numbers among them.
        file: Where to write, ending in `.pt2`.
        surrounding: The dtypes of the autocast that the graph ran in, on the CPU and the GPU.

    Raises:
        PackageError: If it cannot be compiled, or computes something else than the graph.
    """
    from torch._inductor import aoti_compile_and_package

    run = _Run(graph_module, examples, surrounding)
    signature = Signature.of(graph_module, examples)
    options = inductor_linears.with_pass({})["options"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own internals
        try:
            inputs = tuple(map(_copy, _tensors(examples)))
            exported = torch.export.export(run, inputs, strict=False)
            aoti_compile_and_package(exported, package_path=str(file), inductor_configs=options)
        except Exception as error:
            raise PackageError(f"{type(error).__name__}: {error}") from error
    _check(Package(file, signature), run, examples)
    return signature


class _Run(nn.Module):
    """Runs a graph on tensors, as it ran: with its numbers, and in its autocast."""

    def __init__(
        self,
        graph_module: GraphModule,
        examples: Sequence[Any],
        surrounding: Sequence[torch.dtype | None],
    ) -> None:
        super().__init__()
        self._run = graph_module.forward
        self._numbers = [None if isinstance(x, Tensor) else x for x in examples]
        self._surrounding = surrounding

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        left = iter(tensors)
        inputs = [next(left) if number is None else number for number in self._numbers]
        with _autocast(self._surrounding):
            return tuple(self._run(*inputs))


def _check(package: Package, run: _Run, examples: Sequence[Any]) -> None:
    """Compares what a package computes, and writes into its inputs, with its graph."""
    given = [_copy(x) if isinstance(x, Tensor) else x for x in examples]
    tensors = list(map(_copy, _tensors(examples)))
    expected = [*run(*tensors), *tensors]
    made = [*package.forward(*given), *_tensors(given)]
    wrong = disagreement(made, expected, package.signature.precision, _MAY_DIFFER)
    if wrong:
        raise PackageError(f"the compiled code computes something else: {wrong}")


def disagreement(
    made: Sequence[Any], expected: Sequence[Any], precision: str, share: float = 0.0
) -> str:
    """Returns where compiled outputs differ from the expected ones; empty if they agree.

    Args:
        made: What compiled code computed.
        expected: What it has to.
        precision: The coarsest dtype that it computes in.
        share: The share of elements of each that may differ, from 0 to 1.
    """
    coarsest = _DTYPES[precision]
    tolerance = _TOLERANCE.get(coarsest, 16 * torch.finfo(coarsest).eps)
    if len(made) != len(expected):
        return f"{len(made)} outputs, of which {len(expected)} are expected"
    for place, (a, b) in enumerate(zip(made, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {place} is {list(a.shape)} {a.dtype}, not {list(b.shape)} {b.dtype}"
        differ = _share_that_differs(a, b, tolerance)
        if differ > share:
            return f"{100 * differ:.3g} % of output {place}"
    return ""


def _share_that_differs(a: Tensor, b: Tensor, tolerance: float) -> float:
    if a.numel() == 0:
        return 0.0
    if not b.is_floating_point():
        return (a != b).double().mean().item()
    a, b = a.double(), b.double()
    finite = b.isfinite()
    scale = b[finite].square().mean().sqrt() if finite.any() else b.new_zeros(())
    close = torch.where(finite, (a - b).abs() <= tolerance * (scale + b.abs()), a == b)
    return (~(close | (a.isnan() & b.isnan()))).double().mean().item()


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _copy(tensor: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """Returns a copy with its strides, or other ones, in memory that nothing shares."""
    strides = tensor.stride() if strides is None else strides
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        return made.copy_(tensor)


def example_of(value: Any) -> Any:
    """Returns a copy of an input, to compile a graph with later."""
    if not isinstance(value, Tensor):
        return value
    expanded = 0 in value.stride()
    return _copy(value, torch.empty(value.shape, device="meta").stride() if expanded else None)


def _autocast(surrounding: Sequence[torch.dtype | None]) -> ExitStack:
    stack = ExitStack()
    for kind, dtype in zip(("cpu", "cuda"), surrounding, strict=True):
        if dtype is not None:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
    return stack


def _without_autocast(device: torch.device) -> ExitStack:
    """Within it, ops that compiled code calls cast nothing: their casts are compiled in."""
    stack = ExitStack()
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack
