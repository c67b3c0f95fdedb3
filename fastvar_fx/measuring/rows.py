"""One model run in several ways, which alternate: the rows of `fastvar-fx bench`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvar_fx.cuda_graphs import cuda_graph
from fastvar_fx.engine.report_text import savings
from fastvar_fx.errors import GraphError, ModelError, ScheduleError
from fastvar_fx.measuring.clock import Clock, peak_bytes
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.measuring.peer import peer_restoration, peer_selection
from fastvar_fx.measuring.presets import Preset, check_fits, default_device, preset, subject_of
from fastvar_fx.measuring.runs import Budget, Progress, Runs, alternate, no_progress
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.measuring.variants import DENSE, VARIANTS, Variant
from fastvar_fx.methods import Method
from fastvar_fx.models.cache import KVCache
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import compile as compile_regions
from fastvar_fx.transform import explain, transform

log = logging.getLogger(__name__)

_MIB: Final = 2**20
_LONG: Final = 5.0
"""Seconds of a dense run from which the time for observing its memory is negligible."""

Record = Callable[..., Callable[..., Any]]
"""(fast, run, *inputs) -> a function that replays the run with inputs, as `cuda_graph`."""


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the model.

    Attributes:
        variant: How it runs.
        transformer: Time in the transformer blocks over a generation; of a graph, time of the
            token loop as a whole, head and sampling included.
        total: Time of the token loop and, if there is one, the image decoder.
        steps: Time in the blocks per step; empty for a graph.
        comparison: Its transformer time and that of the dense row of the same kind; None if that
            row was not measured.
        limit: FLOPs of the blocks, dense over its own: the speed-up if time were proportional.
        peak_mib: The most memory allocated in the token loop, without the weights, in MiB.
        kv_mib: The most that cached keys and values take, in MiB.
    """

    variant: Variant
    transformer: Spread
    total: Spread
    steps: tuple[Spread, ...]
    comparison: Comparison | None
    limit: float
    peak_mib: float
    kv_mib: float

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; times in milliseconds, None where unknown."""
        time, compared = self.transformer, self.comparison
        return {
            "name": str(self.variant),
            "ms": 1e3 * time.median,
            "ms_iqr": None if time.iqr is None else 1e3 * time.iqr,
            "runs": time.runs,
            "unusable": time.unusable,
            "reason": time.doubt,
            "total_ms": 1e3 * self.total.median,
            "speedup": compared and compared.speedup,
            "speedup_unusable": compared and compared.unusable,
            "limit": self.limit,
            "limit_fraction": compared and compared.limit_fraction,
            "peak_mib": self.peak_mib,
            "kv_mib": self.kv_mib,
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        subject: The original model, its schedule and how its token loop is run.
        batch: Images per generation.
        repeats: Timed runs of each row that were asked for.
        rows: One per way to run it.
        savings: What step skipping, guidance that ends and token pruning save, each apart.
        left_out: Rows for which there was no time.
        failed: Rows that could not be run, with the error.
    """

    subject: Subject
    batch: int
    repeats: int
    rows: tuple[Row, ...]
    savings: tuple[str, ...] = ()
    left_out: tuple[Variant, ...] = ()
    failed: Mapping[Variant, str] = field(default_factory=dict)

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """Yields each row with times per step, next to the dense row of the same kind."""
        rows = {row.variant: row for row in self.rows}
        for variant, row in rows.items():
            if row.steps and variant != variant.dense and variant.dense in rows:
                yield rows[variant.dense], row

    @property
    def slower_steps(self) -> dict[Variant, tuple[int, ...]]:
        """The pruned steps that are no faster than in the dense row of the same kind."""
        steps = self.subject.schedule.pruned_steps
        return {
            row.variant: tuple(
                s for s in steps if not Comparison(dense.steps[s], row.steps[s]).pays
            )
            for dense, row in self.pairs()
            if row.variant.what == "pruned"
        }

    @property
    def saved(self) -> dict[Variant, tuple[float, float]]:
        """Seconds saved over the dense row of the same kind: at steps of ratio 1, at pruned ones.

        They are apart because leaving steps out saves time without any pruning of tokens.
        """
        schedule = self.subject.schedule
        pruned = [s for s in schedule.pruned_steps if s not in schedule.full_steps]
        return {
            row.variant: (
                _saved(dense, row, schedule.full_steps),
                _saved(dense, row, pruned),
            )
            for dense, row in self.pairs()
        }


