"""The user's verbs: `transform` a model, `trace`, `compile`, `measure` and `explain` it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fastvar_fx.engine.block import RUNTIME, attach
from fastvar_fx.engine.copy_model import copy_structure
from fastvar_fx.engine.engine import ENGINE, Engine
from fastvar_fx.engine.executor import EAGER, Executor
from fastvar_fx.engine.family import Family
from fastvar_fx.engine.find_blocks import find_blocks, module_at
from fastvar_fx.engine.guidance import hook
from fastvar_fx.engine.outside import counting
from fastvar_fx.engine.overrides import check_blocks, watch
from fastvar_fx.engine.plan import LIVE_ROWS, LiveRows, Plan, StepOf
from fastvar_fx.engine.report import Report
from fastvar_fx.engine.skipping import OnFull, install
from fastvar_fx.errors import ArgumentError, ModelError, NothingPrunedError, RunError, ScheduleError
from fastvar_fx.measuring.step_times import time_steps
from fastvar_fx.methods import Method, method_of
from fastvar_fx.schedule import Schedule
from passes.analyse.branches import KINDS, Kind
from passes.trace.recipes import SCRIPTED, SHARDED
from passes.trace.state import is_sharded

Model = TypeVar("Model", bound=nn.Module)


def transform(  # noqa: PLR0913
    model: Model,
    schedule: Schedule | Sequence[Schedule],
    *,
    blocks: str | Sequence[nn.Module] | None = None,
    branches: Iterable[str] | None = None,
    step_of: StepOf | None = None,
    on_full: OnFull = "skip",
    live_rows: LiveRows | None = None,
    conditional: LiveRows | None = None,
    kv_buffer: bool = True,
    strict: bool = True,
    dump_dir: str | Path | None = None,
    method: str | Method = "fastvar",
) -> Model:
    """Returns a copy of a next-scale model whose blocks run FastVAR in the model's own loop.

    The copy has the model's class, parameters (shared), `state_dict` keys and methods; `model`
    stays as it is. Programs are traced on the first call of each step; `trace` does it ahead.

    Args:
        model: A model in eval mode whose blocks map a token map (B, L, C) to one.
        schedule: The scales the loop draws and the pruning ratios of its last steps; or several
            schedules, such as one per aspect ratio, which share programs. The one that runs is read
            from the scales that the loop hands to a method of the model or to its blocks, else from
            the token counts, or is set by `use`.
        blocks: The transformer blocks: a module path, a list of modules, or None to find them.
        branches: Kinds that prune, of "attention", "cross_attention", "ffn"; None means all.
        step_of: Returns the step of a block call, (block, args, kwargs) -> int or None. Needed
            only where the token count does not determine it.
        on_full: What the last steps do whose ratio is 1. "skip", the paper's: the loop leaves
            them out, and what was drawn before is interpolated; "cache": they run, and every
            branch is its resized cache; or a rule that makes the loop skip (see
            `fastvar_fx.engine.skipping`).
        live_rows: Which samples stay, "first" or "last", where the loop drops some of the batch
            after the cache step, as when it switches guidance off. None infers it from the slices
            that the loop makes of the block's caches and other inputs.
        conditional: Which half of the batch is the conditional one, "first" (VAR, HART, Infinity)
            or "last". Schedules with `guidance_until` need it: it is not guessed. None means
            `live_rows`.
        kv_buffer: Whether KV caches that a block grows by `torch.cat` grow in place, in buffers of
            their final length, from the cache step on. The caches hold the same values, but are
            views with gaps between their rows, and an older one shares memory with the newer. They
            are copied as they grow with gradients enabled, under your own `torch.compile`, and
            where `compile` records CUDA graphs.
        strict: Whether to raise if nothing at all could be pruned; else a warning is logged.
        dump_dir: Folder for the graphs before and after each pass, as readable code.
        method: How a branch is pruned: a name (`fastvar_fx.methods.names()`) or a `Method`.

    Raises:
        ModelError: No blocks found, training mode, already transformed, or a loop that cannot
            skip steps.
        ScheduleError: Token counts that do not determine the step, layers beyond the model's, or a
            skipped step in the middle.
        ArgumentError: An unknown `method`, or one that cannot be used with the schedule.
        ValueError: Unknown kinds in `branches`, an unknown `on_full`, or another `live_rows`.

    Example:
        >>> fast = transform(model, Schedule.preset("var-256"))  # doctest: +SKIP
        >>> image = fast.autoregressive_infer_cfg(1, 207, g_seed=0)  # doctest: +SKIP
    """
    _check_model(model)
    kinds = _check_kinds(branches)
    for name, half in {"live_rows": live_rows, "conditional": conditional}.items():
        if half not in (None, *LIVE_ROWS):
            raise ValueError(f"{name} is one of {LIVE_ROWS}, or None; found {half!r}")
    found = find_blocks(model, blocks)
    for name, block in found.items():
        _check_not_scripted(name, block)
    schedules = (schedule,) if isinstance(schedule, Schedule) else _listed(schedule)
    skipped, *others = [_check_schedule(each, len(found), step_of, on_full) for each in schedules]
    if any(other != skipped for other in others):
        raise ScheduleError(
            f"the schedules of one model skip the same steps; found {[skipped, *others]}, counted "
            f"from 0. Transform the model once for each of these"
        )
    conditional = conditional or live_rows
    plans = [
        Plan(
            schedule=each,
            skipped_steps=skipped,
            blocks=tuple(found),
            kinds=kinds,
            step_of=step_of,
            strict=strict,
            dump_dir=Path(dump_dir) if dump_dir is not None else None,
            method=method_of(method),
            live_rows=live_rows,
            conditional=conditional,
            buffers_caches=kv_buffer,
            on_full=on_full,
            schedules=len(schedules),
        )
        for each in schedules
    ]
    for plan in plans:
        _check_guidance(plan)
        _check_plan(plan)
    family = Family(plans, EAGER)
    ends_guidance = any(plan.unguided_steps for plan in plans)
    fast, copies = copy_structure(model, found.values())
    for layer, block in enumerate(found.values()):
        prunes = [plan.prunes(layer) for plan in plans]
        if any(prunes) or skipped or ends_guidance:
            attach(family, layer, copies[id(block)], prunes)
    if skipped:
        install(fast, family.current, on_full)
    object.__setattr__(fast, ENGINE, family)
    if skipped or any(plan.changed_steps for plan in plans):
        watch(fast)
    if ends_guidance:
        hook(fast, family, [copies[id(block)] for block in found.values()])
    return cast("Model", fast)


def trace(fast: nn.Module, run: Callable[[Any], object]) -> Report:
    """Runs `run(fast)` once, so that every step's programs exist, and returns the report.

    Args:
        fast: A transformed model.
        run: Runs one generation with the batch size, dtype and device that you will use.

    Raises:
        NothingPrunedError: If the run met none of the steps that the schedule prunes.
        RunError: If the loop does not run the schedule, drew a step that is to be skipped, or if a
            block was replaced.
        passes.PassError: If the compiler itself fails on a block and `strict` is set.

    Example:
        >>> trace(fast, lambda m: m.autoregressive_infer_cfg(1, 207))  # doctest: +SKIP
    """
    family = Engine.of(fast).family
    family.traced = run
    check_blocks(fast, family)
    with counting(family) as flops, family.whole(judges=False):
        run(fast)
    engine = family.current  # of the schedule that ran
    engine.outside_share = flops.outside_share() if flops else None
    plan, store = engine.plan, engine.store
    watched = engine.generation.watch
    engine.generation.check_ended()
    report = engine.report()
    if plan.changed_steps and not any(step in plan.changed_steps for _, step in store.records):
        wanted = [plan.schedule.length(step) for step in plan.changed_steps]
        watched.cut_off()
        raise NothingPrunedError(
            f"the schedule changes steps of {wanted} tokens, but the run never came to one; "
            f"its blocks saw token counts {engine.generation.seen or 'no call of a block'}. Give "
            f"the schedule that the loop runs, or name the blocks with blocks="
        )
    watched.finished()
    if report.unmet:
        steps = ", ".join(f"{step} ({tokens} tokens)" for step, tokens in report.unmet.items())
        raise RunError(
            f"the schedule changes step {steps}, but no block met it in the run, only token counts "
            f"{engine.generation.seen} and the steps before. Give the schedule that the loop runs"
        )
    return report


def reset(fast: nn.Module) -> None:
    """Ends the current generation of a transformed model, and frees the outputs it captured.

    A generation that was cut off keeps them until the next one begins; the next call of a block
    begins one anyway, so this is needed only to free memory at once.

    Args:
        fast: A transformed model.

    Raises:
        ModelError: If `fast` is not transformed.

    Example:
        >>> reset(fast)  # doctest: +SKIP
    """
    for engine in Engine.of(fast).family.engines:
        engine.generation.reset()


def use(fast: nn.Module, schedule: Schedule | None) -> None:
    """Says which of its schedules a transformed model runs from now on.

    It is needed where the loop hands in no scales and several schedules have the same token counts,
    as those of a landscape and a portrait format. `explain` then shows that schedule.

    Args:
        fast: A transformed model, outside any generation.
        schedule: One of those that it was transformed with; None to find it out again.

    Raises:
        ModelError: If `fast` is not transformed.
        ScheduleError: If `schedule` is none of its schedules.

    Example:
        >>> use(fast, landscape)  # doctest: +SKIP
    """
    Engine.of(fast).family.use(schedule)


def measure(fast: nn.Module, run: Callable[[Any], object], *, repeats: int = 5) -> Report:
    """Times every pruned step dense and pruned, and returns the report, which says where it pays.

    `run(fast)` is called `2 * (1 + repeats)` times, alternating between all steps dense and
    the schedule's pruning. On a model that compiles, both are compiled. `Schedule.without` leaves
    steps dense where pruning does not pay.

    Args:
        fast: A transformed model, traced or not.
        run: Runs one generation with the batch size, dtype and device that you will use.
        repeats: Timed runs of each, at least 1.

    Raises:
        ValueError: If `repeats` is below 1.
        ModelError: If `fast` was loaded by `fastvar_fx.load`.
        NothingPrunedError: If the run met none of the steps that the schedule prunes.
        RunError: If the token counts of the run's blocks do not determine its steps.

    Example:
        >>> print(measure(fast, lambda m: m.autoregressive_infer_cfg(1, 207)))  # doctest: +SKIP
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1; found {repeats}")
    check_traces(fast)
    trace(fast, run)
    engine = Engine.of(fast)
    engine.step_times = time_steps(fast, engine, run, repeats)
    return engine.report()


