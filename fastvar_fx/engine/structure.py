"""What a forward can read beyond its graph's inputs: a program holds only while it is the same.

A program holds while its block and its arguments are built as they were when it was made. Values
that a graph reads, and plain values, are compared with the inputs (`program.py`).
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvar_fx.engine.find_blocks import reachable
from passes.trace.state import PLAIN, Path, attributes

_VALUES: Final = (range, slice, Fraction, torch.Size)
_HOOKS: Final = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_OF_MODULE: Final = frozenset(vars(nn.Module()))
_MANY: Final = 64
"""Containers of more plain values than this are described at once: their types alone."""


class Structure:
    """How a value is built: types, lengths and keys of containers, and which tensors are one.

    Two are equal if a program that was made for one holds for the other, provided that its
    graph's inputs and the plain values fit too.
    """

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._objects: list[Any] = []  # compared by identity, and so kept alive
        self._numbers: dict[int, int] = {}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Structure)
            and self._parts == other._parts
            and len(self._objects) == len(other._objects)
            and all(map(operator.is_, self._objects, other._objects))
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of_block(cls, block: nn.Module) -> Structure:
        """Returns the structure of a block.

        It covers submodules, forwards set on instances, hooks, names of attributes, containers,
        settings of torch's own layers, and which parameters and buffers are one tensor. Hooks of
        the block itself are called around its programs, and so are no part of it.
        """
        made = cls()
        for _, module in reachable(block):
            made._parts += made._module(module)
            if module is not block:
                for name in _HOOKS:
                    made._objects += (getattr(module, name) or {}).values()
        return made

    @classmethod
    def of_arguments(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Collection[Path]
    ) -> Structure:
        """Returns the structure of a call's arguments.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            asked: Where tensors are that a forward asked for their shape or the like; it is part of
                the structure.
        """
        made = cls()
        for root, items in (("args", enumerate(args)), ("kwargs", kwargs.items())):
            for key, value in items:
                if type(value) is Tensor and not asked:
                    made._parts.append(made._numbers.setdefault(id(value), len(made._numbers)))
                else:
                    path = (("item", root), ("item", key))
                    made._parts.append(made._argument(path, value, asked))
        return made

    # --- blocks ---------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> list[Any]:
        own = {key: value for key, value in vars(module).items() if key not in _OF_MODULE}
        self._objects += [module, own.pop("forward", None)]
        parts: list[Any] = [type(module)]
        for registry in ("_parameters", "_buffers", "_modules"):
            parts.append(registry)
            for name, value in getattr(module, registry).items():
                parts.append((name, self._held(value)))
        settings = type(module).__module__.startswith("torch.")
        for name, value in own.items():
            setting = settings and isinstance(value, PLAIN) and type(value) is not float
            parts.append((name, value if setting else self._held(value)))
        return parts

    def _held(self, value: Any) -> Any:
        """Returns what a block holds: a tensor by its number, a container by what is in it."""
        kind = type(value)
        if kind is nn.Parameter or kind is Tensor:
            return kind, self._number(value), ""
        if isinstance(value, Tensor):
            return kind, self._number(value), _wrapping(value)
        if isinstance(value, (dict, list, tuple, deque)):
            return self._container(value, self._held)
        if isinstance(value, (set, frozenset)):
            return kind, len(value)
        return None if isinstance(value, PLAIN) else kind

    # --- arguments ------------------------------------------------------------------------------

    def _argument(self, path: Path, value: Any, asked: Collection[Path]) -> Any:
        if isinstance(value, Tensor):
            number = self._number(value)
            return (number, value.shape, value.dtype, value.device) if path in asked else number
        if isinstance(value, PLAIN):
            return type(value)
        if isinstance(value, (dict, list, tuple, deque)) and type(value) is not torch.Size:
            steps = value.keys() if isinstance(value, dict) else range(len(value))
            places = iter([(*path, ("item", step)) for step in steps])
            return self._container(value, lambda item: self._argument(next(places), item, asked))
        return self._other(path, value, asked)

    def _other(self, path: Path, value: Any, asked: Collection[Path]) -> Any:
        """Returns an argument that is neither a tensor nor a plain value or a container of them."""
        if isinstance(value, _VALUES):
            return value
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(value)
        if type(value).__module__ == "numpy":
            return type(value), value.shape, value.dtype, value.tobytes()
        held = attributes(value)
        if held is None:
            self._objects.append(value)
            return type(value)
        places = iter([(*path, ("attr", name)) for name in held])
        return self._container(value, lambda item: self._argument(next(places), item, asked), held)

    # --- both -----------------------------------------------------------------------------------

    def _number(self, value: Any) -> int:
        return self._numbers.setdefault(id(value), len(self._numbers))

    def _container(
        self, value: Any, describe: Callable[[Any], Any], held: dict[str, Any] | None = None
    ) -> Any:
        """Returns a container by its items; an object by its attributes, which are `held`."""
        if id(value) in self._numbers:
            return type(value), self._number(value)
        self._number(value)
        items = value if held is None else held
        kind = dict if isinstance(value, dict) else type(value)
        if len(items) > _MANY:
            kinds = tuple(map(type, items.values() if isinstance(items, dict) else items))
            if all(issubclass(each, PLAIN) for each in set(kinds)):
                return kind, tuple(items) if isinstance(items, dict) else (), kinds
        if isinstance(items, dict):
            return kind, [(key, describe(item)) for key, item in items.items()]
        return kind, [describe(item) for item in items]


def _wrapping(tensor: Any) -> str:
    """Returns how a tensor subclass wraps its tensors, such as the block size of quantisation."""
    if not is_traceable_wrapper_subclass(tensor):
        return ""
    return repr(tensor.__tensor_flatten__()[1])
