"""Where a loop is in the steps that it is to leave out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.plan import Plan
from fastvar_fx.errors import RunError


class SkippedSteps:
    """Lets blocks pass their input on at skipped steps; checks that the loop leaves them out."""

    def __init__(self, plan: Plan) -> None:
        self._steps = plan.skipped_steps
        self._tokens = [plan.schedule.length(step) for step in range(plan.schedule.steps)]
        drawn = self._tokens[: plan.drawn_steps]
        self._only_skipped = {self._tokens[step] for step in self._steps} - set(drawn)
        self._returns_map = [True] * len(plan.blocks)
        self.forget()

    def forget(self) -> None:
        """Waits for another generation."""
        self._at: int | None = None  # the skipped step that the loop is at
        self._last_tokens: int | None = None  # of the last block call since `drew`
        self._drew_early = False  # whether blocks ran at a step before the skipped ones

    def drew(self, step: int) -> None:
        """Notes that the loop has accumulated what it drew at a step, and moves to the next one.

        At skipped steps, the blocks then return their input at once.
        """
        self._at = step + 1 if step + 1 in self._steps else None
        self._last_tokens = None

    def passes(self, call: BlockCall) -> bool:
        """Whether a call is at a skipped step, where the block returns its input."""
        tokens, at = call.tokens, self._at
        if at is not None:
            if tokens == self._tokens[at]:
                self._last_tokens = tokens
                self._check_returns_map(call)
                return True
            if self._last_tokens == self._tokens[at]:
                self._raise_drawn(at)
        self._last_tokens = tokens
        if tokens < self._tokens[self._steps[0]]:
            self._drew_early = True
        return False

    def returned(self, call: BlockCall, result: Any) -> None:
        """Notes what a block returned: at a skipped step, only a token map can be passed on."""
        self._returns_map[call.site.layer] = isinstance(result, Tensor)

    def _check_returns_map(self, call: BlockCall) -> None:
        if not self._returns_map[call.site.layer]:
            raise RunError(
                f"{call.site.name} returns more than its token map, so it cannot pass its input "
                f'on at a skipped step; pass on_full="cache" to transform'
            )

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it, generations begin and end; if one did, checks that the steps were skipped.

        Raises:
            RunError: At its end, if the loop drew a skipped step.
        """
        before, self._drew_early = self._drew_early, False
        try:
            yield
        except BaseException:
            self.forget()
            raise
        if self._drew_early:
            self.check()
        self._drew_early = self._drew_early or before

    def check(self) -> None:
        """Checks, at the end of a generation, that the steps were skipped.

        Raises:
            RunError: If blocks ran at a skipped step and their result was used.
        """
        if self._last_tokens is not None and self._at is not None:
            self._raise_drawn(self._at)
        if self._last_tokens in self._only_skipped:
            self._raise_drawn(self._tokens.index(self._last_tokens))

    def _raise_drawn(self, step: int) -> None:
        how = (
            "outside its accumulator"
            if self._at is not None
            else "although it was asked to skip it"
        )
        self.forget()
        raise RunError(
            f"step {step} ({self._tokens[step]} tokens) has ratio 1 and is to be skipped, but the "
            f'loop draws it {how}. Pass on_full="cache" to transform, which draws the step from '
            f"the captured features, or on_full= a loop rule of your own. If a generation was cut "
            f"off, run it again"
        )
