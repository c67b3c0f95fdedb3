"""The tensors and values that a call of a module can reach, where they are, and what it changed.

A module keeps state outside its parameters and buffers: keys and values in attributes, in lists,
in dicts, or in an object that is passed as an argument. A `Snapshot` walks all of it from three
roots (the module, its args, its kwargs), so that a call can be run on stand-ins and undone, and so
that its writes can be replayed later around a graph.

Objects of a package that sets `__not_state__ = True`, such as a runtime that is attached to the
modules, are not walked.
"""

from __future__ import annotations

import copy
import operator
import sys
from argparse import Namespace
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from passes.refusal import refuse

Step = tuple[str, Any]
"""One step of a path: ("attr", name) or ("item", key)."""
Path = tuple[Step, ...]
Roots = dict[str, Any]
"""What paths start from: {"module": ..., "args": [...], "kwargs": {...}}."""
Contents = dict[Step, Any]
"""The entries of a container."""
StandIn = Callable[[Path, Any], Any]
"""(path, tensor or plain value) -> what stands in its place."""

_MODULE_INTERNALS: Final = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
PLAIN: Final = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
"""The types of plain values."""
_HOLDERS: Final = (
    dict, list, deque, nn.Module, SimpleNamespace, Namespace, UserDict, UserList,
)  # fmt: skip
_NO_CONTAINERS: Final = (
    type,
    torch.Generator,
    FunctionType,
    MethodType,
    partial,
    torch.jit.ScriptModule,
    torch.ScriptObject,
)
_MISSING: Final = object()
_CHANGED: Final = "keep what changes from call to call in attributes, lists or dicts"
_NOT_STATE: Final = sys.stdlib_module_names | {"torch", "numpy", "einops", "passes"}


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


def is_beside(path: Path, place: Path) -> bool:
    """Whether a path leads into a neighbour of a place in a list, or in a dict by number."""
    (kind, key), at = place[-1], len(place) - 1
    if len(path) <= at or path[:at] != place[:at] or path[at] == place[-1]:
        return False
    return kind == "item" and type(key) is type(path[at][1]) is int


class Change(NamedTuple):
    """One entry of a container that a call changed.

    Attributes:
        holder: The container's type.
        path: The container, from the roots.
        step: The entry.
        value: Its new value; `_MISSING` if it was removed.
        buffer: Whether it is a registered buffer of a module.
    """

    holder: type[Any]
    path: Path
    step: Step
    value: Any
    buffer: bool = False

    @property
    def removed(self) -> bool:
        """Whether the entry was removed."""
        return self.value is _MISSING


class Snapshot:
    """Everything a call can reach, as it was when the snapshot was taken.

    Attributes:
        tensors: Every tensor by its first path, each tensor once.
        constants: The plain values that the call's own modules and arguments hold, by path.
        aliases: Places in the arguments of objects that the module holds too, and where it does.
    """

    def __init__(self, origin: Roots) -> None:
        self._containers: list[tuple[Path, Any, Contents]] = []
        self._registries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._wholes: list[tuple[Path, Any, Any]] = []
        self._places: dict[int, Path] = {}
        self.tensors: dict[Path, Tensor] = {}
        self.constants: dict[Path, Any] = {}
        self.aliases: dict[Path, Path] = {}
        for name, value in origin.items():
            self._visit((("item", name),), value)

    def _visit(self, path: Path, value: Any) -> None:
        if is_constant(value):
            self.constants[path] = value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._visit((*path, ("item", index)), item)
        elif (first := self._places.setdefault(id(value), path)) is not path:
            if path[0] != first[0] == ("item", "module"):
                self.aliases[path] = first
        elif isinstance(value, Tensor):
            self.tensors[path] = value
        elif is_container(value):
            self._enter(path, value)
        elif whole_value(value) is not None:
            self._wholes.append((path, value, copy.copy(value)))

    def _enter(self, path: Path, container: Any) -> None:
        entries = contents(container)
        self._containers.append((path, container, entries))
        if isinstance(container, nn.Module):
            self.constants[*path, ("attr", "training")] = container.training
            self._registries += [(r, dict(r)) for r in _registries(container)]
        for step, item in entries.items():
            setting = isinstance(item, tuple) or (is_constant(item) and type(item) is not float)
            if not (_is_torch_layer(container) and setting):
                self._visit((*path, step), item)

    def place_of(self, value: Any) -> Path | None:
        """Returns where an object was that is neither a tensor, a plain value nor a tuple."""
        return None if isinstance(value, Tensor) else self._places.get(id(value))

    def inner_tensors(self) -> dict[Path, Tensor]:
        """Returns the tensors by path, with those that a subclass wraps in the place of its own."""
        found: dict[int, tuple[Path, Tensor]] = {}
        for path, tensor in self.tensors.items():
            for inner_path, inner in _inner_tensors(path, tensor):
                found.setdefault(id(inner), (inner_path, inner))
        return dict(found.values())

    def substitute(self, stand_in: StandIn) -> None:
        """Puts `stand_in(path, value)` in the place of every tensor and plain value."""
        for path, container, entries in self._containers:
            fill(container, _mapped(path, entries, stand_in))

    def restore(self) -> None:
        """Puts everything back as it was."""
        for registered, entries in self._registries:
            registered.clear()
            registered.update(entries)
        for _, container, held in self._containers:
            fill(container, held)
        for _, value, held in self._wholes:
            if whole_value(value) != whole_value(held):
                _fill_whole(value, held)

    def changes(self, since: StandIn) -> Iterator[Change]:
        """Yields what changed since `substitute(since)`.

        Raises:
            RefusedError: FVX001, if a list lost entries, or a set or an array changed.
        """
        for path, value, held in self._wholes:
            if whole_value(value) != whole_value(held):
                what = f"the {type(value).__name__} {show(path[1:])}"
                refuse("FVX001", f"the call changed {what}", advice=_CHANGED)
        for path, container, entries in self._containers:
            before, after = _mapped(path, entries, since), contents(container)
            if isinstance(container, (list, deque)) and len(after) < len(before):
                refuse("FVX001", f"the call removed entries of the list {show(path[1:])}")
            for step, value in after.items():
                if not _same(before.get(step, _MISSING), value):
                    buffer = isinstance(container, nn.Module) and step[1] in container._buffers
                    yield Change(type(container), path, step, value, buffer)
            for step in before.keys() - after.keys():
                yield Change(type(container), path, step, _MISSING)


