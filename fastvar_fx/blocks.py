"""Finds a model's transformer blocks, and copies a model's structure around shared tensors."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial, reduce
from typing import Any, Final

import torch
from torch import nn

from fastvar_fx.errors import ModelError
from passes.trace.state import contents, fill, is_container

_LISTS: Final = (nn.ModuleList, nn.Sequential, list, tuple)
_NO_FORWARD: Final = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Group:
    """Modules that stand in lists together: a candidate for the blocks."""

    owner: Any
    names: list[str]
    modules: list[nn.Module]

    @property
    def weight(self) -> int:
        """How many elements the matrices of its linear layers hold."""
        found = {id(p): p.numel() for m in self.modules for p in m.parameters() if p.dim() == 2}
        return sum(found.values())

    @property
    def submodules(self) -> int:
        """How many modules are in them, themselves included."""
        return sum(1 for m in self.modules for _ in m.modules())

    def is_sister_of(self, other: _Group) -> bool:
        """Whether it holds blocks of the same classes in another list of the same owner."""
        classes, others = ({type(m) for m in group.modules} for group in (self, other))
        return self.owner == other.owner and classes == others


def find_blocks(model: nn.Module, blocks: str | Sequence[nn.Module] | None) -> dict[str, nn.Module]:
    """Returns the transformer blocks by module path, in order.

    Args:
        model: The model.
        blocks: Module path of a block list or of one block, a list of modules, or None to look.

    Raises:
        ModelError: If none are found; the message lists what was seen.
    """
    if blocks is None:
        return _look(model)
    if isinstance(blocks, str):
        return _by_path(model, blocks)
    names = {id(m): n for n, m in reachable(model)}
    if not blocks or any(id(b) not in names for b in blocks):
        raise ModelError(
            f"blocks= must name modules of the model; found {len(blocks)} modules, of which "
            f"{sum(id(b) in names for b in blocks)} belong to {type(model).__name__}"
        )
    return {names[id(b)]: b for b in blocks}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path that `find_blocks` gave, which may lead through plain lists."""

    def step(owner: Any, part: str) -> Any:
        return getattr(owner, part) if hasattr(owner, part) else owner[int(part)]

    return reduce(step, path.split("."), model)


def _by_path(model: nn.Module, path: str) -> dict[str, nn.Module]:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in model.named_modules() if name]
        close = get_close_matches(path, names) or names[:8]
        raise ModelError(
            f"blocks={path!r} is no module of {type(model).__name__}; did you mean "
            f"{' or '.join(close)}?"
        ) from error
    blocks = dict(_flat(path, found))
    if not blocks:
        raise ModelError(f"blocks={path!r} is an empty list in {type(model).__name__}")
    return blocks


def _flat(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields a module, or the modules in a list of lists."""
    if isinstance(module, (*_NO_FORWARD, nn.Sequential)):
        for name, child in module.named_children():
            yield from _flat(f"{path}.{name}", child)
    else:
        yield path, module


def _look(model: nn.Module) -> dict[str, nn.Module]:
    groups = _groups(model)
    if not groups:
        seen = sorted({type(m).__name__ for m in model.modules()})
        raise ModelError(
            f"no transformer blocks found in {type(model).__name__}: no list of modules with "
            f"linear layers. Seen: {', '.join(seen[:20])}. Name them with blocks="
        )
    best = max(group.weight for group in groups)
    # Chunks that only wrap blocks weigh the same as their blocks: the innermost such list counts.
    heaviest = [group for group in groups if group.weight >= 0.99 * best]
    found = max(heaviest, key=lambda group: (len(group.modules), -group.submodules))
    names: dict[int, str] = {}
    modules = {}
    for group in groups:
        if group.is_sister_of(found):
            for name, module in zip(group.names, group.modules, strict=True):
                modules[names.setdefault(id(module), name)] = module
    return modules


def _groups(model: nn.Module) -> list[_Group]:
    """Collects the modules of each list; sister lists, as in the chunks of a model, are one."""
    groups: dict[Any, _Group] = {}
    lists: dict[int, Any] = {}  # which list a module stands in
    for owner_name, owner, key, items in _lists(model):
        if isinstance(owner, _NO_FORWARD):
            place: Any = (id(owner), "")
        else:
            place = (lists.get(id(owner), id(owner)), key)
        for _, item in items:
            lists.setdefault(id(item), place)
        candidates = [(name, item) for name, item in items if _has_linear(item)]
        if isinstance(owner, _NO_FORWARD) and _mixed(item for _, item in candidates):
            continue  # sub-layers of a block that is no module: their owner's owner adds them up
        if any(isinstance(item, _NO_FORWARD) and _mixed(item.children()) for _, item in items):
            candidates = [(owner_name, owner)]
        group = groups.setdefault(place, _Group(place[0], [], []))
        for name, item in candidates:
            if not isinstance(item, _NO_FORWARD) and not any(item is m for m in group.modules):
                group.names.append(name)
                group.modules.append(item)
    return [group for group in groups.values() if group.modules]


def _mixed(modules: Iterable[nn.Module]) -> bool:
    return len({type(m) for m in modules if _has_linear(m)}) > 1


def _has_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return False
    return sum(p.dim() == 2 for p in module.parameters()) > 1


def _lists(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, str, list[tuple[str, nn.Module]]]]:
    """Yields the lists of modules in a model: the owner's name, the owner, the key, the items."""
    for name, module in reachable(model):
        held: list[tuple[str, Any]] = list(module.named_children())
        held += [(k, v) for k, v in vars(module).items() if isinstance(v, (list, tuple))]
        for key, value in held:
            if isinstance(value, _LISTS):
                items = [(f"{_join(name, key)}.{i}", m) for i, m in enumerate(value)]
                modules = [(n, m) for n, m in items if isinstance(m, nn.Module)]
                if modules:
                    yield name, module, key, modules


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def reachable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields modules by path: registered ones, then those kept in plain lists and tuples."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        stack += [(_join(name, n), m) for n, m in module.named_children()]
        for key, value in vars(module).items():
            if isinstance(value, (list, tuple)):
                plain = enumerate(value)
                stack += [
                    (_join(name, f"{key}.{i}"), m) for i, m in plain if isinstance(m, nn.Module)
                ]


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
        if id(original) not in self.modules:
            made = original.__class__.__new__(original.__class__)
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
            items = [self._value(item) for item in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
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
