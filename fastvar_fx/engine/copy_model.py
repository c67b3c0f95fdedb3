"""Copies a model's structure around shared tensors."""

from __future__ import annotations

import copy
import logging
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from fastvar_fx.engine.find_blocks import reachable
from passes.trace.state import contents, fill, is_container, rebuilt

log = logging.getLogger(__name__)

_PROXIES: Final[tuple[Any, ...]] = weakref.ProxyTypes
_WEAK: Final[tuple[Any, ...]] = (weakref.ref, *_PROXIES)
_FUNCTIONS: Final = (types.FunctionType, types.MethodType, partial, types.CellType)
_FIXED: Final = (*_FUNCTIONS, *_WEAK, tuple)
"""What has no state itself, and is copied only if it leads to a part of the model."""


def copy_structure(
    model: nn.Module, blocks: Iterable[nn.Module] = ()
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Copies a model's modules and containers; parameters and buffers are shared.

    Functions and objects that lead to a part of the model, such as a patched forward that calls
    the old one through a hook's object, are copied too, so that they lead to the copy.

    Args:
        model: The model.
        blocks: Its blocks. Methods bound to a block that are its class's forward are bound to the
            class that the copied block has when they are called; and what `torch.compile` put
            around a block, or around what holds it, is left out.

    Returns:
        The copy, and the copied module for each original one by its id.
    """
    copier = _Copier(model, {id(block) for block in blocks})
    made = copier.module(model)
    if copier.compiled:
        log.warning(
            "torch.compile around blocks is left out of the copy: fastvar_fx.compile(fast) "
            "compiles them, and torch.compile can be applied after fastvar_fx.trace"
        )
    return made, copier.modules


def class_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward of a block's class, which is another one once the block is transformed."""
    return type(self).forward(self, *args, **kwargs)


class _Copier:
    def __init__(self, model: nn.Module, blocks: set[int]) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.compiled = False
        self._memo: dict[int, Any] = {}
        self._parts = _parts(model)
        self._blocks = blocks
        self._around = {
            id(module)
            for _, module in reachable(model)
            if blocks and any(id(inner) in blocks for _, inner in reachable(module))
        }

    def module(self, original: nn.Module) -> nn.Module:
        """Returns the copy of a module."""
        if id(original) not in self.modules:
            made: nn.Module = object.__new__(type(original))  # a class may have its own `__new__`
            self.modules[id(original)] = made
            held = vars(original)
            if id(original) in self._around:
                held = self._uncompiled(original)
            made.__dict__ = {key: self._value(value) for key, value in held.items()}
        return self.modules[id(original)]

    def _uncompiled(self, module: nn.Module) -> dict[str, Any]:
        """Returns a module's attributes without what `torch.compile` put around the module."""
        own = dict(vars(module))
        for key in [key for key, value in own.items() if _is_compiled(value)]:
            inside = own[key]._torchdynamo_orig_callable
            own[key] = None if key == "_compiled_call_impl" else inside
            self.compiled = True
        return own

    def _value(self, value: Any) -> Any:
        if id(value) not in self._parts:
            return value
        if isinstance(value, _WEAK):
            return self._weak(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, tuple):
            return rebuilt(value, [self._value(item) for item in value])
        if isinstance(value, types.MethodType):
            return self._method(value)
        if isinstance(value, partial):
            keywords = {k: self._value(v) for k, v in value.keywords.items()}
            return self._with_attributes(
                partial(self._value(value.func), *map(self._value, value.args), **keywords), value
            )
        if id(value) not in self._memo:
            make = self._function if isinstance(value, types.FunctionType) else self._container
            make(value)
        return self._memo[id(value)]

    def _weak(self, value: Any) -> Any:
        if isinstance(value, weakref.WeakMethod):
            method: Any = value()
            return weakref.WeakMethod(self._method(method))
        target = self._value(_target(value))
        return weakref.ref(target) if isinstance(value, weakref.ref) else weakref.proxy(target)

    def _method(self, value: types.MethodType) -> types.MethodType:
        owner, function = value.__self__, value.__func__
        if id(owner) in self._blocks and function is getattr(type(owner), "forward", None):
            function = class_forward
        return types.MethodType(self._value(function), self._value(owner))

    def _function(self, value: types.FunctionType) -> None:
        cells = tuple(map(self._cell, value.__closure__ or ()))
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self._memo[id(value)] = made
        made.__defaults__ = tuple(map(self._value, value.__defaults__ or ())) or None
        made.__kwdefaults__ = {k: self._value(v) for k, v in (value.__kwdefaults__ or {}).items()}
        made.__qualname__, made.__doc__ = value.__qualname__, value.__doc__
        self._with_attributes(made, value)
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if cell is not old and not _held_by_cell(cell):
                cell.cell_contents = self._value(old.cell_contents)

    def _cell(self, cell: types.CellType) -> types.CellType:
        """Returns an empty cell for one that leads to a part of the model: functions share it."""
        if id(cell) not in self._parts:
            return cell
        made: types.CellType = self._memo.setdefault(id(cell), types.CellType())
        return made

    def _with_attributes(self, made: Any, value: Any) -> Any:
        vars(made).update({key: self._value(item) for key, item in vars(value).items()})
        return made

    def _container(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            exact = type(value) is torch.Generator
            self._memo[id(value)] = _clone(value) if exact else copy.deepcopy(value)
            return
        made = self._memo[id(value)] = copy.copy(value)  # noted first: it may hold itself
        if isinstance(value, set):
            made.clear()
            made.update(map(self._value, value))
        else:
            fill(made, {step: self._value(item) for step, item in contents(value).items()})


def _clone(generator: torch.Generator) -> torch.Generator:
    made = torch.Generator(device=generator.device)
    made.set_state(generator.get_state())
    return made


def _is_compiled(value: Any) -> bool:
    own = vars(value) if isinstance(value, types.FunctionType) else {}
    return "_torchdynamo_orig_callable" in own and "_torchdynamo_disable" not in own


# --- what is a part of the model -----------------------------------------------------------------


def _parts(model: nn.Module) -> set[int]:
    """Returns the ids of what is copied with a model.

    These are its modules, the containers in which they keep state, and the functions and objects
    that lead to any of these.
    """
    held = _walk([model], _inside)
    modules = [value for value in held.values() if _is_module(value)]
    owned = _walk(modules, _inside_containers)
    parts = {key for key, value in owned.items() if not isinstance(value, _FIXED)}
    parts |= {key for key, value in held.items() if id(_target(value)) in parts}
    holders = defaultdict(list)
    for value in held.values():
        for item in _inside(value):
            holders[id(item)].append(id(value))
    found = list(parts)
    while found:
        new = [holder for holder in holders[found.pop()] if holder not in parts]
        parts.update(new)
        found += new
    return parts


def _walk(values: Iterable[Any], inside: Callable[[Any], Iterable[Any]]) -> dict[int, Any]:
    """Returns what may be copied among values and all that is inside them, by id."""
    found: dict[int, Any] = {}
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) not in found and _may_be_copied(value):
            found[id(value)] = value
            stack += inside(value)
    return found


def _may_be_copied(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and not isinstance(value, torch.Size)
    kinds = (*_FUNCTIONS, *_WEAK, set, torch.Generator)
    return isinstance(value, kinds) or is_container(value)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) and not isinstance(value, _PROXIES)


def _inside(value: Any) -> Iterable[Any]:
    """Returns what a value holds, if it is a container or a function."""
    if isinstance(value, types.CellType):
        return _held_by_cell(value)
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values(), *vars(value).values())
    if isinstance(value, types.FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return (*(value.__closure__ or ()), *defaults, *vars(value).values())
    return _inside_containers(value)


def _inside_containers(value: Any) -> Iterable[Any]:
    if isinstance(value, (*_FUNCTIONS, *_WEAK, torch.Generator)):
        return ()
    if isinstance(value, nn.Module):
        return vars(value).values()
    return value if isinstance(value, (tuple, set)) else contents(value).values()


def _held_by_cell(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # nothing is assigned to the variable yet
        return ()


def _target(value: Any) -> Any:
    """Returns what a weak reference refers to; a method's is its object."""
    if isinstance(value, weakref.WeakMethod):
        method = value()
        return None if method is None else method.__self__
    if isinstance(value, weakref.ref):
        return value()
    return value.__repr__.__self__ if isinstance(value, _PROXIES) else None
