"""A model measured dense and pruned, step by step, with pictures: what `fastvar-fx demo` does.

It needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from fastvar_fx import ops
from fastvar_fx.engine.report import Report
from fastvar_fx.errors import RunError, ScheduleError
from fastvar_fx.measuring.compare import Comparison
from fastvar_fx.measuring.runs import Budget, Progress, Runs, alternate, no_progress
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.methods import Method
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import trace, transform

Role = Literal["dense", "captures", "prunes"]
"""What a step of the transformed model does."""

_MOST_ROWS: Final = 4


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepResult(Comparison):
    """The blocks at one step; FLOPs are those of matrix products, whole batch."""

    step: int
    scale: ops.Scale
    tokens: int
    kept: int
    role: Role
    dense_flops: int
    pruned_flops: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        names = ("step", "scale", "tokens", "kept", "role", "dense_flops", "pruned_flops")
        return {name: getattr(self, name) for name in names} | super().as_dict()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A generation measured dense and pruned.

    Attributes:
        steps: The transformer blocks at each step.
        pruned_steps: The blocks over all pruned steps.
        transformer: The blocks over the whole generation.
        total: The whole run, with what is not a block: sampling, image decoder.
        dense_images: (B, 3, H, W) in [0, 1].
        pruned_images: The same of the transformed model.
        kept_shares: For each pruned step, how often the branches kept each token of the first
            sample, in [0, 1], shaped as the scale.
        selections: For each pruned step, how many branches selected tokens.
        repeat_difference: Largest difference between the images of two dense runs; 0 if the run is
            deterministic.
        repeats: Timed runs of each model.
        report: What the transformed blocks do.
    """

    steps: tuple[StepResult, ...]
    pruned_steps: Comparison
    transformer: Comparison
    total: Comparison
    dense_images: Tensor
    pruned_images: Tensor
    kept_shares: dict[int, Tensor]
    selections: dict[int, int]
    repeat_difference: float
    repeats: int
    report: Report

    @property
    def slower_steps(self) -> tuple[int, ...]:
        """Steps whose every pruned run took longer than every dense one, of several runs."""
        slower = tuple(s.step for s in self.steps if s.pruned.low > s.dense.high)
        return slower if self.repeats > 1 else ()

    @property
    def branch_counts(self) -> tuple[int, int]:
        """How many branches prune, and how many there are, over blocks and pruned steps."""
        pruned = {s.step for s in self.steps if s.role == "prunes"}
        rows = [row for row in self.report.rows if row.step in pruned]
        return sum(row.kept < row.tokens for row in rows), len(rows)

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as plain data; times in milliseconds."""
        pruned, branches = self.branch_counts
        return {
            "batch": self.dense_images.shape[0],
            "repeats": self.repeats,
            "steps": [step.as_dict() for step in self.steps],
            "pruned_steps": self.pruned_steps.as_dict(),
            "transformer": self.transformer.as_dict(),
            "total": self.total.as_dict(),
            "slower_steps": self.slower_steps,
            "pruned_branches": pruned,
            "branches": branches,
            "skipped_steps": [],
            "repeat_difference": self.repeat_difference,
            "trace_seconds": round(self.report.trace_seconds, 3),
        }


# --- measuring --------------------------------------------------------------------------------


def measure_both(
    subject: Subject,
    *,
    repeats: int = 3,
    budget: Budget | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Returns times, FLOPs, images and kept tokens of a model, dense and pruned.

    Steps of ratio 1 are not skipped but run on no tokens, so that each step has a time. Three
    untimed runs come first: one dense and one pruned that count FLOPs, and one that traces. Then
    dense and pruned runs alternate, all from the same seed.

    Args:
        subject: The model; it is not changed.
        repeats: Timed runs of each, at least 1.
        budget: Time that all of it may take: repeats that would probably exceed it are left out,
            except the first. None for no bound.
        progress: Called with a few words before each run.

    Raises:
        ScheduleError: If the schedule prunes nothing.
        NothingPrunedError: If nothing in the model could be pruned.
        RunError: If the run returns no images, or its blocks do not follow the schedule.
    """
    schedule = subject.schedule
    if not schedule.pruned_steps:
        raise ScheduleError(
            f"nothing to compare: ratios {schedule.ratios} prune no token; give one above 0"
        )
    select = _Recorder()
    fast = transform(
        subject.model,
        schedule,
        blocks=subject.blocks,
        on_full="cache",
        method=Method(select=select),
    )
    dense, pruned = subject.runs(subject.model), subject.runs(fast)

    progress("warm-up and FLOPs, dense")
    dense.count()
    first_images = _images(dense.result)
    progress("tracing")
    report = trace(fast, subject.generate)
    progress("warm-up and FLOPs, pruned")
    with select.recording():
        pruned.count()
    alternate({"dense": dense, "pruned": pruned}, repeats, budget=budget, progress=progress)
    dense_images = _images(dense.result)
    return Measurement(
        steps=tuple(_step(schedule, step, dense, pruned) for step in range(schedule.steps)),
        pruned_steps=Comparison.of_blocks(dense, pruned, schedule.pruned_steps),
        transformer=Comparison.of_blocks(dense, pruned),
        total=Comparison.of_runs(dense, pruned),
        dense_images=dense_images,
        pruned_images=_images(pruned.result),
        kept_shares={s: select.share(schedule.scales[s]) for s in schedule.pruned_steps},
        selections={s: select.calls(schedule.tokens(s)) for s in schedule.pruned_steps},
        repeat_difference=(first_images - dense_images).abs().max().item(),
        repeats=len(dense.seconds),
        report=report,
    )


