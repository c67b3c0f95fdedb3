"""The figures of `ablations.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastvar_fx import Method, Schedule, transform
from fastvar_fx.models.sampling import spread_classes
from fastvar_fx.ops import Scale, kept_tokens, pivotal_token_selection
from fastvar_fx.quality.evaluate import Speed
from fastvar_fx.quality.metrics import Interval, radial_spectrum
from fastvar_fx.quality.subjects import Case, draw_var

CAPTIONS = {
    "samples.png": "Images of the dense model, and of the pruned one by several methods, at the "
    "same seeds: 50 % and 75 % of the tokens of the last two steps are dropped. The last row has "
    "the ratios and the end of guidance that were calibrated for about as many FLOPs.",
    "steps.png": "Images of the dense and the pruned model after each of the last steps, at the "
    "same seed. They are equal up to the cache step.",
    "spectra.png": "Radial power spectra of the dense model's image after each step, and of the "
    "finished images; means over the batch.",
    "kept_tokens.png": "Tokens kept at the last step at several pruning ratios, over the dense "
    "image: the share of branches that keep each token.",
    "runtime.png": "Time of the transformer blocks at each step, medians of alternating runs.",
    "tradeoff.png": "Bits per token lost against measured speed-up, each method at several pruning "
    "ratios of the last two steps, in the order of the labels; bars are 95 % intervals, the star "
    "is the dense model. Lower and further to the right is better.",
}
"""By file name."""

RATIOS = (0.25, 0.5, 0.75, 0.9)
SHOWN_STEPS, MOST_CLASSES, SAMPLES = 6, 4, 7


def save(figure: Figure, out: Path, name: str, dpi: int = 120) -> None:
    figure.savefig(out / name, dpi=dpi)


def after_each_step(model: Any) -> list[Tensor]:
    """Returns images (B, 3, H, W) of a few classes after each step, of seed 0."""
    maps: list[Tensor] = []
    classes = spread_classes(model.num_classes, MOST_CLASSES)
    draw_var(model, 0, classes, on_step=lambda _, latents: maps.append(latents))
    with torch.no_grad():
        return [model.vae.decode(latents).float().cpu() for latents in maps]


def show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])


def draw_samples(case: Case, fast: Mapping[str, nn.Module], out: Path) -> None:
    models: dict[str, Any] = {"dense": case.model, **fast}
    classes = spread_classes(models["dense"].num_classes, SAMPLES)
    figure = Figure(figsize=(2 * len(classes), 2.05 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(classes), squeeze=False)
    for row, (name, model) in zip(axes, models.items(), strict=True):
        images = draw_var(model, 0, classes).picture
        row[0].set_ylabel(name, fontsize=15)
        for axis, image in zip(row, images, strict=True):
            show(axis, image)
    save(figure, out, "samples.png", dpi=80)


def draw_steps(case: Case, fast: nn.Module, out: Path) -> None:
    scales = case.schedule.scales
    drawn = {"dense": after_each_step(case.model), "pruned": after_each_step(fast)}
    steps = range(max(0, len(scales) - SHOWN_STEPS), len(scales))
    figure = Figure(figsize=(2.1 * len(steps), 5), layout="constrained")
    axes = figure.subplots(2, len(steps), squeeze=False)
    for row, (kind, images) in zip(axes, drawn.items(), strict=True):
        row[0].set_ylabel(kind, fontsize=15)
        for axis, step in zip(row, steps, strict=True):
            show(axis, images[step][0])
            kept = case.schedule.kept(step)
            tokens = case.schedule.tokens(step)
            what = f"{kept} of {tokens} tokens" if kind == "pruned" and kept < tokens else ""
            axis.set_xlabel(what or f"all of {tokens}", fontsize=12)
            if kind == "dense":
                axis.set_title(f"step {step}: {' x '.join(map(str, scales[step]))}")
    save(figure, out, "steps.png")


def draw_spectra(case: Case, fast: Mapping[str, nn.Module], out: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    steps = after_each_step(case.model)
    for step, images in enumerate(steps):
        color = colormaps["viridis"](step / len(steps))
        spectrum = radial_spectrum(images).mean(0)
        scale = " x ".join(map(str, case.schedule.scales[step]))
        left.plot(range(1, len(spectrum) + 1), spectrum, color=color, label=f"{step}: {scale}")
    left.set_title("dense, after each step")
    left.legend(title="step: token map", fontsize=9, ncols=2)
    finished = {"dense": steps[-1]}
    finished |= {name: after_each_step(model)[-1] for name, model in fast.items()}
    if case.held_out is not None:
        finished["held out"] = case.held_out.images
    styles = {"dense": "C3-", "FastVAR": "C0--", "ToMe": "C1:"}
    styles |= {"drift-corrected": "C2-.", "drift-corrected-grid": "C4-"}
    styles["held out"] = "k-"
    for name, images in finished.items():
        spectrum = radial_spectrum(images).mean(0)
        right.plot(range(1, len(spectrum) + 1), spectrum, styles[name], label=name, lw=2)
    right.set_title("finished images")
    right.legend()
    for axis in (left, right):
        axis.set(xlabel="spatial frequency, cycles per image side", xscale="log")
        octaves = [2**i for i in range(12) if 2**i <= len(spectrum)]
        axis.set_xticks(octaves, map(str, octaves))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.set_ylabel("mean power, dB")
    save(figure, out, "spectra.png")


def draw_kept_tokens(case: Case, out: Path) -> None:
    scales = case.schedule.scales
    figure = Figure(figsize=(2.6 * (1 + len(RATIOS)), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(RATIOS))
    image = after_each_step(case.model)[-1][0]
    show(axes[0], image)
    axes[0].set_title("dense image")
    for axis, ratio in zip(axes[1:], RATIOS, strict=True):
        share = kept_share(case, Schedule(scales, (ratio,)))
        axis.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
        height, width = image.shape[1:]
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        shown = axis.imshow(share.numpy(), cmap="viridis", alpha=0.6, vmin=0, vmax=1, extent=extent)
        axis.set_xticks([])
        axis.set_yticks([])
        tokens = share.numel()
        axis.set_title(f"{100 * ratio:g} % dropped\n{kept_tokens(tokens, ratio)} of {tokens} kept")
    figure.colorbar(shown, ax=list(axes), label="share of branches", shrink=0.8)
    save(figure, out, "kept_tokens.png")


def kept_share(case: Case, schedule: Schedule) -> Tensor:
    """Returns the share of branches of the last step that keep each token of the first image."""
    kept: list[Tensor] = []

    def select(x: Tensor, count: int) -> Tensor:
        index = pivotal_token_selection(x, count)
        kept.append(index[0])
        return index

    fast = transform(case.model, schedule, method=Method(select=select))
    case.draw(fast, 0)
    kept.clear()  # selections while programs were made
    case.draw(fast, 0)
    counts = torch.bincount(torch.cat(kept).cpu(), minlength=schedule.tokens(schedule.steps - 1))
    return (counts / len(kept)).view(schedule.scales[-1])


def draw_runtime(scales: Sequence[Scale], speeds: Mapping[str, Speed], out: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axis = figure.subplots()
    first = next(iter(speeds.values()))
    times = {"dense": [1e3 * dense.median for dense, _ in first.steps]}
    times |= {name: [1e3 * part.median for _, part in s.steps] for name, s in speeds.items()}
    for (name, values), style in zip(times.items(), ("C3o-", "C0s--", "C1^:"), strict=True):
        axis.plot(values, style, label=f"{name}: {sum(values):.0f} ms in all")
    names = [f"{i}\n{' x '.join(map(str, scale))}" for i, scale in enumerate(scales)]
    axis.set_xticks(range(len(scales)), names)
    axis.set(xlabel="step and its token map", ylabel="ms in the transformer blocks", ylim=0)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, out, "runtime.png")


class Point(NamedTuple):
    """A row in the figure of quality against speed.

    Attributes:
        label: What is written beside it.
        speed: Speed-up of the transformer blocks.
        held_out: Bits per token of held-out images more than dense; None if not measured.
        draws: The same of dense draws.
    """

    label: str
    speed: float
    held_out: Interval | None
    draws: Interval | None


def draw_tradeoff(curves: Mapping[str, Sequence[Point]], out: Path) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes, first = figure.subplots(1, 2), next(iter(curves))
    colors = [*colormaps["tab10"].colors, "navy"]  # type: ignore[attr-defined]
    for axis, what in zip(axes, ("held_out", "draws"), strict=True):
        axis.set_prop_cycle(color=colors)
        for (name, points), marker in zip(curves.items(), cycle("osD^vP*X<>h"), strict=False):
            known = [(p, getattr(p, what)) for p in points if getattr(p, what) is not None]
            xs, ys = [p.speed for p, _ in known], [bits.mean for _, bits in known]
            axis.errorbar(xs, ys, [bits.half for _, bits in known], marker=marker, label=name)
            for p, bits in known if name == first else ():
                place = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 8}
                axis.annotate(p.label, (p.speed, bits.mean), **place)
        axis.plot(1, 0, "*", color="k", ms=16, label="dense")
        of = "held-out images" if what == "held_out" else "dense draws"
        axis.set_title(f"bits per token of {of}, more than dense")
        axis.set(xlabel="speed-up of the transformer blocks, times")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    save(figure, out, "tradeoff.png")
