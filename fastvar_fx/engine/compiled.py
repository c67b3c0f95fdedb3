"""Regional compilation: `torch.compile` once per structure and step, not once per layer.

A program is compiled once for all blocks that share it. A step without a program runs the user's
own forward, which is compiled once for each shape of the token map. Where Dynamo cannot take that
forward, its traced graph is compiled instead.

This module imports Dynamo and Inductor, so it is imported where compiling is asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch.fx import GraphModule

from fastvar_fx.engine import inductor_linears
from fastvar_fx.engine.block import own_class, with_own_code
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.dense_graphs import DenseGraphs
from fastvar_fx.engine.executor import Compiled, Executor
from fastvar_fx.engine.program import Match
from fastvar_fx.errors import CompileError
from fastvar_fx.schedule import Schedule

log = logging.getLogger(__name__)

_REGIONS: Final = "_fastvar_regions"
"""The attribute of a program's graph that holds what it compiles to, which ends with the graph."""
_MOST_SHARED: Final = 4
"""Graphs of a region after which other blocks get a new one: Dynamo stops at 8 for one code."""


class _Region:
    """What one code object compiles to: a graph, or some if the blocks that share it differ."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.call = torch.compile(function, **options)
        self.graphs = 0
        self.fell_back = False
        self.runs_traced = False  # the graph of a trace, in the place of a forward


class Compilation(Executor):
    """The compiled regions of a transformed model; they are compiled at their first call.

    Attributes:
        graphs: How many graphs were compiled, by the token count of the calls.
        failures: Which calls run eagerly because compiling them failed, and why.
    """

    def __init__(self, schedule: Schedule, options: dict[str, Any], *, fallback: bool) -> None:
        self._schedule = schedule
        self._options = inductor_linears.with_pass(options)
        self._fallback = fallback
        self._newest: dict[Any, _Region] = {}
        self._dense: dict[Any, _Region] = {}
        self._plain: dict[str, nn.Module] = {}
        self._traced = DenseGraphs()
        self.graphs: Counter[int] = Counter()
        self.failures: list[str] = []
        _Region(_run_dense, self._options)  # torch checks the options' names

    @property
    def makes_cuda_graphs(self) -> bool:
        """Whether `torch.compile` records CUDA graphs with these options."""
        mode, options = self._options.get("mode"), self._options.get("options") or {}
        chosen = (list_mode_options(mode) if mode else {}) | options
        default = inductor_config.triton.cudagraphs
        return self._options.get("backend") == "cudagraphs" or bool(
            chosen.get("triton.cudagraphs", default)
        )

    @property
    def compiled(self) -> Compiled:
        """What was compiled so far."""
        return Compiled(
            graphs=dict(sorted(self.graphs.items())),
            failures=tuple(self.failures),
            linears=inductor_linears.choice_in(self._options),
        )

    def anew(self) -> Compilation:
        """Returns one with the same options and nothing compiled, for a copy of the model."""
        return Compilation(self._schedule, self._options, fallback=self._fallback)

    def run_program(self, graph: GraphModule, inputs: Sequence[Any], call: BlockCall) -> Any:
        """Returns the outputs of a program's graph, compiled.

        Raises:
            CompileError: If it cannot be compiled, and `fallback` was not asked for.
        """
        regions = vars(graph).setdefault(_REGIONS, WeakKeyDictionary())
        if self not in regions:
            regions[self] = _Region(graph.forward, self._options)
        return self._run(regions[self], graph, inputs, call)

    def run_dense(self, call: BlockCall) -> Any:
        """Returns what a block's own forward returns, compiled.

        Raises:
            CompileError: If it cannot be compiled, and `fallback` was not asked for.
        """
        name, forward, x = call.site.name, call.site.forward, call.x
        if name not in self._plain:
            self._plain[name] = _without_runtime(call.block)
        inputs = (forward, self._plain[name], call.args, call.kwargs)
        kind = (forward, x.shape, x.dtype, x.device)
        region = self._dense.get((name, kind))
        if region is None:
            region = self._dense[name, kind] = self._shared_region(kind)
        match = self._traced.program_for(call) if region.runs_traced else None
        if match is not None:
            return self._run_traced(match, call)
        return self._run(region, _run_dense, inputs, call)

    def _run_traced(self, match: Match, call: BlockCall) -> Any:
        program, inputs = match
        result, _ = program.run(call, inputs, {}, self)
        return result

    def _shared_region(self, kind: Any) -> _Region:
        """Returns a region for a block that meets calls of a kind for the first time."""
        region = self._newest.get(kind)
        if region is None or region.graphs >= _MOST_SHARED:
            number = sum(len(found) for found in (self._newest, self._dense))
            function = with_own_code(_run_dense, f"dense_{id(self):x}_{number}")
            region = self._newest[kind] = _Region(function, self._options)
        return region

    def _run(
        self, region: _Region, eager: Callable[..., Any], inputs: Sequence[Any], call: BlockCall
    ) -> Any:
        if region.fell_back:
            return eager(*inputs)
        try:
            return self._call(region, inputs, call)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            what = f"{call.site.name} at {self._place(call.tokens)}: {_reason(error)}"
            match = self._traced.program_for(call) if eager is _run_dense else None
            if match is not None:
                log.info("its traced graph is compiled instead: %s", what)
                region.runs_traced = True
                return self._run_traced(match, call)
            if not self._fallback:
                raise CompileError(
                    f"torch.compile failed on {what}\nNothing was written to the block. Pass "
                    f"fallback=True to run such calls eagerly, other options to compile them "
                    f"(fullgraph=False allows graph breaks), or transform the model anew"
                ) from error
            log.warning("not compiled, so eager from now on: %s", what)
            region.fell_back = True
            self.failures.append(what)
            return eager(*inputs)

    def _call(self, region: _Region, inputs: Sequence[Any], call: BlockCall) -> Any:
        before = _graphs_so_far()
        try:
            with _guarding_hooks():
                return region.call(*inputs)
        finally:
            made = _graphs_so_far() - before
            region.graphs += made
            if made:
                self.graphs[call.tokens] += made

    def _place(self, tokens: int) -> str:
        steps = range(self._schedule.steps)
        found = [str(step) for step in steps if self._schedule.length(step) == tokens]
        return f"step {' or '.join(found) or '-'} ({tokens} tokens)"


def _run_dense(
    forward: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return forward(block, *args, **kwargs)


def _without_runtime(block: nn.Module) -> nn.Module:
    """Returns the block as an object of the user's class, with the same attributes.

    Transformed blocks have a class each, which would keep Dynamo from sharing what it compiles.
    """
    plain: nn.Module = object.__new__(own_class(block))
    object.__setattr__(plain, "__dict__", vars(block))
    return plain


@contextlib.contextmanager
def _guarding_hooks() -> Iterator[None]:
    """Within it, what Dynamo compiles holds only while modules have the same hooks.

    By default it does not look at them, and hooks added later would count at pruned steps alone.
    `config.patch` makes a class at every call, which is slow.
    """
    before = dynamo_config.skip_nnmodule_hook_guards
    dynamo_config.skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        dynamo_config.skip_nnmodule_hook_guards = before


def _graphs_so_far() -> int:
    return counters["stats"]["unique_graphs"]


def _reason(error: Exception) -> str:
    """Returns what torch says, which names the op, without its advice on debugging."""
    text = str(error).partition("\n\nSet TORCH")[0].strip()
    return f"{type(error).__name__}: {text}"
