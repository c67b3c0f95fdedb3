"""How a model's own loop is brought to skip its last steps.

A block cannot leave out a step of the loop that it runs in; that takes something which the loop
offers. A loop rule looks for it on the transformed copy and, if it is there, uses it, by attributes
of the copy's modules alone. The rules of `RULES` are tried in order, or a rule of the user's own:

    def rule(fast, skipped):
        fast.last_step = skipped.first  # this loop draws while step < last_step
        return True

    fast = fastvar_fx.transform(model, schedule, on_full=rule)

Source: FastVAR, arXiv 2503.23367: steps of ratio 1 are skipped, and what was drawn before them is
interpolated to the target resolution.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import takewhile
from math import prod
from typing import Any, Final, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.blocks import reachable
from fastvar_fx.errors import ModelError, RunError
from fastvar_fx.ops import Scale

_SKIPPED: Final = "_fastvar_skipped"
_STOP: Final = "trunk_scale"
_ACCUMULATE: Final = "get_next_autoregressive_input"


class Skipped:
    """The steps that a loop skips, and whether it is at one of them.

    Attributes:
        steps: The skipped steps, 0-based: the last ones of the schedule, or none.
        scales: The token maps of all steps.
    """

    def __init__(self, scales: Sequence[Scale], steps: Sequence[int]) -> None:
        self.steps = tuple(steps)
        self.scales = tuple(scales)
        self._tokens = [prod(scale) for scale in scales]
        drawn = {prod(scale) for step, scale in enumerate(scales) if step not in self.steps}
        self._telling = {self._tokens[step] for step in self.steps} - drawn
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Skipped:
        """A copy is in no generation yet."""
        memo[id(self)] = made = Skipped(self.scales, self.steps)
        return made

    def _forget(self) -> None:
        self._at: int | None = None  # the skipped step that the loop is at
        self._last: int | None = None  # tokens of the last block call since `drew`
        self._early = False  # whether blocks ran at a step before the skipped ones

    @property
    def first(self) -> int:
        """The first skipped step: how many steps the loop draws."""
        return self.steps[0]

    def drew(self, step: int) -> None:
        """Notes that the loop has added up what it drew at a step, and goes on to the next.

        At skipped steps, the blocks then return their input at once.
        """
        self._at = step + 1 if step + 1 in self.steps else None
        self._last = None

    def passes(self, tokens: int) -> bool:
        """Whether a block, called with so many tokens, is at a skipped step that it has to pass.

        Raises:
            RunError: If a new generation begins, and the one before never added up a skipped step.
        """
        at = self._at
        if at is not None:
            if tokens == self._tokens[at]:
                self._last = tokens
                return True
            if self._last == self._tokens[at]:
                self._raise_drawn(at)
        self._last = tokens
        if tokens < self._tokens[self.first]:
            self._early = True
        return False

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the model; if that drew an image, checks that the steps were skipped.

        Raises:
            RunError: If the loop drew a skipped step.
        """
        before, self._early = self._early, False
        try:
            result = method(*args, **kwargs)
        except BaseException:
            self._forget()
            raise
        if self._early:
            self.check()
        self._early = self._early or before
        return result

    def check(self) -> None:
        """Checks, when a generation has ended, that the steps were skipped.

        Raises:
            RunError: If blocks ran at a skipped step, and what they gave was not left out.
        """
        if self._last is not None and self._at is not None:
            self._raise_drawn(self._at)
        if self._last in self._telling:
            self._raise_drawn(self._tokens.index(self._last))

    def _raise_drawn(self, step: int) -> None:
        past = "past its accumulator" if self._at is not None else "though told to leave it out"
        self._forget()
        raise RunError(
            f"step {step} ({self._tokens[step]} tokens) has ratio 1 and is to be skipped, but the "
            f"loop draws it {past}, so what it returns is not to be used. Pass "
            f'on_full="cache" to transform, which draws the step from the captured features, or '
            f"on_full= a loop rule of your own; if the generation was cut off, just run it again"
        )


LoopRule = Callable[[nn.Module, Skipped], bool]
"""Makes a transformed model's loop skip steps, or returns False if it does not offer a way."""

OnFull = Literal["skip", "cache"] | LoopRule
"""What becomes of the last steps with ratio 1."""


