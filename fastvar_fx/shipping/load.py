"""`load`: runs a model on compiled packages, without tracing, Dynamo or a compiler."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from torch import Tensor, nn
from torch.fx import GraphModule

from fastvar_fx.engine.block import RUNTIME
from fastvar_fx.engine.call import BlockCall, Form
from fastvar_fx.engine.dense_graphs import DenseGraphs
from fastvar_fx.engine.engine import Engine
from fastvar_fx.engine.executor import EAGER, Executor, Packaged, Ready
from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.engine.plan import Plan, StepOf
from fastvar_fx.engine.program import Program, StaysDense
from fastvar_fx.engine.skipping import OnFull
from fastvar_fx.errors import PackageError
from fastvar_fx.methods import Method
from fastvar_fx.schedule import Schedule
from fastvar_fx.shipping.description import (
    Lines,
    describe_block,
    describe_call,
    describe_outcome,
    differences,
    digest,
)
from fastvar_fx.shipping.entry import Entry, Key
from fastvar_fx.shipping.export import OPTIONS, given_code
from fastvar_fx.shipping.folder import Manifest, check_machine, read_manifest
from fastvar_fx.shipping.package import Package, Signature, disagreement, register_ops
from fastvar_fx.transform import run_by, transform
from passes import StepProgram, live_inputs
from passes.analyse.caches import Buffered, new_buffer
from passes.refusal import Refusal
from passes.trace.calls import Facts, undone
from passes.trace.capture import BlockProgram
from passes.trace.state import Path as Place

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_TOLD: Final = 3
"""Differences that an error names."""


def load(
    model: Model,
    folder: str | Path,
    *,
    step_of: StepOf | None = None,
    on_full: OnFull | None = None,
    method: str | Method | None = None,
    fallback: bool = False,
) -> Model:
    """Returns a transformed copy of a model that runs on the packages of a folder.

    Nothing is traced or compiled. At its first call of each step, each block is compared with what
    was exported, and its own forward runs once more, without effects: it says how results and
    caches are put together, and the packages of dense calls and of the cache step must compute
    what it does. The packages hold for any values of the weights.

    A package is compiled code, which runs as this process: load folders that you trust only.

    Args:
        model: The model, in eval mode, on the device and in the dtype that it was exported in.
        folder: What `export` wrote.
        step_of: The function that `transform` was given, if it was given one.
        on_full: The same, if it was given a loop rule.
        method: The same, if it was given a `Method`.
        fallback: Whether calls without a package run eagerly, with a warning in the log and a line
            in `explain`; programs for them are traced. Without it they are an error.

    Raises:
        PackageError: If the folder is missing, incomplete or damaged; if it was exported with other
            versions, on another machine, or from another model; or if `step_of`, `on_full` or
            `method` are others. Also at a later call that no package holds for, with what there is.
        ModelError: If the model cannot be transformed.

    Example:
        >>> fast = load(model, "packages")  # doctest: +SKIP
    """
    path = Path(folder)
    manifest = read_manifest(path)
    given = {name: manifest[name] for name in ("method", "on_full", "step_of")}
    options = {name: manifest["options"][name] for name in OPTIONS}
    check_machine(manifest["machine"], model)
    fast = transform(
        model,
        [Schedule.from_json(text) for text in manifest["schedules"]],
        blocks=_blocks(model, manifest["blocks"]),
        step_of=step_of,
        on_full=on_full or _named("on_full", given["on_full"]),
        method=method or _named("method", given["method"]),
        **options,
    )
    _check_code(given, Engine.of(fast).plan)
    packages = Packages(path, manifest, fallback=fallback)
    run_by(fast, packages)
    for layer, name in enumerate(manifest["blocks"]):
        vars(module_at(fast, name))[RUNTIME].site.paths.update(packages.token_maps(layer))
    return fast


def _blocks(model: nn.Module, exported: Mapping[str, Mapping[str, str]]) -> list[nn.Module]:
    """Returns the blocks of a model, which must have the modules and weights that were exported."""
    found = []
    for name, expected in exported.items():
        try:
            block = module_at(model, name)
        except (AttributeError, LookupError, ValueError) as error:
            raise PackageError(
                f"the packages are of another model: {type(model).__name__} has no module {name}"
            ) from error
        differ = differences(dict(expected), describe_block(block))
        if differ:
            raise PackageError(
                f"the packages are of another model: {name} differs: {_told(differ)}. Load them "
                f"with the model that was exported, or export this one"
            )
        found.append(block)
    return found


def _named(what: str, exported: str) -> Any:
    """Returns the name that an argument of `transform` was given as.

    Raises:
        PackageError: If it was code.
    """
    if exported.startswith("code "):
        raise PackageError(f"the model was exported with {what}= of its own; pass the same to load")
    return exported


def _check_code(exported: Mapping[str, Any], plan: Plan) -> None:
    given = given_code(plan)
    for name in exported:
        if exported[name] != given[name]:
            raise PackageError(
                f"the model was exported with another {name}: {exported[name]} there, "
                f"{given[name]} here; pass what transform was given"
            )


def _told(differ: Sequence[str]) -> str:
    more = len(differ) - _TOLD
    return "; ".join(differ[:_TOLD]) + (f"; and {more} more" if more > 0 else "")


# --- running --------------------------------------------------------------------------------------


class Packages(Executor):
    """Runs what was exported, for calls like those that it was exported for."""

    def __init__(self, folder: Path, manifest: Manifest, *, fallback: bool) -> None:
        self._folder = folder
        self._manifest = manifest
        self._fallback = fallback
        self._descriptions = manifest["descriptions"]
        self._packages = [
            Package(folder / graph["file"], Signature.from_data(graph))
            for graph in manifest["graphs"]
        ]
        self._entries: dict[Key, list[Entry]] = {}
        for data in manifest["entries"]:
            entry = Entry.from_data(data)
            self._entries.setdefault(entry.key, []).append(entry)
        self._dense = _PackagedDense(self)
        self._used: set[int] = set()
        self._failures: list[str] = []
        register_ops()

    @property
    def packages(self) -> Packaged:
        """The packages that it runs."""
        return Packaged(
            folder=str(self._folder),
            packages=len(self._packages),
            used=len(self._used),
            failures=tuple(self._failures),
        )

    def anew(self) -> Executor:
        """Returns one for a copy of the model."""
        return Packages(self._folder, self._manifest, fallback=self._fallback)

    def token_maps(self, layer: int) -> dict[Form, Place]:
        """Returns where the calls of a block have their token maps, by their form."""
        entries = (entry for found in self._entries.values() for entry in found)
        return {entry.form: entry.token_map for entry in entries if entry.layer == layer}

    def packaged(self, call: BlockCall, step: int, schedule: int) -> Ready | None:
        """Returns the program that was exported for a call.

        Raises:
            PackageError: If none was, and `fallback` was not asked for.
        """
        entry = self.entry_for(call, (schedule, call.site.layer, step))
        if entry is None:
            return None
        if entry.graph is None:
            return -1, entry.refusal or Refusal("FVX001", "it was not exported")
        return entry.graph, self.program(entry, call)

    def run_dense(self, call: BlockCall) -> Any:
        """Returns what a block's own forward returns, from its package if it has one."""
        match = self._dense.program_for(call)
        assert match is not None
        program, inputs = match
        result, _ = program.run(call, inputs, {}, EAGER)
        return result

    def entry_for(self, call: BlockCall, key: Key) -> Entry | None:
        """Returns what was exported for a call; None if it is to run eagerly instead."""
        block, arguments = describe_call(call)
        names = digest(block), digest(arguments)
        known = self._entries.get(key, [])
        for entry in known:
            if (entry.block, entry.arguments) == names:
                return entry
        step = "at a dense step" if key[2] is None else f"at step {key[2]}"
        why = self._why(known, call, block, arguments)
        told = f"no package holds for {call.site.name} {step}, {call.tokens} tokens: {why}"
        if not self._fallback:
            raise PackageError(
                f"{told}. Export the model with a run of such calls, or load it with fallback=True "
                f"to run them eagerly"
            )
        log.warning("%s", told)
        self._failures.append(told)
        return None

    def _why(self, known: Sequence[Entry], call: BlockCall, block: Lines, arguments: Lines) -> str:
        """Returns how a call differs from those that were exported, and which those are."""

        def differ(entry: Entry) -> list[str]:
            asked = self._descriptions
            told = differences(asked[entry.arguments], arguments)
            return told + differences(asked[entry.block], block)

        alike = [entry for entry in known if entry.tokens == call.tokens]
        if not alike:
            counts = sorted({entry.tokens for entry in known})
            return f"there are some for {counts} tokens" if counts else "there are none"
        maps = {_token_map(self._descriptions[entry.arguments], entry) for entry in alike}
        return (
            f"it differs from the nearest in {_told(min(map(differ, alike), key=len))}; there are "
            f"some for {' and '.join(sorted(maps))}"
        )

    def program(self, entry: Entry, call: BlockCall) -> StepProgram:
        """Returns a program for the places of a call, that runs a package.

        Raises:
            PackageError: If the block's own forward does something else than when it was exported.
        """
        assert entry.graph is not None
        package = self._packages[entry.graph]
        live = call.as_captured()
        with undone(live) as trial:
            outcome = trial.outcome(trial.run())
        results = [*outcome.results, *outcome.written]
        told = tuple(describe_outcome(outcome.result, outcome.writes))
        if told != entry.outcome or len(results) + entry.more != package.signature.outputs:
            raise PackageError(
                f"{call.site.name} returns and stores {told}, and {entry.outcome} when it was "
                f"exported; export the model again"
            )
        captures = entry.step is None or not any(b.kept is not None for b in entry.branches)
        if captures:
            self._check(entry, call, package, results)
        self._used.add(entry.graph)
        graph = cast("GraphModule", package)  # it has what a `Program` calls
        snapshot = trial.snapshot
        facts = Facts(
            result=outcome.result,
            writes=outcome.writes,
            constants=snapshot.constants,
            aliases=snapshot.aliases,
            touched=frozenset(snapshot.tensors),
        )
        return StepProgram(
            captured=BlockProgram(graph_module=graph, inputs=entry.inputs, **vars(facts)),
            graph_module=graph,
            inputs=entry.inputs,
            features=entry.features,
            branches=entry.branches,
            caches=entry.caches,
            buffered=Buffered(graph, entry.growths) if entry.growths else None,
        )

    def _check(
        self, entry: Entry, call: BlockCall, package: Package, expected: Sequence[Tensor]
    ) -> None:
        """Checks that a package that prunes nothing computes what the block does."""
        inputs = live_inputs(call.as_captured(), entry.inputs)
        for growth in entry.growths:
            past = inputs[growth.input]
            inputs[growth.input] = growth.front(new_buffer(past, growth), past)
        made = package.forward(*inputs)[: len(expected)]
        wrong = disagreement(made, expected, package.signature.precision)
        if wrong:
            raise PackageError(
                f"{package.file} computes something else than {call.site.name} at {call.tokens} "
                f"tokens: {wrong} differs. The block reads something that has changed since it was "
                f"exported, such as an object outside it; export the model again"
            )


class _PackagedDense(DenseGraphs):
    """Programs of dense calls that run packages."""

    def __init__(self, packages: Packages) -> None:
        super().__init__()
        self._packages = packages

    def _program(self, call: BlockCall) -> Program | StaysDense:
        entry = self._packages.entry_for(call, (None, call.site.layer, None))
        if entry is None or entry.graph is None:
            return StaysDense(call)
        return Program(self._packages.program(entry, call), call, None)


def _token_map(arguments: Lines, entry: Entry) -> str:
    return arguments.get(f"argument {entry.token_map[1][1]}", "?")
