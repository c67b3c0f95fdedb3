"""The order of the passes: a captured call in, a checked program for one step out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.branches import (
    Branch,
    FoundBranch,
    Kind,
    RefusedBranch,
    find_branches,
    met_at_cached_keys,
)
from passes.capture import BlockProgram, Forward, capture, placeholder_of, run_eagerly
from passes.costs import BranchReport, dense_report, pruned_report
from passes.features import capture_features
from passes.graphs import outputs_of
from passes.prune import Operators, PruneRefusedError, Step, prune
from passes.refusal import Refusal, RefusedError, refuse, where
from passes.sizes import NOTHING_VARIES, Varying
from passes.state import Path, get, roots
from passes.validate import PermutedTokens, SomeTokens, check_permutation, check_translation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One live call of a block, to be captured."""

    forward: Forward
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Path
    """Where its (B, L, C) input is, from the roots."""
    varying: Varying = NOTHING_VARIES
    """The sizes that its program shall leave open."""


Reference = tuple[list[Tensor], list[Tensor]]
"""What a real call returned, and what it wrote."""


@dataclass(frozen=True)
class StepProgram:
    """A checked program of one step.

    Attributes:
        captured: The call it stands for, with the structure of its result and writes.
        graph_module: Takes the tensors at `inputs`, then one captured feature per entry of
            `features`; returns results, writes and, at the cache step, the features.
        inputs: Where its inputs are read.
        features: The branches whose features it makes (cache step) or takes (pruned step).
        branches: What became of every branch.
    """

    captured: BlockProgram = field(repr=False)
    graph_module: GraphModule = field(repr=False)
    inputs: tuple[Path, ...] = field(repr=False)
    features: tuple[int, ...]
    branches: tuple[BranchReport, ...]

    @property
    def prunes(self) -> tuple[int, ...]:
        """The branches that prune."""
        return tuple(branch.index for branch in self.branches if branch.kept is not None)


@dataclass(frozen=True)
class _Analysed:
    program: BlockProgram
    found: list[FoundBranch]
    results: list[Tensor]
    """What the real call returns."""
    expected: list[Tensor]
    """The feature of every found branch in the real call, by position."""
    inputs: list[Tensor]
    """The graph's inputs after the call, which may have overwritten them."""


def reference(call: Call) -> Reference:
    """Runs a call for real, with no effect; it comes first, for it fills what calls share.

    A helper's cache, such as one of position ids, would else keep a tensor made while tracing.
    """
    return run_eagerly(call.forward, call.module, call.args, call.kwargs)


def analyse(call: Call, real: Reference) -> _Analysed:
    """Captures a call, finds its branches and checks the translation.

    Args:
        call: The live call.
        real: What `reference` gave for it.

    Raises:
        RefusedError: If the block as a whole stays dense.
    """
    results, written = real
    program = capture(call.forward, call.module, call.args, call.kwargs, call.varying)
    found = branches_of(program, call.stream)
    for branch in found:
        for node in branch.region:
            node.meta["fastvar"] = dict(branch.label)
    features = capture_features(program.graph_module, found)
    inputs = live_inputs(call, program.inputs)
    outputs = features(*inputs)
    count = len(results) + len(written)
    mismatch = check_translation(outputs[: len(outputs) - len(found)], [*results, *written])
    if mismatch is not None:
        raise RefusedError(mismatch)
    return _Analysed(program, found, results, outputs[count:], inputs)


def branches_of(program: BlockProgram, stream: Path) -> list[FoundBranch]:
    """Finds the residual branches of a captured call whose (B, L, C) input is at `stream`."""
    node = placeholder_of(program, stream)
    if node is None:
        refuse("FVX003", "its (B, L, C) input is not read")
    return find_branches(program.graph_module.graph, node, program.result_count)


def make_capture(
    call: Call, real: Reference, kinds: Sequence[Kind], dump: Dump | None
) -> StepProgram:
    """Makes the program of the cache step: the dense block that also returns its features."""
    analysed = analyse(call, real)
    program = analysed.program
    wanted = [branch for branch in analysed.found if branch.kind in kinds]
    graph_module = capture_features(program.graph_module, wanted)
    if program.earlier is not None:
        others = _same_branches(call, program.earlier, wanted)
        _check_sizes(graph_module, capture_features(program.earlier.graph_module, others))
    if dump is not None:
        dump("captured", program.graph_module)
        dump("features", graph_module)
    reports = tuple(replace(dense_report(b), refusal=None) for b in analysed.found)
    features = tuple(branch.index for branch in wanted)
    return StepProgram(program, graph_module, program.inputs, features, reports)


