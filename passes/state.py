"""The tensors and values that a call of a module can reach, where they are, and what it changed.

A module keeps state outside its parameters and buffers: keys and values in attributes, in lists,
in dicts, or in an object handed in as an argument. A `Snapshot` walks all of it from three roots
(the module, its args, its kwargs), so that a call can be run on stand-ins and undone, and so that
its writes can be replayed later around a graph.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.refusal import refuse

Step = tuple[str, Any]
"""One step of a path: ("attr", name) or ("item", key)."""
Path = tuple[Step, ...]
Roots = dict[str, Any]
"""What paths start from: {"module": ..., "args": [...], "kwargs": {...}}."""
StandIn = Callable[[Path, Any], Any]
"""(path, tensor or plain value) -> what stands in its place."""

_MODULE_INTERNALS: Final = frozenset(vars(nn.Module())) | {"_fastvar", "_compiled_call_impl"}
_CONSTANTS: Final = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_MISSING: Final = object()
_NOT_STATE: Final = sys.stdlib_module_names | {"torch", "numpy", "einops", "fastvar_fx", "passes"}


def roots(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Roots:
    """Returns the roots of one call of `module`."""
    return {"module": module, "args": list(args), "kwargs": dict(kwargs)}


def get(origin: Any, path: Path) -> Any:
    """Returns the value at `path`, seen from `origin`."""
    for kind, key in path:
        origin = getattr(origin, key) if kind == "attr" else origin[key]
    return origin


def show(path: Path) -> str:
    """Returns `path` the way a user would write it, such as `attn.cache['k']`."""
    text = "".join(f".{key}" if kind == "attr" else f"[{key!r}]" for kind, key in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Write:
    """One thing a call changed.

    Attributes:
        path: The container that changed, from the roots.
        step: The entry of it that was set.
        spec: The structure of the new value.
        leaves: Its leaves: tensors, or constants to set as they are.
        deleted: Whether the entry was removed instead.
    """

    path: Path
    step: Step
    spec: pytree.TreeSpec | None
    leaves: tuple[Any, ...]
    deleted: bool = False


class Snapshot:
    """Everything a call can reach, as it was when the snapshot was taken.

    Attributes:
        tensors: Every tensor by its first path, each tensor once.
        constants: The plain values that the call's own modules and arguments hold, by path.
    """

    def __init__(self, origin: Roots) -> None:
        self._containers: list[tuple[Path, Any, Any]] = []
        self._registries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._seen: set[int] = set()
        self.tensors: dict[Path, Tensor] = {}
        self.constants: dict[Path, Any] = {}
        for name, value in origin.items():
            self._visit((("item", name),), value)

    def _visit(self, path: Path, value: Any) -> None:
        if _is_constant(value):
            self.constants[path] = value
            return
        if id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen.add(id(value))
            self.tensors[path] = value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._visit((*path, ("item", index)), item)
        elif is_container(value):
            self._seen.add(id(value))
            self._containers.append((path, value, _copy(value)))
            if isinstance(value, nn.Module):
                self.constants[*path, ("attr", "training")] = value.training
                self._registries += [(r, dict(r)) for r in _registries(value)]
            for step, item in _entries(value):
                setting = isinstance(item, tuple) or _is_constant(item)
                if not (_is_torch_layer(value) and setting):
                    self._visit((*path, step), item)

    def substitute(self, stand_in: StandIn) -> None:
        """Puts `stand_in(path, value)` in the place of every tensor and plain value."""
        for path, container, contents in self._containers:
            _fill(container, _map_contents(path, container, contents, stand_in))

    def restore(self) -> None:
        """Puts everything back as it was."""
        for registered, entries in self._registries:
            registered.clear()
            registered.update(entries)
        for _, container, contents in self._containers:
            _fill(container, contents)

    def writes(self, since: StandIn) -> Iterator[Write]:
        """Yields what changed since `substitute(since)`.

        Raises:
            RefusedError: FVX001, if a change is of a form that cannot be replayed.
        """
        for path, container, contents in self._containers:
            mapped = _map_contents(path, container, contents, since)
            before = dict(_contents_entries(container, mapped))
            after = dict(_entries(container))
            if isinstance(container, (list, deque)) and len(after) < len(before):
                refuse("FVX001", f"the call removed entries of the list {show(path[1:])}")
            for step, value in after.items():
                if not _same(before.get(step, _MISSING), value):
                    yield _write(path, step, value)
            for step in before.keys() - after.keys():
                yield Write(path, step, None, (), deleted=True)


def _is_constant(value: Any) -> bool:
    """Whether `value` is a plain value; so are NumPy's scalars, which comparisons with it give."""
    numpy_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return numpy_scalar or isinstance(value, _CONSTANTS)


