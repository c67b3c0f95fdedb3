"""The blocks' time by module: attention, feed-forward, PTS, CTR and the rest.

Each node of a block's program is marked with the kind of its branch. A copy of the graph reads the
clock wherever the kind changes. Blocks that run their own forward, without a program, get a program
that prunes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fastvar_fx.engine.call import BlockCall, BlockSite, TokenMaps
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import Executor
from fastvar_fx.engine.generation import Role
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.store import Store
from fastvar_fx.measuring.clock import Clock, per_step
from fastvar_fx.measuring.runs import Budget, Progress, alternate, no_progress
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.measuring.variants import DENSE, PRUNED, Variant
from fastvar_fx.methods import Method
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import run_by, transform
from passes.analyse.branches import KINDS
from passes.graph import copy_graph
from passes.rewrite.side_input import take_side

PTS, CTR, REST = "PTS", "CTR", "rest"
MODULES: Final = (*KINDS, PTS, CTR, REST)
"""The modules; the rest is what lies between the branches, and blocks without a program.

At a step of one token, attention to that token counts as cross-attention.
"""

ModuleTimes = tuple[dict[str, float], ...]
"""Seconds by module at each step, summed over the blocks."""

_Marks = list[tuple[str, Any]]
"""Which module begins, and the reading of the clock."""


def measure_modules(
    subject: Subject,
    repeats: int,
    *,
    budget: Budget | None = None,
    progress: Progress = no_progress,
) -> dict[Variant, ModuleTimes]:
    """Returns the median times of the blocks by module, dense and pruned, both run eagerly.

    Steps of ratio 1 run on no tokens. Reading the clock costs some time itself.

    Args:
        subject: The original model, its schedule and how to run it.
        repeats: Timed runs of each, alternating, at least 1.
        budget: Time that all of it may take; repeats are left out to meet it.
        progress: Called with a few words before each run.
    """
    schedules = {DENSE: Schedule(subject.schedule.scales, ()), PRUNED: subject.schedule}
    timed = {}
    for variant, schedule in schedules.items():
        timed[variant] = _ModuleRuns(subject, schedule)
        progress(f"{variant} by module, warm-up")
        timed[variant].warm_up()
    named = {f"{variant} by module": runs for variant, runs in timed.items()}
    alternate(named, repeats, budget=budget, progress=progress)
    return {variant: _medians(runs.taken) for variant, runs in timed.items()}


class _ModuleRuns:
    """Runs of a transformed model, each with its times by module.

    Attributes:
        seconds: Seconds of each timed run as a whole.
        taken: The times by module of each.
    """

    def __init__(self, subject: Subject, schedule: Schedule) -> None:
        fast = transform(
            subject.model,
            schedule,
            blocks=subject.blocks,
            on_full="cache",
            conditional=subject.conditional,
        )
        self._clock = ModuleClock.of(fast, subject.weight.device)
        self._generate = partial(subject.generate, fast)
        self.seconds: list[float] = []
        self.taken: list[ModuleTimes] = []

    def warm_up(self) -> None:
        """Makes the programs."""
        self._generate()
        self._clock.take()

    def time(self) -> None:
        """Times a run."""
        begun = perf_counter()
        self._generate()
        self.taken.append(self._clock.take())
        self.seconds.append(perf_counter() - begun)


def _medians(runs: Sequence[ModuleTimes]) -> ModuleTimes:
    return tuple(
        {module: median(step[module] for step in steps) for module in MODULES}
        for steps in zip(*runs, strict=True)
    )


def late_modules(modules: Mapping[Variant, ModuleTimes], schedule: Schedule) -> list[str]:
    """Returns the modules that take time at the cache step or later."""
    late = [step for times in modules.values() for step in times[schedule.cache_step :]]
    return [module for module in MODULES if any(step[module] for step in late)]


def overhead(modules: Mapping[Variant, ModuleTimes], step: int) -> float:
    """Returns the time of PTS and CTR at a step over that of the dense branches."""
    dense, pruned = modules[DENSE][step], modules[PRUNED][step]
    branches = sum(time for module, time in dense.items() if module in KINDS)
    return (pruned[PTS] + pruned[CTR]) / branches


class ModuleClock(Executor):
    """Runs blocks eagerly and reads the clock where the module changes in their graphs.

    Programs of dense steps are made at the first call of each: do not measure that run.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._clock = Clock(device)
        self._store = Store(replace(plan, kinds=(), dump_dir=None, buffers_caches=False))
        self._maps: TokenMaps = {}
        self._sites: dict[str, BlockSite] = {}
        self._marked: dict[GraphModule, GraphModule] = {}
        self._calls: list[tuple[int, _Marks]] = []

    @classmethod
    def of(cls, fast: nn.Module, device: torch.device) -> ModuleClock:
        """Returns one that runs the blocks of a transformed model from now on."""
        made = cls(Engine.of(fast).plan, device)
        run_by(fast, made)
        return made

    def anew(self) -> ModuleClock:
        """Returns one for a copy of the model."""
        return ModuleClock(self._plan, self._clock.device)

    def take(self) -> ModuleTimes:
        """Returns the times of the generation since the last call."""
        calls = [(tokens, self._seconds(marks)) for tokens, marks in self._calls]
        self._calls.clear()
        schedule = self._plan.schedule
        by_module = {
            module: per_step([(tokens, found[module]) for tokens, found in calls], schedule)
            for module in MODULES
        }
        return tuple(
            {module: seconds[step] for module, seconds in by_module.items()}
            for step in range(schedule.steps)
        )

    def run_program(self, graph: GraphModule, inputs: Sequence[Any], call: BlockCall) -> Any:
        """Returns the outputs of a program's graph."""
        if graph not in self._marked:
            modules = partial(module_of, self._plan.method)
            self._marked[graph] = with_marks(graph, modules, self._mark)
        self._begin(call.tokens)
        outputs = self._marked[graph](*inputs)
        self._mark(REST)
        return outputs

    def run_dense(self, call: BlockCall) -> Any:
        """Returns what a block's own forward returns, from a program of it if one can be made."""
        site = self._sites.setdefault(call.site.name, self._new_site(call.site))
        if call.site is site:  # a program was refused
            self._begin(call.tokens)
            result = super().run_dense(call)
            self._mark(REST)
            return result
        dense = BlockCall(site, call.block, call.args, call.kwargs)
        step = self._plan.schedule.cache_step
        role = Role(step, captures=True)  # of no kinds of branches
        program, inputs = self._store.program_for(dense, role, step)
        return program.run(dense, inputs, {}, self)[0]

    def _new_site(self, site: BlockSite) -> BlockSite:
        """Returns a block's place with programs for dense steps alone."""
        return BlockSite(site.layer, site.name, site.forward, self._maps, prunes=False)

    def _begin(self, tokens: int) -> None:
        self._calls.append((tokens, []))
        self._mark(REST)

    def _mark(self, module: str) -> None:
        self._calls[-1][1].append((module, self._clock.read()))

    def _seconds(self, marks: _Marks) -> dict[str, float]:
        sums = dict.fromkeys(MODULES, 0.0)
        for (module, begun), (_, ended) in pairwise(marks):
            sums[module] += self._clock.seconds(ended, begun)
        return sums


def with_marks(
    graph_module: GraphModule, module_of: Callable[[Node], str], mark: Callable[[str], None]
) -> GraphModule:
    """Returns a copy of a graph that calls `mark` with each module where the module changes."""
    graph, copies = copy_graph(graph_module.graph)
    current = ""

    def mark_module(module: str) -> None:  # a graph calls functions, not methods
        mark(module)

    for node, made in copies.items():
        if node.op == "call_function" and module_of(node) != current:
            current = module_of(node)
            with graph.inserting_before(made):
                graph.call_function(mark_module, (current,))
    return GraphModule(graph_module, graph)


def module_of(method: Method, node: Node) -> str:
    """Returns which of `MODULES` a call in the graph of a program belongs to."""
    if node.target in (method.select, method.take, take_side):
        return PTS
    if node.target is method.restore:
        return CTR
    kind: str = node.meta.get("fastvar", {}).get("kind", REST)
    return kind
