"""Shows how the cost of an image grows with its resolution, dense and pruned.

    python examples/higher_resolution.py                 # a small Infinity, for two CPU cores
    python examples/higher_resolution.py --size 2b       # the real size, for a GPU

The model is the in-tree Infinity with random weights. Beyond the one megapixel that Infinity was
trained for, maps are appended to its schedule. Maps up to 24 x 24 run dense, that one is the cache
step, and a larger map of side n keeps 20 n of its n^2 tokens: about the paper's pruning ratios of
0.4 at 32 x 32 and 0.5 at 40 x 40, continued. What is printed and plotted is measured on real runs
of the whole token loop, batch 1, without guidance. In a narrow model attention outweighs the rest
sooner, so that both exponents are lower at the real width. Needs matplotlib (the extra "cli").
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastvar_fx
from fastvar_fx.models.infinity import CONFIGS, Infinity, build
from fastvar_fx.models.maps import template
from fastvar_fx.timing import peak_bytes

TRAINED, APPENDED = tuple(side for side, _ in template(1.0)), (84, 128)
SIDES = TRAINED + APPENDED
FIRST, LAST_DENSE, PER_ROW = 16, 24, 20
PIXELS = 16  # along the side of a token


def schedule_of(side: int) -> fastvar_fx.Schedule:
    """The schedule of an image whose last map is side x side."""
    sides = [n for n in TRAINED if n <= side]
    schedule = fastvar_fx.Schedule(sides, [1 - PER_ROW / n for n in sides if n > LAST_DENSE])
    for n in APPENDED:
        if n <= side:
            schedule = schedule.extend((n, n), ratio=1 - PER_ROW / n)
    return schedule


# ------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Cost:
    """What one image took; seconds are those under the counters, no benchmark."""

    flops: float
    peak_bytes: float
    seconds: float


def cost(run: Callable[[], Tensor], device: torch.device) -> Cost:
    begun = time.perf_counter()
    # The counter does not know the CPU's attention kernel.
    kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=kernel) as counter:
        peak = peak_bytes(run, device)
    return Cost(counter.get_total_flops(), peak, time.perf_counter() - begun)


def attention_flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Of both matrix products, from the shapes of queries (B, H, L, c) and keys."""
    return 4 * q.numel() * k[2]


@dataclass(frozen=True)
class Row:
    """One image, dense (None where it was left out) and pruned."""

    side: int
    dense: Cost | None
    pruned: Cost

    def __str__(self) -> str:
        schedule = schedule_of(self.side)
        tokens = sum(schedule.tokens(step) for step in range(schedule.steps))
        kept = sum(schedule.kept(step) for step in range(schedule.steps))
        ratio = schedule.ratio(schedule.steps - 1)
        size = f"{self.side}x{self.side}"
        start = f"{self.side * PIXELS:>6} {size:>8} {ratio:>6.3f} {tokens:>7} {kept:>6}"
        return start + "".join(
            f"{'-' if found is None else f'{getattr(found, name) / unit:.1f}':>10}"
            for name, unit in (("flops", 1e9), ("peak_bytes", 1e6))
            for found in (self.dense, self.pruned)
        )


HEADER = """\
                            tokens         GFLOPs              peak MB
 image last map  ratio    all   kept     dense    pruned     dense    pruned"""


def measure(model: Infinity, side: int, *, dense: bool) -> Row:
    schedule, device = schedule_of(side), model.pos_start.device
    scales = [(n, n) for n in SIDES if n <= side]
    text = torch.zeros(1, 20, model.config.text_width, device=device)

    def run(m: Infinity) -> Tensor:
        return m.autoregressive_infer_cfg(text, scales, cfg=1, g_seed=0)

    fast = fastvar_fx.transform(model, schedule)
    if schedule.pruned_steps:
        fastvar_fx.trace(fast, run)  # so that no tracing is measured
    pruned = cost(lambda: run(fast), device)
    return Row(side, cost(lambda: run(model), device) if dense else None, pruned)


# ------------------------------------------------------------------------------------------- figure


def points(rows: Sequence[Row], kind: str, name: str, unit: float) -> tuple[list[int], list[float]]:
    """Tokens of the last map, and the cost."""
    found = [(row.side**2, getattr(row, kind)) for row in rows]
    found = [(tokens, getattr(cost, name) / unit) for tokens, cost in found if cost is not None]
    return [tokens for tokens, _ in found], [value for _, value in found]


def exponent(rows: Sequence[Row], kind: str, name: str) -> float:
    """The e of cost ~ tokens^e over the images with pruned steps, least squares of logarithms."""
    grown = [row for row in rows if row.side > LAST_DENSE]
    tokens, values = points(grown, kind, name, 1.0)
    if len(tokens) < 2:
        return math.nan
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def plot(rows: Sequence[Row], caption: str, path: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    ticks = [row.side for row in rows if row.side in (32, 64, 84, 128)]
    for ax, title, name, unit, label in (
        (panels[0], "FLOPs", "flops", 1e9, "GFLOPs"),
        (panels[1], "Peak memory, weights left out", "peak_bytes", 1e6, "MB"),
    ):
        for kind, style in (("dense", "o-C3"), ("pruned", "s-C0")):
            grows = f"{kind}: grows as tokens$^{{{exponent(rows, kind, name):.2f}}}$"
            ax.plot(*points(rows, kind, name, unit), style, label=grows)
        ax.set(title=title, xlabel="tokens of the last map", ylabel=label, xlim=0, ylim=0)
        ax.set_xticks([n * n for n in ticks], [f"{n * n}\n{n * PIXELS} px" for n in ticks])
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left")
    figure.suptitle("Cost of one image by its size, dense and pruned")
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=CONFIGS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dense-limit", type=float, default=60, metavar="SECONDS",
                        help="leave dense runs out after one that took longer")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("higher_resolution.png"))
    options = parser.parse_args()
    small = {"depth": 2} if options.size == "tiny" else {}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = build(options.size, **small).to(options.device, dtype)

    print(HEADER)
    rows: list[Row] = []
    for side in SIDES[SIDES.index(FIRST) :]:
        last = rows[-1].dense if rows else Cost(0, 0, 0)
        in_time = last is not None and last.seconds <= options.dense_limit
        rows.append(measure(model, side, dense=in_time))
        print(rows[-1], flush=True)
    caption = (
        f"Infinity {options.size}: width {model.config.width}, depth {model.config.depth}, "
        f"{dtype} on {options.device}, torch {torch.__version__}; whole token loop, batch 1, "
        f"no guidance.\nMaps above {LAST_DENSE} x {LAST_DENSE} keep {PER_ROW} tokens per row; "
        f"exponents are fitted over the images that have such maps."
    )
    if rows[-1].dense is None:
        caption += f" Dense runs stop after one of more than {options.dense_limit:g} s."
    for kind in ("dense", "pruned"):
        print(f"{kind}: FLOPs grow as tokens^{exponent(rows, kind, 'flops'):.2f}, "
              f"peak memory as tokens^{exponent(rows, kind, 'peak_bytes'):.2f}")  # fmt: skip
    print(caption)
    plot(rows, caption, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
