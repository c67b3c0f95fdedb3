"""What a pass is, what it works on, and the one place that runs, times, checks and dumps passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.analyse.branches import KINDS, Branch, Kind
from passes.refusal import BranchRefusedError, Refusal, RefusedError
from passes.trace.state import show

if TYPE_CHECKING:
    from passes.analyse.caches import Buffered, Copied, Growth, LaterRows
    from passes.analyse.costs import BranchReport
    from passes.rewrite.prune import Step
    from passes.trace.calls import Call, Reference
    from passes.trace.capture import BlockProgram
    from passes.trace.fingerprint import Fingerprint
    from passes.trace.state import Path

log = logging.getLogger(__name__)

_UNSET: Final[Any] = None
"""What an early pass sets; only a pipeline in the wrong order reads it before."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is compiled, and for which step.

    Attributes:
        call: The live call at that step.
        real: What `reference` returned for it.
        kinds: Kinds of branches that prune.
        step: The pruned step; None at the cache step, whose program also returns its branches'
            outputs.
        captured: The outputs that the cache step returned, by branch index, at a pruned step.
        later: What later steps append to caches; None leaves caches as they are.
        dump: Writes the graphs, if given.
    """

    call: Call
    real: Reference
    kinds: Sequence[Kind] = KINDS
    step: Step | None = None
    captured: Mapping[int, Tensor] = field(default_factory=dict)
    later: LaterRows | None = None
    dump: Dump | None = None


@dataclass(frozen=True, kw_only=True)
class StepProgram:
    """A checked program of one step.

    Attributes:
        captured: The captured call, unchanged by later passes.
        graph_module: Takes the tensors at `inputs`, then one captured output per entry of
            `features`; returns results, writes and, at the cache step, the outputs to capture.
        inputs: Where the graph's inputs are read.
        features: The branches whose outputs the graph returns (cache step) or takes (pruned step).
        branches: A report on every branch.
        caches: The caches that the graph grows.
        buffered: The same program on buffers, if any cache can be in one.
        seconds: How long each pass took.
        refusal: Why it drops rows of the batch and does nothing else.
    """

    captured: BlockProgram = field(default=_UNSET, repr=False)
    graph_module: GraphModule = field(default=_UNSET, repr=False)
    inputs: tuple[Path, ...] = field(default=(), repr=False)
    features: tuple[int, ...] = ()
    branches: tuple[BranchReport, ...] = ()
    caches: tuple[Growth | Copied, ...] = ()
    buffered: Buffered | None = field(default=None, repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
    refusal: Refusal | None = None

    @property
    def prunes(self) -> tuple[int, ...]:
        """The branches that prune."""
        return tuple(branch.index for branch in self.branches if branch.kept is not None)

    def moved(self, made_for: Fingerprint, call: Fingerprint) -> StepProgram:
        """Returns the program for the places of another call.

        Args:
            made_for: The fingerprint of the call that it was made for.
            call: An equal fingerprint.
        """
        to = dict(zip(made_for.inputs, call.inputs, strict=True))
        held = self.captured.conditions
        conditions = replace(held, places=tuple((to[path], dim) for path, dim in held.places))
        captured = replace(self.captured, **vars(call.facts) | {"conditions": conditions})
        return replace(self, captured=captured, inputs=tuple(to[path] for path in self.inputs))

    @property
    def why_copied(self) -> dict[str, str | None]:
        """Why each cache is copied as it grows, by its place; None for one in a buffer."""
        return {show(self.inputs[c.input][1:]): getattr(c, "reason", None) for c in self.caches}


@dataclass(frozen=True, kw_only=True)
class Draft(StepProgram):
    """A program in the making: each pass returns a new one.

    Attributes:
        source: The graph that the branches were found in.
        found: Its residual branches.
        needed_later: Why later steps need the keys of a branch whole, by index.
        expected: What each branch adds in the real call, by index.
        inputs_after: The inputs of `source` after the real call, which may have overwritten them.
        forms: The nodes that compute each pruned branch in the graph, by index.
        at_earlier_sizes: The same graph at the sizes of an earlier call, if some vary.
    """

    source: GraphModule = _UNSET
    found: tuple[Branch, ...] = ()
    needed_later: Mapping[int, Refusal] = field(default_factory=dict)
    expected: Mapping[int, Tensor] = field(default_factory=dict)
    inputs_after: tuple[Any, ...] = ()
    forms: Mapping[int, Sequence[Node]] = field(default_factory=dict)
    at_earlier_sizes: GraphModule | None = None

    @property
    def newest(self) -> GraphModule:
        """The graph that was made last."""
        return self.graph_module if self.buffered is None else self.buffered.graph_module

    @property
    def added(self) -> list[Branch]:
        """The branches that are added to the residual stream."""
        return [branch for branch in self.found if branch.add is not None]

    def prunable(self, kinds: Sequence[Kind]) -> list[Branch]:
        """Returns the branches of some kinds that may prune."""
        return [b for b in self.found if b.refusal is None and b.kind in kinds]

    def refusing(self, branch: int, refusal: Refusal) -> Draft:
        """Returns the draft with a branch refused."""
        found = (replace(b, refusal=refusal) if b.index == branch else b for b in self.found)
        return replace(self, found=tuple(found))


class Pass(Protocol):
    """One entry of a pipeline: it analyses, rewrites or verifies a draft.

    Attributes:
        name: What errors, dumps and times call it.
    """

    name: str

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with its result, or as it is where the pass does not apply.

        Raises:
            BranchRefusedError: If one branch has to stay dense.
            RefusedError: If the whole block has to.
        """


