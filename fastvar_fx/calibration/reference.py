"""Makes pruned generations comparable with a dense one, call by call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvar_fx.engine.block import RUNTIME
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.engine.plan import LiveRows
from fastvar_fx.errors import ArgumentError, RunError

_NOISE: Final = 1e-5
"""What two runs of a dense step may differ by, per token: far more than by rounding."""

Losses = dict[int, float]
"""What a schedule changes at each step: the sum over the tokens, the mean over the batch."""


@dataclass(frozen=True)
class Guidance:
    """How a loop makes guided logits of those of both halves of a batch.

    Attributes:
        strengths: Of each step, t in `(1 + t) * conditional - t * unconditional`.
        conditional: Which half of the batch is the conditional one.
    """

    strengths: Sequence[float]
    conditional: LiveRows

    def guided(self, logits: Tensor, step: int, batch: int) -> Tensor:
        """Returns the guided logits (B, L, V) of logits (2B, L, V), float32.

        Args:
            logits: Those of both halves.
            step: The step.
            batch: The batch that the blocks got, 2B.

        Raises:
            RunError: If there are no logits of both halves.
        """
        if batch % 2 or len(logits) != batch:
            raise RunError(
                f"guidance is for a batch of two halves, the same images with and without "
                f"condition, and for a module that returns the logits of both at once; found "
                f"logits of a batch of {len(logits)} at step {step}, and a batch of {batch} in the "
                f"blocks"
            )
        conditional, other = logits.float().chunk(2)
        if self.conditional == "last":
            conditional, other = other, conditional
        strength = self.strengths[step]
        if not strength:
            return conditional
        guided = conditional + strength * (conditional - other)
        return guided.where(conditional != other, conditional)  # -inf in both halves stays


def watched_module(model: nn.Module, logits: str | None, last: nn.Module) -> nn.Module:
    """Returns the module that is compared: the one at the path `logits`, else the last block.

    Raises:
        ArgumentError: If the model has no such module.
    """
    if logits is None:
        return last
    try:
        return model.get_submodule(logits)
    except AttributeError as error:
        raise ArgumentError(
            f"logits is the module path of what returns the logits, such as head; "
            f"{type(model).__name__} has none at {logits!r}"
        ) from error


@contextmanager
def watching(module: nn.Module, seen: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, `seen` gets what a module returns, (B, L, V), at each call."""

    def after(_module: nn.Module, _args: object, output: object) -> None:
        maps = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.dim() == 3]
        if not maps:
            raise ArgumentError("logits is the path of a module that returns logits (B, L, V)")
        seen(maps[0])

    hook = module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def fingerprint(module: nn.Module) -> Iterator[Callable[[], str]]:
    """Within it, a generation runs; its result returns a hash of what a module returned."""
    found = sha256()

    def add(output: Tensor) -> None:
        found.update(repr(tuple(output.shape)).encode())
        found.update(output.cpu().double().numpy().tobytes())

    with watching(module, add), torch.no_grad():
        yield found.hexdigest


