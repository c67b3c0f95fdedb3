"""Graph -> graph: a compiler for the blocks of next-scale image generators. Imports only torch.

A live call of a transformer block becomes a checked FX graph in which residual branches run on the
tokens that matter. `PIPELINE` is the order of the passes; `docs/passes.md` shows how to add one.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Final

from passes.analyse.branches import FindBranches
from passes.analyse.caches import FindCaches
from passes.analyse.costs import CountFlops
from passes.analyse.counts import CheckCounts
from passes.analyse.later import FindNeededLater
from passes.analyse.prunable import CheckPrunable
from passes.analyse.rows import Half, RowDim, find_rows
from passes.base import (
    Context,
    Draft,
    Dump,
    OperatorError,
    Pass,
    PassError,
    StepProgram,
    WithoutRefused,
)
from passes.base import run_passes as _run_passes
from passes.refusal import Refusal, RefusedError
from passes.rewrite.capture_outputs import CaptureOutputs
from passes.rewrite.kv_append import AppendKV
from passes.rewrite.prune import Operators, Prune, Step
from passes.rewrite.rows import DropRows
from passes.rewrite.share_selection import ShareSelection
from passes.trace.calls import Call, Reference, live_inputs, reference
from passes.trace.capture import Capture
from passes.trace.fingerprint import Fingerprint, LeakedTensorError, fingerprint
from passes.verify import (
    VerifyBuffered,
    VerifyPermuted,
    VerifySizes,
    VerifySubset,
    VerifyTranslation,
)

OWNER: Final = "fastvar_fx"
"""The distribution that this package belongs to: another one may be called `passes` too."""

PIPELINE: Final[tuple[Pass, ...]] = (
    Capture(),
    FindBranches(),
    VerifyTranslation(),
    FindNeededLater(),
    CaptureOutputs(),  # the cache step only
    CheckPrunable(),  # this and the next two lines: pruned steps only
    CheckCounts(),
    WithoutRefused(VerifyPermuted(), Prune(), VerifySubset()),
    VerifySizes(CaptureOutputs(), Prune()),
    CountFlops(),
    FindCaches(),
    AppendKV(),
    VerifyBuffered(),
    ShareSelection(),  # pruned steps only
    DropRows(),  # steps without guidance only
)
"""The passes in the order they run; each does nothing where it does not apply."""

TRANSLATION: Final[tuple[Pass, ...]] = (Capture(), VerifyTranslation())
"""The passes that make a call a graph, and nothing else."""

ROWS: Final[tuple[Pass, ...]] = (*TRANSLATION, DropRows())
"""The passes that make a call a graph of some rows of the batch, and nothing else."""

__all__ = [
    "OWNER",
    "PIPELINE",
    "ROWS",
    "TRANSLATION",
    "Call",
    "Context",
    "Draft",
    "Dump",
    "Fingerprint",
    "Half",
    "LeakedTensorError",
    "OperatorError",
    "Operators",
    "Pass",
    "PassError",
    "Reference",
    "Refusal",
    "RefusedError",
    "RowDim",
    "Step",
    "StepProgram",
    "find_rows",
    "fingerprint",
    "live_inputs",
    "reference",
    "run",
]


def run(context: Context, pipeline: Sequence[Pass] = PIPELINE) -> StepProgram:
    """Compiles a call into the program of one step.

    Args:
        context: The call, what it returned for real, and the step.
        pipeline: The passes to run.

    Raises:
        RefusedError: If the whole block stays dense.
        OperatorError: If an operator of the step returned something else than it has to.
        PassError: If a pass fails, which is a bug of the pass.
    """
    draft = _run_passes(pipeline, context, Draft())
    return StepProgram(**{each.name: getattr(draft, each.name) for each in fields(StepProgram)})