def compile(
    fast: Model, *, fallback: bool = False, fullgraph: bool = True, **options: Any
) -> Model:
    """Makes a transformed model compile what its blocks run at every step; returns the same model.

    `torch.compile` sees each program once, whatever the number of blocks that share it, and the
    blocks' own forward once for each step without a program; blocks that differ in what their
    forward reads get their own graphs. Compilation happens at the first call of each, so run one
    generation before timing; `explain` then shows the number of graphs. A model compiled again
    takes the new options. What the loop does between blocks is not compiled.

    Args:
        fast: A transformed model, traced or not. Do not apply `torch.compile` to its blocks or to
            the loop as well: inside it, nothing is compiled a second time.
        fallback: Whether calls that cannot be compiled run eagerly, with a warning in the log and a
            line in `explain`.
        fullgraph: Whether a graph break is a failure.
        **options: Passed on to `torch.compile`, such as `backend` or `mode`. Inductor is also
            given a pass by which large float32 linear layers on a CPU run in oneDNN where that is
            faster, by a rule for the kind of CPU; `options={"post_grad_custom_pre_pass": ...}`
            replaces it.

    Raises:
        ModelError: If `fast` is not transformed, or was loaded by `fastvar_fx.load`.
        TypeError: For an option that `torch.compile` does not take.
        CompileError: At a later call that cannot be compiled, without `fallback`. The error names
            the block, the step and torch's reason. The block's state is as before the call.

    Example:
        >>> fast = compile(transform(model, schedule))  # doctest: +SKIP
    """
    from fastvar_fx.engine.compiled import Compilation  # it imports Dynamo and Inductor

    options = {"fullgraph": fullgraph, **options}
    engine = Engine.of(fast)
    check_traces(fast)
    run_by(fast, Compilation(engine.plan.schedule, options, fallback=fallback))
    return fast


