"""A page on a generation that was measured dense and pruned, with pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Final

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from fastvar_fx.engine.report_text import remarks
from fastvar_fx.measuring.demo import (
    MOST_IMAGES,
    Growth,
    Measurement,
    StepResult,
    difference,
    first_map,
)
from fastvar_fx.ops import Scale
from fastvar_fx.page.data import (
    GrownStep,
    Kept,
    KeptMap,
    KeptStep,
    Page,
    Sample,
    Samples,
    Tile,
)
from fastvar_fx.page.explained import (
    LIMIT,
    branch_tile,
    doubt_of,
    flop_chart,
    kept_tile,
    lines_of,
    time_chart,
    tokens_text,
)
from fastvar_fx.quality.metrics import psnr

_OUTSIDE: Final = "In the whole run, all but the blocks takes as long as in the dense run."
_COLORS: Final = colormaps["magma"]
_LARGEST: Final = 512
"""Pixels of the longer side of a picture on the page; larger images are reduced."""
_LARGEST_STEP: Final = 256
"""The same of an image after a step."""


def of_measurement(
    result: Measurement, title: str, subtitle: Sequence[str], notes: Sequence[str]
) -> Page:
    """Returns a page on a measurement.

    Args:
        result: What `measure_both` returned.
        title: What was measured.
        subtitle: Its schedule, and what the times depend on.
        notes: How the figures were measured.
    """
    steps = {f"step {step.step}": step for step in result.steps}
    parts = {
        "pruned steps": ("transformer", result.pruned_steps),
        "all steps": ("transformer", result.transformer),
        "whole run": ("with image decoder", result.total),
    }
    times = {
        label: (_tokens(step), step if step.role == "prunes" else replace(step, limit=None))
        for label, step in steps.items()
    }
    flops = {label: (_tokens(s), s.dense_flops, s.pruned_flops) for label, s in steps.items()}
    return Page(
        title=title,
        subtitle=tuple(subtitle),
        lines=lines_of(result.report),
        remarks=tuple(remarks(result.report)),
        tiles=tuple(_tiles(result)),
        charts=(
            time_chart("Time of a generation", parts, f"{LIMIT} {_OUTSIDE}"),
            time_chart("Time in the blocks at each step", times, LIMIT),
            flop_chart(flops),
        ),
        notes=tuple(notes),
        doubt=doubt_of([result.transformer]),
        samples=_samples(result.dense_images, result.pruned_images),
        kept=_kept(result),
        growth=() if result.growth is None else tuple(_growth(result.steps, result.growth)),
    )


def _tiles(result: Measurement) -> Iterable[Tile]:
    for label, part in (("transformer", result.transformer), ("whole run", result.total)):
        times = " → ".join(f"{1e3 * time.median:.0f}" for time in (part.dense, part.pruned))
        limit = "" if part.limit is None else f"; FLOP limit {part.limit:.2f}x"
        yield Tile(f"speed-up, {label}", f"{part.speedup:.2f}x", f"{times} ms{limit}")
    pruned = [step for step in result.steps if step.role == "prunes"]
    tokens = sum(step.tokens for step in pruned)
    dropped = tokens - sum(step.kept for step in pruned)
    yield kept_tile(tokens, dropped, [step.step for step in pruned])
    yield branch_tile(result.report)


def _tokens(step: StepResult) -> str:
    return f"{_map(step.scale)}, {tokens_text(step.kept, step.tokens)}"


def _map(scale: Scale) -> str:
    return " x ".join(map(str, scale))


# --- pictures ---------------------------------------------------------------------------------


def _samples(dense: Tensor, pruned: Tensor) -> Samples:
    ones, others = dense[:MOST_IMAGES], pruned[:MOST_IMAGES]
    apart, highest = difference(ones, others)
    ratios = psnr(others, ones).tolist()
    heat = torch.from_numpy(_COLORS((apart / highest).numpy())[..., :3]).permute(0, 3, 1, 2)
    return Samples(
        images=tuple(
            Sample(
                dense=_data_uri(one, _LARGEST),
                pruned=_data_uri(other, _LARGEST),
                difference=_data_uri(between, _LARGEST),
                psnr=f"PSNR to the dense image: {ratio:.1f} dB",
            )
            for one, other, between, ratio in zip(ones, others, heat, ratios, strict=True)
        ),
        batch=len(dense),
        width=dense.shape[3],
        height=dense.shape[2],
        highest=highest,
        colors=tuple(to_hex(_COLORS(i / 8)) for i in range(9)),
    )


def _growth(steps: Sequence[StepResult], growth: Growth) -> Iterable[GrownStep]:
    for step, dense, pruned in zip(steps, growth.dense, growth.pruned, strict=True):
        does = ", captures" if step.role == "captures" else ""
        yield GrownStep(
            label=f"step {step.step}: {_tokens(step)}{does}",
            dense=_data_uri(dense, _LARGEST_STEP),
            pruned=_data_uri(pruned, _LARGEST_STEP),
        )


def _data_uri(image: Tensor, largest: int) -> str:
    """Returns an image (3, H, W) in [0, 1] as a JPEG whose sides are at most `largest`."""
    pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((largest, largest))
    written = BytesIO()
    picture.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(written.getvalue()).decode()}"


# --- kept tokens ------------------------------------------------------------------------------


def _kept(result: Measurement) -> Kept:
    steps = [step for step in result.steps if step.role == "prunes"]
    numbers = [step.step for step in steps]
    blocks = list(dict.fromkeys(each.block for each in result.kept_tokens))
    branches = list(dict.fromkeys(each.branch for each in result.kept_tokens))
    return Kept(
        steps=tuple(map(_kept_step, steps)),
        blocks=tuple(blocks),
        branches=tuple(branches),
        maps=tuple(
            KeptMap(
                step=numbers.index(each.step),
                block=blocks.index(each.block),
                branch=branches.index(each.branch),
                bits=_bits(first_map(each.tokens)),
            )
            for each in result.kept_tokens
        ),
        joint=len(steps[0].scale) > 2,
    )


def _kept_step(step: StepResult) -> KeptStep:
    rows, columns = step.scale[-2:]
    label = f"{step.step}: {_map(step.scale)}"
    return KeptStep(label=label, kept=step.kept, tokens=step.tokens, rows=rows, columns=columns)


def _bits(tokens: Tensor) -> str:
    """Returns booleans as hexadecimal digits, the first one as the highest bit of the first."""
    bits = "".join("1" if kept else "0" for kept in tokens.flatten().tolist())
    digits = -(-len(bits) // 4)
    return f"{int(bits.ljust(4 * digits, '0'), 2):0{digits}x}"
