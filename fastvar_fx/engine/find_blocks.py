"""Finds a model's transformer blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Final

from torch import nn

from fastvar_fx.errors import ModelError, did_you_mean

_LISTS: Final = (nn.ModuleList, nn.Sequential, list, tuple)
_NO_FORWARD: Final = (nn.ModuleList, nn.ModuleDict)
_SAME_WEIGHT: Final = 0.99


@dataclass(frozen=True)
class _Group:
    """Modules of one list, or of sister lists, with their names: a candidate for the blocks."""

    owner: Any
    modules: dict[nn.Module, str] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """How many elements the matrices of its linear layers hold."""
        found = {id(p): p.numel() for m in self.modules for p in m.parameters() if p.dim() == 2}
        return sum(found.values())

    @property
    def submodules(self) -> int:
        """How many modules are in them, themselves included."""
        return sum(1 for m in self.modules for _ in m.modules())

    def add(self, candidates: Iterable[tuple[str, nn.Module]]) -> None:
        """Adds modules by name, each once."""
        for name, module in candidates:
            if not isinstance(module, _NO_FORWARD):
                self.modules.setdefault(module, name)

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
        close = did_you_mean(path, names)
        raise ModelError(
            f"blocks={path!r} is no module of {type(model).__name__}; {close}"
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
    # Chunks that wrap blocks weigh as much, up to a small projection: the innermost list counts.
    heaviest = [group for group in groups if group.weight >= _SAME_WEIGHT * best]
    found = max(heaviest, key=lambda group: (len(group.modules), -group.submodules))
    names: dict[nn.Module, str] = {}
    for group in groups:
        if group.is_sister_of(found):
            for module, name in group.modules.items():
                names.setdefault(module, name)
    return {name: module for module, name in names.items()}


def _groups(model: nn.Module) -> list[_Group]:
    """Collects the modules of each list; sister lists, as in the chunks of a model, are one."""
    groups: dict[Any, _Group] = {}
    lists: dict[int, Any] = {}  # the list that holds a module
    for owner_name, owner, key, items in _lists(model):
        place: Any = (id(owner), "")
        if not isinstance(owner, _NO_FORWARD):
            place = (lists.get(id(owner), id(owner)), key)
        for _, item in items:
            lists.setdefault(id(item), place)
        group = groups.setdefault(place, _Group(place[0]))
        group.add(_candidates(owner_name, owner, items))
    return [group for group in groups.values() if group.modules]


def _candidates(
    owner_name: str, owner: nn.Module, items: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """Returns the items of a list that may be blocks, or the owner if the items are parts of it."""
    if any(isinstance(item, _NO_FORWARD) and _mixed(item.children()) for _, item in items):
        return [(owner_name, owner)]
    found = [(name, item) for name, item in items if _has_linear(item)]
    parts_of_a_list = isinstance(owner, _NO_FORWARD) and _mixed(item for _, item in found)
    return [] if parts_of_a_list else found


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
        for key, value in _held(module):
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
        for key, value in _held(module):
            if isinstance(value, nn.Module):
                stack.append((_join(name, key), value))
                continue
            for i, item in enumerate(value):
                if isinstance(item, nn.Module):
                    stack.append((_join(name, f"{key}.{i}"), item))


def _held(module: nn.Module) -> list[tuple[str, Any]]:
    """Returns the children of a module, then its plain lists and tuples, by name."""
    held: list[tuple[str, Any]] = [(k, m) for k, m in module._modules.items() if m is not None]
    held += [(k, v) for k, v in vars(module).items() if isinstance(v, (list, tuple))]
    return held