def check_traces(fast: nn.Module) -> None:
    """Checks that a transformed model makes its programs itself.

    Raises:
        ModelError: If it runs on packages.
    """
    if Engine.of(fast).executor.packages is not None:
        raise ModelError(
            f"{type(fast).__name__} runs on packages, which are compiled already; transform the "
            f"original model instead"
        )


def run_by(fast: nn.Module, executor: Executor) -> None:
    """Makes an executor run all blocks of a transformed model, at every step."""
    family = Engine.of(fast).family
    for engine in family.engines:
        engine.executor = executor
        if engine.buffers is not None:
            engine.buffers.replayed = executor.makes_cuda_graphs
    for layer, name in enumerate(family.current.plan.blocks):
        block = module_at(fast, name)
        if RUNTIME not in vars(block):
            attach(family, layer, block, [False] * len(family.engines))


def explain(fast: nn.Module) -> Report:
    """Returns what every block and branch of a transformed model does at every step met so far."""
    return Engine.of(fast).report()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"transform takes a torch.nn.Module; found {type(model).__name__}")
    _check_not_scripted(type(model).__name__, model)
    if any(RUNTIME in vars(m) or ENGINE in vars(m) for m in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is already transformed; transform the original model with the "
            f"other schedule instead, it was not changed"
        )
    sharded = [name for name, tensor in model.named_parameters() if is_sharded(tensor)]
    if sharded:
        raise ModelError(
            f"{len(sharded)} parameters of {type(model).__name__} are DTensors, such as "
            f"{sharded[0]}: {SHARDED}"
        )
    if model.training:
        raise ModelError(
            f"{type(model).__name__} is in training mode; pruning is for inference: call "
            f"model.eval() first"
        )


