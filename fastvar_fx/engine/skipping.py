"""Makes a model's own loop skip its last steps.

A block cannot leave out a step of the loop that it runs in: the loop must offer a way. A loop rule
looks for one on the transformed copy and uses it, by setting attributes of the copy's modules. The
rules of `RULES` are tried in order, or a rule that the user passes:

    def rule(fast, skipped):
        fast.last_step = skipped.first  # this loop draws while step < last_step
        return True

    fast = fastvar_fx.transform(model, schedule, on_full=rule)

Source: FastVAR, arXiv 2503.23367: steps of ratio 1 are skipped, and what was drawn before them is
interpolated to the target resolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import reachable
from fastvar_fx.engine.overrides import methods_of, override
from fastvar_fx.errors import ModelError, RunError
from fastvar_fx.ops import Scale

_STOP: Final = "trunk_scale"
_ACCUMULATE: Final = "get_next_autoregressive_input"


class Skipped:
    """The steps that a loop skips, as a loop rule sees them.

    Attributes:
        steps: The skipped steps, 0-based: the last ones of the schedule.
        scales: The token maps of all steps.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps = engine.plan.skipped_steps
        self.scales = engine.plan.schedule.scales
        self.family = engine.family

    @property
    def first(self) -> int:
        """The first skipped step: how many steps the loop draws."""
        return self.steps[0]

    def drew(self, step: int) -> None:
        """Notes that the loop has accumulated what it drew at a step, and moves to the next one.

        At skipped steps, the blocks then return their input at once.
        """
        _drew(self.family.running, step)


LoopRule = Callable[[nn.Module, Skipped], bool]
"""Makes a transformed model's loop skip steps, or returns False if it does not offer a way."""

OnFull = Literal["skip", "cache"] | LoopRule
"""What the last steps do whose ratio is 1."""


def install(fast: nn.Module, engine: Engine, on_full: OnFull) -> None:
    """Makes the loop of a transformed model skip steps.

    Args:
        fast: The transformed copy.
        engine: Its engine.
        on_full: "skip" to try `RULES`, or a rule.

    Raises:
        ModelError: If no rule applies.
    """
    skipped = Skipped(engine)
    rules = (on_full,) if callable(on_full) else tuple(RULES)
    if not any(rule(fast, skipped) for rule in rules):
        tried = "; ".join(_first_line(rule) for rule in rules)
        raise ModelError(
            f"the loop of {type(fast).__name__} cannot skip steps {list(skipped.steps)}, which "
            f'have ratio 1. Tried: {tried}. Pass on_full="cache" to transform, so that every '
            f"branch of these steps is its resized cache, or on_full= a loop rule of your own, "
            f"which returns True once it has made the loop skip (see fastvar_fx.engine.skipping)"
        )


def _first_line(rule: LoopRule) -> str:
    name: str = getattr(rule, "__name__", type(rule).__name__)
    return f"{name} ({rule.__doc__.splitlines()[0].rstrip('.')})" if rule.__doc__ else name


def trunk_scale(fast: nn.Module, skipped: Skipped) -> bool:
    """A method that takes trunk_scale, the number of steps to draw.

    Such a loop sums its codes up at the final resolution, so that stopping early is interpolating.

    Source: FoundationVision/Infinity, `Infinity.autoregressive_infer_cfg`.
    """
    found = [(module, *method) for _, module in reachable(fast) for method in methods_of(module)]
    stopping = [each for each in found if _STOP in inspect.signature(each[-1]).parameters]
    for module, name, method in stopping:
        override(module, name, skipped.family, _stopping(method))
    return bool(stopping)


def accumulator(fast: nn.Module, skipped: Skipped) -> bool:
    """A module with get_next_autoregressive_input(si, SN, f_hat, ...) -> (f_hat, next map).

    It keeps the sum `f_hat` (B, C, H, W) at the final resolution. At a skipped step the blocks
    return their input, and the sum is returned as it is, and resized as the next map. What else
    the loop does in the step stays: the head and the sampling run, and their result is dropped.

    Source: FoundationVision/VAR, `VectorQuantizer2`.
    """
    found = [module for _, module in reachable(fast) if hasattr(type(module), _ACCUMULATE)]
    for module in found:
        method = _accumulating(getattr(type(module), _ACCUMULATE))
        override(module, _ACCUMULATE, skipped.family, method)
    return bool(found)


RULES: Final[tuple[LoopRule, ...]] = (trunk_scale, accumulator)


def _stopping(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)
    def stopping(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given, first = bound.arguments[_STOP], Engine.of(self).plan.skipped_steps[0]
        bound.arguments[_STOP] = first if given is None else min(given, first)
        return method(*bound.args, **bound.kwargs)

    return stopping


def _accumulating(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def accumulating(
        self: nn.Module, si: int, SN: int, f_hat: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        running = Engine.of(self).family.running
        steps = {engine.plan.schedule.steps for engine in running}
        if SN not in steps:
            raise RunError(
                f"the loop draws {SN} steps, but the schedule has {', '.join(map(str, steps))}; "
                f"give the schedule that the loop runs"
            )
        running = [engine for engine in running if engine.plan.schedule.steps == SN]
        if si in running[0].plan.skipped_steps:
            result = _left_out([engine.plan.schedule.scales for engine in running], si, f_hat)
        else:
            result = method(self, si, SN, f_hat, *args, **kwargs)
        _drew(running, si)
        return result

    return accumulating


def _left_out(
    schedules: Sequence[Sequence[Scale]], step: int, f_hat: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the sum so far, and the next map made of it."""
    size, finals = tuple(f_hat.shape[-2:]), {scales[-1][-2:] for scales in schedules}
    if size not in finals:
        raise RunError(
            f"step {step} is to be skipped, but the loop sums its maps up at {size} by then, not "
            f'at the final {", ".join(map(str, finals))}; pass on_full="cache" to transform, or a '
            f"loop rule of your own"
        )
    scales = next(scales for scales in schedules if scales[-1][-2:] == size)
    following = scales[min(step + 1, len(scales) - 1)][-2:]
    return f_hat, F.interpolate(f_hat, size=following, mode="area")


def _drew(engines: Sequence[Engine], step: int) -> None:
    for engine in engines:
        engine.generation.skipped.drew(step)
