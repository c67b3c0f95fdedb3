"""What a block is made of, compared between generations: edits in between need other programs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn

from fastvar_fx.engine.find_blocks import reachable

_PLAIN: Final = (int, float, complex, bool, str, bytes, type(None))
_HOOKS: Final = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_OF_MODULE: Final = frozenset(vars(nn.Module()))


class Structure:
    """The modules of a block, their forwards, hooks and settings, and how tensors are shared.

    It covers what a program was made from and does not compare at every call: submodules, forwards
    set on instances, hooks, the names of attributes, the lengths and keys of containers, settings
    of torch's own layers, and which parameters and buffers are one tensor. Two are equal if a
    program that was made for one holds for the other.
    """

    def __init__(self, block: nn.Module) -> None:
        self._objects: list[Any] = []  # compared by identity, and so kept alive
        self._numbers: dict[int, int] = {}
        self._parts = [part for _, module in reachable(block) for part in self._module(module)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Structure)
            and self._parts == other._parts
            and len(self._objects) == len(other._objects)
            and all(a is b for a, b in zip(self._objects, other._objects, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def _module(self, module: nn.Module) -> Iterator[Any]:
        own = {key: value for key, value in vars(module).items() if key not in _OF_MODULE}
        self._objects += [module, own.pop("forward", None)]
        self._objects += [
            hook for name in _HOOKS for hook in (getattr(module, name) or {}).values()
        ]
        yield type(module)
        for held in (module._parameters, module._buffers, module._modules):
            yield self._value(held)
        settings = type(module).__module__.startswith("torch.")
        for name, value in own.items():
            yield name, value if settings and isinstance(value, _PLAIN) else self._value(value)

    def _value(self, value: Any) -> Any:
        """Returns the structure of a value: which tensor or module it is, or what it contains."""
        met = self._numbers.get(id(value))
        if isinstance(value, Tensor):
            return type(value), self._numbers.setdefault(id(value), len(self._numbers))
        if isinstance(value, (dict, list, tuple, deque)):
            if met is not None:
                return type(value), met
            self._numbers[id(value)] = len(self._numbers)
            if isinstance(value, dict):
                return dict, [(key, self._value(item)) for key, item in value.items()]
            return type(value), [self._value(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return type(value), len(value)
        return None if isinstance(value, _PLAIN) else type(value)
