"""The figures of `ablations.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastvar_fx import Method, Schedule, transform
from fastvar_fx.ops import Scale, kept_tokens, pivotal_token_selection
from fastvar_fx.quality.evaluate import Speed
from fastvar_fx.quality.metrics import radial_spectrum
from fastvar_fx.quality.subjects import Case, draw_var

CAPTIONS = {
    "steps.png": "Images of the dense and the pruned model after each of the last steps, at the "
    "same seed. They are equal up to the cache step.",
    "spectra.png": "Radial power spectra of the dense model's image after each step, and of the "
    "finished images; means over the batch.",
    "kept_tokens.png": "Tokens kept at the last step at several pruning ratios, over the dense "
    "image: the share of branches that keep each token.",
    "runtime.png": "Time of the transformer blocks at each step, medians of alternating runs.",
    "tradeoff.png": "Quality against speed of every row of the tables; the star is the dense "
    "model, the line the pruning ratio of the last two steps. Lower and further to the right is "
    "better.",
}
"""By file name."""

RATIOS = (0.25, 0.5, 0.75, 0.9)
SHOWN_STEPS, MOST_CLASSES = 6, 4


def save(figure: Figure, out: Path, name: str) -> None:
    figure.savefig(out / name, dpi=120)


def after_each_step(model: Any) -> list[Tensor]:
    """Returns images (B, 3, H, W) of the first classes after each step, of seed 0."""
    maps: list[Tensor] = []
    classes = range(min(model.num_classes, MOST_CLASSES))
    draw_var(model, 0, classes, on_step=lambda _, latents: maps.append(latents))
    with torch.no_grad():
        return [model.vae.decode(latents).float().cpu() for latents in maps]


def show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])


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
    if case.photographs is not None:
        finished["photographs"] = case.photographs.images
    styles = {"dense": "C3-", "pruned": "C0--", "ToMe": "C1:", "photographs": "k-"}
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


def draw_runtime(scales: Sequence[Scale], pruned: Speed, merged: Speed, out: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axis = figure.subplots()
    times = {
        "dense": [1e3 * dense.median for dense, _ in pruned.steps],
        "pruned": [1e3 * part.median for _, part in pruned.steps],
        "ToMe": [1e3 * part.median for _, part in merged.steps],
    }
    for (name, values), style in zip(times.items(), ("C3o-", "C0s--", "C1^:"), strict=True):
        axis.plot(values, style, label=f"{name}: {sum(values):.0f} ms in all")
    names = [f"{i}\n{' x '.join(map(str, scale))}" for i, scale in enumerate(scales)]
    axis.set_xticks(range(len(scales)), names)
    axis.set(xlabel="step and its token map", ylabel="ms in the transformer blocks", ylim=0)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, out, "runtime.png")


Point = tuple[str, float, float | None, float]
"""Label, speed-up, bits per token of dense draws more than dense, distance of spectra in dB."""


def draw_tradeoff(points: Mapping[str, Sequence[Point]], out: Path) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = ("bits per token of dense draws, more than dense", "distance of spectra to dense, dB")
    markers = "osD^vP*X"
    for place, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for i, (section, found) in enumerate(points.items()):
            known = [(p[0], p[1], p[2 + place]) for p in found if p[2 + place] is not None]
            labels, xs, ys = zip(*known, strict=True)
            swept = i == 0
            style = {"ls": "-" if swept else "", "zorder": 3 if swept else 2}
            axis.plot(xs, ys, markers[i], color=f"C{i}", ms=8, alpha=0.7, label=section, **style)
            for label, x, y in zip(labels, xs, ys, strict=True) if swept else ():
                axis.annotate(label, (x, y), xytext=(6, -14), textcoords="offset points")
        axis.plot(1, 0, "*", color="k", ms=20, label="dense")
        axis.set(xlabel="speed-up of the transformer blocks, times", ylabel=title)
        axis.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=10)
    save(figure, out, "tradeoff.png")
