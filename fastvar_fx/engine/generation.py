"""Where a transformed model is in a generation: the only object that knows.

The token count of a block call (or `step_of`) determines its role. Each block goes through

    structure steps    dense; what an earlier generation left is dropped
    cache step         captures its branch outputs, once per call of the step
    pruned steps       in order, each call with the outputs of its counterpart at the cache step;
                       the last call of the last step frees them

A call that comes out of this order is the beginning of another generation (source tokens as many
as a pruned step's), or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.watch import Watch
from fastvar_fx.errors import CaptureMismatchError, ModelError, RunError

_Live = tuple[int, torch.device, torch.dtype]
"""Batch size, device and dtype of a token map."""

Captured = dict[int, Tensor]
"""Branch outputs (B, L, C) of one call of a block at the cache step, by branch index."""


class Role(NamedTuple):
    """What a block does at a call.

    Attributes:
        step: The step whose program runs; None for none.
        captured: At a pruned step, what the cache step captured.
        captures: Whether the step is the cache step.
        passes: Whether the block returns its input, at a skipped step.
    """

    step: int | None = None
    captured: Captured = {}  # noqa: RUF012
    captures: bool = False
    passes: bool = False


DENSE: Final = Role()
PASS: Final = Role(passes=True)

_CAPTURED: Final = -1
"""The position of a block that has captured and not yet pruned."""


class Progress:
    """How far one block is in the generation.

    Attributes:
        began: Whether a structure or cache step was met since the last generation ended.
        captured: What each call of the cache step captured; None before and after.
        live: Batch size, device and dtype of the token map at the cache step, or since samples were
            dropped.
        position: Which of the pruned steps was met last; -1 for none.
        calls: How many calls of that step came before the current one.
        returns_map: Whether the block returns its token map alone.
    """

    def __init__(self) -> None:
        self.began = False
        self.captured: list[Captured] | None = None
        self.live: _Live | None = None
        self.position = _CAPTURED
        self.calls = 0
        self.returns_map = True

    def forget(self) -> None:
        """Frees what was captured."""
        self.captured = None
        self.position = _CAPTURED
        self.calls = 0

    def end(self) -> None:
        """Ends the generation."""
        self.forget()
        self.began = False


class Generation:
    """The current generation of a transformed model.

    Attributes:
        prunes: Whether the schedule is followed; if not, every step runs dense.
        dense_calls: Calls of blocks by token count that were neither capturing nor pruned.
        early_calls: Calls with a pruned step's token count that came before their generation's
            cache step, by token count.
        peak_captured_bytes: The most bytes of captured outputs held so far.
    """

    def __init__(self, plan: Plan) -> None:
        schedule = plan.schedule
        self.plan = plan
        self.prunes = True
        self.dense_calls: Counter[int] = Counter()
        self.early_calls: Counter[int] = Counter()
        self.peak_captured_bytes = 0
        self._progress = [Progress() for _ in plan.blocks]
        self._last_layer = 0  # the last block that captured; there may be others that never run
        self._watch = Watch(schedule, plan.pruned_steps)
        self._cache_step = schedule.cache_step
        self._cache_tokens = schedule.length(schedule.cache_step)
        self._positions = {step: i for i, step in enumerate(plan.pruned_steps)}
        late = (schedule.cache_step, *plan.pruned_steps) if plan.pruned_steps else ()
        self._late_steps = {schedule.length(step): step for step in late}
        self._tokens = [schedule.length(step) for step in range(schedule.steps)]
        self._forget_skipping()

    # --- the state machine ----------------------------------------------------------------------

    def at(self, call: BlockCall) -> Role:
        """Returns the role of a call, and moves on.

        Raises:
            ModelError: If the block is in training mode.
            RunError: If the call comes out of order.
            CaptureMismatchError: If it does not fit what was captured.
        """
        if self.plan.skipped_steps and self._passes(call):
            return PASS
        if not (self.prunes and call.site.prunes):
            return DENSE
        step = self._late_step(call)
        if step is None:
            return DENSE
        if call.block.training:
            raise ModelError(
                f"{call.site.name} is in training mode and the schedule prunes; call model.eval() "
                f"first"
            )
        return self._capturing(call) if step == self._cache_step else self._pruned(call, step)

    def _late_step(self, call: BlockCall) -> int | None:
        """Returns the step, if it is the cache step or a pruned one; notes any other."""
        step_of = self.plan.step_of
        if step_of is not None:
            step = step_of(call.block, call.args, call.kwargs)
            if step is not None and (step == self._cache_step or step in self._positions):
                return step
            if step is None or step < self._cache_step:
                self._structure(call)
            return None
        if call.tokens < self._cache_tokens:
            self._structure(call)
            return None
        step = self._late_steps.get(call.tokens)
        if step is None:
            self._note(call, self.dense_calls)
        return step

    def _structure(self, call: BlockCall) -> None:
        progress = self._progress[call.site.layer]
        self._note(call, self.dense_calls)
        if progress.captured is not None:
            progress.forget()
        if not progress.began:  # an assignment, even of the same value, is a guard for Dynamo
            progress.began = True

    def _capturing(self, call: BlockCall) -> Role:
        if not call.compiling:
            self._watch.saw(call.tokens)
            call.site.check_structure(call.block)  # users edit models between generations
        return Role(self._cache_step, captures=True)

    def capture(self, call: BlockCall, outputs: Captured) -> None:
        """Keeps what a call of the cache step captured."""
        progress = self._progress[call.site.layer]
        again = progress.position == _CAPTURED and progress.began
        earlier = progress.captured if again else None
        progress.captured = [*(earlier or ()), outputs]
        progress.position, progress.calls, progress.live = _CAPTURED, 0, _live(call)
        if not call.compiling and call.site.layer >= self._last_layer:
            self._last_layer = call.site.layer
            self.peak_captured_bytes = max(self.peak_captured_bytes, self.captured_bytes)

    def _pruned(self, call: BlockCall, step: int) -> Role:
        progress, position = self._progress[call.site.layer], self._positions[step]
        if (
            progress.captured is None
            or position not in (progress.position, progress.position + 1)
            or (call.match(step) is None and self._caches_are_empty(call))
        ):
            return self._out_of_order(call, step)
        progress.calls = progress.calls + 1 if position == progress.position else 0
        progress.position = position
        if not call.compiling:
            self._watch.pruned()
        role = Role(step, self._fitting(call, step, progress))
        if position == len(self._positions) - 1 and progress.calls == len(progress.captured) - 1:
            progress.end()
        return role

    def _out_of_order(self, call: BlockCall, step: int) -> Role:
        """A pruned step's length without this generation's capture: source tokens, or a mistake."""
        progress, schedule = self._progress[call.site.layer], self.plan.schedule
        progress.forget()
        expected = call.tokens in self.early_calls or self._caches_are_empty(call)
        if progress.began and not expected:
            progress.began = False
            raise RunError(
                f"{call.site.name}: step {step} ({call.tokens} tokens) came without the "
                f"steps before it: the features of cache step {self._cache_step} "
                f"({self._cache_tokens} tokens) or of the pruned step before are missing. Dense so "
                f"far: {sorted(self.dense_calls)} tokens. Give the schedule that the loop runs: "
                f"scales {schedule.scales}"
            )
        self._note(call, self.early_calls)
        return DENSE

    def _note(self, call: BlockCall, calls: Counter[int]) -> None:
        if not call.compiling:
            calls[call.tokens] += 1
            self._watch.saw(call.tokens)

    def _caches_are_empty(self, call: BlockCall) -> bool:
        """Whether caches that the block reads at the cache step are empty: a generation begins."""
        programs = call.site.programs.get(self._cache_step, ())
        found = [program.misses_caches(call) for program in programs]
        known = [misses for misses in found if misses is not None]
        return bool(known) and all(known)  # some calls of a step may read more than others

    # --- what was captured ----------------------------------------------------------------------

    def _fitting(self, call: BlockCall, step: int, progress: Progress) -> Captured:
        """Returns what this call of the step is restored from, checked against the live batch."""
        assert progress.captured is not None
        if progress.calls >= len(progress.captured):
            raise RunError(
                f"{call.site.name} runs for the {progress.calls + 1}. time in step {step}, but ran "
                f"only {len(progress.captured)} times in the cache step {self._cache_step}; give a "
                f"cache_step at which every block runs as often as in the pruned steps"
            )
        live, was = _live(call), progress.live
        if live != was and was is not None and progress.captured[progress.calls]:
            if live[0] < was[0]:
                self._drop_samples(call, step, progress)
            if live != progress.live:
                progress.forget()
                raise CaptureMismatchError(
                    f"{call.site.name} at step {step}: asked to restore {_describe(live)} from "
                    f"what the cache step {self._cache_step} captured, {_describe(was)}. Keep "
                    f"batch, device and dtype within one generation"
                )
        return progress.captured[progress.calls]

    def _drop_samples(self, call: BlockCall, step: int, progress: Progress) -> None:
        """Keeps the captured outputs of the samples that the loop still runs, such as a half."""
        assert progress.captured is not None
        assert progress.live is not None
        batch, device, dtype = progress.live
        live = call.x.shape[0]
        found = self._first_rows(call, batch, live)
        if len(found) != 1:
            progress.forget()
            raise CaptureMismatchError(
                f"{call.site.name} at step {step}: the cache step {self._cache_step} captured "
                f"batch {batch}, of which {live} are left; which ones is unknown: "
                f"{_no_evidence(call, found, batch)}. Pass live_rows='first' or 'last' to "
                f"fastvar_fx.transform"
            )
        (first,) = found
        progress.captured = [
            {branch: output[first : first + live] for branch, output in outputs.items()}
            for outputs in progress.captured
        ]
        progress.live = (live, device, dtype)

    def _first_rows(self, call: BlockCall, batch: int, live: int) -> set[int]:
        """Returns which of `batch` samples may come first now that `live` of them are left."""
        if self.plan.live_rows is not None:
            return {0 if self.plan.live_rows == "first" else batch - live}
        if call.compiling:
            return set()
        known = [program for programs in call.site.programs.values() for program in programs]
        return set().union(*(program.first_rows(call, batch, live) for program in known))

    @property
    def captured_bytes(self) -> int:
        """Bytes of captured outputs held now."""
        calls = [outputs for progress in self._progress for outputs in progress.captured or ()]
        return sum(output.nbytes for outputs in calls for output in outputs.values())

    # --- beginning and end ----------------------------------------------------------------------

    def reset(self) -> None:
        """Ends the generation, wherever it is, and frees what was captured."""
        for progress in self._progress:
            progress.end()
        self._watch.cut_off()
        self._forget_skipping()

    @contextmanager
    def running_dense(self) -> Iterator[None]:
        """Within it, whole generations run dense at every step that the loop draws."""
        self.prunes = False
        try:
            yield
        finally:
            self.prunes = True

    @property
    def seen(self) -> list[int]:
        """Token counts of the calls that ran dense."""
        return sorted(self.dense_calls | self.early_calls)

    # --- skipped steps --------------------------------------------------------------------------

    def _forget_skipping(self) -> None:
        self._skipping: int | None = None  # the skipped step that the loop is at
        self._last_tokens: int | None = None  # of the last block call since `drew`
        self._drew_early = False  # whether blocks ran at a step before the skipped ones

    def drew(self, step: int) -> None:
        """Notes that the loop has accumulated what it drew at a step, and moves to the next one.

        At skipped steps, the blocks then return their input at once.
        """
        self._skipping = step + 1 if step + 1 in self.plan.skipped_steps else None
        self._last_tokens = None

    def _passes(self, call: BlockCall) -> bool:
        """Whether the call is at a skipped step, where the block returns its input."""
        tokens, at = call.tokens, self._skipping
        if at is not None:
            if tokens == self._tokens[at]:
                self._last_tokens = tokens
                self._check_returns_map(call)
                return True
            if self._last_tokens == self._tokens[at]:
                self._raise_drawn(at)
        self._last_tokens = tokens
        if tokens < self._tokens[self.plan.skipped_steps[0]]:
            self._drew_early = True
        return False

    def returned(self, call: BlockCall, result: Any) -> None:
        """Notes what a block returned: at a skipped step, only a token map can be passed on."""
        self._progress[call.site.layer].returns_map = isinstance(result, Tensor)

    def _check_returns_map(self, call: BlockCall) -> None:
        if not self._progress[call.site.layer].returns_map:
            raise RunError(
                f"{call.site.name} returns more than its token map, so it cannot pass its input "
                f'on at a skipped step; pass on_full="cache" to transform'
            )

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the model; if it drew an image, checks that the steps were skipped.

        Raises:
            RunError: If the loop drew a skipped step.
        """
        before, self._drew_early = self._drew_early, False
        try:
            result = method(*args, **kwargs)
        except BaseException:
            self._forget_skipping()
            raise
        if self._drew_early:
            self.check_skipped()
        self._drew_early = self._drew_early or before
        return result

    def check_skipped(self) -> None:
        """Checks, at the end of a generation, that the steps were skipped.

        Raises:
            RunError: If blocks ran at a skipped step and their result was used.
        """
        if self._last_tokens is not None and self._skipping is not None:
            self._raise_drawn(self._skipping)
        skipped, drawn = self.plan.skipped_steps, self._tokens[: self.plan.drawn_steps]
        only_skipped = {self._tokens[step] for step in skipped} - set(drawn)
        if self._last_tokens in only_skipped:
            self._raise_drawn(self._tokens.index(self._last_tokens))

    def _raise_drawn(self, step: int) -> None:
        at = self._skipping is not None
        how = "outside its accumulator" if at else "although it was asked to skip it"
        self._forget_skipping()
        raise RunError(
            f"step {step} ({self._tokens[step]} tokens) has ratio 1 and is to be skipped, but the "
            f'loop draws it {how}. Pass on_full="cache" to transform, which draws the step from '
            f"the captured features, or on_full= a loop rule of your own. If a generation was cut "
            f"off, run it again"
        )


def _live(call: BlockCall) -> _Live:
    x = call.x
    return (x.shape[0], x.device, x.dtype)


def _describe(live: _Live) -> str:
    batch, device, dtype = live
    return f"batch {batch} on {device}, {str(dtype).removeprefix('torch.')}"


def _no_evidence(call: BlockCall, found: set[int], batch: int) -> str:
    if call.compiling:
        return "torch.compile hides whether the block's caches are views of the earlier ones"
    if found:
        return f"its inputs are cut at different samples, {sorted(found)}"
    return f"none of the tensors it reads, such as its caches, is a slice of one of batch {batch}"