def _inner_tensors(path: Path, tensor: Any) -> Iterator[tuple[Path, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield path, tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner_tensors((*path, ("attr", name)), getattr(tensor, name))


def rewrapped(tensor: Any, replace: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns a tensor whose inner tensors are replaced; one that wraps none is itself replaced."""
    if not is_traceable_wrapper_subclass(tensor):
        return replace(tensor)
    inside = lambda _, inner: rewrapped(inner, replace)  # noqa: E731
    made: Tensor = transform_subclass(tensor, inside)  # type: ignore[no-untyped-call]
    return made


def is_sharded(value: Any) -> bool:
    """Whether `value` is a DTensor; only a program that imported them can have any."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def is_constant(value: Any) -> bool:
    """Whether `value` is a plain value; so are NumPy's scalars, which comparisons with it give."""
    kind = type(value)
    fixed = kind.__module__ == "numpy" and not hasattr(kind, "__setitem__")
    numpy_scalar = fixed and getattr(value, "shape", None) == ()
    return numpy_scalar or isinstance(value, PLAIN)


def is_container(value: Any) -> bool:
    """Whether `value` is mutable and may hold tensors that a call reads or writes."""
    if isinstance(value, _NO_CONTAINERS):
        return False
    if isinstance(value, _HOLDERS):
        return True
    package = type(value).__module__.partition(".")[0]
    if package in _NOT_STATE or getattr(sys.modules.get(package), "__not_state__", False):
        return False
    return hasattr(value, "__dict__") or bool(_slots(value))


def whole_value(value: Any) -> Any:
    """Returns what makes two sets or arrays equal; None for anything else.

    They hold no tensors, and are compared, put back and refused as a whole.
    """
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    if not isinstance(value, (bytes, Tensor)) and hasattr(type(value), "tobytes"):
        meta = (getattr(value, name, None) for name in ("shape", "dtype"))
        return type(value), *meta, value.tobytes()
    return None


def _fill_whole(value: Any, held: Any) -> None:
    if isinstance(value, set):
        value.clear()
        value.update(held)
    else:
        value[... if hasattr(value, "shape") else slice(None)] = held


def attributes(value: Any) -> dict[str, Any] | None:
    """Returns what an object holds; None for code and values without attributes.

    Also None for modules, except those that only hold values, as a KV cache may be written.
    """
    if isinstance(value, nn.Module):
        return _read_module(value) if _only_holds(value) else None
    if callable(value) and not is_container(value):
        return None
    held = hasattr(value, "__dict__") or _slots(value)
    return _read_object(value) if held else None


def _only_holds(module: nn.Module) -> bool:
    """Whether a module has neither weights, submodules nor hooks, and is no layer of torch."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not (module._parameters or module._modules or hooks or _is_torch_layer(module))


def _is_torch_layer(value: Any) -> bool:
    """Layers of torch itself hold settings; of these, loops change floats at most."""
    return isinstance(value, nn.Module) and type(value).__module__.startswith("torch.")


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return all(map(_same, before, after))
    plain = is_constant(before) and is_constant(after)
    return plain and type(before) is type(after) and bool(before == after)


def _mapped(path: Path, entries: Contents, stand_in: StandIn) -> Contents:
    """Replaces tensors and plain values, also inside tuples; containers keep their identity."""
    return {step: _map_value((*path, step), value, stand_in) for step, value in entries.items()}


def _map_value(path: Path, value: Any, stand_in: StandIn) -> Any:
    if isinstance(value, (Tensor, *PLAIN)):
        return stand_in(path, value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = (_map_value((*path, ("item", i)), v, stand_in) for i, v in enumerate(value))
        return rebuilt(value, list(items))
    return value


def rebuilt(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """Returns a tuple of the same type with other items; the same tuple if none is another."""
    if all(map(operator.is_, items, value)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


# --- containers, each read and filled in its own way --------------------------------------------


def contents(container: Any) -> Contents:
    """Returns the entries of a container as they are now.

    An object of a class derived from `dict` or `list` has attributes besides.
    """
    adapter = _adapter(container)
    entries: Contents = {(adapter.kind, key): v for key, v in adapter.read(container).items()}
    if adapter.kind == "item":
        entries |= {("attr", key): value for key, value in _read_object(container).items()}
    return entries


def fill(container: Any, entries: Contents) -> None:
    """Makes `entries`, as `contents` returns them, the only entries of a container."""
    adapter = _adapter(container)
    own = {key: value for (kind, key), value in entries.items() if kind == adapter.kind}
    adapter.fill(container, own)
    if adapter.kind == "item":
        _fill_object(container, {key: v for (kind, key), v in entries.items() if kind == "attr"})


class _Adapter(NamedTuple):
    kind: Literal["attr", "item"]
    read: Callable[[Any], dict[Any, Any]]
    fill: Callable[[Any, dict[Any, Any]], None]


def _adapter(container: Any) -> _Adapter:
    kinds = (kind for kind in _ADAPTERS if isinstance(container, kind))
    return _ADAPTERS[next(kinds, object)]


def _fill_list(items: Any, entries: dict[int, Any]) -> None:
    items.clear()
    items.extend(entries.values())


def _fill_dict(items: Any, entries: dict[Any, Any]) -> None:
    items.clear()
    items.update(entries)


def _read_module(module: nn.Module) -> dict[str, Any]:
    """Returns parameters, buffers, children and the module's own attributes."""
    own = {k: v for k, v in vars(module).items() if k not in _MODULE_INTERNALS}
    return module._parameters | module._buffers | module._modules | own


def _fill_module(module: nn.Module, entries: dict[str, Any]) -> None:
    own = vars(module)
    for name in [n for n in own if n not in _MODULE_INTERNALS and n not in entries]:
        del own[name]
    for registered in _registries(module):
        for name in registered.keys() - entries.keys():
            del registered[name]
    for name, value in entries.items():
        holder = next((r for r in _registries(module) if name in r), own)
        holder[name] = value


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return (module._parameters, module._buffers, module._modules)


def _slots(value: Any) -> list[str]:
    kind: Any = type(value)
    return _slots_of(kind)


@cache
def _slots_of(kind: Any) -> list[str]:
    names = [getattr(base, "__slots__", ()) for base in kind.__mro__]
    flat = [n for name in names for n in ((name,) if isinstance(name, str) else name)]
    return [name for name in flat if name not in ("__dict__", "__weakref__")]


def _read_object(value: Any) -> dict[str, Any]:
    """Returns the attributes of a plain object, in its `__dict__` or its slots."""
    slots = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
    return slots | dict(getattr(value, "__dict__", {}))


def _fill_object(value: Any, entries: dict[str, Any]) -> None:
    for name in _read_object(value).keys() - entries.keys():
        object.__delattr__(value, name)
    for name, item in entries.items():
        object.__setattr__(value, name, item)


_ADAPTERS: Final[dict[type, _Adapter]] = {
    list: _Adapter("item", lambda items: dict(enumerate(items)), _fill_list),
    deque: _Adapter("item", lambda items: dict(enumerate(items)), _fill_list),
    dict: _Adapter("item", dict, _fill_dict),
    nn.Module: _Adapter("attr", _read_module, _fill_module),
    object: _Adapter("attr", _read_object, _fill_object),
}
"""The first kind that fits; every container is an object."""
