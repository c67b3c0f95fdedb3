"""`export`: writes what a transformed model runs as compiled packages into a folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastvar_fx import methods
from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.dense_graphs import DenseGraphs
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import EAGER, Executor
from fastvar_fx.engine.family import Family
from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.program import Program, StaysDense, autocast_dtypes, meta_of
from fastvar_fx.errors import PackageError
from fastvar_fx.shipping.code import digest_of
from fastvar_fx.shipping.description import (
    Lines,
    describe_block,
    describe_call,
    describe_outcome,
    digest,
)
from fastvar_fx.shipping.entry import Entry, Key
from fastvar_fx.shipping.folder import machine_of, new_folder, write_manifest
from fastvar_fx.shipping.package import compile_package, example_of
from fastvar_fx.transform import check_traces, run_by, trace
from passes.refusal import Refusal

log = logging.getLogger(__name__)

OPTIONS: Final = ("branches", "live_rows", "kv_buffer", "strict")
"""The arguments of `transform` that a manifest holds as they are."""


def export(fast: nn.Module, folder: str | Path, run: Callable[[Any], object] | None = None) -> None:
    """Writes what a transformed model runs as compiled packages into a new folder.

    `run(fast)` is called twice, without gradients. Every program of its calls, and the blocks' own
    forward at its dense steps, is compiled once by AOTInductor for the shapes that the run has; the
    values of weights are not part of it. A block that cannot be traced keeps its own forward.
    `load` runs a model on the folder.

    Args:
        fast: A transformed model, on the device and in the dtype that it is to run.
        folder: Where to write; nothing may be there yet. It appears whole or not at all.
        run: Runs a generation of every batch size that is to be served. None repeats the last run
            of `trace`.

    Raises:
        ModelError: If `fast` is not transformed, or was loaded from a folder.
        PackageError: If there is no run, the schedule has steps without guidance, something is in
            the place of the folder, or a program cannot be compiled; the message names the block
            and the step.

    Example:
        >>> export(fast, "packages", lambda m: m.autoregressive_infer_cfg(4, 207))  # doctest: +SKIP
    """
    family = Engine.of(fast).family
    check_traces(fast)
    run = run or family.traced
    if run is None:
        raise PackageError(
            "export needs a run to know the shapes: call fastvar_fx.trace(fast, run) before, or "
            "pass run="
        )
    ends = [engine.plan.schedule for engine in family.engines if engine.plan.unguided_steps]
    if ends:
        raise PackageError(
            f"steps without guidance cannot be exported, and guidance_until is "
            f"{ends[0].guidance_until}. Leave it out of the schedule, or run the model without "
            f"packages"
        )
    with new_folder(Path(folder)) as part, torch.no_grad():
        content = _about(fast, family.engines)
        with _recording(fast, family) as record:
            for _ in range(2):  # blocks may keep something from one generation to the next
                trace(fast, run)
        graphs = [
            _compiled(part / f"{number:03}.pt2", made) for number, made in enumerate(record.graphs)
        ]
        entries = [entry.as_data() for entry in record.entries.values()]
        descriptions = record.descriptions
        write_manifest(
            part, {**content, "graphs": graphs, "entries": entries, "descriptions": descriptions}
        )


def _about(fast: nn.Module, engines: Sequence[Engine]) -> dict[str, Any]:
    """Returns what a model, and how it is transformed, is shipped with."""
    plan = engines[0].plan
    return {
        "machine": machine_of(fast),
        "model": type(fast).__name__,
        "blocks": {name: describe_block(module_at(fast, name)) for name in plan.blocks},
        "schedules": [engine.plan.schedule.to_json() for engine in engines],
        "options": dict(
            zip(
                OPTIONS,
                (plan.kinds, plan.live_rows, plan.buffers_caches, plan.strict),
                strict=True,
            )
        ),
        **given_code(plan),
    }


def given_code(plan: Plan) -> dict[str, Any]:
    """Returns what `transform` was given that may be code: names, or digests of the code."""
    named = {id(method): name for name, method in methods.METHODS.items()}
    method, on_full, step_of = plan.method, plan.on_full, plan.step_of
    own = (method.select, method.take, method.restore, method.once)
    return {
        "method": named.get(id(method)) or f"code {digest_of(own)}",
        "on_full": on_full if isinstance(on_full, str) else f"code {digest_of(on_full)}",
        "step_of": None if step_of is None else f"code {digest_of(step_of)}",
    }


def _compiled(file: Path, made: _Graph) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        signature = compile_package(made.graph_module, made.examples, file, made.autocast)
    except PackageError as error:
        raise PackageError(f"{made.where} cannot be exported: {error}") from error
    log.info("%s: %s, %.1f s", file.name, made.where, time.perf_counter() - started)
    return {"file": file.name, **signature.as_data()}


# --- what a run calls -----------------------------------------------------------------------------


class _Graph:
    """A graph to compile, with inputs that it was run on.

    Attributes:
        where: The first call that it was met at, in words.
        graph_module: The graph.
        examples: Copies of its inputs.
        autocast: The dtypes of the surrounding autocast.
    """

    def __init__(self, where: str, graph_module: GraphModule, inputs: Sequence[Any]) -> None:
        self.where = where
        self.graph_module = graph_module
        self.examples = [example_of(value) for value in inputs]
        self.autocast = autocast_dtypes()


class _Record:
    """The calls of a run, and the graphs that it ran.

    Attributes:
        entries: The kinds of calls.
        graphs: The graphs, each for the shapes of some calls.
        descriptions: The descriptions of blocks and arguments by their digests.
        dense: The graphs of dense calls.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Key, str, str], Entry] = {}
        self.graphs: list[_Graph] = []
        self.descriptions: dict[str, Lines] = {}
        self.dense = DenseGraphs()
        self._numbers: dict[tuple[Any, ...], int] = {}

    def note(self, call: BlockCall, key: Key, program: Program | Refusal | None, *run: Any) -> None:
        """Notes a call.

        Args:
            call: The call, before it ran.
            key: Where it belongs.
            program: Its program, or why the block stays dense; None for its own forward.
            *run: The graph of the program, and its inputs.
        """
        block, arguments = (self._described(lines) for lines in describe_call(call))
        if (key, block, arguments) in self.entries:
            return
        schedule, layer, step = key
        common: dict[str, Any] = {
            "schedule": schedule,
            "layer": layer,
            "step": step,
            "tokens": call.tokens,
            "form": call.form,
            "token_map": call.path,
            "block": block,
            "arguments": arguments,
        }
        if isinstance(program, Program):
            entry = Entry(**common, **self._program(call, program, *run))
        else:
            entry = Entry(**common, refusal=program)
        self.entries[key, block, arguments] = entry

    def _described(self, lines: Lines) -> str:
        name = digest(lines)
        self.descriptions[name] = lines
        return name

    def _program(
        self, call: BlockCall, program: Program, graph: GraphModule, inputs: Sequence[Any]
    ) -> dict[str, Any]:
        made = program.made
        facts = made.captured
        place = (id(graph), *map(_kind, inputs), *autocast_dtypes())
        if place not in self._numbers:
            self._numbers[place] = len(self.graphs)
            where = f"{call.site.name} at a call of {call.tokens} tokens"
            self.graphs.append(_Graph(where, graph, inputs))
        outputs = facts.result.count + sum(write.count for write in facts.writes)
        returned: Any = graph.graph.output_node().args[0]
        return {
            "graph": self._numbers[place],
            "inputs": made.inputs,
            "features": made.features,
            "branches": made.branches,
            "caches": made.caches,
            "outcome": tuple(describe_outcome(facts.result, facts.writes)),
            "more": len(returned) - outputs,
        }


