"""Digests of code: equal in two processes if functions and what they call are the same.

A package holds what a forward computed when it was exported. The forward of the model that runs on
it may have been edited since; its digest then differs.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, Final

import torch
from torch import Tensor

from passes.trace.state import PLAIN

_LIBRARIES: Final = sys.stdlib_module_names | {"torch", "numpy", "einops", "passes"}
"""What packages of another version of these would be is checked by the version of torch alone."""
_WRAPPERS: Final = (staticmethod, classmethod, types.MethodType)
_GENERATED: Final = frozenset({"__doc__", "__module__", "__qualname__", "__firstlineno__"})


def digest_of(value: Any) -> str:
    """Returns a digest of a class or function, and of the user's code that it leads to.

    It covers bytecode, constants, defaults and closures, and the functions, classes, plain values
    and tensors that global names refer to. Objects and containers count by their type.
    """
    return _Digest(value).text


def is_library(module: str | None) -> bool:
    """Whether code of a module is a library's, and not the user's or a model's."""
    name = module or ""
    ours = name.startswith("fastvar_fx") and not name.startswith("fastvar_fx.models")
    return ours or name.partition(".")[0] in _LIBRARIES


class _Digest:
    def __init__(self, value: Any) -> None:
        self._parts: list[str] = []
        self._met: dict[int, Any] = {}
        self._left: list[Any] = [value]
        while self._left:
            self._enter(self._left.pop())
        self.text = sha256("\n".join(self._parts).encode()).hexdigest()[:16]

    def _enter(self, value: Any) -> None:
        """Notes a value; what it leads to is noted later."""
        if id(value) in self._met:
            return
        self._met[id(value)] = value
        self._parts.append(_shown(value))
        self._left += reversed(list(_inside(value)))


def _inside(value: Any) -> Iterator[Any]:
    """Yields what a value leads to."""
    if isinstance(value, types.FunctionType) and not is_library(value.__module__):
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from (cell.cell_contents for cell in value.__closure__ or () if _filled(cell))
        names = set(_names(value.__code__))
        named = {name: value.__globals__[name] for name in sorted(names & value.__globals__.keys())}
        for found in named.values():
            yield from _members(found, names) if isinstance(found, types.ModuleType) else (found,)
    elif isinstance(value, type) and not is_library(value.__module__):
        yield from value.__bases__
        yield from (v for k, v in vars(value).items() if k not in _GENERATED)
    elif isinstance(value, _WRAPPERS):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, cached_property):
        yield value.func
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, tuple):
        yield from value
    elif callable(value) and not isinstance(value, (type, types.FunctionType)):
        yield getattr(value, "__wrapped__", type(value))  # a memo of `functools`, or an object


def _members(module: types.ModuleType, names: Iterable[str]) -> Iterator[Any]:
    """Yields what a function may use of a module that it refers to."""
    if not is_library(module.__name__):
        yield from (vars(module)[name] for name in sorted(names) if name in vars(module))


def _shown(value: Any) -> str:
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if isinstance(value, types.FunctionType) and not is_library(value.__module__):
        return f"{name} {_code(value.__code__)}"
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype} {_values(value)}"
    if isinstance(value, (*PLAIN, range, slice)):
        return repr(value)
    return name if isinstance(value, (type, types.FunctionType)) else type(value).__qualname__


def _code(code: types.CodeType) -> str:
    constants = [_constant(constant) for constant in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
    return f"{code.co_code.hex()} {constants} {names}"


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, frozenset):
        return str(sorted(map(repr, value)))  # sets have no order
    return repr(value)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # nothing is assigned to the variable yet
        return False


def _values(tensor: Tensor) -> str:
    if tensor.is_meta or type(tensor) is not Tensor:
        return ""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return sha256(values.numpy().tobytes()).hexdigest()
