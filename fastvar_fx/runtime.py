"""What a transformed block does at a call: which step it is, which program runs, what is cached.

The path of a call: `BlockRuntime.__call__` tells the step by the token count; structure steps run
the user's own forward; at the cache step a program also gives the features of the branches; at the
pruned steps a program takes them. Programs are made on the first call of a step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvar_fx.bound import BoundProgram, StaysDense, token_map
from fastvar_fx.errors import (
    CaptureMismatchError,
    FastVARError,
    ModelError,
    NothingPrunedError,
    RunError,
)
from fastvar_fx.plan import Executor, Plan
from fastvar_fx.programs import Block, Forward, ProgramStore
from fastvar_fx.report import Report
from passes import Call
from passes.trace.state import Path

log = logging.getLogger(__name__)

_CAPTURED: Final = -1
"""The position of a block that has captured and not yet pruned."""


class BlockRuntime:
    """The state of one transformed block.

    Attributes:
        layer: Its index among the blocks.
        name: Its module path in the model.
    """

    def __init__(
        self, layer: int, name: str, forward: Forward, plan: Plan, store: ProgramStore
    ) -> None:
        self.layer = layer
        self.name = name
        self._forward = forward
        self._plan = plan
        self._store = store
        self._step_of_tokens = plan.step_of_tokens
        self._limit = plan.cache_tokens
        self._cache_step = plan.schedule.cache_step
        self._positions = {step: i for i, step in enumerate(plan.pruned_steps)}
        self._streams = _Streams(forward, store)
        self._programs: dict[int, list[BoundProgram | StaysDense]] = {}
        self._began = False
        self._features: list[dict[int, Tensor]] | None = None
        self._dtype: torch.dtype | None = None
        self._position = _CAPTURED
        self._call = 0
        plan.holders.append(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRuntime:
        """A copy starts anew: no features, no programs."""
        plan, store = copy.deepcopy((self._plan, self._store), memo)
        return BlockRuntime(self.layer, self.name, self._forward, plan, store)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call of the block."""
        step = self._step(block, args, kwargs) if self._plan.prunes_now else None
        if step is None:
            return self._dense(block, args, kwargs)
        if block.training:
            raise ModelError(
                f"{self.name} is in training mode and the schedule prunes; call model.eval() first"
            )
        if step == self._cache_step:
            return self._capture(block, args, kwargs)
        return self._pruned(step, block, args, kwargs)

    @property
    def captured_bytes(self) -> int:
        """Bytes of the captured features it holds."""
        features = [feature for call in self._features or () for feature in call.values()]
        return sum(feature.nbytes for feature in features)

    def forget(self) -> None:
        """Frees the captured features, and waits for a new generation."""
        self._forget()
        self._began = False

    # --- steps ---------------------------------------------------------------------------------

    def _step(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Tells the step, if it is the cache step or a pruned one."""
        if self._plan.step_of is not None:
            step = self._plan.step_of(block, args, kwargs)
            if step is not None and (step == self._cache_step or step in self._positions):
                return step
            if step is None or step < self._cache_step:
                self._begin(self._stream(block, args, kwargs).shape[1])
            return None
        tokens = self._stream(block, args, kwargs).shape[1]
        if tokens < self._limit:
            self._begin(tokens)
            return None
        step = self._step_of_tokens.get(tokens)
        if step is None:
            self._note_dense(tokens)
        return step

    def _stream(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Returns the block's (B, L, C) input."""
        return self._streams.of(block, args, kwargs)

    def _begin(self, tokens: int) -> None:
        """A structure step: whatever an earlier generation left is stale."""
        self._note_dense(tokens)
        if self._features is not None:
            self._forget()
        if not self._began:
            self._began = True

    def _note_dense(self, tokens: int) -> None:
        if not torch.compiler.is_compiling():
            self._plan.dense_calls[tokens] += 1
            self._plan.watch.saw(tokens)

    def _forget(self) -> None:
        """Frees the captured features and the place in the generation."""
        self._features = None
        self._position = _CAPTURED
        self._call = 0

    def _dense(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _run_dense(self._plan, self.name, self._forward, self._streams, block, args, kwargs)

    def _run(
        self,
        program: BoundProgram,
        step: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        features: Sequence[Tensor],
    ) -> tuple[Any, Sequence[Tensor]]:
        executor = _executor(self._plan)
        if executor is None:
            return program.run(args, kwargs, features)
        tokens = self._plan.schedule.tokens(step)
        execute = partial(executor.run_program, block=self.name, tokens=tokens)
        return program.run(args, kwargs, features, execute)

    # --- the cache step ------------------------------------------------------------------------

    def _capture(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        repeated = self._features is not None and self._position == _CAPTURED and self._began
        program = self._known(self._cache_step, args, kwargs)
        program = program or self._make(self._cache_step, block, args, kwargs, {})
        ends_step = not torch.compiler.is_compiling() and self.layer == self._plan.last_layer
        if ends_step:
            self._plan.watch.saw(self._plan.cache_tokens)
        if isinstance(program, StaysDense):
            result, features = self._dense(block, args, kwargs), {}
        else:
            result, made = self._run(program, self._cache_step, args, kwargs, ())
            features = dict(zip(program.features, made, strict=True))
        self._position = _CAPTURED
        self._call = 0
        self._dtype = self._stream(block, args, kwargs).dtype
        if repeated and self._features is not None:
            self._features = [*self._features, features]
        else:
            self._features = [features]
        if ends_step:
            self._plan.note_captured()
        return result

    # --- pruned steps --------------------------------------------------------------------------

    def _pruned(
        self, step: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        position = self._positions[step]
        program = self._known(step, args, kwargs)
        next_up = position in (self._position, self._position + 1)
        if (
            self._features is None
            or not next_up
            or (program is None and self._emptied(args, kwargs))
        ):
            return self._out_of_order(step, block, args, kwargs)
        self._call = self._call + 1 if position == self._position else 0
        self._position = position
        if not torch.compiler.is_compiling():
            self._plan.watch.pruned()
        captured = self._captured(step, block, args, kwargs)
        program = program or self._make(step, block, args, kwargs, captured)
        last = position == len(self._positions) - 1 and self._call == len(self._features) - 1
        if last:
            self._forget()
            self._began = False
        if isinstance(program, StaysDense):
            return self._dense(block, args, kwargs)
        features = [captured[i] for i in program.features]
        return self._run(program, step, args, kwargs, features)[0]

    def _captured(
        self, step: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[int, Tensor]:
        """Returns the features of this call of the step, checked against the live batch."""
        assert self._features is not None
        if self._call >= len(self._features):
            raise RunError(
                f"{self.name} runs for the {self._call + 1}. time in step {step}, but ran only "
                f"{len(self._features)} times in the cache step {self._cache_step}; give a "
                f"cache_step at which every block runs as often as in the pruned steps"
            )
        x = self._stream(block, args, kwargs)
        if any(x.shape[0] < feature.shape[0] for feature in self._features[self._call].values()):
            self._drop_samples(step, x.shape[0], args, kwargs)
        captured = self._features[self._call]
        live = (x.shape[0], x.device, x.dtype)
        for feature in captured.values():
            was = (feature.shape[0], feature.device, self._dtype)
            if live != was:
                self._forget()
                raise CaptureMismatchError(
                    f"{self.name} at step {step}: asked to restore {_describe_batch(*live)} from "
                    f"what the cache step {self._cache_step} captured, {_describe_batch(*was)}. "
                    f"Keep batch, device and dtype within one generation"
                )
        return captured

    def _drop_samples(
        self, step: int, live: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keeps the features of the `live` samples that the loop still runs, such as a half."""
        assert self._features is not None
        batch = next(iter(self._features[self._call].values())).shape[0]
        found: set[int] = set()
        if self._plan.live_rows is not None:
            found = {0 if self._plan.live_rows == "first" else batch - live}
        elif not torch.compiler.is_compiling():
            for program in chain.from_iterable(self._programs.values()):
                if isinstance(program, BoundProgram):
                    found |= program.first_rows(batch, live, args, kwargs)
        if len(found) != 1:
            self._forget()
            raise CaptureMismatchError(
                f"{self.name} at step {step}: the cache step {self._cache_step} captured batch "
                f"{batch}, of which {live} are left; which ones cannot be told: "
                f"{_no_evidence(found, batch)}. Pass live_rows='first' or 'last' to "
                f"fastvar_fx.transform"
            )
        (first,) = found
        self._features = [
            {branch: feature[first : first + live] for branch, feature in features.items()}
            for features in self._features
        ]

    def _out_of_order(
        self, step: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A pruned step's length without this generation's capture: source tokens, or a mistake."""
        self._forget()
        schedule = self._plan.schedule
        expected = schedule.tokens(step) in self._plan.early_calls or self._emptied(args, kwargs)
        if self._began and not expected:
            self._began = False
            raise RunError(
                f"{self.name}: step {step} ({schedule.tokens(step)} tokens) came without the steps "
                f"before it: the features of cache step {self._cache_step} "
                f"({schedule.tokens(self._cache_step)} tokens) or of the pruned step before are "
                f"missing. Dense so far: {sorted(self._plan.dense_calls)} tokens. Give the "
                f"schedule that the loop runs: scales {schedule.scales}"
            )
        if not torch.compiler.is_compiling():
            self._plan.early_calls[schedule.tokens(step)] += 1
            self._plan.watch.saw(schedule.tokens(step))
        return self._dense(block, args, kwargs)

    def _emptied(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether caches that the block reads at the cache step are empty: a generation begins."""
        return any(
            isinstance(program, BoundProgram) and program.misses_state(args, kwargs)
            for program in self._programs.get(self._cache_step, ())
        )

    # --- programs ------------------------------------------------------------------------------

    def _known(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundProgram | StaysDense | None:
        """Returns the program of this step that stands for this call, if there is one."""
        for program in self._programs.get(step, ()):
            if program.matches(args, kwargs):
                return program
        return None

    def _make(
        self,
        step: int,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        captured: dict[int, Tensor],
    ) -> BoundProgram | StaysDense:
        """Makes the program of this step that stands for this call."""
        if torch.compiler.is_compiling():
            raise RunError(
                f"{self.name} has no program for this call of step {step}; run "
                f"fastvar_fx.trace(model, run) with these shapes before torch.compile"
            )
        path = self._streams.path(block, args, kwargs)
        call = Call(partial(self._forward, block), block, args, kwargs, path)
        me = Block(self.layer, self.name, self._forward)
        known = self._programs.setdefault(step, [])
        try:
            made = self._store.find_or_make(me, step, call, captured, known)
        except (RuntimeError, ValueError) as error:
            if step in self._plan.pruned_steps[1:] and not isinstance(error, FastVARError):
                self._note_kept_keys(error)
            raise
        self._check_anything_pruned(step)
        return made

    def _note_kept_keys(self, error: BaseException) -> None:
        """Adds to an error of the user's code what pruning may have to do with it."""
        error.add_note(
            f"since step {self._plan.pruned_steps[0]} the keys cached in {self.name} are those of "
            f"kept tokens: a mask over all earlier tokens no longer fits them, for its token axis "
            f'cannot be told. branches=("cross_attention", "ffn") keeps all keys'
        )

    def _check_anything_pruned(self, step: int) -> None:
        """After the last block has met the last pruned step, something must have been pruned."""
        plan = self._plan
        if step != plan.pruned_steps[-1] or self.layer != plan.last_layer or plan.pruned_anything:
            return
        message = (
            f"the schedule prunes steps {list(plan.pruned_steps)}, but no branch of any block "
            f"could be pruned:\n{Report.of(plan)}"
        )
        if plan.strict:
            raise NothingPrunedError(message)
        log.warning("%s", message)


class DenseRuntime:
    """Runs the own forward of a block that never prunes, compiled if that was asked for."""

    def __init__(self, name: str, forward: Forward, plan: Plan, store: ProgramStore) -> None:
        self._name = name
        self._forward = forward
        self._plan = plan
        self._store = store
        self._streams = _Streams(forward, store)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseRuntime:
        """A copy shares nothing that is compiled."""
        plan, store = copy.deepcopy((self._plan, self._store), memo)
        return DenseRuntime(self._name, self._forward, plan, store)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call of the block."""
        return _run_dense(self._plan, self._name, self._forward, self._streams, block, args, kwargs)


class SkippingRuntime:
    """Lets a block pass on its input at skipped steps; else the block runs, pruned or dense."""

    def __init__(
        self,
        name: str,
        forward: Forward,
        plan: Plan,
        store: ProgramStore,
        inner: BlockRuntime | DenseRuntime,
    ) -> None:
        self._name = name
        self._skipped = plan.skipped
        self._inner = inner
        self._streams = _Streams(forward, store)
        self._returns_map = True

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs or passes one call of the block."""
        x = self._streams.of(block, args, kwargs)
        if self._skipped.passes(x.shape[1]):
            if not self._returns_map:
                raise RunError(
                    f"{self._name} returns more than its token map, so it cannot pass its input "
                    f'on at a skipped step; pass on_full="cache" to transform'
                )
            return x
        result = self._inner(block, args, kwargs)
        self._returns_map = isinstance(result, Tensor)
        return result


class _Streams:
    """Where the (B, L, C) input is in the calls of a block, by their form."""

    def __init__(self, forward: Forward, store: ProgramStore) -> None:
        self._forward = forward
        self._store = store
        self._paths: dict[tuple[int, tuple[str, ...]], Path] = {}

    def path(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
        form = (len(args), tuple(kwargs))
        path = self._paths.get(form)
        if path is None:
            path = self._paths[form] = self._store.stream_of(self._forward, block, args, kwargs)
        return path

    def of(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return token_map(self.path(block, args, kwargs), args, kwargs)


def _executor(plan: Plan) -> Executor | None:
    """Returns what runs the blocks; under the user's own torch.compile, that does."""
    return None if torch.compiler.is_compiling() else plan.executor


def _run_dense(
    plan: Plan,
    name: str,
    forward: Forward,
    streams: _Streams,
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    executor = _executor(plan)
    if executor is None:
        return forward(block, *args, **kwargs)
    x = streams.of(block, args, kwargs)
    return executor.run_dense(name, forward, block, args, kwargs, x)


def _describe_batch(size: int, device: torch.device, dtype: torch.dtype | None) -> str:
    return f"batch {size} on {device}, {str(dtype).removeprefix('torch.')}"


def _no_evidence(found: set[int], batch: int) -> str:
    if torch.compiler.is_compiling():
        return "torch.compile hides whether the block's caches are views of the earlier ones"
    if found:
        return f"its inputs are cut at different samples, {sorted(found)}"
    return f"none of the tensors it reads, such as its caches, is a slice of one of batch {batch}"
