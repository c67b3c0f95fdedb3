"""A model measured dense and pruned, eager and compiled, by turns: what `fastvar-fx bench` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from fastvar_fx.bench.peer import peer_restoration, peer_selection
from fastvar_fx.bench.presets import Preset, check_fits, preset, subject_of
from fastvar_fx.errors import ModelError
from fastvar_fx.methods import Method
from fastvar_fx.models.cache import KVCache
from fastvar_fx.recording import cuda_graph
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import Clock, Runs, Spread, StepTimes, Subject, peak_bytes
from fastvar_fx.transform import compile as compile_regions
from fastvar_fx.transform import transform

DENSE, DENSE_COMPILED = "dense-eager", "dense-compiled"
PRUNED, PRUNED_COMPILED = "pruned-eager", "pruned-compiled"
SKIPPED, SKIPPED_COMPILED = "pruned-eager-skip", "pruned-compiled-skip"
GRAPH, SKIPPED_GRAPH = "pruned-compiled-graph", "pruned-compiled-skip-graph"
PEER = "peer-eager"
"""Names of the rows."""
_EAGER: Final = {
    DENSE_COMPILED: DENSE,
    PRUNED_COMPILED: PRUNED,
    SKIPPED_COMPILED: SKIPPED,
    GRAPH: PRUNED,
    SKIPPED_GRAPH: SKIPPED,
}
"""The row that runs the same ops eagerly; FLOPs are counted there."""
_RECORDED: Final = {GRAPH: PRUNED_COMPILED, SKIPPED_GRAPH: SKIPPED_COMPILED}
"""The row whose generation is recorded as a CUDA graph."""

_MIB: Final = 2**20


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    Attributes:
        name: What it is.
        transformer: Time in the transformer blocks over a generation; where that is replayed, of
            the token loop as a whole, head and sampling included.
        total: Time of the whole generation, with sampling and, if there is one, image decoder.
        steps: Time in the blocks per step; empty where a generation is replayed.
        speedup: Transformer time of `dense-eager` over its own.
        compiled_speedup: That of `dense-compiled` over its own; None without that row.
        limit: FLOPs of the blocks, dense over its own: the speed-up if time followed them.
        limit_fraction: How much of the limit is reached against the dense row that is run alike,
            eager or compiled.
        peak_mib: The most memory allocated in the token loop, without the weights, in MiB.
        kv_mib: The most that cached keys and values take, in MiB.
    """

    name: str
    transformer: Spread
    total: Spread
    steps: tuple[Spread, ...]
    speedup: float
    compiled_speedup: float | None
    limit: float
    limit_fraction: float
    peak_mib: float
    kv_mib: float

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; times in milliseconds."""
        numbers = ("speedup", "limit", "limit_fraction", "peak_mib", "kv_mib")
        times = {"ms": 1e3 * self.transformer.median, "ms_iqr": 1e3 * self.transformer.iqr}
        return {"name": self.name} | times | {name: getattr(self, name) for name in numbers}


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        subject: The original model, its schedule and how it was run.
        batch: Images per generation.
        repeats: Timed runs of each row.
        rows: One per way to run it.
    """

    subject: Subject
    batch: int
    repeats: int
    rows: tuple[Row, ...]

    @property
    def slower_steps(self) -> dict[str, tuple[int, ...]]:
        """The pruned steps that are no faster than in the dense row of the same kind, by row."""
        rows = {row.name: row for row in self.rows}
        pairs = ((DENSE, PRUNED), (DENSE_COMPILED, PRUNED_COMPILED))
        return {
            pruned: self._slower(rows[dense], rows[pruned])
            for dense, pruned in pairs
            if dense in rows
        }

    def _slower(self, dense: Row, pruned: Row) -> tuple[int, ...]:
        pruned_steps = self.subject.schedule.pruned_steps
        return tuple(s for s in pruned_steps if not StepTimes(dense.steps[s], pruned.steps[s]).pays)


# --- measuring --------------------------------------------------------------------------------


def phases(chosen: Preset, repeats: int, *, compiled: bool) -> int:
    """Returns how often `measure` reports progress."""
    skips = bool(chosen.schedule.full_steps)
    rows = (3 + 2 * compiled) + (1 + compiled) * skips
    recorded = (1 + skips) * (compiled and torch.cuda.is_available())
    return 1 + rows * (2 + repeats) + recorded * (1 + repeats)


