"""The runtime of a transformed block: what it runs instead of its own forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from pickle import PicklingError
from typing import Any, Final, NoReturn

import torch
from torch import nn

from fastvar_fx.engine.call import BlockCall, BlockSite, Forward
from fastvar_fx.engine.copy_model import class_forward
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import EAGER, Executor
from fastvar_fx.engine.family import Family, Seen
from fastvar_fx.engine.generation import Role
from fastvar_fx.engine.track import Captured
from fastvar_fx.errors import raise_to_compiler
from passes import Call
from passes.trace.calls import undone

RUNTIME: Final = "_fastvar"
"""The attribute of a transformed block that holds its runtime."""
_OWN: Final = "_fastvar_own"
"""The attribute of a block that holds a forward that was set on the block itself."""
ATTACHED: Final = (RUNTIME, _OWN)
"""What blocks hold besides the user's attributes."""


class BlockRuntime:
    """Runs the calls of one transformed block."""

    def __init__(
        self, family: Family, layer: int, kind: type[nn.Module], prunes: Sequence[bool]
    ) -> None:
        """Makes a runtime without programs.

        Args:
            family: The engines of the model.
            layer: The block's index.
            kind: The class that it had, whose forward is its own.
            prunes: Whether each of the schedules prunes it.
        """
        self._family = family
        self._kind = kind
        self._own: Callable[..., Any] | None = None  # set on the block itself
        self._runs: Forward = kind.forward
        name, maps = family.current.plan.blocks[layer], family.current.token_maps
        self._sites = [BlockSite(layer, name, kind.forward, maps, prunes=own) for own in prunes]

    @property
    def site(self) -> BlockSite:
        """The block's place in the model, and its programs for the schedule that ran last."""
        return self._sites[self._family.current.index]

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRuntime:
        """A copy has no programs yet."""
        prunes = [site.prunes for site in self._sites]
        family = copy.deepcopy(self._family, memo)
        made = memo[id(self)] = BlockRuntime(family, self.site.layer, self._kind, prunes)
        if self._own is not None:
            made._own = copy.deepcopy(self._own, memo)
            made._run_by(self._runs)
        return made

    def follow(self, block: nn.Module, own: Callable[..., Any] | None) -> None:
        """Runs a forward that was set on the block in the place of its class's; None for that."""
        if own is self._own:
            return
        self._own = own
        if own is None:
            object.__delattr__(block, _OWN)
            self._run_by(self._kind.forward)
        else:
            object.__setattr__(block, _OWN, own)
            self._run_by(with_own_code(_run_own, "forward"))

    def _run_by(self, forward: Forward) -> None:
        self._runs = forward
        for site in self._sites:
            site.use_forward(forward)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call of the block."""
        family = self._family
        if torch.compiler.is_compiling():
            call = BlockCall(self.site, block, args, kwargs, compiling=True)
            return _run(family.current, call, EAGER)
        with family.lock:
            if self._own is None and self._runs is not self._kind.forward:
                self._run_by(self._kind.forward)  # the class was patched
            call = BlockCall(self._sites[0], block, args, kwargs)
            engines = family.engines if family.decided else family.fitting(call)
            try:
                if len(engines) > 1:
                    return self._run_undecided(engines, call)
                (engine,) = engines
                call.site = self._sites[engine.index]
                return _run(engine, call, engine.executor)
            except BaseException:
                for engine in engines:
                    engine.generation.aborted()
                raise

    def _run_undecided(self, engines: Sequence[Engine], call: BlockCall) -> Any:
        """Runs a call while several schedules fit the generation so far."""
        seen = []
        for engine in engines:
            own = BlockCall(self._sites[engine.index], call.block, call.args, call.kwargs)
            seen.append(Seen(engine, own, engine.generation.at(own)))
        engine, chosen, role = self._family.agreed(seen)
        if role.passes:
            return call.x
        result, captured = _execute(engine, chosen, role, engine.executor)
        for each in seen:
            each.engine.generation.ran(each.call, each.role, result, captured)
        return result


def _run(engine: Engine, call: BlockCall, executor: Executor) -> Any:
    role = engine.generation.at(call)
    if role.passes:
        return call.x
    result, captured = _execute(engine, call, role, executor)
    engine.generation.ran(call, role, result, captured)
    return result


def _execute(
    engine: Engine, call: BlockCall, role: Role, executor: Executor
) -> tuple[Any, Captured]:
    step = role.step if call.unguided is None else call.unguided.step
    if step is None:
        return executor.run_dense(call), {}
    program, inputs = engine.store.program_for(call, role, step)
    return program.run(call, inputs, call.left(role.captured), executor)


def attach(family: Family, layer: int, block: nn.Module, prunes: Sequence[bool]) -> None:
    """Gives a copied block a subclass of its class, whose forward calls a `BlockRuntime`.

    Args:
        family: The engines of the model.
        layer: The block's index.
        block: The block.
        prunes: Whether each of the schedules prunes it.
    """
    kind = type(block)
    own = vars(block).get("forward")
    if own is not None:
        vars(block)["forward"] = InstanceForward(block, own)
    object.__setattr__(block, RUNTIME, BlockRuntime(family, layer, kind, prunes))
    members = {
        "forward": _own_forward(kind),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "__setattr__": _setter(kind),
        "__delattr__": _deleter(kind),
    }
    block.__class__ = type(kind.__name__, (kind,), members)


def own_class(module: nn.Module) -> Any:
    """Returns the user's class of a module: blocks that `attach` was called on have others."""
    return type(module).__base__ if RUNTIME in vars(module) else type(module)


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
    """A forward that was set on a block itself.

    It may call the forward of the block's class, as hooks of accelerate and diffusers do; then it
    stays around the runtime. Or it takes that forward's place, as patches do; then it is what the
    runtime runs. The first call shows which.

    Attributes:
        own: The forward that was set.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.own = forward
        self._block = block
        self._stays: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one call of the block."""
        if self._stays is None:
            self._stays = self._reaches_class(args, kwargs)
        if self._stays:
            return self.own(*args, **kwargs)
        runtime = vars(self._block)[RUNTIME]
        if isinstance(runtime, BlockRuntime) and not torch.compiler.is_compiling():
            runtime.follow(self._block, self.own)
        return class_forward(self._block, *args, **kwargs)

    def _reaches_class(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        block = self._block
        if torch.compiler.is_compiling():
            raise_to_compiler(
                f"a forward was set on a {own_class(block).__name__}; run fastvar_fx.trace(model, "
                f"run) with it before torch.compile"
            )
        held = vars(block)[RUNTIME]  # within the trial of another one, that trial
        object.__setattr__(block, RUNTIME, _Trial(_runtime(block)))
        try:
            with undone(Call(self.own, block, args, kwargs)) as trial:
                trial.run()
        except _ReachedError:
            return True
        finally:
            object.__setattr__(block, RUNTIME, held)
        return False


class _ReachedError(BaseException):
    """A trial run has come to the forward of the block's class."""


class _Trial:
    """Takes the place of a runtime in a trial run.

    Attributes:
        runtime: The runtime.
    """

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, *_: Any) -> NoReturn:
        """Ends the trial run."""
        raise _ReachedError


def _runtime(block: nn.Module) -> BlockRuntime:
    held: BlockRuntime | _Trial = vars(block)[RUNTIME]
    return held.runtime if isinstance(held, _Trial) else held


def _setter(kind: type[nn.Module]) -> Callable[..., None]:
    """Returns a `__setattr__` that notices forwards which are set on a block."""

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward":
            _runtime(self).follow(self, None)
            own = value.own if isinstance(value, InstanceForward) else value
            value = InstanceForward(self, own)
        kind.__setattr__(self, name, value)

    set_attribute.sets_plainly = kind.__setattr__ is nn.Module.__setattr__  # type: ignore[attr-defined]
    return set_attribute


def _deleter(kind: type[nn.Module]) -> Callable[..., None]:
    """Returns a `__delattr__` that notices forwards which are taken back."""

    def delete_attribute(self: nn.Module, name: str) -> None:
        kind.__delattr__(self, name)
        if name == "forward":
            _runtime(self).follow(self, None)

    return delete_attribute


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