class Reference:
    """A dense generation: what its blocks got at each step, and what came out.

    A pruned generation soon draws other tokens than a dense one, after which nothing can be
    compared. So the first block that prunes is handed, call by call, what it got in the dense
    generation, whatever the loop has drawn: a step then differs by what the blocks prune alone.

    Attributes:
        calls: How often the blocks are called at each step.
    """

    def __init__(
        self, fast: nn.Module, logits: str | None, guidance: Guidance | None = None
    ) -> None:
        """Makes one without a generation.

        Args:
            fast: A transformed model.
            logits: Module path of what returns the logits (B, L, V); None to compare what the last
                block returns.
            guidance: How guided logits are made, which are then compared; None to compare both
                halves of a batch alike.

        Raises:
            ArgumentError: If the model has no such module.
        """
        self._fast = fast
        self._guidance = guidance
        blocks = [module_at(fast, name) for name in Engine.of(fast).plan.blocks]
        self._first = next(block for block in blocks if RUNTIME in vars(block))
        self._watched = watched_module(fast, logits, blocks[-1])
        self._of_logits = logits is not None
        self.calls: dict[int, int] = {}
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._step: int | None = None
        self._batch = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, a dense generation runs, which becomes the reference."""
        self.calls, self._inputs, self._outputs = {}, [], []

        def enter(call: BlockCall) -> None:
            self._inputs.append(call.x.clone())
            if self._step is not None:
                self.calls[self._step] = self.calls.get(self._step, 0) + 1

        def leave(output: Tensor) -> None:
            self._outputs.append(output.clone())

        with self._hooked(enter, leave):
            yield

    @contextmanager
    def comparing(self) -> Iterator[Losses]:
        """Within it, one generation runs; its losses are there at the end.

        They are those of all steps from the first that prunes or has no guidance on.

        Raises:
            RunError: If it calls the blocks otherwise than the dense generation, or under other
                conditions.
        """
        plan = Engine.of(self._fast).plan
        first = min(plan.changed_steps, default=plan.drawn_steps)
        losses: Losses = dict.fromkeys(range(first, plan.drawn_steps), 0.0)
        inputs, outputs = iter(self._inputs), iter(self._outputs)
        place = 0

        def enter(call: BlockCall) -> Tensor:
            nonlocal place
            given = next(inputs, None)
            if given is None or given.shape != call.x.shape:
                wanted = "no call" if given is None else f"one with {tuple(given.shape)}"
                raise RunError(
                    f"call {place} of {call.site.name} has a token map {tuple(call.x.shape)}, but "
                    f"in the dense generation there was {wanted}. A run for calibration draws the "
                    f"same batch each time"
                )
            place += 1
            return given

        def leave(output: Tensor) -> None:
            dense, step = next(outputs), self._step
            if step in losses:
                tokens = plan.schedule.tokens(step)
                maps = [self._compared(x[:, -tokens:], step) for x in (dense, output)]
                losses[step] += self._difference(*maps) / self.calls[step]
            elif step is not None and step < first:
                self._check_same(dense, output, step)

        with self._hooked(enter, leave):
            yield losses
        if next(inputs, None) is not None:
            raise RunError(
                f"a run has {place} calls of a block, and the dense one had {len(self._inputs)}. A "
                f"run for calibration draws the same batch each time"
            )

    def _check_same(self, dense: Tensor, output: Tensor, step: int) -> None:
        """Raises a `RunError` if what comes out of a step differs that nothing changes."""
        per_token = self._difference(dense, output) / dense.shape[1]
        if per_token > _NOISE:
            raise RunError(
                f"step {step} differs from that of the dense generation by {per_token:.3g} per "
                f"token, and nothing prunes before. A run for calibration has the same classes, "
                f"prompts and settings each time: give one run for each choice of them"
            )

    def _compared(self, output: Tensor, step: int) -> Tensor:
        guidance = self._guidance
        return guidance.guided(output, step, self._batch) if guidance else output

    def _difference(self, dense: Tensor, pruned: Tensor) -> float:
        """Returns the sum over the tokens, the mean over the batch, of what differs.

        Of logits it is the divergence of their distributions in bits, else the squared relative
        difference.
        """
        if not self._of_logits:
            before, after = dense.float(), pruned.float()
            moved = (after - before).square().sum(2) / before.square().sum(2)
            return float(moved.sum() / len(dense))
        log_p, log_q = (F.log_softmax(x.float(), dim=-1) for x in (dense, pruned))
        p = log_p.exp()
        nats = (p * (log_p - log_q)).where(p != 0, 0)  # what has no probability loses none
        return float(nats.sum() / len(dense) / math.log(2))

    @contextmanager
    def _hooked(self, enter: Any, leave: Any) -> Iterator[None]:
        """Within it, `enter` sees each call of the first block, and `leave` what comes out."""

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = BlockCall(vars(block)[RUNTIME].site, block, args, kwargs)
            self._step, self._batch = self._step_of(call), len(call.x)
            given = enter(call)
            if given is None:
                return None
            (_, root), (_, key) = call.path
            if root == "kwargs":
                return args, {**kwargs, key: given}
            return (*args[:key], given, *args[key + 1 :]), kwargs

        with watching(self._watched, leave), torch.no_grad():
            hook = self._first.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    def _step_of(self, call: BlockCall) -> int | None:
        """Returns the step of a call; None if it is none."""
        plan = Engine.of(self._fast).plan
        schedule, step_of = plan.schedule, plan.step_of
        if step_of is not None:
            return step_of(call.block, call.args, call.kwargs)
        steps = (s for s in range(schedule.steps) if schedule.length(s) == call.tokens)
        return next(steps, None)
