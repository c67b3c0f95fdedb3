"""The user's verbs: `transform` a model, `trace`, `compile`, `measure` and `explain` it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from torch import nn

from fastvar_fx import ops
from fastvar_fx.blocks import copy_structure, find_blocks, module_at
from fastvar_fx.compiled import Compilation, with_own_code
from fastvar_fx.errors import ModelError, NothingPrunedError, ScheduleError
from fastvar_fx.kv_buffers import KVBuffers
from fastvar_fx.loops import OnFull, Skipped, install
from fastvar_fx.payoff import time_steps
from fastvar_fx.plan import LIVE_ROWS, Executor, LiveRows, Plan, StepOf
from fastvar_fx.programs import ProgramStore
from fastvar_fx.report import Report
from fastvar_fx.runtime import BlockRuntime, DenseRuntime, SkippingRuntime
from fastvar_fx.schedule import Schedule
from passes.analyse.branches import KINDS, Kind

Model = TypeVar("Model", bound=nn.Module)
Made = TypeVar("Made", bound=Executor)

_RUNTIME: Final = "_fastvar"
_PLAN: Final = "_fastvar_plan"


def transform(
    model: Model,
    schedule: Schedule,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
    branches: Iterable[str] | None = None,
    step_of: StepOf | None = None,
    on_full: OnFull = "skip",
    live_rows: LiveRows | None = None,
    kv_buffer: bool = True,
    strict: bool = True,
    dump_dir: str | Path | None = None,
    select: ops.Select = ops.pivotal_token_selection,
    take: ops.Take = ops.take_tokens,
    restore: ops.Restore = ops.cached_token_restoration,
    select_once: bool = False,
) -> Model:
    """Returns a copy of a next-scale model whose blocks run FastVAR in the model's own loop.

    The copy has the model's class, parameters (shared), `state_dict` keys and methods; `model`
    stays as it is. Programs are traced on the first call of each step; `trace` does it ahead.

    Args:
        model: A model in eval mode whose blocks map a token map (B, L, C) to one.
        schedule: The scales the loop draws and the pruning ratios of its last steps.
        blocks: The transformer blocks: a module path, a list of modules, or None to find them.
        branches: Kinds that prune, of "attention", "cross_attention", "ffn"; None means all.
        step_of: Tells the step of a block call, (block, args, kwargs) -> int or None. Needed
            only where the token count does not tell it.
        on_full: What the last steps do whose ratio is 1. "skip", the paper's: the loop leaves
            them out, and what was drawn before is interpolated; "cache": they run, and every
            branch is its resized cache; or a rule (`fastvar_fx.loops`) that makes the loop skip.
        live_rows: Which samples go on, "first" or "last", where the loop drops some of the batch
            after the cache step, as when it switches guidance off. None tells it from the slices
            that the loop makes of the block's caches and other inputs.
        kv_buffer: Whether KV caches that a block grows by `torch.cat` grow in place, in buffers of
            their final length, from the cache step on. The caches hold the same values, but are
            views with gaps between their rows, and an older one shares memory with the newer. They
            are copied as ever with gradients enabled, under your own `torch.compile`, and where
            `compile` records CUDA graphs.
        strict: Whether to raise if nothing at all could be pruned; else a warning is logged.
        dump_dir: Folder for the graphs before and after each pass, as readable code.
        select: Selects the kept tokens: (x (B, L, C), kept) -> indices (B, kept), int64, or a tuple
            that starts with them, which `take` and `restore` then get in place of the indices.
        take: Makes what a branch runs on: (x (B, L, C), index (B, kept)) -> (B, kept, C).
        restore: Restores a branch's output: (kept (B, kept, C), index (B, kept), cached
            (B, Lc, C), its scale, scale) -> (B, L, C). With ratio 1, `kept` and `index` are empty.
            Rules to compare with are in `fastvar_fx.alternatives`.
        select_once: Whether all branches of a block keep what its first one selects; else, as in
            the paper, each selects anew.

    Raises:
        ModelError: No blocks found, training mode, already transformed, or a loop that cannot
            skip steps.
        ScheduleError: Token counts that do not tell the step, layers beyond the model's, or a
            skipped step in the middle.
        ValueError: Unknown kinds in `branches`, an unknown `on_full`, or another `live_rows`.

    Example:
        >>> fast = transform(model, Schedule.preset("var-256"))  # doctest: +SKIP
        >>> image = fast.autoregressive_infer_cfg(1, 207, g_seed=0)  # doctest: +SKIP
    """
    _check_model(model)
    kinds = _check_kinds(branches)
    if live_rows not in (None, *LIVE_ROWS):
        raise ValueError(f"live_rows is one of {LIVE_ROWS}, or None; found {live_rows!r}")
    found = find_blocks(model, blocks)
    skipped = _check_schedule(schedule, len(found), step_of, on_full)
    layers = [i for i in range(len(found)) if schedule.prunes_layer(i)]
    folder = Path(dump_dir) if dump_dir is not None else None
    anew = restore is ops.cached_token_restoration
    operators = ops.Operators(_named(select), _named(restore), anew, _named(take), select_once)
    names = tuple(found)
    plan = Plan(schedule, skipped, names, kinds, step_of, strict, folder, operators, live_rows)
    plan.kv_buffers = KVBuffers() if kv_buffer else None
    store = ProgramStore(plan)
    fast, copies = copy_structure(model)
    for layer, (name, block) in enumerate(found.items()):
        prunes = layer in layers and bool(plan.pruned_steps)
        if not (prunes or skipped.steps):
            continue
        copied = copies[id(block)]
        forward = _take_forward(name, copied)
        inner = (
            BlockRuntime(layer, name, forward, plan, store)
            if prunes
            else DenseRuntime(name, forward, plan, store)
        )
        if skipped.steps:
            _attach(copied, SkippingRuntime(name, forward, plan, store, inner))
        else:
            _attach(copied, inner)
    if skipped.steps:
        install(fast, skipped, on_full)
    object.__setattr__(fast, _PLAN, plan)
    return cast("Model", fast)


def trace(fast: nn.Module, run: Callable[[Any], object]) -> Report:
    """Runs `run(fast)` once, so that every step's programs exist, and returns the report.

    Args:
        fast: A transformed model.
        run: Runs one generation with the batch size, dtype and device to come.

    Raises:
        NothingPrunedError: If the run met none of the steps that the schedule prunes.
        RunError: If the loop drew a step that is to be skipped.

    Example:
        >>> trace(fast, lambda m: m.autoregressive_infer_cfg(1, 207))  # doctest: +SKIP
    """
    plan = plan_of(fast)
    run(fast)
    plan.skipped.check()
    report = Report.of(plan)
    if plan.pruned_steps and not any(step in plan.pruned_steps for _, step in plan.records):
        wanted = [plan.schedule.tokens(step) for step in plan.pruned_steps]
        seen = sorted(plan.dense_calls | plan.early_calls) or "no call of a block"
        raise NothingPrunedError(
            f"the schedule prunes steps of {wanted} tokens, but the run never came to one; "
            f"its blocks saw token counts {seen}. Give the schedule that the loop runs, or "
            f"name the blocks with blocks="
        )
    return report


def measure(fast: nn.Module, run: Callable[[Any], object], *, repeats: int = 5) -> Report:
    """Times every pruned step dense and pruned, and returns the report, which says where it pays.

    `run(fast)` is called `2 * (1 + repeats)` times, by turns with all steps dense and as the
    schedule has it. On a model that compiles, both are compiled. `Schedule.without` leaves steps
    dense where pruning does not pay.

    Args:
        fast: A transformed model, traced or not.
        run: Runs one generation with the batch size, dtype and device to come.
        repeats: Timed runs of each, at least 1.

    Raises:
        ValueError: If `repeats` is below 1.
        NothingPrunedError: If the run met none of the steps that the schedule prunes.
        RunError: If the token counts of the run's blocks do not tell its steps.

    Example:
        >>> print(measure(fast, lambda m: m.autoregressive_infer_cfg(1, 207)))  # doctest: +SKIP
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1; found {repeats}")
    plan = plan_of(fast)
    trace(fast, run)
    plan.step_times = time_steps(fast, plan, run, repeats)
    return Report.of(plan)