def _saved(dense: Row, row: Row, steps: Sequence[int]) -> float:
    return sum(dense.steps[s].median - row.steps[s].median for s in steps)


# --- what to measure --------------------------------------------------------------------------


def recorder(device: torch.device) -> Record | None:
    """Returns what records a generation as a CUDA graph; None on a device that has none."""
    return cuda_graph if device.type == "cuda" else None


def default_variants(schedule: Schedule, *, compiled: bool = True) -> tuple[Variant, ...]:
    """Returns the rows to measure where none are named.

    Args:
        schedule: Steps are skipped only if it has steps of ratio 1.
        compiled: Whether the compiled rows are among them.
    """
    graphs = recorder(default_device()) is not None
    return tuple(
        variant
        for variant in VARIANTS
        if (compiled or not variant.compiled)
        and (graphs or not variant.graph)
        and (variant.what != "skip" or schedule.full_steps)
        and (variant.what != "peer" or variant == Variant("peer"))
    )


def check_variants(variants: Sequence[Variant], schedule: Schedule) -> tuple[Variant, ...]:
    """Returns the rows asked for in the order in which they are measured, each once.

    Raises:
        ModelError: If there is none.
        GraphError: If one is a CUDA graph, and there is no GPU.
        ScheduleError: If one skips steps, and the schedule has none of ratio 1.
    """
    ordered = tuple(variant for variant in VARIANTS if variant in variants)
    device = default_device()
    for variant in ordered:
        if variant.graph and recorder(device) is None:
            raise GraphError(
                f"row {variant} is a CUDA graph, which needs a CUDA device; the benchmark runs on "
                f"{device}; leave out the rows that end in -graph"
            )
        if variant.what == "skip" and not schedule.full_steps:
            raise ScheduleError(
                f"row {variant} skips steps of ratio 1, but the ratios are {schedule.ratios}; "
                f"leave out the rows that begin with skip"
            )
    if not ordered:
        raise ModelError(f"no row to measure; name some of {', '.join(map(str, VARIANTS))}")
    return ordered


# --- measuring --------------------------------------------------------------------------------


def measure_rows(
    name: str,
    variants: Sequence[Variant] | None = None,
    *,
    schedule: Schedule | None = None,
    batch: int = 1,
    repeats: int = 5,
    budget: Budget | None = None,
    progress: Progress = no_progress,
) -> Result:
    """Returns times, FLOPs and memory of a preset run in several ways, in one process.

    First each row is prepared (traced, compiled, recorded) and run once, dense rows first within
    each kind; then the rows alternate. On a GPU the model is in bfloat16, else in float32.

    Args:
        name: A key of `PRESETS`.
        variants: The rows; None for the default ones.
        schedule: A schedule of the preset's scales; None for its own.
        batch: Images per generation, at least 1.
        repeats: Timed runs of each row, at least 1.
        budget: Time that all of it may take. Repeats, then rows are left out to meet it; the first
            row is always run once. None for no bound.
        progress: Called with a few words before each run.

    Raises:
        ModelError: Unknown name, numbers below 1, or a preset that does not fit into memory.
        GraphError: A row is a CUDA graph, and there is no GPU.
        ScheduleError: A row skips steps, and the schedule has none to skip.
    """
    chosen = preset(name) if schedule is None else preset(name).at(schedule)
    for what, number in (("batch", batch), ("repeats", repeats)):
        if number < 1:
            raise ModelError(f"{what} is at least 1; found {number}")
    asked = default_variants(chosen.schedule) if variants is None else variants
    ordered = check_variants(asked, chosen.schedule)
    budget = budget or Budget()
    device = default_device()
    check_fits(name, batch, device)
    progress("building the model")
    rows = _Rows(chosen, subject_of(name, chosen, batch, device), batch, progress)
    left_out, failed = _first_runs(rows, ordered, budget)
    timed: dict[Any, Runs | Whole] = {**rows.timed}
    if rows.decoder is not None:
        timed["image decoder"] = rows.decoder
    alternate(timed, repeats, budget=budget, progress=progress)
    return Result(
        subject=rows.subject,
        batch=batch,
        repeats=repeats,
        rows=tuple(map(rows.row, rows.timed)),
        savings=rows.savings(),
        left_out=left_out,
        failed=failed,
    )