def _check_not_scripted(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{name} is a module of torch.jit: {SCRIPTED}")


def _check_guidance(plan: Plan) -> None:
    until = plan.schedule.guidance_until
    if until is None:
        return
    if plan.conditional is None:
        raise ArgumentError(
            f"the schedule ends guidance at step {until}, and which half of the batch is the "
            f'conditional one is unknown: pass conditional="first" or "last" to transform. It is '
            f"the half whose logits the loop weights positively, the first in VAR, HART and "
            f"Infinity"
        )
    if not plan.unguided_steps:
        raise ScheduleError(
            f"guidance_until={until} is a step that is skipped, as are all after it: steps "
            f"{list(plan.skipped_steps)} have ratio 1. Give an earlier step, or none"
        )


def _check_kinds(branches: Iterable[str] | None) -> tuple[Kind, ...]:
    if branches is None:
        return KINDS
    wanted = (branches,) if isinstance(branches, str) else tuple(branches)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        raise ValueError(f"branches lists kinds of {KINDS}; found {wanted}")
    return cast("tuple[Kind, ...]", wanted)


def _check_plan(plan: Plan) -> None:
    schedule, once = plan.schedule, plan.method.once
    drawn = [step for step in schedule.pruned_steps if step not in plan.skipped_steps]
    if drawn and not plan.pruned_steps:
        raise ScheduleError(
            f"the schedule prunes steps {drawn}, but none of the branches {plan.kinds} that may "
            f"prune; found ratios {schedule.ratios}"
        )
    for step in plan.pruned_steps if once else ():
        counts = [{*plan.kept(step, layer).values()} for layer in range(len(plan.blocks))]
        if once == "step":
            counts = [set().union(*counts)]
        if any(len(own) > 1 for own in counts):
            raise ArgumentError(
                f'a method with once="{once}" has one selection for all branches of a {once}, '
                f"but at step {step} the schedule keeps {max(counts, key=len)} tokens. Give them "
                f"one ratio, or use a method in which each branch selects its own"
            )


def _check_schedule(
    schedule: Schedule, blocks: int, step_of: StepOf | None, on_full: OnFull
) -> tuple[int, ...]:
    """Returns the steps that are skipped."""
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"transform takes a fastvar_fx.Schedule; found {type(schedule).__name__}. Named ones "
            f"come from Schedule.preset(name)"
        )
    if schedule.depth not in (None, blocks):
        raise ScheduleError(
            f"the schedule has ratios for {schedule.depth} layers, but the model has {blocks} "
            f"blocks. Give one for each block, or one for all of them"
        )
    beyond = [layer for layer in schedule.layers or () if layer >= blocks]
    if beyond:
        raise ScheduleError(
            f"the schedule prunes layers {beyond}, but the model has {blocks} blocks, 0 to "
            f"{blocks - 1}"
        )
    sides = _summed_sides(schedule)
    if sides and step_of is None:
        raise ScheduleError(
            f"the scales {schedule.scales} of one row are the running sums of square maps of sides "
            f"{sides}, as the sequences of a loop that feeds all maps so far; such a loop runs "
            f"Schedule({sides}, {schedule.ratios}, prefix=True). If the maps have one row, pass "
            f"step_of="
        )
    skipped = _skipped_steps(schedule, on_full)
    steps = range(schedule.steps - len(skipped))
    pruned = any(step in schedule.pruned_steps for step in steps)
    late = [s for s in steps if (pruned and s >= schedule.cache_step) or not schedule.guided(s)]
    if step_of is not None or not late:
        return skipped
    counts = [schedule.length(step) for step in steps]
    shared = [step for step in late if counts.count(counts[step]) > 1]
    if shared:
        raise ScheduleError(
            f"from step {late[0]} on, the token count must determine the step, but steps {shared} "
            f"share theirs with another ({[counts[s] for s in shared]} tokens); pass step_of="
        )
    return skipped