def make_pruned(
    call: Call,
    real: Reference,
    kinds: Sequence[Kind],
    step: Step,
    operators: Operators,
    captured: dict[int, Tensor],
    dump: Dump | None,
) -> StepProgram:
    """Makes the program of a pruned step: its branches run on the kept tokens.

    Args:
        call: The live call at that step.
        real: What `reference` gave for it.
        kinds: Kinds of branches that prune.
        step: How many tokens each branch keeps, and the scales.
        operators: Selection and restoration.
        captured: The features of the cache step by branch index.
        dump: Writes the graphs, if given.
    """
    analysed = analyse(call, real)
    program = analysed.program
    found = [_with_feature(branch, captured) for branch in analysed.found]
    if not step.last:
        found = [_with_future(branch) for branch in found]

    def feature_of(branch: Branch) -> Tensor:
        return _fake_like(branch, captured[branch.index])

    while True:
        wanted = [b for b in found if isinstance(b, Branch) and b.kind in kinds]
        try:
            _check_permuted(call, analysed, wanted)
            _check_subset(call, analysed, wanted, step.kept)
            pruned = prune(program.graph_module, wanted, step, operators, feature_of)
        except PruneRefusedError as error:
            log.info("branch %d refused: %s", error.branch, error.refusal)
            found = [_refuse(b, error.refusal) if b.index == error.branch else b for b in found]
        else:
            break
    if program.earlier is not None:
        same = _same_branches(call, program.earlier, wanted)
        others = [branch for branch in same if isinstance(branch, Branch)]
        other = prune(program.earlier.graph_module, others, step, operators, feature_of)
        _check_sizes(pruned.graph_module, other.graph_module)
    if dump is not None:
        dump("captured", program.graph_module)
        dump("pruned", pruned.graph_module)
    reports = tuple(pruned_report(b, wanted, step.kept, pruned.graph_module) for b in found)
    inputs = tuple(program.inputs[i] for i in pruned.inputs)
    features = tuple(branch.index for branch in wanted)
    return StepProgram(program, pruned.graph_module, inputs, features, reports)


def _same_branches(
    call: Call, earlier: BlockProgram, wanted: Sequence[FoundBranch]
) -> list[FoundBranch]:
    """Finds the wanted branches again in the graph at the sizes of an earlier call."""
    found = branches_of(earlier, call.stream)
    indices = [branch.index for branch in wanted]
    return [branch for branch in found if branch.index in indices]


def _check_sizes(made: GraphModule, at_earlier_sizes: GraphModule) -> None:
    """Nothing in a graph may depend on the sizes that vary but what is computed in it."""
    if len(made.graph.nodes) != len(at_earlier_sizes.graph.nodes):
        refuse("FVX019", "other branches prune at other sizes")
    for node, other in zip(made.graph.nodes, at_earlier_sizes.graph.nodes, strict=True):
        if node.format_node() != other.format_node():
            refuse("FVX019", f"`{node.format_node()}` has been `{other.format_node()}`", node)


def _with_feature(branch: FoundBranch, captured: dict[int, Tensor]) -> FoundBranch:
    if isinstance(branch, RefusedBranch):
        return branch
    feature, out = captured.get(branch.index), branch.out.meta["val"]
    if feature is None:
        return _refuse(branch, Refusal("FVX016", "the block ran other branches at the cache step"))
    if feature.dtype != out.dtype or feature.shape[::2] != out.shape[::2]:
        found = f"{tuple(feature.shape)} {feature.dtype}, now {tuple(out.shape)} {out.dtype}"
        return _refuse(branch, Refusal("FVX016", f"its output at the cache step was {found}"))
    return branch


def _with_future(branch: FoundBranch) -> FoundBranch:
    """Refuses a branch whose pruned keys a later step could not do with."""
    met = met_at_cached_keys(branch) if isinstance(branch, Branch) else None
    if met is None:
        return branch
    reason = "what it meets here has an entry per key, those of earlier steps included"
    return _refuse(branch, Refusal("FVX021", reason, str(met.target), where(met)))


