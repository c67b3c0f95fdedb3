"""Methods of a transformed copy that run something around the user's own."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import nn

from fastvar_fx.engine.engine import ENGINE

if TYPE_CHECKING:
    from fastvar_fx.engine.family import Family


def methods_of(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the methods that the module's own classes define, as functions of `self`."""
    kinds = takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    for name in {name: None for kind in kinds for name in vars(kind)}:
        defined = inspect.getattr_static(type(module), name)
        if isinstance(defined, types.FunctionType) and not name.startswith("__"):
            method = getattr(module, name)  # an attribute of the module's may stand before it
            if isinstance(method, types.MethodType) and method.__self__ is module:
                yield name, method.__func__


def override(module: nn.Module, name: str, family: Family, function: Callable[..., Any]) -> None:
    """Puts a method on one module, bound to it, so that deep copies of the module have it too."""
    object.__setattr__(module, ENGINE, family)
    object.__setattr__(module, name, types.MethodType(function, module))
