"""What a forward can read beyond its graph's inputs: a program holds only while it is the same.

A program holds while its block and its arguments are built as they were when it was made. Values
that a graph reads, and plain values, are compared with the inputs (`program.py`).
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.trace.state import PLAIN, Path, attributes, is_container, whole_value

_VALUES: Final = (range, slice, Fraction, torch.Size)
_HOOKS: Final = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_GLOBAL_HOOKS: Final = tuple(
    hooks for name, hooks in vars(torch.nn.modules.module).items() if name.endswith("_hooks")
)
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
        self._modules: list[nn.Module] = []

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

        It covers modules at any depth, their classes' and their own forwards, hooks, names of
        attributes, containers and objects, functions and what else is no plain value, settings of
        torch's own layers, and which of all these are one. Hooks of the block itself are called
        around its programs, and so are no part of it.
        """
        made = cls()
        made._held(block)
        for module in made._modules:  # those that it holds are appended meanwhile
            made._parts += made._module(module)
            if module is not block:
                for name in _HOOKS:
                    made._objects += (getattr(module, name) or {}).values()
        for hooks in _GLOBAL_HOOKS:
            made._objects += [hook for hook in hooks.values() if not _observes(hook)]
        for kind in dict.fromkeys(k for module in made._modules for k in type(module).__mro__):
            own = vars(kind)
            made._objects += [own.get("forward")] if _is_of_torch(kind) else own.values()
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
        settings = _is_of_torch(type(module))
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
        if isinstance(value, nn.Module):
            if id(value) not in self._numbers:
                self._modules.append(value)
            return self._number(value)
        if isinstance(value, PLAIN):  # compared with the inputs
            return None
        if isinstance(value, (dict, list, tuple, deque)):
            own = getattr(value, "__dict__", None)  # of a class that is derived from one
            return self._container(value, self._held), own and self._container(own, self._held)
        return self._other(value, attributes(value) if is_container(value) else None, self._held)

    # --- arguments ------------------------------------------------------------------------------

    def _argument(self, path: Path, value: Any, asked: Collection[Path]) -> Any:
        if isinstance(value, Tensor):
            number = self._number(value)
            return (number, value.shape, value.dtype, value.device) if path in asked else number
        if isinstance(value, PLAIN):
            return type(value)
        if isinstance(value, (dict, list, tuple, deque)) and type(value) is not torch.Size:
            steps = value.keys() if isinstance(value, dict) else range(len(value))
            items = self._container(value, self._arguments(path, "item", steps, asked))
            own = getattr(value, "__dict__", None)
            return items, own and self._container(own, self._arguments(path, "attr", own, asked))
        held = attributes(value)
        return self._other(value, held, self._arguments(path, "attr", held or (), asked))

    def _arguments(
        self, path: Path, kind: str, steps: Iterable[Any], asked: Collection[Path]
    ) -> Callable[[Any], Any]:
        """Returns a function that describes the entries of a container, one after the other."""
        places = iter([(*path, (kind, step)) for step in steps])
        return lambda item: self._argument(next(places), item, asked)

    # --- both -----------------------------------------------------------------------------------

    def _number(self, value: Any) -> int:
        return self._numbers.setdefault(id(value), len(self._numbers))

    def _other(
        self, value: Any, held: dict[str, Any] | None, describe: Callable[[Any], Any]
    ) -> Any:
        """Returns what is neither a tensor, a plain value nor a container of them.

        An object counts by its attributes, which are `held`; where they are None, by identity.
        """
        if isinstance(value, _VALUES):
            return value
        whole = whole_value(value)
        if whole is not None:
            return whole
        if held is None or isinstance(value, Enum):
            self._objects.append(value)
            return type(value)
        return self._container(value, describe, held)

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


def _observes(hook: Any) -> bool:
    """Whether a global hook is of torch's own tools, such as FLOP counters: they only observe."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def _wrapping(tensor: Any) -> str:
    """Returns how a tensor subclass wraps its tensors, such as the block size of quantisation."""
    if not is_traceable_wrapper_subclass(tensor):
        return ""
    return repr(tensor.__tensor_flatten__()[1])
