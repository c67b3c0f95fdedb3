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
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fastvar_fx.bench.variants import Variant
from fastvar_fx.bound import BoundProgram, StaysDense
from fastvar_fx.ops import Operators
from fastvar_fx.plan import Plan
from fastvar_fx.programs import Block, ProgramStore
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import Budget, Clock, Progress, Subject, alternate, no_progress, per_step
from fastvar_fx.transform import run_by, transform
from passes.branches import KINDS
from passes.pipeline import Call
from passes.prune import take_side

DENSE, PRUNED = Variant("dense"), Variant("pruned")
"""What is timed by module."""
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
        budget: Time that all of it may take; repeats are left out for it.
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
        fast = transform(subject.model, schedule, blocks=subject.blocks, on_full="cache")
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


class ModuleClock:
    """Runs blocks eagerly and reads the clock where the module changes in their graphs.

    Programs of dense steps are made at the first call of each: do not measure that run.
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
        """Returns one that runs the blocks of a transformed model from now on."""
        return run_by(fast, lambda plan: cls(plan, device))

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

    def run_program(
        self, graph_module: GraphModule, inputs: Sequence[Any], block: str, tokens: int
    ) -> Any:
        """Runs a program on its inputs."""
        if graph_module not in self._marked:
            modules = partial(module_of, self._plan.operators)
            self._marked[graph_module] = with_marks(graph_module, modules, self._mark)
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
        """Runs a program of a block's own forward, or the forward where there is no program."""
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
    made: dict[Node, Node] = {}
    graph, current = Graph(), ""

    def mark_module(module: str) -> None:  # a graph calls functions, not methods
        mark(module)

    for node in graph_module.graph.nodes:
        if node.op == "call_function" and module_of(node) != current:
            current = module_of(node)
            graph.call_function(mark_module, (current,))
        made[node] = graph.node_copy(node, made.__getitem__)
    return GraphModule(graph_module, graph)


def module_of(operators: Operators, node: Node) -> str:
    """Returns which of `MODULES` a call in the graph of a program belongs to."""
    if node.target in (operators.select, operators.take, take_side):
        return PTS
    if node.target is operators.restore:
        return CTR
    kind: str = node.meta.get("fastvar", {}).get("kind", REST)
    return kind
