"""The time of a generation by what it goes into: attention, feed-forward, PTS, CTR and the rest.

The programs of the blocks tell: each node of a branch is marked with the branch's kind, and where
this changes, a copy of the graph reads the clock. The blocks' own forwards, which have no program,
get one that prunes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fastvar_fx.bound import BoundProgram, StaysDense
from fastvar_fx.ops import Operators
from fastvar_fx.plan import Plan
from fastvar_fx.programs import Block, ProgramStore
from fastvar_fx.timing import Clock, per_step
from passes.branches import KINDS
from passes.pipeline import Call
from passes.prune import take_side

PTS, CTR, REST = "PTS", "CTR", "rest"
MODULES: Final = (*KINDS, PTS, CTR, REST)
"""What time goes into; the rest is what lies between the branches, and blocks without a program."""

_Marks = list[tuple[str, Any]]
"""What begins, and when, by the clock."""


class ModuleClock:
    """Runs blocks eagerly and reads the clock wherever their graphs come from one module to another.

    Programs of dense steps are made at the first call of each, so that run is not one to measure.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._clock = Clock(device)
        self._store = ProgramStore(replace(plan, kinds=(), records={}, dump_dir=None))
        self._programs: dict[str, list[BoundProgram | StaysDense]] = {}
        self._marked: dict[GraphModule, GraphModule] = {}
        self._calls: list[tuple[int, _Marks]] = []

    def anew(self) -> ModuleClock:
        """Returns one for a copy of the model."""
        return ModuleClock(self._plan, self._clock.device)

    def take(self) -> list[dict[str, float]]:
        """Returns the seconds per step and module since the last time, summed over the blocks."""
        calls = [(tokens, self._seconds(marks)) for tokens, marks in self._calls]
        self._calls.clear()
        schedule = self._plan.schedule
        by_module = {
            module: per_step([(tokens, found[module]) for tokens, found in calls], schedule)
            for module in MODULES
        }
        return [
            {module: seconds[step] for module, seconds in by_module.items()}
            for step in range(schedule.steps)
        ]

    def run_program(
        self, graph_module: GraphModule, inputs: Sequence[Any], block: str, tokens: int
    ) -> Any:
        """Runs a program on its inputs."""
        if graph_module not in self._marked:
            module_of = partial(_module_of, self._plan.operators)
            self._marked[graph_module] = with_marks(graph_module, module_of, self._mark)
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
        for (module, begun), (_, ended) in zip(marks, marks[1:], strict=False):
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


def _module_of(operators: Operators, node: Node) -> str:
    if node.target in (operators.select, operators.take, take_side):
        return PTS
    if node.target is operators.restore:
        return CTR
    kind: str = node.meta.get("fastvar", {}).get("kind", REST)
    return kind
