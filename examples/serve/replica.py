"""What a replica does: load a model, trace it in a few batch sizes, and draw requests in these."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from ray import serve
from ray.util.metrics import Counter, Gauge, Histogram

import fastvar_fx
from fastvar_fx.cli.options import Asked
from fastvar_fx.cli.source import source_of
from fastvar_fx.engine.engine import ENGINE
from fastvar_fx.errors import ArgumentError
from fastvar_fx.sampling.drawing import pixels_of
from fastvar_fx.sampling.folder import png
from fastvar_fx.sampling.plan import Condition

Takes = Literal["class", "prompt", "nothing"]

SEEDS: Final = 2**32
"""Seeds are below this: torch's generators on the CPU ignore higher bits."""

_TRIALS: Final[dict[Takes, tuple[Condition, ...]]] = {
    "class": (0,),
    "prompt": ("a fox", "a red fox on a wall in the rain"),  # two lengths make it a symbol
    "nothing": (None,),
}
_TIMED: Final = 2
"""Batches of each size that are timed at the start; the faster one counts."""
_BATCH_WAIT: Final = 0.02
"""Seconds that the first picture of a batch waits for others."""
_SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]

_log = logging.getLogger("ray.serve")


class Picture(NamedTuple):
    """A picture that is asked for.

    Attributes:
        seed: At least 0, below `SEEDS`.
        condition: Its class or prompt; None for a model that takes neither.
    """

    seed: int
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that is served.

    Attributes:
        asked: The model, its schedule and its blocks, as on the command line of the package.
        draw: `package.module:function` that draws a batch, for a model of the user's own.
        dense: Whether to draw without pruning.
        method: How branches are pruned.
        compiled: Whether programs are compiled.
        prompts: Whether requests are prompts; a model of the user's own only.
        classes: How many classes there are, for a model of the user's own that takes classes.
        sizes: The batch sizes.
    """

    asked: Asked
    draw: str | None = None
    dense: bool = False
    method: str = "fastvar"
    compiled: bool = False
    prompts: bool = False
    classes: int | None = None
    sizes: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model draws.

    Attributes:
        model: Its name.
        takes: What a request chooses.
        classes: How many classes there are; None if it takes no class.
        size: Of a picture, such as `256x256`, width first.
        pruned: Share of all tokens that pruned branches leave out, from 0 to 1.
        seconds: What a batch takes, by its size.
    """

    model: str
    takes: Takes
    classes: int | None
    size: str
    pruned: float
    seconds: Mapping[int, float]