def _kind(value: Any) -> Any:
    return meta_of(value) if isinstance(value, Tensor) else value


class _Recorder(Executor):
    """Runs what blocks run under one schedule, and notes it."""

    def __init__(self, record: _Record, engine: Engine) -> None:
        self._record = record
        self._engine = engine

    def run_program(self, graph: GraphModule, inputs: Sequence[Any], call: BlockCall) -> Any:
        step, program = next(
            (step, program)
            for step, programs in call.site.programs.items()
            for program in programs
            if isinstance(program, Program) and program.runs(graph)
        )
        key = (self._engine.index, call.site.layer, step)
        self._record.note(call, key, program, graph, inputs)
        return super().run_program(graph, inputs, call)

    def run_dense(self, call: BlockCall) -> Any:
        layer = call.site.layer
        for step, programs in call.site.programs.items():
            stays = any(isinstance(p, StaysDense) and p.inputs_of(call) == [] for p in programs)
            refusal = self._engine.store.records[layer, step].refusal if stays else None
            if refusal is not None:
                self._record.note(call, (self._engine.index, layer, step), refusal)
        program, inputs = self._record.dense.program_for(call) or (None, [])
        if not isinstance(program, Program):
            self._record.note(call, (None, layer, None), None)
            return super().run_dense(call)
        graph = program.made.graph_module
        self._record.note(call, (None, layer, None), program, graph, inputs)
        result, _ = program.run(call, inputs, {}, EAGER)
        return result


@contextmanager
def _recording(fast: nn.Module, family: Family) -> Iterator[_Record]:
    """Within it, what the model runs is noted."""
    before = [(e, e.executor, e.buffers and e.buffers.replayed) for e in family.engines]
    traced, record = family.traced, _Record()
    run_by(fast, EAGER)
    for engine in family.engines:
        engine.executor = _Recorder(record, engine)
    try:
        yield record
    finally:
        family.traced = traced
        for engine, executor, replayed in before:
            engine.executor = executor
            if engine.buffers is not None:
                engine.buffers.replayed = bool(replayed)
