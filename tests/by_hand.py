"""What the tests of the text-to-image models share: FastVAR by hand, and what a run did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvar_fx import Schedule, ops

Shapes = dict[str, tuple[int, ...]]

Branch = Callable[[Tensor, Tensor], Tensor]
"""(tokens (B, n, C), their index (B, n)) -> the branch's contribution (B, n, C)."""


class Pruner:
    """PTS -> branch -> CTR around the branches of one block."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.steps = {schedule.tokens(step): step for step in range(schedule.steps)}
        self.captured: dict[str, Tensor] = {}

    def run(self, name: str, x: Tensor, branch: Branch) -> Tensor:
        B, L, _ = x.shape
        schedule, step = self.schedule, self.steps.get(L)
        if step not in schedule.pruned_steps:
            out = branch(x, torch.arange(L).expand(B, L))
            if step == schedule.cache_step:
                self.captured[name] = out
            return out
        index = ops.pivotal_token_selection(x, schedule.kept(step))
        kept = branch(ops.take_tokens(x, index), index)
        return ops.cached_token_restoration(
            kept,
            index,
            self.captured[name],
            schedule.scales[schedule.cache_step],
            schedule.scales[step],
        )


def pruned_by_hand(
    model: Any, schedule: Schedule, block: Callable[[nn.Module, Pruner], nn.Module]
) -> Any:
    """A copy of a model whose blocks are replaced by `block(old block, its pruner)`."""
    edited = copy.deepcopy(model)
    edited.blocks = nn.ModuleList([block(old, Pruner(schedule)) for old in edited.blocks])
    return edited


def streams(model: Any, run: Callable[[Any], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result of a run, and the residual stream after the last block at every step."""
    seen: list[Tensor] = []
    hook = model.head_nm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    result = run(model)
    hook.remove()
    return result, seen


def assert_same_streams(got: list[Tensor], want: list[Tensor], atol: float) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference over all steps, relative to the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def fixed_draws(classes: int, seen: list[Tensor] | None = None) -> Callable[..., Tensor]:
    """A sampler whose result depends on the number of tokens alone, so that rounding flips none.

    Args:
        classes: what it draws from.
        seen: a list that the logits it is given are appended to.
    """

    def draw(logits: Tensor, *_: object) -> Tensor:
        if seen is not None:
            seen.append(logits)
        B, L = logits.shape[:2]
        return torch.randint(0, classes, (B, L), generator=torch.Generator().manual_seed(L))

    return draw