def compile(
    fast: Model, *, fallback: bool = False, fullgraph: bool = True, **options: Any
) -> Model:
    """Makes a transformed model compile what its blocks run at every step; returns the same model.

    `torch.compile` sees each program once, whatever the number of blocks that share it, and the
    blocks' own forward once for each step without a program; blocks that differ in what their
    forward reads get graphs of their own. Compilation happens at the first call of each, so run one
    generation before timing; `explain` then tells the number of graphs. A model compiled again
    takes the new options. What the loop does between blocks is not compiled.

    Args:
        fast: A transformed model, traced or not. Leave `torch.compile` of its blocks or of the loop
            out: inside of it, nothing is compiled a second time.
        fallback: Whether calls that cannot be compiled run eagerly, with a warning in the log and a
            line in `explain`.
        fullgraph: Whether a graph break is a failure.
        **options: Passed on to `torch.compile`, such as `backend` or `mode`. Inductor is also
            given a pass by which large float32 linear layers on a CPU run in oneDNN where that is
            measured to be the faster library; `options={"post_grad_custom_pre_pass": ...}` takes
            its place.

    Raises:
        ModelError: If `fast` is not transformed.
        TypeError: For an option that `torch.compile` does not take.
        CompileError: Not here but at a call that cannot be compiled, without `fallback`: it names
            the block, the step and what torch says. The block's state is as before the call.

    Example:
        >>> fast = compile(transform(model, schedule))  # doctest: +SKIP
    """
    options = {"fullgraph": fullgraph, **options}
    made = run_by(fast, lambda plan: Compilation(plan.schedule, options, fallback=fallback))
    buffers = plan_of(fast).kv_buffers
    if buffers is not None:
        buffers.replayed = made.makes_cuda_graphs
    return fast


