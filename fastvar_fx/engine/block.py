"""The runtime of a transformed block: what it runs instead of its own forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pickle import PicklingError
from typing import Any, Final, NoReturn

from torch import nn

from fastvar_fx.engine.call import BlockCall, BlockSite, Forward
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import EAGER
from fastvar_fx.errors import ModelError

RUNTIME: Final = "_fastvar"
"""The attribute of a transformed block that holds its runtime."""


class BlockRuntime:
    """Runs the calls of one transformed block.

    Attributes:
        site: The block's place in the model, and its programs.
    """

    def __init__(self, engine: Engine, layer: int, forward: Forward, *, prunes: bool) -> None:
        name = engine.plan.blocks[layer]
        self.site = BlockSite(layer, name, forward, engine.token_maps, prunes=prunes)
        self._engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRuntime:
        """A copy has no programs yet."""
        engine, site = copy.deepcopy(self._engine, memo), self.site
        return BlockRuntime(engine, site.layer, site.forward, prunes=site.prunes)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call of the block."""
        engine = self._engine
        generation = engine.generation
        call = BlockCall(self.site, block, args, kwargs)
        role = generation.at(call)
        if role.passes:
            return call.x
        executor = EAGER if call.compiling else engine.executor
        if role.step is None:
            result = executor.run_dense(call)
        else:
            program, inputs = engine.store.program_for(call, role)
            result, captured = program.run(call, inputs, role.captured, executor)
            if role.captures:
                generation.capture(call, captured)
        if engine.plan.skipped_steps:
            generation.returned(call, result)
        return result


def attach(engine: Engine, layer: int, block: nn.Module, *, prunes: bool) -> None:
    """Gives a copied block a subclass of its class, whose forward calls a `BlockRuntime`.

    Raises:
        ModelError: If the block has a forward set on itself that is no method of it.
    """
    kind = type(block)
    forward = _take_forward(engine.plan.blocks[layer], block)
    object.__setattr__(block, RUNTIME, BlockRuntime(engine, layer, forward, prunes=prunes))
    members = {
        "forward": _own_forward(kind),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
    }
    block.__class__ = type(kind.__name__, (kind,), members)


def _reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
    return _NewBlock(type(self)), (), vars(self)


class _NewBlock:
    """Makes an empty block for `copy`; it cannot be pickled, and neither can the block."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self._kind = kind

    def __call__(self) -> nn.Module:
        """Returns a block without attributes."""
        return object.__new__(self._kind)

    def __reduce__(self) -> NoReturn:
        """Raises an error that says what to save instead."""
        raise PicklingError(
            f"a transformed model cannot be pickled: the class of its block {self._kind.__name__} "
            f"was made by fastvar_fx.transform. Save state_dict() and the schedule, and transform "
            f"the model again after loading"
        )


def _take_forward(name: str, block: nn.Module) -> Forward:
    """Returns the forward that a call of the block runs, as a function of the block and its input.

    A forward set on the block itself, as patches do, is removed: it would hide the runtime's.
    """
    own = vars(block).pop("forward", None)
    if own is None:
        return type(block).forward
    if isinstance(own, types.MethodType) and own.__self__ is block:
        return own.__func__
    raise ModelError(
        f"{name} has an instance attribute `forward` that is a {type(own).__name__}, not a method "
        f"of the block; set it as block.forward = types.MethodType(function, block), with the "
        f"block as first argument"
    )


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._fastvar(self, args, kwargs)  # type: ignore[operator]


def _own_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Returns a forward with its own code object.

    Dynamo limits the graphs per code object, so blocks must not share one.
    """
    made = with_own_code(_forward, "forward")
    made.__wrapped__ = kind.forward  # type: ignore[attr-defined]
    made.__doc__ = kind.forward.__doc__
    return made


def with_own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """Returns a copy of a function with its own code object.

    Dynamo counts compilations per code object, and takes a size for dynamic that differs between
    calls of codes of one name and place.
    """
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name)
