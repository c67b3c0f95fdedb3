"""A model measured dense and pruned, eager and compiled, by turns: what `fastvar-fx bench` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.errors import ModelError
from fastvar_fx.models import hart, infinity, var
from fastvar_fx.models.cache import KVCache
from fastvar_fx.models.maps import template
from fastvar_fx.ops import Scale
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import Runs, Spread, Subject, peak_bytes
from fastvar_fx.transform import compile as compile_regions
from fastvar_fx.transform import transform

DENSE, DENSE_COMPILED = "dense-eager", "dense-compiled"
PRUNED, PRUNED_COMPILED = "pruned-eager", "pruned-compiled"
SKIPPED, SKIPPED_COMPILED = "pruned-eager-skip", "pruned-compiled-skip"
PEER = "peer-eager"
"""Names of the rows."""

_MIB: Final = 2**20
_GIB: Final = 2**30
_TEXT_TOKENS: Final = 30


# --- presets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """A model with random weights, its schedule and its loop.

    Attributes:
        build: Builds the model, on the CPU in float32.
        bare: Constructs it without filling in weights, to be called on the meta device.
        schedule: The scales that it draws, and the pruning ratios.
        draw: Runs its token loop, (model, batch) -> latents (B, C, H, W).
        decode: Makes images of latents, (model, latents); None where the package has no decoder.
    """

    build: Callable[[], nn.Module]
    bare: Callable[[], nn.Module]
    schedule: Schedule
    draw: Callable[[Any, int], Tensor]
    decode: Callable[[Any, Tensor], Tensor] | None = None


def _var(name: str, schedule: Schedule, **sizes: int) -> Preset:
    sides = tuple(height for height, _ in schedule.scales)

    def draw(model: var.VAR, batch: int) -> Tensor:
        return model.infer_fhat(batch, 1, g_seed=0, top_k=100, top_p=0.95)

    def decode(model: var.VAR, latents: Tensor) -> Tensor:
        return model.vae.decode(latents)

    def bare() -> var.VAR:
        config = replace(var.CONFIGS[name], scales=sides, **sizes)  # type: ignore[arg-type]
        return config.new_var(config.new_vae())

    return Preset(partial(var.build, name, scales=sides, **sizes), bare, schedule, draw, decode)


def _infinity(name: str, schedule: Schedule) -> Preset:
    def draw(model: infinity.Infinity, batch: int) -> Tensor:
        return model.autoregressive_infer_cfg(_text(model, batch), schedule.scales, g_seed=0)  # type: ignore[arg-type]

    bare = partial(infinity.Infinity, infinity.CONFIGS[name])
    return Preset(partial(infinity.build, name), bare, schedule, draw)


def _hart(name: str, schedule: Schedule) -> Preset:
    def draw(model: hart.HART, batch: int) -> Tensor:
        return model.autoregressive_infer_cfg(_text(model, batch), schedule.scales, g_seed=0)  # type: ignore[arg-type]

    bare = partial(hart.HART, hart.CONFIGS[name])
    return Preset(partial(hart.build, name), bare, schedule, draw)


def _text(model: infinity.Infinity | hart.HART, batch: int) -> Tensor:
    """Returns features of a prompt (B, T, Ct); of HART's padded length, else of a usual one."""
    config, weight = model.config, model.word_embed.weight
    tokens = config.text_length if isinstance(model, hart.HART) else _TEXT_TOKENS
    text = torch.randn(batch, tokens, config.text_width, generator=torch.Generator().manual_seed(0))
    return text.to(weight.device, weight.dtype)


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "var-tiny": _var("tiny", Schedule.preset("var-256")),
        "infinity-tiny": _infinity("tiny", Schedule(template(1.0, "0.06M"), (0.4, 0.5, 1.0))),
        "var-small-512": _var("tiny", Schedule.preset("var-512"), depth=6, width=512, heads=8),
        "hart-tiny": _hart("tiny", Schedule((1, 2, 3, 4, 5, 7, 9, 12, 16), (0.5, 0.75))),
        "var-d16-256": _var("d16", Schedule.preset("var-256")),
        "var-d16-512": _var("d16", Schedule.preset("var-512")),
        "var-d30-512": _var("d30", Schedule.preset("var-512")),
        "hart-0.7b-1024": _hart("0.7b", Schedule.preset("hart-1024")),
        "infinity-2b-1024": _infinity("2b", Schedule.preset("infinity-1024")),
    }
)
"""What can be measured; the tiny and small ones take a minute or two on two CPU cores.

In the tiny ones, the cost of launching ops hides what pruning saves.
"""


def preset(name: str) -> Preset:
    """Returns a preset by name.

    Raises:
        ModelError: If there is no such preset; the message offers close names.
    """
    if name not in PRESETS:
        close = " or ".join(get_close_matches(name, PRESETS) or PRESETS)
        raise ModelError(f"no benchmark preset is named {name!r}; did you mean {close}?")
    return PRESETS[name]


def needed_bytes(chosen: Preset, batch: int, dtype: torch.dtype) -> int:
    """Returns about how much memory a preset takes; guidance doubles the batch.

    Counted are weights, the keys and values of all steps, and eight token maps of the last step,
    four of them of the inner width of the feed-forward branch.
    """
    with torch.device("meta"):
        model: Any = chosen.bare()
    width = model.word_embed.out_features
    tokens = [chosen.schedule.tokens(step) for step in range(chosen.schedule.steps)]
    weights = sum(parameter.numel() for parameter in model.parameters())
    keys = 2 * len(model.blocks) * 2 * batch * sum(tokens) * width
    maps = (4 + 4 * 4) * 2 * batch * tokens[-1] * width
    return int((weights + keys + maps) * dtype.itemsize)