def run_by(fast: nn.Module, make: Callable[[Plan], Made]) -> Made:
    """Hands all that the blocks of a transformed model run to an executor, which it returns."""
    plan = plan_of(fast)
    plan.executor = executor = make(plan)
    store = ProgramStore(plan)
    for name in plan.blocks:
        block = module_at(fast, name)
        if _RUNTIME not in vars(block):
            _attach(block, DenseRuntime(name, _take_forward(name, block), plan, store))
    return executor


def explain(fast: nn.Module) -> Report:
    """Returns what every block and branch of a transformed model does at every step met so far."""
    return Report.of(plan_of(fast))


def _attach(block: nn.Module, runtime: BlockRuntime | DenseRuntime | SkippingRuntime) -> None:
    """Gives a copied block a subclass of its own class whose forward is the runtime's."""
    kind = type(block)
    object.__setattr__(block, _RUNTIME, runtime)
    members = {
        "forward": _own_forward(kind),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    block.__class__ = type(kind.__name__, (kind,), members)


def _take_forward(name: str, block: nn.Module) -> Callable[..., Any]:
    """Returns the forward that a call of the block runs, as a function of the block and its input.

    One set on the block itself, as patches do, is taken off, for it would hide the runtime's.
    """
    own = vars(block).pop("forward", None)
    if own is None:
        return type(block).forward
    if isinstance(own, types.MethodType) and own.__self__ is block:
        return own.__func__
    raise ModelError(
        f"{name} has a forward of its own that is a {type(own).__name__}, not a method of it; set "
        f"it as block.forward = types.MethodType(function, block), with the block as first argument"
    )


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._fastvar(self, args, kwargs)  # type: ignore[operator]


def _own_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Returns a forward with a code object of its own.

    With a shared one, many blocks would use up Dynamo's budget that each has for its steps.
    """
    made = with_own_code(_forward, "forward")
    made.__wrapped__ = kind.forward  # type: ignore[attr-defined]
    made.__doc__ = kind.forward.__doc__
    return made


def _named(function: Callable[..., Any]) -> Any:
    """A function that a graph can call by name; a partial or an object with a call has none."""
    if hasattr(function, "__name__"):
        return function
    return lambda *args: function(*args)


def plan_of(fast: nn.Module) -> Plan:
    """Returns the plan of a transformed model.

    Raises:
        ModelError: If it is not transformed.
    """
    plan = getattr(fast, _PLAN, None)
    if plan is None:
        raise ModelError(
            f"{type(fast).__name__} is not transformed; pass what fastvar_fx.transform returned"
        )
    return cast("Plan", plan)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"transform takes a torch.nn.Module; found {type(model).__name__}")
    if any(_RUNTIME in vars(m) or _PLAN in vars(m) for m in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is transformed already; transform the original model again "
            f"with another schedule instead, it was not changed"
        )
    if model.training:
        raise ModelError(
            f"{type(model).__name__} is in training mode; pruning is for inference: call "
            f"model.eval() first"
        )


def _check_kinds(branches: Iterable[str] | None) -> tuple[Kind, ...]:
    if branches is None:
        return KINDS
    wanted = (branches,) if isinstance(branches, str) else tuple(branches)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        raise ValueError(f"branches lists kinds of {KINDS}; found {wanted}")
    return cast("tuple[Kind, ...]", wanted)


def _check_schedule(
    schedule: Schedule, blocks: int, step_of: StepOf | None, on_full: OnFull
) -> Skipped:
    """Returns the steps that are skipped."""
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"transform takes a fastvar_fx.Schedule; found {type(schedule).__name__}. Named ones "
            f"come from Schedule.preset(name)"
        )
    beyond = [layer for layer in schedule.layers or () if layer >= blocks]
    if beyond:
        raise ScheduleError(
            f"the schedule prunes layers {beyond}, but the model has {blocks} blocks, 0 to "
            f"{blocks - 1}"
        )
    skipped = Skipped(schedule.scales, _skipped_steps(schedule, on_full))
    steps = range(schedule.steps - len(skipped.steps))
    if step_of is not None or not any(step in schedule.pruned_steps for step in steps):
        return skipped
    counts = [schedule.tokens(step) for step in steps]
    shared = [step for step in steps[schedule.cache_step :] if counts.count(counts[step]) > 1]
    if shared:
        raise ScheduleError(
            f"from the cache step on, the token count must tell the step, but steps {shared} share "
            f"theirs with another ({[counts[s] for s in shared]} tokens); pass step_of="
        )
    return skipped


def _skipped_steps(schedule: Schedule, on_full: OnFull) -> tuple[int, ...]:
    if on_full == "cache":
        return ()
    if on_full != "skip" and not callable(on_full):
        raise ValueError(f'on_full is "skip", "cache" or a loop rule; found {on_full!r}')
    full = schedule.full_steps
    middle = [s for s in range(schedule.steps) if schedule.ratio(s) == 1 and s not in full]
    if middle:
        raise ScheduleError(
            f"ratio 1 skips a step, but steps {middle} are in the middle of the schedule: only the "
            f'last steps can be skipped. Give them a lower ratio, or pass on_full="cache", so that '
            f"every branch of these steps is its resized cache"
        )
    return full
