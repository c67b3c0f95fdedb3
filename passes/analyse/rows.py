"""Finds the rows of a batch in what a call reads, by running its graph. Analysis only.

A batch that guidance doubles has a conditional and an unconditional half. A call may run one of
them alone if it does not mix the rows of the batch: whatever stands in the rows that are dropped,
the others come out as before. That is tried with numbers, so that it holds for every op. Labels of
axes would not do: they begin at the token map, and conditions, masks and caches have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from passes.graph import outputs_of
from passes.refusal import refuse
from passes.trace.calls import Call, Rows, live_inputs, reference
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import Path, get, show
from passes.verify import check_translation, difference


@dataclass(frozen=True)
class Half:
    """The rows of a batch that are left.

    Attributes:
        batch: How many rows there were.
        first: The first that is left.
        count: How many are left.
    """

    batch: int
    first: int
    count: int

    @property
    def dropped(self) -> Half:
        """The rows that are not left, of a batch of two halves."""
        return Half(self.batch, self.batch - self.count - self.first, self.batch - self.count)


class RowDim(NamedTuple):
    """A dim that ranges over the batch.

    Attributes:
        dim: The dim.
        each: How many entries it has for a row, such as the heads.
        more: How many it has besides; 1 for the bounds of packed sequences.
    """

    dim: int
    each: int = 1
    more: int = 0

    def size(self, batch: int) -> int:
        """Returns its size for a batch."""
        return self.each * batch + self.more

    def rows(self, half: Half) -> Rows:
        """Returns the entries of the rows that are left."""
        return Rows(self.dim, self.each * half.first, self.each * half.count + self.more)


def find_rows(call: Call, half: Half) -> dict[Path, RowDim]:
    """Returns the dim that ranges over the batch, for every input that has one.

    Args:
        call: A call with the whole batch.
        half: What is left of it.

    Raises:
        RefusedError: FVX024, if the call mixes rows of the batch, or does not run on half of them;
            FVX001, if it cannot be traced; FVX003, if it returns no token map.
    """
    whole = reference(call)
    search = _Search(call, half, capture(call))
    found = {path: dim for path in search.program.inputs for dim in search.dims(path)}
    if call.stream not in found or not search.keeps(found):
        search.refuse_mixing(found)
    try:
        alone = reference(replace(call, rows={path: d.rows(half) for path, d in found.items()}))
    except (RuntimeError, ValueError, IndexError) as error:
        refuse("FVX024", f"on {half.count} of {half.batch} rows: {type(error).__name__}: {error}")
    for made, expected in zip(alone[0] + alone[1], whole[0] + whole[1], strict=True):
        wanted, graph_module = _part(expected, made, half), search.program.graph_module
        if difference([made], [wanted], graph_module, "on half of the batch") is not None:
            names = ", ".join(show(path[1:]) for path in found)
            refuse("FVX024", f"with half of {names} alone, it returns or stores other values")
    return found


class _Search:
    """Runs a call's graph with other values in the rows that are dropped."""

    def __init__(self, call: Call, half: Half, program: BlockProgram) -> None:
        self.program = program
        self._call = call
        self._half = half
        results = outputs_of(program.graph_module.graph)[: program.result_count]
        shape = get(call.roots(), call.stream).shape
        maps = [i for i, node in enumerate(results) if node.meta["val"].shape == shape]
        if not maps:
            refuse("FVX003", f"no result has the shape {tuple(shape)} of its input")
        self._map = maps[0]
        self._expected = self._run({})
        self._packed = any(map(self._bounds, live_inputs(call, program.inputs)))

    def dims(self, path: Path) -> Iterator[RowDim]:
        """Yields the dim of an input that ranges over the batch, if it has one.

        Values in the rows that are dropped change the result in these rows, and in no others.
        """
        value, batch = get(self._call.roots(), path), self._half.batch
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return
        if self._bounds(value):
            yield RowDim(0, more=1)
            return
        sizes = enumerate(value.shape)
        known = [RowDim(d, size // batch) for d, size in sizes if size and size % batch == 0]
        if self._packed:  # rows of packed sequences have other lengths in another call
            known = [dim for dim in known if dim.each == 1]
        idle = []
        for dim in sorted(known, key=lambda each: each.each > 1):
            made = self._run({path: dim})
            if self._alike(made, self._half):
                if not self._alike(made, self._half.dropped):
                    yield dim
                    return
                idle += [dim] * (dim.each == 1)
        yield from idle[:1]  # nothing depends on it, as behind a gate that is zero

    def _bounds(self, value: Any) -> bool:
        """Whether an input is the bounds of packed sequences, such as `cu_seqlens`."""
        shape = (self._half.batch + 1,)
        return isinstance(value, Tensor) and value.dtype is torch.int32 and value.shape == shape

    def keeps(self, found: Mapping[Path, RowDim]) -> bool:
        """Whether other values in the dropped rows of all inputs change nothing in the others."""
        return self._alike(self._run(found), self._half)

    def refuse_mixing(self, found: Mapping[Path, RowDim]) -> NoReturn:
        """Refuses the call at the first op by which rows that are left depend on the others."""
        seen: list[dict[Node, Any]] = [{}, {}]
        for values, changed in zip(
            seen, ({}, {**found, self._call.stream: RowDim(0)}), strict=True
        ):
            _Recorder(self.program, values).run(*self._inputs(changed))
        nodes = (node for node in seen[0] if node.op == "call_function")
        mixing = (n for n in nodes if not self._separate(seen[0][n], seen[1][n]))
        reason = "rows of the batch that are left depend on those that are dropped"
        refuse("FVX024", reason, next(mixing, None))

    def _separate(self, before: Any, after: Any) -> bool:
        """Whether two values of a node are alike in the rows that are left, along some dim."""
        if not isinstance(before, Tensor) or _same(after, before):
            return True
        batch = self._half.batch
        dims = (RowDim(d, n // batch) for d, n in enumerate(before.shape) if n and n % batch == 0)
        parts = (dim.rows(self._half) for dim in dims)
        return any(_same(rows.of(after), rows.of(before)) for rows in parts)

    def _run(self, changed: Mapping[Path, RowDim]) -> Tensor:
        outputs: Sequence[Tensor] = self.program.graph_module(*self._inputs(changed))
        return outputs[self._map]

    def _inputs(self, changed: Mapping[Path, RowDim]) -> list[Any]:
        values = live_inputs(self._call, self.program.inputs)
        for i, path in enumerate(self.program.inputs):
            if path in changed and not changed[path].more:
                values[i] = _with_others(values[i], changed[path].rows(self._half))
        return values

    def _alike(self, made: Tensor, half: Half) -> bool:
        rows = RowDim(0).rows(half)
        return _same(rows.of(made), rows.of(self._expected))


class _Recorder(Interpreter):
    """Notes the value of every node."""

    def __init__(self, program: BlockProgram, seen: dict[Node, Any]) -> None:
        super().__init__(program.graph_module)
        self._seen = seen

    def run_node(self, n: Node) -> Any:
        value = self._seen[n] = super().run_node(n)
        if isinstance(value, Tensor):  # a later op may overwrite it
            self._seen[n] = value.clone()
        return value


def _with_others(tensor: Tensor, rows: Rows) -> Tensor:
    """Returns a copy of a tensor with other values in all rows but these."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    if tensor.is_floating_point() or tensor.is_complex():
        other = tensor + (8 * noise).to(tensor.dtype)
    else:
        other = ~tensor if tensor.dtype is torch.bool else tensor.flatten().flip(0).view_as(tensor)
    rows.of(other).copy_(rows.of(tensor))
    return other


def _part(whole: Tensor, alone: Tensor, half: Half) -> Tensor:
    """Returns the rows of a tensor that a call on half of the rows made."""
    sizes = enumerate(zip(whole.shape, alone.shape, strict=False))
    shrunk = [RowDim(d, size // half.batch) for d, (size, left) in sizes if size != left]
    part = shrunk[0].rows(half).of(whole) if shrunk else whole
    if part.shape != alone.shape:
        reason = f"{tuple(whole.shape)} becomes {tuple(alone.shape)} on half of the rows"
        refuse("FVX024", reason)
    return part


def _same(made: Tensor, expected: Tensor) -> bool:
    return check_translation([made], [expected]) is None