def _summed_sides(schedule: Schedule) -> tuple[int, ...]:
    """Returns the growing sides of the square maps that scales of one row are running sums of."""
    if schedule.prefix or any(1 not in scale[-2:] or len(scale) > 2 for scale in schedule.scales):
        return ()
    counts = [schedule.tokens(step) for step in range(schedule.steps)]
    maps = [after - before for before, after in pairwise([0, *counts])]
    sides = tuple(isqrt(max(tokens, 0)) for tokens in maps)
    squares = [side * side for side in sides] == maps
    return sides if squares and list(sides) == sorted(set(sides)) and len(sides) > 2 else ()


def _listed(schedules: Any) -> tuple[Schedule, ...]:
    if not isinstance(schedules, (list, tuple)) or not schedules:
        empty = "an empty " if schedules in ([], ()) else ""
        raise ScheduleError(
            f"transform takes a fastvar_fx.Schedule or a list of them; found "
            f"{empty}{type(schedules).__name__}. Named ones come from Schedule.preset(name)"
        )
    twice = [each for i, each in enumerate(schedules) if each in schedules[:i]]
    if twice:
        raise ScheduleError(f"each schedule is given once; found twice {twice[0]}")
    return tuple(schedules)


def _skipped_steps(schedule: Schedule, on_full: OnFull) -> tuple[int, ...]:
    if on_full == "cache":
        return ()
    if on_full != "skip" and not callable(on_full):
        raise ValueError(f'on_full is "skip", "cache" or a loop rule; found {on_full!r}')
    full = schedule.full_steps
    middle = [s for s in range(schedule.steps) if schedule.entry(s) == 1 and s not in full]
    if middle:
        raise ScheduleError(
            f"ratio 1 skips a step, but steps {middle} are in the middle of the schedule: only the "
            f'last steps can be skipped. Give them a lower ratio, or pass on_full="cache", so that '
            f"every branch of these steps is its resized cache"
        )
    return full