def measure(
    name: str,
    *,
    batch: int = 1,
    repeats: int = 5,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Returns times, FLOPs and memory of a preset, dense and pruned, in one process.

    After untimed runs, of which the first traces or compiles, all rows take turns. On a GPU there
    are rows of replayed CUDA graphs too. Pruned rows run
    the steps of ratio 1 on no tokens; those named `-skip` leave them out. On a GPU the model is in
    bfloat16, else in float32.

    Args:
        name: A key of `PRESETS`.
        batch: Images per generation, at least 1.
        repeats: Timed runs of each row, at least 1.
        compiled: Whether to measure the compiled rows too.
        progress: Called with a few words before each run.

    Raises:
        ModelError: Unknown name, numbers below 1, or a preset that does not fit into memory.
    """
    chosen = preset(name)
    for what, number in (("batch", batch), ("repeats", repeats)):
        if number < 1:
            raise ModelError(f"{what} is at least 1; found {number}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_fits(name, batch, device)
    progress("building the model")
    subject = subject_of(name, chosen, batch, device)
    runs = _variants(subject, compiled=compiled)
    memory = {row: _warm_up(row, run, chosen, batch, progress) for row, run in runs.items()}
    if device.type == "cuda":
        for row, source in _RECORDED.items():
            if source in runs:
                progress(f"{row}, recording")
                runs[row], peak = record_replays(runs[source], chosen, batch)
                memory[row] = peak, memory[source][1]
    for turn in range(repeats):
        for row, run in runs.items():
            progress(f"{row}, run {turn + 1} of {repeats}")
            run.time()
    rows = tuple(_row(row, runs, *memory[row]) for row in runs)
    return Result(subject, batch, repeats, rows)


def _variants(subject: Subject, *, compiled: bool) -> dict[str, Runs]:
    """Returns the models to run by row, with FLOPs that are still to be counted."""
    model, schedule = subject.model, subject.schedule
    pruned = partial(transform, model, schedule, on_full="cache")
    skipped = partial(transform, model, schedule)
    drawn = schedule.steps - len(schedule.full_steps)
    runs = {DENSE: Runs(subject, model)}
    if compiled:
        dense = transform(model, Schedule(schedule.scales, ()))
        runs[DENSE_COMPILED] = Runs(subject, compile_regions(dense))
    runs[PRUNED] = Runs(subject, pruned())
    if compiled:
        runs[PRUNED_COMPILED] = Runs(subject, compile_regions(pruned()))
    if schedule.full_steps:
        runs[SKIPPED] = Runs(subject, skipped(), drawn)
        if compiled:
            runs[SKIPPED_COMPILED] = Runs(subject, compile_regions(skipped()), drawn)
    peer = pruned(method=Method(select=peer_selection, restore=peer_restoration))
    return runs | {PEER: Runs(subject, peer)}


def _warm_up(
    row: str, run: Runs, chosen: Preset, batch: int, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Traces or compiles, counts FLOPs of eager rows; returns bytes at the peak and of keys."""
    progress(f"{row}, warm-up")
    if row != DENSE:
        run.subject.generate(run.model)  # traces and compiles, which is not to be counted
    if row not in _EAGER:
        run.count()
    progress(f"{row}, memory")
    prompt = chosen.prompt(run.model, batch)
    loop = replace(run.subject, run=lambda model: chosen.draw(model, prompt, 0))
    with _watch_keys(run.model) as sizes:
        peak = peak_bytes(lambda: loop.generate(run.model), run.subject.weight.device)
    return peak, max(sizes)


@dataclass
class Replays(Runs):
    """Replays of a recorded token loop, inside of which nothing can be timed or counted.

    Attributes:
        draw: Replays it; returns latents.
        decode: Makes images of them.
        loop_seconds: Seconds of each timed replay.
    """

    draw: Callable[[], Tensor] = field(kw_only=True)
    decode: Callable[[Tensor], object] = field(kw_only=True)
    loop_seconds: list[float] = field(default_factory=list)

    def time(self) -> Any:
        """Times a replay and the decoder; returns the images."""
        clock = Clock(self.subject.weight.device)
        with torch.no_grad():
            begun = clock.read()
            latents = self.draw()
            drawn = clock.read()
            images = self.decode(latents)
            decoded = clock.read()
        self.loop_seconds.append(clock.seconds(drawn, begun))
        self.seconds.append(clock.seconds(decoded, begun))
        return images

    @property
    def loop(self) -> Spread:
        """The time of the token loop."""
        return Spread.of(self.loop_seconds)

    @property
    def by_step(self) -> tuple[Spread, ...]:
        """Nothing: a replay has no steps."""
        return ()


def record_replays(
    run: Runs, chosen: Preset, batch: int, record: Callable[..., Any] = cuda_graph
) -> tuple[Replays, int]:
    """Records the token loop of a compiled row; returns it with bytes at the peak of recording."""
    recorded: list[Any] = []
    prompt = chosen.prompt(run.model, batch)

    def draw(model: Any, prompt: Tensor) -> Tensor:
        return chosen.draw(model, prompt, None)

    def keep_recording() -> None:
        recorded.append(record(run.model, draw, prompt))

    peak = peak_bytes(keep_recording, run.subject.weight.device)
    replay, decode = partial(recorded[0], prompt), chosen.decode
    images = (lambda latents: latents) if decode is None else partial(decode, run.model)
    return Replays(run.subject, run.model, run.drawn, draw=replay, decode=images), peak


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


def _row(name: str, runs: Mapping[str, Runs], peak: int, keys: int) -> Row:
    run, dense, compiled = runs[name], runs[DENSE], runs.get(DENSE_COMPILED)
    time = run.loop
    speedup = dense.loop.median / time.median
    over_compiled = None if compiled is None else compiled.loop.median / time.median
    limit = sum(dense.flops) / sum(runs[_EAGER.get(name, name)].flops)
    alike = over_compiled if name in _EAGER and over_compiled is not None else speedup
    return Row(
        name,
        time,
        Spread.of(run.seconds),
        run.by_step,
        speedup,
        over_compiled,
        limit,
        alike / limit,
        peak / _MIB,
        keys / _MIB,
    )