def _first_runs(
    rows: _Rows, variants: Sequence[Variant], budget: Budget
) -> tuple[tuple[Variant, ...], dict[Variant, str]]:
    """Prepares rows and runs each once; returns those without time, and those that failed."""
    left_out: list[Variant] = []
    failed: dict[Variant, str] = {}
    longest: dict[tuple[bool, bool], float] = {}
    for variant in variants:
        kind = variant.compiled, variant.graph
        if rows.timed and not budget.allows(longest.get(kind, 0.0)):
            left_out.append(variant)
            continue
        begun = budget.spent
        try:
            rows.add(variant)
        except Exception as error:
            if not rows.timed:
                raise
            # One row that fails, for example for memory, must not lose the figures of the others.
            log.exception("row %s failed", variant)
            failed[variant] = f"{type(error).__name__}: {error}"
        longest[kind] = max(longest.get(kind, 0.0), budget.spent - begun)
    return tuple(left_out), failed


class _Rows:
    """Rows as they are added; they share models, FLOPs and the image decoder.

    Attributes:
        subject: The original model and how to run its token loop.
        timed: The runs by row.
        decoder: Runs of the image decoder, which is the same for all rows; None without one.
    """

    def __init__(self, chosen: Preset, subject: Subject, batch: int, progress: Progress) -> None:
        self.subject = subject
        self._device = subject.weight.device
        self.timed: dict[Variant, Runs | Whole] = {}
        self.decoder: Whole | None = None
        self._chosen = chosen
        self._batch = batch
        self._progress = progress
        self._played: dict[Variant, Runs] = {}
        self._memory: dict[Variant, tuple[int, int]] = {}
        self._long = False

    def add(self, variant: Variant) -> None:
        """Prepares a row and runs it once."""
        for eager in (DENSE, Variant(variant.what)):
            self._runs(eager)  # counts FLOPs, which only eager ops show
        timed = self._recorded(variant) if variant.graph else self._runs(variant)
        if not timed.seconds:
            self._progress(f"{variant}, first timed run")
            timed.time()
        self.timed[variant] = timed
        if self.decoder is None and self._chosen.decode is not None:
            self._progress("image decoder")
            decode = partial(self._chosen.decode, self.subject.model, timed.result)
            self.decoder = Whole(decode, self._device)
            self.decoder.time()

    def row(self, variant: Variant) -> Row:
        """Returns a row, which has been timed at least once."""
        runs, dense = self.timed[variant], self.timed.get(variant.dense)
        flops, left = (sum(self._runs(Variant(w)).flops) for w in ("dense", variant.what))
        peak, keys = self._memory[variant]
        decoder = Spread.of(self.decoder.seconds).median if self.decoder else 0.0
        return Row(
            variant=variant,
            transformer=runs.loop,
            total=Spread.of([seconds + decoder for seconds in runs.seconds]),
            steps=runs.by_step,
            comparison=None if dense is None else Comparison(dense.loop, runs.loop, flops / left),
            limit=flops / left,
            peak_mib=peak / _MIB,
            kv_mib=keys / _MIB,
        )

    def savings(self) -> tuple[str, ...]:
        """Returns what the schedule saves, of the row that skips steps, else of another one."""
        eager = (self._played.get(Variant(what)) for what in ("skip", "pruned"))
        found = next(filter(None, eager), None)
        return tuple(savings(explain(found.model))) if found else ()

    def _runs(self, variant: Variant) -> Runs:
        """Returns runs of a model that is traced or compiled, with its use of memory known."""
        if variant in self._played:
            return self._played[variant]
        runs = self._new_runs(variant)
        if runs.model is not self.subject.model or self._device.type == "cuda":
            self._progress(f"{variant}, warm-up")
            runs.generate()
        begun = perf_counter()
        with _watch_keys(runs.model) as sizes:
            peak = self._observe(variant, runs)
        if runs.model is self.subject.model:
            self._long = perf_counter() - begun > _LONG
        self._memory[variant] = peak, max(sizes)
        self._played[variant] = runs
        return runs

    def _observe(self, variant: Variant, runs: Runs) -> int:
        """Returns the bytes at the peak of one run, and counts FLOPs where the ops are visible.

        On a GPU the peak costs no time, and on a CPU less than 1 % of a long run: a run in which no
        FLOPs are counted is then timed as well.
        """
        if not variant.compiled:
            self._progress(f"{variant}, memory and FLOPs")
            return peak_bytes(runs.count, self._device)
        timed = self._device.type == "cuda" or self._long
        self._progress(f"{variant}, memory{' and first timed run' * timed}")
        return peak_bytes(runs.time if timed else runs.generate, self._device)

    def _new_runs(self, variant: Variant) -> Runs:
        schedule = self.subject.schedule
        drawn = schedule.steps - (len(schedule.full_steps) if variant.what == "skip" else 0)
        model = self.subject.model if variant == DENSE else self._transformed(variant)
        return self.subject.runs(model, drawn)

    def _transformed(self, variant: Variant) -> nn.Module:
        model, schedule = self.subject.model, self.subject.schedule
        half = self.subject.conditional
        if variant.what == "dense":
            fast = transform(model, Schedule(schedule.scales, ()))
        elif variant.what == "skip":
            fast = transform(model, schedule, conditional=half)
        elif variant.what == "pruned":
            fast = transform(model, schedule, on_full="cache", conditional=half)
        else:
            method = Method(select=peer_selection, restore=peer_restoration)
            fast = transform(model, schedule, on_full="cache", conditional=half, method=method)
        return compile_regions(fast) if variant.compiled else fast

    def _recorded(self, variant: Variant) -> Whole:
        """Returns the token loop of the row without a graph, recorded."""
        played = variant.played
        runs, record = self._runs(played), recorder(self._device)
        if record is None:
            raise GraphError(f"there are no CUDA graphs on {self._device}")
        fast = self._transformed(played) if played == DENSE else runs.model
        self._progress(f"{variant}, recording")
        made, peak = record_replays(fast, self._chosen, self._batch, record)
        self._memory[variant] = peak, self._memory[played][1]
        return made