class BatchedModel:
    """A model that is ready to draw.

    Args:
        served: The model and how it is pruned.
        record: Called after each batch with its size, the pictures in it, and seconds.

    Attributes:
        about: What it draws.
        broken: Why it cannot draw any more; empty if it can.
    """

    def __init__(self, served: Served, record: Callable[[int, int, float], None]) -> None:
        source = source_of(served.asked, served.draw, dense=served.dense)
        classes = source.classes or served.classes
        if sum(map(bool, (source.classes, served.classes, served.prompts))) > 1:
            raise ArgumentError(
                "give one of: a named model, which knows its classes; --classes N; --prompts"
            )
        takes: Takes = "prompt" if served.prompts else "class" if classes else "nothing"
        self._source, self._compiled, self._record = source, served.compiled, record
        self._trials = _TRIALS[takes]
        self._model = source.model
        if source.schedule is not None:
            self._model = fastvar_fx.transform(
                source.model, source.schedule, blocks=served.asked.blocks, method=served.method
            )
        self.broken = ""
        self.about = About(
            model=served.asked.model,
            takes=takes,
            classes=classes,
            seconds={size: self._prepare(size) for size in sorted(served.sizes)},
            size="{1}x{0}".format(*self._draw_trial(min(served.sizes), self._trials[0]).shape[1:]),
            pruned=self._pruned_share(),
        )

    def draw(self, pictures: Sequence[Picture]) -> list[bytes | None]:
        """Returns PNG files; None for a picture that could not be drawn, which the log explains."""
        files: list[bytes | None] = []
        for size in division(len(pictures), self.about.seconds):
            files += self._try(pictures[len(files) : len(files) + size], size)
        return files

    def _prepare(self, size: int) -> float:
        """Traces a batch size; returns the seconds that a batch then takes."""
        for trial in self._trials:
            if self._source.schedule is not None:
                self._trace(size, trial)
        if self._compiled:
            fastvar_fx.compile(self._model)
            for trial in self._trials:
                self._draw_trial(size, trial)
        return min(self._timed(size) for _ in range(_TIMED))

    def _timed(self, size: int) -> float:
        began = time.perf_counter()
        self._draw_trial(size, self._trials[-1])
        return time.perf_counter() - began

    def _trace(self, size: int, trial: Condition) -> None:
        fastvar_fx.trace(self._model, lambda _: self._draw_trial(size, trial))

    def _draw_trial(self, size: int, condition: Condition) -> torch.Tensor:
        return self._pixels([Picture(0, condition)] * size)

    def _pixels(self, batch: Sequence[Picture]) -> torch.Tensor:
        """Returns a batch of a traced size, uint8 (B, H, W, 3)."""
        seeds, conditions = [p.seed for p in batch], [p.condition for p in batch]
        with torch.no_grad():
            return pixels_of(self._source.draw(self._model, seeds, conditions), len(batch))

    def _try(self, pictures: Sequence[Picture], size: int) -> list[bytes | None]:
        """Draws a batch, filled up to its size; if that fails, every picture alone."""
        began = time.perf_counter()
        filled = [*pictures, *[pictures[-1]] * (size - len(pictures))]
        try:
            files = [png(each) for each in self._pixels(filled)[: len(pictures)]]
        except Exception:
            _log.exception("a batch of %d pictures failed", len(pictures))
            self._end_generation()
            if len(pictures) > 1:
                smallest = min(self.about.seconds)
                return [file for each in pictures for file in self._try([each], smallest)]
            self._check()
            return [None]
        self._record(size, len(pictures), time.perf_counter() - began)
        return [*files]

    def _is_transformed(self) -> bool:
        return ENGINE in vars(self._model)  # by the factory, it may be

    def _pruned_share(self) -> float:
        if not self._is_transformed():
            return 0.0
        report = fastvar_fx.explain(self._model)
        left_out = report.pruning.dropped + report.skipping.tokens
        return left_out / report.skipping.all_tokens

    def _end_generation(self) -> None:
        if self._is_transformed():
            fastvar_fx.reset(self._model)

    def _check(self) -> None:
        """Draws what was drawn at the start: does only a request fail, or the model?"""
        try:
            self._draw_trial(min(self.about.seconds), self._trials[0])
        except Exception as error:
            self.broken = f"the model draws nothing any more: {type(error).__name__}: {error}"


def division(count: int, seconds: Mapping[int, float]) -> list[int]:
    """Returns the batch sizes in which `count` pictures take least time, the largest first.

    The last batch may have more room than there are pictures left.

    Args:
        count: Number of pictures, at least 0.
        seconds: What a batch takes, by its size.
    """
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for pictures in range(1, count + 1):
        rest = ((size, took, best[max(0, pictures - size)]) for size, took in seconds.items())
        best.append(min((total + took, (*sizes, size)) for size, took, (total, sizes) in rest))
    return sorted(best[count][1], reverse=True)


class Replica:
    """A deployment that draws what comes in at the same time as a batch.

    Args:
        served: The model.
    """

    def __init__(self, served: Served) -> None:
        sizes = sorted(served.sizes)
        self._images = Counter("fastvar_fx_images", "Pictures, by outcome.", ("outcome",))
        self._sizes = Histogram("fastvar_fx_batch_size", "Batch sizes as drawn.", sizes)
        self._seconds = Histogram("fastvar_fx_seconds_per_image", "Without waiting.", _SECONDS)
        self._pruned = Gauge("fastvar_fx_pruned_share", "Share of tokens that are left out.")
        # All work on the model is in one thread: a generation belongs to the thread that began it.
        self._thread = ThreadPoolExecutor(1)
        self._model = self._thread.submit(BatchedModel, served, self._record).result()
        self._draw_all.set_max_batch_size(sizes[-1])

    def about(self) -> About:
        """Returns what the model draws."""
        return self._model.about

    def check_health(self) -> None:
        """Raises if the model cannot draw any more; Ray then replaces the replica."""
        self._pruned.set(self._model.about.pruned)  # at times: Ray forgets what gauges said before
        if self._model.broken:
            raise RuntimeError(self._model.broken)

    async def draw(self, picture: Picture) -> bytes | None:
        """Returns a PNG file; None if the picture could not be drawn."""
        file: bytes | None = await self._draw_all(picture)
        self._images.inc(tags={"outcome": "failed" if file is None else "drawn"})
        return file

    @serve.batch(batch_wait_timeout_s=_BATCH_WAIT)  # type: ignore[untyped-decorator]
    async def _draw_all(self, pictures: list[Picture]) -> list[bytes | None]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._model.draw, pictures)

    def _record(self, size: int, pictures: int, seconds: float) -> None:
        self._sizes.observe(size)
        self._seconds.observe(seconds / pictures)