def is_container(value: Any) -> bool:
    """Whether `value` is mutable and may hold tensors that a call reads or writes."""
    if isinstance(value, (dict, list, deque, nn.Module, SimpleNamespace)):
        return True
    if isinstance(value, (type, torch.Generator, FunctionType, MethodType, partial)):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in _NOT_STATE and (hasattr(value, "__dict__") or bool(_slots(value)))


def _slots(value: Any) -> list[str]:
    names = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    flat = [n for name in names for n in ((name,) if isinstance(name, str) else name)]
    return [name for name in flat if name not in ("__dict__", "__weakref__")]


def attributes(value: Any) -> dict[str, Any]:
    """Returns the attributes of a plain object, in its `__dict__` or its slots."""
    slots = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
    return slots | dict(getattr(value, "__dict__", {}))


def _is_torch_layer(value: Any) -> bool:
    """Layers of torch itself hold settings that no public loop changes between two calls."""
    return isinstance(value, nn.Module) and type(value).__module__.startswith("torch.")


def apply(write: Write, container: Any, leaves: list[Any]) -> None:
    """Replays `write` on a live container, with `leaves` for its value."""
    kind, key = write.step
    if write.deleted:
        delattr(container, key) if kind == "attr" else container.pop(key)
        return
    assert write.spec is not None
    value = leaves[0] if write.spec.is_leaf() else pytree.tree_unflatten(leaves, write.spec)
    if kind == "attr":
        setattr(container, key, value)
    elif isinstance(container, (list, deque)) and key == len(container):
        container.append(value)
    else:
        container[key] = value


def _write(path: Path, step: Step, value: Any) -> Write:
    leaves, spec = pytree.tree_flatten(value)
    for leaf in leaves:
        if not (isinstance(leaf, Tensor) or _is_constant(leaf)):
            where = show((*path[1:], step))
            refuse("FVX001", f"the call stored an object of {type(leaf).__name__} in {where}")
    return Write(path, step, spec, tuple(leaves))


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return all(map(_same, before, after))
    plain = _is_constant(before) and _is_constant(after)
    return plain and type(before) is type(after) and bool(before == after)


def _map_contents(path: Path, container: Any, contents: Any, stand_in: StandIn) -> Any:
    """Replaces tensors and plain values, also inside tuples; containers keep their identity."""
    entries = _contents_entries(container, contents)
    mapped = {step: _map_value((*path, step), value, stand_in) for step, value in entries}
    if isinstance(contents, dict):
        return {key: value for (_, key), value in mapped.items()}
    return list(mapped.values())


def _map_value(path: Path, value: Any, stand_in: StandIn) -> Any:
    if isinstance(value, (Tensor, *_CONSTANTS)):
        return stand_in(path, value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [_map_value((*path, ("item", i)), v, stand_in) for i, v in enumerate(value)]
        if all(map(_is, items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _is(a: object, b: object) -> bool:
    return a is b


def _module_names(module: nn.Module) -> dict[str, Any]:
    """The entries of a module: parameters, buffers, children, and its own attributes."""
    own = {k: v for k, v in vars(module).items() if k not in _MODULE_INTERNALS}
    return module._parameters | module._buffers | module._modules | own


def _copy(container: Any) -> Any:
    if isinstance(container, nn.Module):
        return _module_names(container)
    if isinstance(container, (dict, list, deque)):
        return container.copy()
    return attributes(container)


def _entries(container: Any) -> Iterator[tuple[Step, Any]]:
    return _contents_entries(container, _copy(container))


def _contents_entries(container: Any, contents: Any) -> Iterator[tuple[Step, Any]]:
    if isinstance(container, (list, deque)):
        return ((("item", index), value) for index, value in enumerate(contents))
    kind = "item" if isinstance(container, dict) else "attr"
    return (((kind, key), value) for key, value in contents.items())


def _fill(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
    elif isinstance(container, (dict, deque)):
        container.clear()
        container.update(contents) if isinstance(container, dict) else container.extend(contents)
    elif isinstance(container, nn.Module):
        _fill_module(container, contents)
    else:
        _fill_attributes(container, contents)


def _fill_attributes(holder: Any, contents: dict[str, Any]) -> None:
    for name in attributes(holder).keys() - contents.keys():
        object.__delattr__(holder, name)
    for name, value in contents.items():
        object.__setattr__(holder, name, value)


def _fill_module(module: nn.Module, contents: dict[str, Any]) -> None:
    own = vars(module)
    for name in [n for n in own if n not in _MODULE_INTERNALS and n not in contents]:
        del own[name]
    for registered in _registries(module):
        for name in registered.keys() - contents.keys():
            del registered[name]
    for name, value in contents.items():
        holder = next((r for r in _registries(module) if name in r), own)
        holder[name] = value


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return (module._parameters, module._buffers, module._modules)
