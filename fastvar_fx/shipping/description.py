"""What a call of a block depends on, as lines of text that are equal in another process.

A package holds for calls whose description is that of the call it was made for: the block's
modules, code, settings, weights and state, and the call's arguments. `Program` then guards later
calls, as for programs that are traced.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from enum import Enum
from fractions import Fraction
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvar_fx.engine.block import ATTACHED, InstanceForward, own_class
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.find_blocks import reachable
from fastvar_fx.engine.program import autocast_dtypes
from fastvar_fx.shipping.code import digest_of, is_library
from passes.trace.outcome import Handed, Made, Recipe, Write
from passes.trace.state import PLAIN, attributes, is_constant, show

Lines = dict[str, str]
"""What is at a place, by its path."""

_SHOWN: Final = (range, slice, Fraction, torch.Size)
_CODE: Final = (FunctionType, MethodType, BuiltinFunctionType, partial, type)
_HOOKS: Final = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_OF_MODULE: Final = frozenset(vars(nn.Module())) - {"training"}
_MANY: Final = 64
"""Containers of more plain values than this are one line."""


def describe_call(call: BlockCall) -> tuple[Lines, Lines]:
    """Returns the descriptions of a call's block, with its state, and of its arguments."""
    walk = _Walk()
    walk.visit("", call.block)
    block, walk.lines = walk.lines, {}
    walk.note("call", f"{call.form[0]} positional arguments, by name {call.form[1]}")
    walk.note("autocast", str(autocast_dtypes()))
    walk.note("selection", "given" if call.selection is not None else "none")
    for place, value in [*enumerate(call.args), *call.kwargs.items()]:
        walk.visit(f"argument {place}", value)
    return block, walk.lines


def describe_block(block: nn.Module) -> Lines:
    """Returns the description of a block's modules and parameters, without state."""
    walk = _Walk()
    for name, module in reachable(block):
        walk.note(name, _class_text(module))
        for key, parameter in module._parameters.items():
            walk.visit(f"{name}.{key}".removeprefix("."), parameter)
    return walk.lines


def describe_outcome(result: Recipe, writes: Iterable[Write]) -> list[str]:
    """Returns how a call's result is made from tensors, and where it stores others."""
    stored = [
        f"{show(write.place[1:])} = {_recipe_text(write.value) if write.value else 'nothing'}"
        for write in writes
    ]
    return [_recipe_text(result), *stored]


def digest(lines: Lines) -> str:
    """Returns a short name of a description."""
    return sha256(json.dumps(list(lines.items())).encode()).hexdigest()[:16]


def differences(expected: Lines, found: Lines) -> list[str]:
    """Returns in words where two descriptions differ."""
    places = [*expected, *(place for place in found if place not in expected)]
    differ = [place for place in places if expected.get(place) != found.get(place)]
    told = [
        f"{place or 'the block'}: exported {expected.get(place, 'nothing')}, "
        f"found {found.get(place, 'nothing')}"
        for place in differ
    ]
    return told or (["the order of entries"] if list(expected) != list(found) else [])


class _Walk:
    """Describes values; one that was met before is named by its first place."""

    def __init__(self) -> None:
        self.lines: Lines = {}
        self._places: dict[int, tuple[str, Any]] = {}  # values are kept alive, for ids are names

    def note(self, place: str, text: str) -> None:
        self.lines[place] = text

    def visit(self, place: str, value: Any) -> None:
        """Describes a value and all that it holds."""
        text = _plain_text(value)
        if text is None and not isinstance(value, tuple):
            first, _ = self._places.setdefault(id(value), (place, value))
            if first != place:
                text = f"the same as {first or 'the block'}"
        if text is not None:
            self.note(place, text)
        elif isinstance(value, nn.Module):
            self._module(place, value)
        elif isinstance(value, Tensor):
            self._tensor(place, value)
        elif isinstance(value, (dict, list, tuple, deque)):
            self._container(place, value)
        else:
            self._object(place, value)

    def _module(self, place: str, module: nn.Module) -> None:
        self.note(place, _class_text(module))
        own = {k: v for k, v in vars(module).items() if k not in (*_OF_MODULE, *ATTACHED)}
        for name, value in (module._parameters | module._buffers | module._modules | own).items():
            self.visit(f"{place}.{name}".removeprefix("."), value)
        for kind in _HOOKS if place else ():  # those of the block are called around its programs
            for number, hook in enumerate((getattr(module, kind) or {}).values()):
                self.visit(f"{place}.{kind}[{number}]", hook)

    def _tensor(self, place: str, tensor: Any) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        kind, shape = type(tensor).__qualname__, list(tensor.shape)
        self.note(place, f"{kind} of {dtype} {shape} on {tensor.device.type}")
        if is_traceable_wrapper_subclass(tensor):
            inner, context = tensor.__tensor_flatten__()
            self.note(f"{place}.context", repr(context))
            for name in inner:
                self.visit(f"{place}.{name}", getattr(tensor, name))

    def _container(self, place: str, value: Any) -> None:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        text = f"{type(value).__qualname__} of {len(items)}"
        if len(items) > _MANY and all(is_constant(item) for _, item in items):
            self.note(place, f"{text}: {sha256(repr(items).encode()).hexdigest()}")
            return
        self.note(place, text)
        for number, (key, item) in enumerate(items):
            self.visit(f"{place}[{key!r}]" if is_constant(key) else f"{place}[#{number}]", item)
            if not is_constant(key):
                self.visit(f"{place}.keys[{number}]", key)

    def _object(self, place: str, value: Any) -> None:
        if isinstance(value, InstanceForward):
            self.visit(place, value.own)
            return
        kind = type(value)
        text = f"object of {kind.__module__}.{kind.__qualname__}"
        held = None if is_library(kind.__module__) else attributes(value)
        if held is None:
            self.note(place, text)
            return
        self.note(place, f"{text}, code {digest_of(kind)}")
        for name, item in held.items():
            self.visit(f"{place}.{name}", item)


def _plain_text(value: Any) -> str | None:
    """Returns a value that holds no others as text; None if it may hold some."""
    if isinstance(value, torch.device):
        return f"device {value.type}"
    if is_constant(value) or isinstance(value, (*PLAIN, *_SHOWN)):
        return repr(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__qualname__} {sorted(map(repr, value))}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape} {sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, _CODE):
        return f"code {digest_of(value)}"
    return None


def _class_text(module: nn.Module) -> str:
    kind = own_class(module)
    return f"module {kind.__module__}.{kind.__qualname__}, code {digest_of(kind)}"


def _recipe_text(recipe: Recipe) -> str:
    return f"{recipe.spec}: {', '.join(map(_leaf_text, recipe.leaves))}"


def _leaf_text(leaf: Any) -> str:
    if leaf is ...:
        return "tensor"
    if isinstance(leaf, Handed):
        return f"the object at {show(leaf.path[1:])}"
    if isinstance(leaf, Made):
        inside = [f"{step}: {_recipe_text(recipe)}" for step, recipe in leaf.entries]
        return f"{type(leaf.blank).__qualname__} of {inside}"
    return repr(leaf) if is_constant(leaf) else type(leaf).__qualname__