def install(fast: nn.Module, skipped: Skipped, on_full: OnFull) -> None:
    """Makes the loop of a transformed model skip steps.

    Args:
        fast: The transformed copy.
        skipped: The steps.
        on_full: "skip" to try `RULES`, or a rule.

    Raises:
        ModelError: If no rule applies.
    """
    rules = (on_full,) if callable(on_full) else tuple(RULES)
    if not any(rule(fast, skipped) for rule in rules):
        tried = "; ".join(_first_line(rule) for rule in rules)
        raise ModelError(
            f"the loop of {type(fast).__name__} cannot skip steps {list(skipped.steps)}, which "
            f'have ratio 1. Tried: {tried}. Pass on_full="cache" to transform, so that every '
            f"branch of these steps is its resized cache, or on_full= a loop rule of your own, "
            f"which returns True once it has made the loop skip (see fastvar_fx.loops)"
        )
    for name, method in _methods(fast):
        if not name.startswith("_"):
            _override(fast, name, skipped, _watched(method))


def _first_line(rule: LoopRule) -> str:
    name: str = getattr(rule, "__name__", type(rule).__name__)
    return f"{name} ({rule.__doc__.splitlines()[0].rstrip('.')})" if rule.__doc__ else name


def trunk_scale(fast: nn.Module, skipped: Skipped) -> bool:
    """A method that takes trunk_scale, the number of steps to draw.

    Such a loop sums its codes up at the final resolution, so that stopping early is interpolating.

    Source: FoundationVision/Infinity, `Infinity.autoregressive_infer_cfg`.
    """
    found = False
    for _, module in reachable(fast):
        for name, method in _methods(module):
            signature = inspect.signature(method)
            if _STOP in signature.parameters:
                _override(module, name, skipped, _stopping(method, signature))
                found = True
    return found


def accumulator(fast: nn.Module, skipped: Skipped) -> bool:
    """A module with get_next_autoregressive_input(si, SN, f_hat, ...) -> (f_hat, next map).

    It keeps the sum `f_hat` (B, C, H, W) at the final resolution. At a skipped step the blocks
    return their input, and the sum is returned as it is, and resized as the next map. What else
    the loop does in the step stays: the head and the sampling run, and their result is dropped.

    Source: FoundationVision/VAR, `VectorQuantizer2`.
    """
    found = False
    for _, module in reachable(fast):
        method = getattr(type(module), _ACCUMULATE, None)
        if method is not None:
            _override(module, _ACCUMULATE, skipped, _accumulating(method))
            found = True
    return found


RULES: Final[tuple[LoopRule, ...]] = (trunk_scale, accumulator)


def _stopping(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    @wraps(method)
    def stopping(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        bound.arguments[_STOP] = min(bound.arguments[_STOP], _skipped(self).first)
        return method(*bound.args, **bound.kwargs)

    return stopping


def _accumulating(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def accumulating(
        self: nn.Module, si: int, SN: int, f_hat: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        skipped = _skipped(self)
        if len(skipped.scales) != SN:
            raise RunError(
                f"the loop draws {SN} steps, but the schedule has {len(skipped.scales)}; give the "
                f"schedule that the loop runs"
            )
        if si not in skipped.steps:
            result = method(self, si, SN, f_hat, *args, **kwargs)
        elif si == SN - 1:
            result = f_hat, f_hat
        else:
            size = skipped.scales[si + 1][-2:]
            result = f_hat, F.interpolate(f_hat, size=size, mode="area")
        skipped.drew(si)
        return result

    return accumulating


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _skipped(self).run(method, self, *args, **kwargs)

    return watched


def _skipped(module: nn.Module) -> Skipped:
    return getattr(module, _SKIPPED)  # type: ignore[no-any-return]


def _methods(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the methods that the module's own classes define, as functions of `self`."""
    kinds = takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    for name in {name: None for kind in kinds for name in vars(kind)}:
        defined = inspect.getattr_static(type(module), name)
        if isinstance(defined, types.FunctionType) and not name.startswith("__"):
            method = getattr(module, name)  # an attribute of the module's may stand before it
            if isinstance(method, types.MethodType) and method.__self__ is module:
                yield name, method.__func__


def _override(module: nn.Module, name: str, skipped: Skipped, function: Callable[..., Any]) -> None:
    """Puts a method on one module; as a bound method it goes with a deep copy of it."""
    object.__setattr__(module, _SKIPPED, skipped)
    object.__setattr__(module, name, types.MethodType(function, module))
