"""Methods of a transformed copy that run something around the user's own."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastvar_fx.engine.block import RUNTIME
from fastvar_fx.engine.engine import ENGINE, Engine
from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.errors import RunError

if TYPE_CHECKING:
    from fastvar_fx.engine.family import Family


log = logging.getLogger(__name__)


def watch(fast: nn.Module) -> None:
    """Makes the public methods of a transformed model note what they draw.

    They note the scales that they are called with, and how the generations in them end.
    """
    for name, method in list(methods_of(fast)):
        if not name.startswith("_"):
            own = method if name in vars(fast) else None
            override(fast, name, Engine.of(fast).family, _watched(name, method, own))


def _watched(
    name: str, method: Callable[..., Any], own: Callable[..., Any] | None
) -> Callable[..., Any]:
    @wraps(method)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        now = own or getattr(type(self), name)  # the class of a copy may have been changed
        if torch.compiler.is_compiling():
            return now(self, *args, **kwargs)
        family, values = Engine.of(self).family, (*args, *kwargs.values())
        if not family.within:
            check_blocks(self, family)
        with family.handing(values), family.whole():
            result = now(self, *args, **kwargs)
        undecided = inspect.isgenerator(result) and not family.decided
        return family.resumed(result, values) if undecided else result

    return watched


def check_blocks(fast: nn.Module, family: Family) -> None:
    """Checks that the blocks of a transformed model are those that `transform` made.

    Raises:
        RunError: If one was replaced, which would run dense; without `strict`, that is a warning.
    """
    for name in family.pruned:
        try:
            found = module_at(fast, name)
        except (AttributeError, IndexError, ValueError):
            continue  # a model may be cut short
        if any(RUNTIME in vars(module) for module in found.modules()):
            continue
        message = (
            f"{name} is a {type(found).__name__} that was put there after fastvar_fx.transform, "
            f"and so nothing prunes it: replace blocks of the original model and transform that, "
            f"or change the layers inside a block"
        )
        if family.current.plan.strict:
            raise RunError(message)
        log.warning("%s", message)


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
