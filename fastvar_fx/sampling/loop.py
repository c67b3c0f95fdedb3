"""The run of one process: its share of the batches, drawn, written and recorded."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvar_fx.engine.engine import ENGINE
from fastvar_fx.errors import FastVARError, RunError
from fastvar_fx.sampling.drawing import Draw, pixels_of
from fastvar_fx.sampling.folder import Folder
from fastvar_fx.sampling.plan import Plan
from fastvar_fx.sampling.processes import Processes
from fastvar_fx.transform import reset


@dataclass(frozen=True)
class Pace:
    """How far the processes of a machine are.

    Attributes:
        done: Images that they have recorded.
        total: Images that they draw in this run.
        per_second: Images per second since the first batch; None before.
    """

    done: int
    total: int
    per_second: float | None

    @property
    def seconds_left(self) -> float | None:
        """The time left in seconds, if the pace stays."""
        return (self.total - self.done) / self.per_second if self.per_second else None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A process of a run.

    Attributes:
        plan: What is drawn.
        model: Original or transformed.
        draw: Draws a batch of it.
        folder: Where the images go.
        run: What the pictures depend on.
        processes: This process among the others.
        show: Called on the first process of each machine after each of its batches.
        tell: Called with a message for the user.
    """

    plan: Plan
    model: nn.Module
    draw: Draw
    folder: Folder
    run: Mapping[str, Any]
    processes: Processes
    show: Callable[[Pace], None]
    tell: Callable[[str], None]

    def sample(self, *, npz: bool = False) -> int:
        """Draws what the folder lacks; returns how many images all processes drew.

        Args:
            npz: Whether to write all images into one array as well.

        Raises:
            ArgumentError: If the folder holds another run.
            RunError: If a batch failed twice.
            OSError: If the folder cannot be written, or its disk is full.
        """
        first = self.processes.rank == 0
        with self._full_disk_named(), self.folder.claimed(self.run) if first else nullcontext():
            todo = self._todo()
            if not first:
                self.folder.check(self.run)
            self._draw_share(todo)
            self.processes.wait()
            if first:
                self._finish(npz)
        return sum(map(len, todo.values()))

    def _todo(self) -> dict[int, list[int]]:
        """Returns the images that rank 0 finds missing, by batch."""
        lacks = torch.zeros(self.plan.count, dtype=torch.uint8)
        if self.processes.rank == 0:
            lacks[self.folder.missing(self.folder.merge(), self.plan.count)] = 1
        todo: dict[int, list[int]] = {}
        for index in self.processes.from_first(lacks).nonzero().flatten().tolist():
            todo.setdefault(index // self.plan.batch, []).append(index)
        return todo

    def _finish(self, npz: bool) -> None:
        records = self.folder.merge(range(self.processes.world))
        absent = [index for index in range(self.plan.count) if index not in records]
        if absent:
            raise RunError(
                f"{len(absent)} images were drawn, but are not in the manifests of "
                f"{self.folder.path}, such as {absent[0]}; give a folder that all processes see"
            )
        if npz:
            self.folder.write_npz(records, self.plan.count)

    def _draw_share(self, todo: dict[int, list[int]]) -> None:
        processes, machine = self.processes, self.processes.of_machine
        batches = list(todo)
        total = sum(len(todo[b]) for rank in machine for b in processes.share(batches, rank))
        clock = _Clock(total)
        for batch in processes.share(batches, processes.rank):
            self._try_twice(batch, todo[batch])
            if processes.local_rank == 0:
                self.show(clock.pace(self.folder.recorded(machine)))

    def _try_twice(self, batch: int, wanted: list[int]) -> None:
        what = f"batch {batch} (images {wanted[0]} to {wanted[-1]})"
        try:
            return self._draw_batch(batch, wanted)
        except Exception as error:
            if _disk_is_full(error):
                raise
            self.tell(f"{what} failed: {_text(error)}; trying once more")
        if ENGINE in vars(self.model):
            reset(self.model)  # frees what the failed generation captured
        try:
            self._draw_batch(batch, wanted)
        except Exception as error:
            if _disk_is_full(error):
                raise
            raise RunError(
                f"{what} failed twice: {_text(error)}. All that is in the manifest stays; run the "
                f"same command again to go on"
            ) from error

    def _draw_batch(self, batch: int, wanted: list[int]) -> None:
        """Draws a whole batch, and writes those of its images that are wanted."""
        images = self.plan.images(batch)
        seeds = [image.seed for image in images]
        torch.manual_seed(seeds[0])  # for what a loop draws from the global generators
        with torch.no_grad():
            drawn = self.draw(self.model, seeds, [image.condition for image in images])
        pixels = dict(zip(images, pixels_of(drawn, len(images)), strict=True))
        chosen = {image: shown for image, shown in pixels.items() if image.index in wanted}
        self.folder.write(self.processes.rank, self.plan.conditions.kind, chosen)

    @contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not _disk_is_full(error):
                raise
            raise OSError(
                f"no room to write to {self.folder.path}: {error.strerror}. All that is in the "
                f"manifest stays; make room and run the same command again to go on"
            ) from error


class _Clock:
    """Measures the pace from the first batch on, which also traces and compiles."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.began: tuple[int, float] | None = None

    def pace(self, done: int) -> Pace:
        now = time.monotonic()
        if self.began is None:
            self.began = done, now
        images, seconds = done - self.began[0], now - self.began[1]
        return Pace(done, self.total, images / seconds if images and seconds else None)


def _disk_is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, FastVARError) else f"{type(error).__name__}: {error}"
