"""Fingerprints: two calls with equal ones have equal block programs, without tracing both.

Blocks that share one cache object read and write other entries of it, such as those of their own
layer. So an entry of a container counts by the order in which it is first used, and a program that
was made for one call is moved to the places of another.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass_type,
)

from passes.trace.calls import TRACING, Call, Facts, FakeCall
from passes.trace.outcome import Write
from passes.trace.state import Path, is_beside

_SMALL: Final = 4096
"""Constants of up to this many elements are compared by value, larger ones by identity."""


class LeakedTensorError(Exception):
    """A forward kept a tensor in a place that no snapshot sees; a stand-in is left there now."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The ops that a call runs, with all their arguments and where their inputs are.

    Attributes:
        key: Equal if the programs are, up to the places of inputs and writes.
        inputs: Where the inputs are read, in the order of their first use.
        facts: What the call showed.
    """

    key: tuple[Any, ...]
    inputs: tuple[Path, ...] = field(compare=False)
    facts: Facts = field(compare=False)


def fingerprint(call: Call) -> Fingerprint:
    """Returns the fingerprint of a call.

    Two calls with equal fingerprints have equal block programs: every value that the forward reads
    and that makes a difference is an argument of an op. It costs a fraction of a capture.

    Raises:
        RefusedError: FVX001, if the call cannot be run on stand-ins.
        LeakedTensorError: If the forward keeps a tensor where it cannot be seen.
    """
    with TRACING:
        fake = FakeCall(call)
        try:
            mark = _record(fake)
        finally:
            left = fake.clear_memos()
    if left:
        found = [holder for holder in gc.get_referrers(*left) if holder is not left]
        holders = sorted({type(holder).__name__ for holder in found} - {"frame", "FakeTensor"})
        raise LeakedTensorError(
            f"its forward keeps a tensor of shape {tuple(left[-1].shape)} outside the module's "
            f"attributes and the call's arguments, in a {' or a '.join(holders) or 'closure'}"
        )
    return mark


def _record(call: FakeCall) -> Fingerprint:
    with call.stand_ins() as fakes:
        paths = [*call.tensors, *call.symbols.numbers]
        recorder = _Recorder(dict(zip(paths, fakes, strict=True)))
        with recorder:
            outputs = call.run(*fakes)
        call.note(recorder.made)
        named = tuple(recorder.name(t) for t in outputs)
    facts = call.facts()
    sizes = tuple((recorder.place(path), dim) for path, dim in facts.conditions.places)
    writes = tuple(map(recorder.written, facts.writes))
    key = (tuple(recorder.records), named, facts.result.key, writes, sizes, facts.conditions.text)
    return Fingerprint(key=key, inputs=tuple(recorder.places), facts=facts)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every op below autograd and autocast, naming tensors by origin.

    Attributes:
        records: The ops.
        places: Where inputs are read, in the order of their first use, with their names.
        made: What the ops returned; it is kept alive, for ids are names.
    """

    def __init__(self, inputs: dict[Path, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[Any] = []
        self.places: dict[Path, Any] = {}
        self.made: list[Tensor] = []
        tensors = {path: t for path, t in inputs.items() if isinstance(t, Tensor)}
        self._inputs = {id(t): path for path, t in tensors.items()}
        self._owners = {t.untyped_storage()._cdata: path for path, t in tensors.items()}
        self._results: dict[int, Any] = {}

    def place(self, path: Path) -> Any:
        """Names a place: entries of containers by the order of their first use."""
        return self.places.setdefault(path, _fixed(path) or (path[0], len(self.places)))

    def written(self, write: Write) -> Any:
        """Names a write, by what was read where it is and beside it."""
        at, value = write.place, write.value and write.value.key
        inside = tuple(i for i, p in enumerate(self.places) if p[: len(at)] == at)
        beside = tuple(i for i, p in enumerate(self.places) if is_beside(p, at))
        return _fixed(at) or at[0], inside, beside, value, write.buffer

    def name(self, value: Any) -> Any:
        """Names an argument of an op."""
        if not isinstance(value, Tensor):
            return (type(value), value if isinstance(value, (int, float, str)) else repr(value))
        path = self._inputs.get(id(value))
        if path is not None:
            return (self.place(path), str(value.shape), value.dtype, value.device)
        return self._results.get(id(value)) or self._constant(value)

    def _constant(self, value: Tensor) -> Any:
        """Names a tensor of unknown origin: an alias of an input, or a constant of the model."""
        meta = layout(value)
        if isinstance(value, FakeTensor):
            owner = self._owners.get(value.untyped_storage()._cdata)
            return ("alias", owner and self.place(owner), meta)
        if value.numel() > _SMALL:
            return ("constant", _Same(value))
        with _disable_current_modes():
            return ("constant", meta, value.device, repr(value.tolist()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # the subclass runs ops on the tensors that it wraps
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [self.name(leaf) for leaf in leaves]
        result = func(*args, **kwargs)
        for index, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._results.setdefault(id(leaf), (len(self.records), index))
                self.made.append(leaf)
        self.records.append((func, tuple(operands), spec))
        return result


def _fixed(path: Path) -> Path | None:
    """Returns a path of attributes, which two blocks must share; None for one into a container."""
    inside = path[1:] if path[0][1] == "module" else path[2:]
    return path if all(kind == "attr" for kind, _ in inside) else None


class _Same:
    """Equal only for one tensor, which it keeps alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._tensor is self._tensor

    def __hash__(self) -> int:
        return id(self._tensor)


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor lies in its storage; sizes as text, for symbols compare by what they mean."""
    offset = str(tensor.storage_offset())
    return (str(tuple(tensor.shape)), str(tensor.stride()), offset, tensor.dtype)