# --- the peer ---------------------------------------------------------------------------------


def peer_selection(x: Tensor, kept: int) -> Tensor:
    """Returns the kept tokens (B, kept) as the authors' code finds them: it sorts all scores."""
    scores = (x - x.mean(dim=1, keepdim=True)).pow(2).sum(dim=-1)  # (B, L)
    return scores.argsort(dim=1, descending=True)[:, :kept]


def peer_restoration(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns a branch's output (B, L, C) as the authors' code does: interpolate, then scatter."""
    image = cached.transpose(1, 2).reshape(*cached.shape[::2], *cached_scale)  # (B, C, h, w)
    full = F.interpolate(image, size=scale, mode="area").flatten(2).transpose(1, 2).contiguous()
    return full.scatter_(1, index.unsqueeze(-1).expand(-1, -1, kept.shape[-1]), kept)


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    Attributes:
        name: What it is.
        transformer: Time in the transformer blocks over a generation.
        total: Time of the whole generation, with sampling and, if there is one, image decoder.
        steps: Time in the blocks per step.
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


# --- measuring --------------------------------------------------------------------------------


def phases(chosen: Preset, repeats: int, *, compiled: bool) -> int:
    """Returns how often `measure` reports progress."""
    rows = (3 + 2 * compiled) + (1 + compiled) * bool(chosen.schedule.full_steps)
    return 1 + rows * (2 + repeats)


def measure(
    name: str,
    *,
    batch: int = 1,
    repeats: int = 5,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Returns times, FLOPs and memory of a preset, dense and pruned, in one process.

    After untimed runs, of which the first traces or compiles, all rows take turns. Pruned rows run
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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _check_fits(name, batch, dtype, device)
    progress("building the model")
    subject = _subject(name, chosen, batch, device, dtype)
    runs = _variants(subject, compiled=compiled)
    memory = {row: _warm_up(row, run, chosen, batch, progress) for row, run in runs.items()}
    for turn in range(repeats):
        for row, run in runs.items():
            progress(f"{row}, run {turn + 1} of {repeats}")
            run.time()
    rows = tuple(_row(row, runs, *memory[row]) for row in runs)
    return Result(subject, batch, repeats, rows)


def _subject(
    name: str, chosen: Preset, batch: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    model = chosen.build().to(device, dtype)
    if isinstance(model, var.VAR):
        model.vae.to(device, dtype)

    def run(model: nn.Module) -> Tensor:
        latents = chosen.draw(model, batch)
        return latents if chosen.decode is None else chosen.decode(model, latents)

    return Subject(name, model, chosen.schedule, run, blocks="blocks")


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
    peer = pruned(select=peer_selection, restore=peer_restoration)
    return runs | {PEER: Runs(subject, peer)}


def _warm_up(
    row: str, run: Runs, chosen: Preset, batch: int, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Traces or compiles, counts FLOPs of eager rows; returns bytes at the peak and of keys."""
    progress(f"{row}, warm-up")
    if row != DENSE:
        run.subject.generate(run.model)  # traces and compiles, which is not to be counted
    if _is_eager(row):
        run.count()
    progress(f"{row}, memory")
    loop = replace(run.subject, run=lambda model: chosen.draw(model, batch))
    with _watch_keys(run.model) as sizes:
        peak = peak_bytes(lambda: loop.generate(run.model), run.subject.weight.device)
    return peak, max(sizes)


@contextmanager
def _watch_keys(model: Any) -> Iterator[list[int]]:
    """Collects the bytes of all cached keys and values after each pass through the blocks."""
    caches = [module for module in model.modules() if isinstance(module, KVCache)]
    sizes: list[int] = []

    def note(*_: object) -> None:
        held = [t for cache in caches for t in (cache.cached_k, cache.cached_v) if t is not None]
        sizes.append(sum(t.nbytes for t in held))

    hook = model.blocks[-1].register_forward_hook(note)
    try:
        yield sizes
    finally:
        hook.remove()


def _row(name: str, runs: Mapping[str, Runs], peak: int, keys: int) -> Row:
    run, dense, compiled = runs[name], runs[DENSE], runs.get(DENSE_COMPILED)
    steps = range(run.subject.schedule.steps)
    time = run.spread(steps)
    speedup = dense.spread(steps).median / time.median
    over_compiled = None if compiled is None else compiled.spread(steps).median / time.median
    eager = runs[name.replace("compiled", "eager")]
    limit = sum(dense.flops) / sum(eager.flops)
    alike = speedup if _is_eager(name) or over_compiled is None else over_compiled
    return Row(
        name,
        time,
        Spread.of(run.seconds),
        tuple(run.spread([step]) for step in steps),
        speedup,
        over_compiled,
        limit,
        alike / limit,
        peak / _MIB,
        keys / _MIB,
    )


def _is_eager(name: str) -> bool:
    return "eager" in name


# --- memory -----------------------------------------------------------------------------------


def _check_fits(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    free = free_bytes(device)
    needed = {key: needed_bytes(each, batch, dtype) for key, each in PRESETS.items()}
    if needed[name] > free:
        smaller = [key for key, size in needed.items() if size <= free]
        hint = f"these fit: {', '.join(smaller)}" if smaller else "use a smaller batch"
        raise ModelError(
            f"preset {name} at batch {batch} needs about {needed[name] / _GIB:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}; {device} has {free / _GIB:.1f} GiB free; {hint}"
        )


def free_bytes(device: torch.device) -> int:
    """Returns how much memory of a device is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(kibibytes)