class PassError(Exception):
    """A pass failed, which is a bug of the compiler; a refusal is a property of the block.

    Attributes:
        name: The pass.
    """

    def __init__(self, name: str, context: Context, error: Exception) -> None:
        kind = type(context.call.module).__name__
        super().__init__(f"pass {name} failed on a {kind}: {type(error).__name__}: {error}")
        self.name = name


class OperatorError(Exception):
    """An operator that the caller gave returned something else than it has to."""


def run_passes(passes: Sequence[Pass], context: Context, draft: Draft) -> Draft:
    """Runs passes in order; checks, times and dumps what each one makes.

    Raises:
        RefusedError: If a pass refuses.
        OperatorError: If an operator of the step returned something else than it has to.
        PassError: If a pass fails otherwise.
    """
    for each in passes:
        started = time.perf_counter()
        try:
            made = each.run(context, draft)
            if made.newest is not draft.newest:
                made.newest.graph.lint()
        except (RefusedError, OperatorError, PassError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PassError(each.name, context, error) from error
        seconds = time.perf_counter() - started
        log.debug("%s: %.1f ms", each.name, 1e3 * seconds)
        draft = replace(made, seconds={**made.seconds, each.name: seconds})
        if context.dump is not None:
            context.dump(each.name, draft)
    return draft


class WithoutRefused:
    """Runs passes, and again from the start without a branch whenever one of them refuses it."""

    name = "without_refused"

    def __init__(self, *passes: Pass) -> None:
        self.passes = passes

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft in which no pass refuses any branch that is left."""
        while True:
            try:
                return run_passes(self.passes, context, draft)
            except BranchRefusedError as error:
                log.info("branch %d refused: %s", error.branch, error.refusal)
                draft = draft.refusing(error.branch, error.refusal)


class Dump:
    """Writes the graph after each pass that changed it, as numbered files of readable code.

    The graph before a pass is in the file with the number before.
    """

    def __init__(self, folder: FilePath, prefix: str) -> None:
        self._folder = folder
        self._prefix = prefix
        self._written: list[GraphModule] = []

    def __call__(self, name: str, draft: Draft) -> None:
        """Writes the newest graph of a draft, unless it is written already."""
        newest = draft.newest
        if any(newest is written for written in self._written):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        code = newest.print_readable(print_output=False, additional_meta=["fastvar"])
        path = self._folder / f"{self._prefix}.{len(self._written)}_{name}.py"
        path.write_text(code, encoding="utf-8")
        self._written.append(newest)
