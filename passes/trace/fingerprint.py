"""Fingerprints: two calls with equal ones have equal block programs, without tracing both."""

from __future__ import annotations

import gc
from typing import Any, Final

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from passes.trace.calls import Call, FakeCall
from passes.trace.state import Path

_SMALL: Final = 4096
"""Constants of up to this many elements are compared by value, larger ones by identity."""


class LeakedTensorError(Exception):
    """A forward kept a tensor in a place that no snapshot sees; a stand-in is left there now."""


def fingerprint(call: Call) -> tuple[Any, ...]:
    """Returns the ops that a call runs, with all their arguments and where their inputs are.

    Two calls with equal fingerprints have equal block programs: every value that the forward reads
    and that makes a difference is an argument of an op. It costs a fraction of a capture.

    Raises:
        RefusedError: FVX001, if the call cannot be run on stand-ins.
        LeakedTensorError: If the forward keeps a tensor where it cannot be seen.
    """
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


def _record(call: FakeCall) -> tuple[Any, ...]:
    with call.stand_ins() as fakes:
        paths = [*call.snapshot.tensors, *call.symbols.numbers]
        recorder = _Recorder(dict(zip(paths, fakes, strict=True)))
        with recorder:
            outputs = call.run(*fakes)
        call.note(recorder.made)
        named = tuple(recorder.name(t) for t in outputs)
        structure = (call.result, tuple(call.result_leaves), tuple(call.writes))
        return (tuple(recorder.records), named, structure, call.symbols.conditions().text)


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
        self.made: list[Tensor] = []  # kept alive: their ids are their names

    def name(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return (type(value), value if isinstance(value, (int, float, str)) else repr(value))
        return self._names.get(id(value)) or self._constant(value)

    def _constant(self, value: Tensor) -> Any:
        """Names a tensor of unknown origin: an alias of an input, or a constant of the model."""
        meta = layout(value)
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


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor lies in its storage; sizes as text, for symbols compare by what they mean."""
    offset = str(tensor.storage_offset())
    return (str(tuple(tensor.shape)), str(tensor.stride()), offset, tensor.dtype)