@dataclass
class Whole:
    """Runs of what is timed as a whole: a replayed token loop, or the image decoder.

    Attributes:
        call: What runs.
        device: Where it runs.
        seconds: Seconds of each timed run.
        result: What the latest run returned.
    """

    call: Callable[[], Any]
    device: torch.device
    seconds: list[float] = field(default_factory=list)
    result: Any = None

    def time(self) -> None:
        """Times a run."""
        clock = Clock(self.device)
        begun = clock.read()
        with torch.no_grad():
            self.result = self.call()
        self.seconds.append(clock.seconds(clock.read(), begun))

    @property
    def loop(self) -> Spread:
        """The time of the runs."""
        return Spread.of(self.seconds)

    @property
    def by_step(self) -> tuple[Spread, ...]:
        """Nothing: steps cannot be timed in it."""
        return ()


def record_replays(
    fast: nn.Module, chosen: Preset, batch: int, record: Record
) -> tuple[Whole, int]:
    """Records the token loop of a transformed model.

    Args:
        fast: The model, compiled or not.
        chosen: The preset that it belongs to.
        batch: Images per generation.
        record: Records a generation as `cuda_graph` does.

    Returns:
        Its replays, none made yet, and the bytes allocated at the peak of recording.
    """
    recorded: list[Callable[..., Any]] = []
    prompt = chosen.prompt(fast, batch)

    def draw(model: Any, prompt: Tensor) -> Tensor:
        return chosen.draw(model, prompt, None)

    def keep_recording() -> None:
        recorded.append(record(fast, draw, prompt))

    peak = peak_bytes(keep_recording, prompt.device)
    return Whole(partial(recorded[0], prompt), prompt.device), peak


@contextmanager
def _watch_keys(model: Any) -> Iterator[list[int]]:
    """Collects the bytes that cached keys and values hold after each pass through the blocks."""
    caches = [module for module in model.modules() if isinstance(module, KVCache)]
    sizes: list[int] = []

    def note(*_: object) -> None:
        held = [t for cache in caches for t in (cache.cached_k, cache.cached_v) if t is not None]
        sizes.append(sum(t.untyped_storage().nbytes() for t in held))

    hook = model.blocks[-1].register_forward_hook(note)
    try:
        yield sizes
    finally:
        hook.remove()
