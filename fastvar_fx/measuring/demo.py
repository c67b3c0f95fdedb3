"""A model measured dense and pruned, step by step, with pictures: what `fastvar-fx demo` does.

It needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn

from fastvar_fx import ops
from fastvar_fx.engine.find_blocks import module_at
from fastvar_fx.engine.report import Report, kept_by_branch
from fastvar_fx.engine.report_text import branch_counts
from fastvar_fx.errors import RunError, ScheduleError
from fastvar_fx.measuring.compare import Comparison
from fastvar_fx.measuring.runs import Budget, Progress, Runs, alternate, no_progress
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.methods import Method, method_of
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import trace, transform

Role = Literal["dense", "captures", "prunes"]
"""What a step of the transformed model does."""

MOST_IMAGES: Final = 4
"""Images of a batch that are shown."""


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
class KeptTokens:
    """The tokens that a branch of a block kept at a pruned step.

    Attributes:
        step: The step.
        block: The block's module path.
        branch: The branch's module path in it.
        tokens: Whether each token of the first sample was kept, bool, shaped as the scale.
    """

    step: int
    block: str
    branch: str
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The first image of the batch after each step, dense and pruned; (K, 3, H, W) in [0, 1]."""

    dense: Tensor
    pruned: Tensor


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A generation measured dense and pruned.

    Attributes:
        method: The name of the method.
        steps: The transformer blocks at each step.
        pruned_steps: The blocks over all pruned steps.
        transformer: The blocks over the whole generation.
        total: The whole run, with what is not a block: sampling, image decoder.
        dense_images: (B, 3, H, W) in [0, 1].
        pruned_images: The same of the transformed model.
        kept_tokens: What each branch kept at each pruned step, in the order it ran.
        growth: What was drawn after each step; None if the subject does not say.
        repeat_difference: Largest difference between the images of two dense runs; 0 if the run is
            deterministic.
        repeats: Timed runs of each model.
        report: What the transformed blocks do.
    """

    method: str
    steps: tuple[StepResult, ...]
    pruned_steps: Comparison
    transformer: Comparison
    total: Comparison
    dense_images: Tensor
    pruned_images: Tensor
    kept_tokens: tuple[KeptTokens, ...]
    growth: Growth | None
    repeat_difference: float
    repeats: int
    report: Report

    @property
    def kept_shares(self) -> dict[int, Tensor]:
        """For each pruned step, how often its branches kept each token, as `KeptTokens.tokens`."""
        return {
            step.step: torch.stack([each.tokens for each in of_step]).float().mean(0)
            if (of_step := self._kept_at(step.step))
            else torch.zeros(step.scale)
            for step in self.steps
            if step.role == "prunes"
        }

    @property
    def selections(self) -> dict[int, int]:
        """For each pruned step, how many branches selected tokens."""
        return {s.step: len(self._kept_at(s.step)) for s in self.steps if s.role == "prunes"}

    def _kept_at(self, step: int) -> list[KeptTokens]:
        return [each for each in self.kept_tokens if each.step == step]

    @property
    def slower_steps(self) -> tuple[int, ...]:
        """Steps whose every pruned run took longer than every dense one, of several runs."""
        slower = tuple(s.step for s in self.steps if s.pruned.low > s.dense.high)
        return slower if self.repeats > 1 else ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as plain data; times in milliseconds."""
        pruned, branches = branch_counts(self.report)
        return {
            "method": self.method,
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
    method: str = "fastvar",
    repeats: int = 3,
    budget: Budget | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Returns times, FLOPs, images and kept tokens of a model, dense and pruned.

    Steps of ratio 1 are not skipped but run on no tokens, so that each step has a time. Three
    untimed runs come first: one dense and one pruned that count FLOPs, and one that traces. Then
    dense and pruned runs alternate, all from the same seed. Last comes one run of each that draws
    after every step, where the subject has `run_by_step`.

    Args:
        subject: The model; it is not changed.
        method: How branches are pruned, one of `fastvar_fx.methods.names()`.
        repeats: Timed runs of each, at least 1.
        budget: Time that all of it may take: repeats that would probably exceed it are left out,
            except the first. None for no bound.
        progress: Called with a few words before each run.

    Raises:
        ScheduleError: If the schedule prunes nothing.
        ArgumentError: If the method is unknown.
        NothingPrunedError: If nothing in the model could be pruned.
        RunError: If the run returns no images, or its blocks do not follow the schedule.
    """
    schedule = subject.schedule
    if not schedule.pruned_steps:
        raise ScheduleError(
            f"nothing to compare: ratios {schedule.ratios} prune no token; give one above 0"
        )
    asked = method_of(method)
    recorder = _Recorder(asked)
    fast = transform(
        subject.model,
        schedule,
        blocks=subject.blocks,
        on_full="cache",
        conditional=subject.conditional,
        method=replace(asked, select=recorder.select),
    )
    dense, pruned = subject.runs(subject.model), subject.runs(fast)

    progress("warm-up and FLOPs, dense")
    dense.count()
    first_images = _images(dense.result)
    progress("tracing")
    report = trace(fast, subject.generate)
    progress("warm-up and FLOPs, pruned")
    with recorder.recording(fast, dense.blocks):
        pruned.count()
    alternate({"dense": dense, "pruned": pruned}, repeats, budget=budget, progress=progress)
    dense_images = _images(dense.result)
    return Measurement(
        method=method,
        steps=tuple(_step(report, schedule, step, dense, pruned) for step in range(schedule.steps)),
        pruned_steps=Comparison.of_blocks(dense, pruned, schedule.pruned_steps),
        transformer=Comparison.of_blocks(dense, pruned),
        total=Comparison.of_runs(dense, pruned),
        dense_images=dense_images,
        pruned_images=_images(pruned.result),
        kept_tokens=tuple(recorder.kept_tokens(schedule, report)),
        growth=_growth(subject, fast, progress),
        repeat_difference=(first_images - dense_images).abs().max().item(),
        repeats=len(dense.seconds),
        report=report,
    )


def _step(report: Report, schedule: Schedule, step: int, dense: Runs, pruned: Runs) -> StepResult:
    role: Role = "prunes" if step in schedule.pruned_steps else "dense"
    return StepResult(
        **vars(Comparison.of_blocks(dense, pruned, [step])),
        step=step,
        scale=schedule.scales[step],
        tokens=schedule.tokens(step),
        kept=kept_by_branch(schedule, step, report.rows),
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


def _growth(subject: Subject, fast: nn.Module, progress: Progress) -> Growth | None:
    if subject.run_by_step is None:
        return None
    progress("drawing after each step")
    dense, pruned = (_images(subject.generate_by_step(each)) for each in (subject.model, fast))
    return Growth(dense=dense, pruned=pruned)


class _Recorder:
    """The selection of a method, which while recording keeps what each block selected.

    Attributes:
        select: The selection, to be put in the place of the method's.
    """

    def __init__(self, method: Method) -> None:
        self._once = method.once
        self._calls: list[tuple[str, list[Tensor]]] = []
        self._recording = False

        @wraps(method.select)
        def select(x: Tensor, kept: int, **asked: Any) -> Any:
            selected = method.select(x, kept, **asked)
            if self._recording and kept:
                index = selected[0] if isinstance(selected, tuple) else selected
                mask = torch.zeros(x.shape[1], dtype=torch.bool)
                mask[index[0].cpu()] = True
                self._calls[-1][1].append(mask)
            return selected

        self.select = select

    @contextmanager
    def recording(self, model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
        """Records while the blocks at these paths of a model run."""
        hooks = [
            module_at(model, name).register_forward_pre_hook(partial(self._enter, name))
            for name in blocks
        ]
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str, *_: object) -> None:
        self._calls.append((name, []))

    def kept_tokens(self, schedule: Schedule, report: Report) -> Iterator[KeptTokens]:
        """Names what was recorded by the rows of a report, which are in the order they run."""
        steps = {schedule.tokens(step): step for step in schedule.pruned_steps}
        branches: dict[tuple[int, str], list[str]] = {}
        for row in report.rows:
            if 0 < row.kept < row.tokens:
                branches.setdefault((row.step, row.block), []).append(row.branch)
        calls = [(block, masks) for block, masks in self._calls if masks]
        if self._once == "step":  # blocks that select nothing keep what the first one selected
            made = {(steps[masks[-1].numel()], block): masks for block, masks in calls}
            first = {step: masks for (step, _), masks in reversed(made.items())}
            calls = [(b, made.get((step, b), first[step])) for step, b in branches]
        for block, masks in calls:
            step = steps[masks[0].numel()]
            names = branches[step, block]
            # A program that is made at this call selects too, before the call runs.
            last = masks[-1:] * len(names) if self._once else masks[-len(names) :]
            for name, mask in zip(names, last, strict=True):
                tokens = mask.view(schedule.scales[step])
                yield KeptTokens(step=step, block=block, branch=name, tokens=tokens)


# --- pictures ---------------------------------------------------------------------------------


def difference(dense: Tensor, pruned: Tensor) -> tuple[Tensor, float]:
    """Returns |dense - pruned| (B, H, W), the mean of the three colours, and the end of its scale.

    Args:
        dense: (B, 3, H, W) in [0, 1].
        pruned: Of the same shape.
    """
    apart = (dense - pruned).abs().mean(1)
    return apart, ceil(10 * apart.max().item()) / 10 or 0.1


def draw_comparison(result: Measurement, title: str, caption: str, path: Path) -> None:
    """Writes a PNG with the first images dense, pruned, and how far they are apart.

    Args:
        result: What `measure_both` returned.
        title: Line above.
        caption: Line below.
        path: File to write.
    """
    dense, pruned = (x[:MOST_IMAGES] for x in (result.dense_images, result.pruned_images))
    apart, highest = difference(dense, pruned)
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
    share = first_map(share)
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


def first_map(tokens: Tensor) -> Tensor:
    """Returns what belongs to the tokens of a scale as (h, w): of jointly drawn maps the first."""
    return tokens if tokens.dim() == 2 else tokens[0]


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