def _step(schedule: Schedule, step: int, dense: Runs, pruned: Runs) -> StepResult:
    role: Role = "prunes" if step in schedule.pruned_steps else "dense"
    return StepResult(
        **vars(Comparison.of_blocks(dense, pruned, [step])),
        step=step,
        scale=schedule.scales[step],
        tokens=schedule.tokens(step),
        kept=schedule.kept(step),
        role="captures" if step == schedule.cache_step else role,
        dense_flops=dense.flops[step],
        pruned_flops=pruned.flops[step],
    )


def _images(result: object) -> Tensor:
    if not isinstance(result, Tensor):
        found = type(result).__name__
    elif result.dim() != 4 or result.shape[1] != 3 or not result.is_floating_point():
        found = f"{result.dtype} {tuple(result.shape)}"
    else:
        images: Tensor = result.detach().float().clamp(0, 1).cpu()
        return images
    raise RunError(
        f"the run must return images, a float tensor (B, 3, H, W) in [0, 1]; found {found}"
    )


class _Recorder:
    """The paper's selection, which while recording keeps what it selected."""

    __name__ = "recorded_selection"

    def __init__(self) -> None:
        self._recording = False
        self._selected: list[tuple[int, Tensor]] = []

    def __call__(self, x: Tensor, kept: int) -> Tensor:
        index = ops.pivotal_token_selection(x, kept)
        if self._recording:
            self._selected.append((x.shape[1], index))
        return index

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def calls(self, tokens: int) -> int:
        return sum(count == tokens for count, _ in self._selected)

    def share(self, scale: ops.Scale) -> Tensor:
        """Returns how often each token of the first sample was kept, shaped as the scale."""
        share = torch.zeros(scale).flatten()
        for tokens, index in self._selected:
            if tokens == share.numel():
                share[index[0].cpu()] += 1
        return (share / max(self.calls(share.numel()), 1)).view(scale)


# --- pictures ---------------------------------------------------------------------------------


def draw_comparison(result: Measurement, title: str, caption: str, path: Path) -> None:
    """Writes a PNG with the first images dense, pruned, and how far they are apart.

    Args:
        result: What `measure_both` returned.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    dense, pruned = (x[:_MOST_ROWS] for x in (result.dense_images, result.pruned_images))
    apart = (dense - pruned).abs().mean(1)  # (B, H, W)
    highest = ceil(10 * apart.max().item()) / 10 or 0.1
    rows, height, width = apart.shape
    side = 4.1 * height / width
    figure = Figure(figsize=(13.6, rows * side + 1.2), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    shown = None
    for row, (left, middle, right) in enumerate(axes):
        _show(left, dense[row])
        _show(middle, pruned[row])
        shown = right.imshow(apart[row].numpy(), cmap="magma", vmin=0, vmax=highest)
    total, blocks = result.total, result.transformer
    axes[0, 0].set_title(f"dense\n{total.dense.median:.2f} s, batch {len(result.dense_images)}")
    axes[0, 1].set_title(
        f"pruned\n{total.pruned.median:.2f} s: {total.speedup:.2f}x, "
        f"transformer {blocks.speedup:.2f}x"
    )
    axes[0, 2].set_title("|dense - pruned|\nmean of the three colours")
    _finish(figure, axes.ravel(), title, caption)
    _color_bar(figure, shown, axes[:, 2], "difference (colour values lie in 0 to 1)")
    figure.savefig(path)


def draw_kept_tokens(result: Measurement, title: str, caption: str, path: Path) -> None:
    """Writes a PNG with the tokens that each pruned step kept, over the first image.

    Args:
        result: What `measure_both` returned.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    image = result.dense_images[0]  # (3, H, W)
    steps = [step for step in result.steps if step.role == "prunes"]
    columns = min(1 + len(steps), 3)
    rows = ceil((1 + len(steps)) / columns)
    side = 4.1 * image.shape[1] / image.shape[2]
    figure = Figure(figsize=(13.6, rows * side + 1.2), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    _show(axes[0], image)
    axes[0].set_title("first image of the batch, dense")
    shown = None
    for axis, step in zip(axes[1:], steps, strict=False):
        shown = _overlay(axis, image, result.kept_shares[step.step])
        sides = " x ".join(map(str, step.scale))
        axis.set_title(f"step {step.step}: {sides}, {step.kept} of {step.tokens} tokens kept")
    for axis in axes[1 + len(steps) :]:
        axis.remove()
    _finish(figure, axes, title, caption)
    branches = max(result.selections.values())
    _color_bar(figure, shown, axes, f"share of {branches} branches that keep the token")
    figure.savefig(path)


def _overlay(axis: Axes, image: Tensor, share: Tensor) -> AxesImage:
    """Draws how often tokens were kept over a grey image; of jointly drawn maps the first."""
    share = share if share.dim() == 2 else share[0]
    height, width = image.shape[1:]
    axis.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
    shown = axis.imshow(
        share.numpy(),
        cmap="viridis",
        alpha=0.6,
        vmin=0,
        vmax=1,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
    h, w = share.shape
    axis.hlines([height * i / h - 0.5 for i in range(1, h)], -0.5, width - 0.5, "k", lw=0.3)
    axis.vlines([width * i / w - 0.5 for i in range(1, w)], -0.5, height - 0.5, "k", lw=0.3)
    return shown


def _show(axis: Axes, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)


def _finish(figure: Figure, axes: Iterable[Axes], title: str, caption: str) -> None:
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(caption, fontsize=10)


def _color_bar(figure: Figure, shown: AxesImage | None, axes: Iterable[Axes], label: str) -> None:
    if shown is not None:
        figure.colorbar(shown, ax=list(axes), label=label, shrink=0.9)
