"""The runtime of a transformed block: what it runs instead of its own forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from pickle import PicklingError
from typing import Any, Final, NoReturn

import torch
from torch import nn

from fastvar_fx.engine.call import BlockCall, BlockSite, Forward
from fastvar_fx.engine.copy_model import class_forward
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import EAGER, Executor
from fastvar_fx.engine.track import Captured
from passes import Call
from passes.trace.calls import undone

RUNTIME: Final = "_fastvar"
"""The attribute of a transformed block that holds its runtime."""
_OWN: Final = "_fastvar_own"
"""The attribute of a block that holds a forward that was set on the block itself."""


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
        if torch.compiler.is_compiling():
            return _run(engine, BlockCall(self.site, block, args, kwargs), EAGER)
        with engine.lock:
            try:
                return _run(engine, BlockCall(self.site, block, args, kwargs), engine.executor)
            except BaseException:
                engine.generation.aborted()
                raise


def _run(engine: Engine, call: BlockCall, executor: Executor) -> Any:
    generation = engine.generation
    role = generation.at(call)
    if role.passes:
        return call.x
    captured: Captured = {}
    if role.step is None:
        result = executor.run_dense(call)
    else:
        program, inputs = engine.store.program_for(call, role)
        result, captured = program.run(call, inputs, role.captured, executor)
    generation.ran(call, role, result, captured)
    return result


def attach(engine: Engine, layer: int, block: nn.Module, *, prunes: bool) -> None:
    """Gives a copied block a subclass of its class, whose forward calls a `BlockRuntime`."""
    kind = type(block)
    own = vars(block).get("forward")
    if own is not None:
        vars(block)["forward"] = InstanceForward(block, own)
    object.__setattr__(block, RUNTIME, BlockRuntime(engine, layer, kind.forward, prunes=prunes))
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


class InstanceForward:
    """A forward that was set on a block itself before `transform`.

    It may call the forward of the block's class, as hooks of accelerate and diffusers do; then it
    stays around the runtime, as if it had been set after `transform`. Or it takes that forward's
    place, as patches do; then it is what the runtime runs. The first call shows which.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block = block
        self._forward = forward
        self._stays: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one call of the block."""
        if self._stays is None:
            self._decide(args, kwargs)
        forward = self._forward if self._stays else partial(class_forward, self._block)
        return forward(*args, **kwargs)

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block = self._block
        runtime: BlockRuntime = vars(block)[RUNTIME]
        object.__setattr__(block, RUNTIME, _reached)
        try:
            with undone(Call(self._forward, block, args, kwargs)) as trial:
                trial.run()
            self._stays = False
        except _ReachedError:
            self._stays = True
        finally:
            object.__setattr__(block, RUNTIME, runtime)
        if not self._stays:
            object.__setattr__(block, _OWN, self._forward)
            runtime.site.use_forward(with_own_code(_run_own, "forward"))


class _ReachedError(BaseException):
    """A trial run has come to the forward of the block's class."""


def _reached(*_: Any) -> NoReturn:
    raise _ReachedError


def _run_own(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._fastvar_own(*args, **kwargs)  # type: ignore[operator]


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
