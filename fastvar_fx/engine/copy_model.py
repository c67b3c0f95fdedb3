"""Copies a model's structure around shared tensors."""

from __future__ import annotations

import copy
import types
from functools import partial
from typing import Any

import torch
from torch import nn

from passes.trace.state import contents, fill, is_container, rebuilt


def copy_structure(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Copies a model's modules and containers; parameters and buffers are shared.

    Returns:
        The copy, and the copied module for each original one by its id.
    """
    copier = _Copier()
    return copier.module(model), copier.modules


class _Copier:
    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self._memo: dict[int, Any] = {}

    def module(self, original: nn.Module) -> nn.Module:
        """Returns the copy of a module."""
        if isinstance(original, torch.jit.ScriptModule):
            return self.modules.setdefault(id(original), original)  # code that cannot be copied
        if id(original) not in self.modules:
            made: nn.Module = object.__new__(type(original))  # a class may have its own `__new__`
            self.modules[id(original)] = made
            made.__dict__ = {key: self._value(value) for key, value in vars(original).items()}
        return self.modules[id(original)]

    def _value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, (set, torch.Generator)) or is_container(value):
            if id(value) not in self._memo:
                self._memo[id(value)] = value  # a container that holds itself is left as it is
                self._memo[id(value)] = self._container(value)
            return self._memo[id(value)]
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            return rebuilt(value, [self._value(item) for item in value])
        return self._function(value)

    def _function(self, value: Any) -> Any:
        """Copies methods, closures and partials that hold modules; returns all else as it is."""
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._closure(value)
        if isinstance(value, partial):
            keywords = {k: self._value(v) for k, v in value.keywords.items()}
            return partial(self._value(value.func), *map(self._value, value.args), **keywords)
        return value

    def _closure(self, value: types.FunctionType) -> Any:
        """Copies a function that holds modules, such as a patched forward that calls the old."""
        if id(value) not in self._memo:
            self._memo[id(value)] = value  # a function that holds itself is left as it is
            cells = tuple(map(self._cell, value.__closure__ or ()))
            if not all(a is b for a, b in zip(cells, value.__closure__ or (), strict=True)):
                made = types.FunctionType(
                    value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
                )
                made.__kwdefaults__ = value.__kwdefaults__
                made.__dict__.update(vars(value))
                self._memo[id(value)] = made
        return self._memo[id(value)]

    def _cell(self, cell: types.CellType) -> types.CellType:
        held = cell.cell_contents
        if not isinstance(held, (nn.Module, types.MethodType, types.FunctionType, partial)):
            return cell
        copied = self._value(held)
        return cell if copied is held else types.CellType(copied)

    def _container(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return copy.deepcopy(value) if type(value) is not torch.Generator else _clone(value)
        if isinstance(value, set):
            return type(value)(self._value(item) for item in value)
        made = copy.copy(value)
        fill(made, {step: self._value(item) for step, item in contents(value).items()})
        return made


def _clone(generator: torch.Generator) -> torch.Generator:
    made = torch.Generator(device=generator.device)
    made.set_state(generator.get_state())
    return made