def _refuse(branch: FoundBranch, refusal: Refusal) -> RefusedBranch:
    return RefusedBranch(branch.index, branch.kind, branch.name, branch.out, branch.region, refusal)


def _check_permuted(call: Call, analysed: _Analysed, wanted: list[Branch]) -> None:
    """Keeps all tokens in another order: every branch must give its output again."""
    if not wanted:
        return
    tokens = get(roots(call.module, call.args, call.kwargs), call.stream).shape[1]
    operators = PermutedTokens()
    graph_module, outputs, inputs = _run_with(call, analysed, wanted, tokens, operators)
    expected = [analysed.expected[branch.index] for branch in wanted]
    wrong = check_permutation(operators.outputs, expected, graph_module)
    if wrong is not None:
        raise PruneRefusedError(wanted[wrong[0]].index, wrong[1])
    wrong = check_permutation(*_effects(analysed, wanted, outputs, inputs), graph_module)
    if wrong is not None:
        raise RefusedError(wrong[1])


def _check_subset(call: Call, analysed: _Analysed, wanted: list[Branch], kept: int) -> None:
    """Keeps some tokens: a branch that does not attend to other tokens gives the same for them."""
    if not wanted or kept == 0:
        return
    operators = SomeTokens()
    graph_module, _, _ = _run_with(call, analysed, wanted, kept, operators)
    for branch, output in zip(wanted, operators.outputs, strict=True):
        if branch.kind != "attention":
            expected = analysed.expected[branch.index]
            wrong = check_permutation([output], [expected], graph_module)
            if wrong is not None:
                raise PruneRefusedError(branch.index, wrong[1])


def _run_with(
    call: Call, analysed: _Analysed, wanted: list[Branch], kept: int, operators: PermutedTokens
) -> tuple[GraphModule, Sequence[Tensor], list[Tensor]]:
    """Runs the rewritten graph with operators of a check; the dense outputs are its features.

    Returns:
        The graph, its outputs, and all inputs of the program, as the run left them.
    """
    step = Step(kept, (kept,), (kept,))
    source = analysed.program.graph_module
    pruned = prune(source, wanted, step, operators, lambda branch: branch.out.meta["val"])
    inputs = live_inputs(call, analysed.program.inputs)
    expected = [analysed.expected[branch.index] for branch in wanted]
    operators.outputs.clear()
    try:
        outputs = pruned.graph_module(*(inputs[i] for i in pruned.inputs), *expected)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel that is handed a shape it does not take
        refuse("FVX017", f"it fails on the kept tokens: {type(error).__name__}: {error}")
    return pruned.graph_module, outputs, inputs


def _effects(
    analysed: _Analysed, wanted: list[Branch], outputs: Sequence[Tensor], inputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what does not depend on the order of the tokens, as made and as it should be.

    That is what the block returns, but for keys and values, and the inputs it overwrote.
    """
    nodes = outputs_of(analysed.program.graph_module.graph)
    made, real = [], []
    for node, output, result in zip(nodes, outputs, analysed.results, strict=False):
        if not any(node in branch.region for branch in wanted):
            made.append(output)
            real.append(result)
    for tensor, after in zip(inputs, analysed.inputs, strict=True):
        if tensor is not after:
            made.append(tensor)
            real.append(after)
    return made, real


def _fake_like(branch: Branch, feature: Tensor) -> Tensor:
    """A fake of the captured feature, in the fake mode of the captured graph."""
    example: Tensor = branch.out.meta["val"]
    return example.new_empty(feature.shape)


def live_inputs(call: Call, paths: Sequence[Path]) -> list[Any]:
    """Reads a program's inputs from a live call; those that it might overwrite are copies."""
    origin = roots(call.module, call.args, call.kwargs)
    values = [get(origin, path) for path in paths]
    return [v if isinstance(v, (nn.Parameter, int)) else v.clone() for v in values]


class Dump:
    """Writes graphs as numbered files of readable code, one per pass."""

    def __init__(self, folder: FilePath, prefix: str) -> None:
        self._folder = folder
        self._prefix = prefix
        self._count = 0

    def __call__(self, name: str, graph_module: GraphModule) -> None:
        """Writes one graph."""
        self._folder.mkdir(parents=True, exist_ok=True)
        code = graph_module.print_readable(print_output=False, additional_meta=["fastvar"])
        path = self._folder / f"{self._prefix}.{self._count}_{name}.py"
        path.write_text(code, encoding="utf-8")
        self._count += 1
