"""The blocks' time by what it goes into: attention, feed-forward, PTS, CTR and the rest.

The programs of the blocks tell: each node of a branch is marked with the branch's kind, and where
this changes, a copy of the graph reads the clock. The blocks' own forwards, which have no program,
get one that prunes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastvar_fx.bench.rows import DENSE, PRUNED
from fastvar_fx.bound import BoundProgram, StaysDense
from fastvar_fx.ops import Operators
from fastvar_fx.plan import Plan
from fastvar_fx.programs import Block, ProgramStore
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import Clock, Subject, per_step
from fastvar_fx.transform import run_by, transform
from passes import Call
from passes.analyse.branches import KINDS
from passes.graph import copy_graph
from passes.rewrite.side_input import take_side

PTS, CTR, REST = "PTS", "CTR", "rest"
MODULES: Final = (*KINDS, PTS, CTR, REST)
"""What time goes into; the rest is what lies between the branches, and blocks without a program.

At a step of one token, attention to that token counts as cross-attention.
"""

ModuleTimes = tuple[dict[str, float], ...]
"""Seconds by module at each step, summed over the blocks."""

_Marks = list[tuple[str, Any]]
"""What begins, and when, by the clock."""


def measure_modules(
    subject: Subject, repeats: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, ModuleTimes]:
    """Returns the median times of the blocks by module, dense and pruned, both run eagerly.

    Steps of ratio 1 run on no tokens. Reading the clock costs some time itself.

    Args:
        subject: The original model, its schedule and how to run it.
        repeats: Timed runs of each, by turns, at least 1.
        progress: Called with a few words before each run, `2 * (1 + repeats)` times.
    """
    schedules = {DENSE: Schedule(subject.schedule.scales, ()), PRUNED: subject.schedule}
    models, clocks = {}, {}
    for name, schedule in schedules.items():
        fast = transform(subject.model, schedule, blocks=subject.blocks, on_full="cache")
        clock = clocks[name] = ModuleClock.of(fast, subject.weight.device)
        models[name] = fast
        progress(f"{name} by module, warm-up")
        subject.generate(fast)
        clock.take()
    taken: dict[str, list[ModuleTimes]] = {name: [] for name in models}
    for turn in range(repeats):
        for name, fast in models.items():
            progress(f"{name} by module, run {turn + 1} of {repeats}")
            subject.generate(fast)
            taken[name].append(clocks[name].take())
    return {name: _medians(times) for name, times in taken.items()}


def _medians(runs: Sequence[ModuleTimes]) -> ModuleTimes:
    return tuple(
        {module: median(step[module] for step in steps) for module in MODULES}
        for steps in zip(*runs, strict=True)
    )


def late_modules(modules: Mapping[str, ModuleTimes], schedule: Schedule) -> list[str]:
    """Returns the modules that take time at the cache step or later."""
    late = [step for times in modules.values() for step in times[schedule.cache_step :]]
    return [module for module in MODULES if any(step[module] for step in late)]


def overhead(modules: Mapping[str, ModuleTimes], step: int) -> float:
    """Returns the time of PTS and CTR at a step over that of the dense branches."""
    dense, pruned = modules[DENSE][step], modules[PRUNED][step]
    branches = sum(time for module, time in dense.items() if module in KINDS)
    return (pruned[PTS] + pruned[CTR]) / branches


class ModuleClock:
    """Runs blocks eagerly and reads the clock where their graphs pass from one module to another.

    Programs of dense steps are made at the first call of each, so that run is not one to measure.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._clock = Clock(device)
        self._store = ProgramStore(replace(plan, kinds=(), records={}, dump_dir=None))
        self._programs: dict[str, list[BoundProgram | StaysDense]] = {}
        self._marked: dict[GraphModule, GraphModule] = {}
        self._calls: list[tuple[int, _Marks]] = []

    @classmethod
    def of(cls, fast: nn.Module, device: torch.device) -> ModuleClock:
        """Returns one that the blocks of a transformed model run by from now on."""
        return run_by(fast, lambda plan: cls(plan, device))

    def anew(self) -> ModuleClock:
        """Returns one for a copy of the model."""
        return ModuleClock(self._plan, self._clock.device)

    def take(self) -> ModuleTimes:
        """Returns the times of the generation since it was last asked."""
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

    def run_program(
        self, graph_module: GraphModule, inputs: Sequence[Any], block: str, tokens: int
    ) -> Any:
        """Runs a program on its inputs."""
        if graph_module not in self._marked:
            told = partial(module_of, self._plan.operators)
            self._marked[graph_module] = with_marks(graph_module, told, self._mark)
        self._begin(tokens)
        outputs = self._marked[graph_module](*inputs)
        self._mark(REST)
        return outputs

    def run_dense(
        self,
        name: str,
        forward: Callable[..., Any],
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
    ) -> Any:
        """Runs a block's own forward by a program of it, or as it is where there is none."""
        program = self._dense_program(name, forward, block, args, kwargs)
        if isinstance(program, BoundProgram):
            execute = partial(self.run_program, block=name, tokens=x.shape[1])
            return program.run(args, kwargs, (), execute)[0]
        self._begin(x.shape[1])
        result = forward(block, *args, **kwargs)
        self._mark(REST)
        return result

    def _dense_program(
        self,
        name: str,
        forward: Callable[..., Any],
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> BoundProgram | StaysDense:
        known = self._programs.setdefault(name, [])
        for program in known:
            if program.matches(args, kwargs):
                return program
        path = self._store.stream_of(forward, block, args, kwargs)
        call = Call(partial(forward, block), block, args, kwargs, path)
        layer, step = self._plan.blocks.index(name), self._plan.schedule.cache_step
        known.append(self._store.find_or_make(Block(layer, name, forward), step, call, {}, []))
        return known[-1]

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


def module_of(operators: Operators, node: Node) -> str:
    """Returns which of `MODULES` a call in the graph of a program belongs to."""
    if node.target in (operators.select, operators.take, take_side):
        return PTS
    if node.target is operators.restore:
        return CTR
    kind: str = node.meta.get("fastvar", {}).get("kind", REST)
    return kind
