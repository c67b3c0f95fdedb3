"""Measures the effect of each part of FastVAR on a trained model: the paper's ablations.

    python examples/ablations.py --out ablations          # the packaged model
    python examples/ablations.py --out ablations --quick  # a tiny one, random weights, to try it

Writes a report, `report.md`, and its figures. Every row is compared with the dense model at the
same seeds, and with photographs that the model was not trained on; timed runs alternate between all
rows. Only the paper's claims in the report are fixed text. Needs matplotlib (the extra "cli").
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ablation_figures as figures
import torch
from torch import nn

from fastvar_fx import Schedule, transform
from fastvar_fx.measuring.runs import Runs, alternate
from fastvar_fx.models.var import build
from fastvar_fx.ops import Scale
from fastvar_fx.quality.evaluate import (
    DENSE,
    METRICS,
    PHOTOGRAPHS,
    Baseline,
    Fidelity,
    Speed,
    speed_of,
)
from fastvar_fx.quality.metrics import Interval
from fastvar_fx.quality.subjects import DEMO, Case, Generation, case, draw_var

PAPER = (0.5, 0.75)
"""Ratios of the last two steps where another part is varied."""
FASTVAR, TOME = "fastvar", "tome"
BATCH = 3
"""Images per seed; guidance doubles them."""


# --------------------------------------------------------------------------------------- ablations


@dataclass(frozen=True)
class Setting:
    """One way to prune."""

    schedule: Schedule
    method: str = FASTVAR


@dataclass(frozen=True)
class Section:
    """One ablation.

    Attributes:
        title: What is varied, and where the paper does.
        claim: What the paper finds.
        settings: By the label of their row.
        better: Pairs of labels; the paper claims that the first loses less than the second.
    """

    title: str
    claim: str
    settings: dict[str, Setting]
    better: tuple[tuple[str, str], ...] = ()


class Tried:
    """Ways to prune token maps of these scales."""

    def __init__(self, scales: Sequence[Scale]) -> None:
        self.scales = scales
        self.paper = self.at(*PAPER)

    def at(self, *ratios: float, cache_step: int | None = None, method: str = FASTVAR) -> Setting:
        return Setting(Schedule(self.scales, ratios, cache_step=cache_step), method)

    def by(self, *methods: str) -> dict[str, Setting]:
        return {m.replace("-", " "): self.at(*PAPER, method=m) for m in methods}


def sections(scales: Sequence[Scale]) -> tuple[Section, ...]:
    ablations = (
        ratio,
        scale,
        cache_step,
        extreme,
        selection,
        restoration,
        reuse,
        merging,
        published,
    )
    return tuple(section(Tried(scales)) for section in ablations)


def ratio(tried: Tried) -> Section:
    swept = {percent(r): tried.at(r, r) for r in (0.25, 0.5, 0.75, 0.9)}
    return Section(
        "Pruning ratio of the last two steps (figure 6)",
        "Quality decreases with the ratio, slowly at first.",
        swept,
        tuple(pairwise(swept)),
    )


def scale(tried: Tried) -> Section:
    last = len(tried.scales) - 1
    alone = {f"step {last - i} only": tried.at(0.75, *[0.0] * i) for i in range(4)}
    together = {f"last {n}": tried.at(*[0.75] * n) for n in (2, 3, 4)}
    return Section(
        "Which scales are pruned, by 75 % (table 4)",
        "Pruning the late scales costs least quality. (They also have more tokens to drop.)",
        alone | together,
        first_than_others(alone),
    )


def cache_step(tried: Tried) -> Section:
    nearest = tried.paper.schedule.cache_step
    cached = {
        f"K-N{-i or ''}: step {nearest - i} ({sides(tried.scales[nearest - i])})": tried.at(
            *PAPER, cache_step=nearest - i
        )
        for i in range(4)
    }
    return Section(
        "Cache step (table A.4)",
        "The step nearest to the pruned steps, K-N, is best.",
        cached,
        first_than_others(cached),
    )


def extreme(tried: Tried) -> Section:
    return Section(
        "Extreme ratios (table A.3)",
        "Even with the last steps left out altogether, images remain usable.",
        {
            percent(*PAPER): tried.paper,
            percent(0.75, 0.95): tried.at(0.75, 0.95),
            f"{percent(0.5)}, last step skipped": tried.at(0.5, 1.0),
            "last two steps skipped": tried.at(1.0, 1.0),
        },
    )


def selection(tried: Tried) -> Section:
    others = tried.by("random", "uniform-grid", "high-pass", "lowest-scores")
    chosen = {"pivotal tokens": tried.paper} | others
    return Section(
        "Which tokens are kept",
        "Pivotal token selection, which keeps the high frequencies, is best.",
        chosen,
        first_than_others(chosen),
    )


def restoration(tried: Tried) -> Section:
    others = tried.by("drift-corrected", "zeros", "nearest-kept")
    restored = {"area of cached": tried.paper} | others
    modes = tried.by("bilinear", "nearest")
    restored |= {f"{mode} of cached": setting for mode, setting in modes.items()}
    return Section(
        "How the dropped tokens are restored",
        "Area interpolation of the branch's cached output is best.",
        restored,
        first_than_others(restored),
    )


def reuse(tried: Tried) -> Section:
    selected = {"per branch": tried.paper} | tried.by("once-per-block", "once-per-step")
    return Section(
        "How often tokens are selected",
        "Each branch makes its own selection.",
        selected,
        first_than_others(selected),
    )


def merging(tried: Tried) -> Section:
    settings: dict[str, Setting] = {}
    better: list[tuple[str, str]] = []
    for ratios in ((0.5, 0.5), PAPER):
        pair = {
            f"{name}, {percent(*ratios)}": tried.at(*ratios, method=method)
            for name, method in (("FastVAR", FASTVAR), ("ToMe", TOME))
        }
        settings |= pair
        better += first_than_others(pair)
    (fastvar, _), (_, tome) = better  # merging costs time: these two are about as fast
    better.append((fastvar, tome))
    return Section(
        "Token merging (table 3)",
        "At equal speed-up FastVAR loses less than merging.",
        settings,
        tuple(better),
    )


def published(tried: Tried) -> Section:
    others = tried.by(
        "drift-corrected", "drift-corrected-grid", "stepvar", "sparsevar", "fastervar"
    )
    return Section(
        "Corrected restoration, and methods published since",
        "None: the paper knows none of these.",
        {"FastVAR": tried.paper} | others,
    )


def first_than_others(settings: dict[str, Setting]) -> tuple[tuple[str, str], ...]:
    first, *others = settings
    return tuple((first, other) for other in others)


def percent(*ratios: float) -> str:
    return ", ".join(f"{100 * ratio:g}" for ratio in ratios) + " %"


def sides(scale: Scale) -> str:
    return " x ".join(map(str, scale))


# ------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Row:
    """The results of one setting."""

    setting: Setting
    fidelity: Fidelity
    speed: Speed

    def values(self, metric: str, against: str) -> tuple[float, ...] | None:
        score = self.fidelity.score(metric, against)
        return None if score is None else score.values

    @property
    def bits(self) -> float | None:
        """Bits per token of dense draws, minus those of the dense model."""
        score = self.fidelity.score("bits", DENSE)
        return None if score is None or score.difference is None else score.difference.mean

    @property
    def spectrum(self) -> float:
        """Distance from the spectra of the dense images, in dB."""
        score = self.fidelity.score("spectrum", DENSE)
        assert score is not None
        return score.pruned.mean


def measure_settings(
    model: Case, settings: Iterable[Setting], seeds: int, repeats: int
) -> dict[Setting, Row]:
    """Returns a row for each setting."""
    baseline = Baseline.of(model, tuple(METRICS), range(seeds))
    subject = model.subject(0)
    dense = subject.runs(model.model)
    dense.count()
    fidelity: dict[Setting, Fidelity] = {}
    runs: dict[Setting, Runs] = {}
    for setting in dict.fromkeys(settings):
        schedule, begun = setting.schedule, time.perf_counter()
        fast = transform(model.model, schedule, method=setting.method)
        fidelity[setting] = baseline.compare(fast, schedule)
        runs[setting] = subject.runs(fast, schedule.steps - len(schedule.full_steps))
        runs[setting].count()
        took = time.perf_counter() - begun
        print(f"{setting.method}, {percent(*schedule.ratios)}: {took:.1f} s", flush=True)
    timed = {"dense": dense}
    timed |= {f"{s.method}, {percent(*s.schedule.ratios)}": each for s, each in runs.items()}
    alternate(timed, repeats, progress=partial(print, flush=True))
    return {s: Row(s, fidelity[s], speed_of(dense, each)) for s, each in runs.items()}


def in_turn(model: Any, seed: int) -> Generation:
    """Draws a few classes, other ones for each seed."""
    return draw_var(model, seed, [(seed * BATCH + i) % model.num_classes for i in range(BATCH)])


# ------------------------------------------------------------------------------------------- report

COLUMNS = {
    "PSNR to dense, dB": ("psnr", DENSE, 2),
    "tokens as dense": ("agreement", DENSE, 3),
    "spectrum to dense, dB": ("spectrum", DENSE, 2),
    "Frechet to photographs, more than dense": ("frechet", PHOTOGRAPHS, 2),
    "bits per token of photographs, more than dense": ("bits", PHOTOGRAPHS, 4),
    "bits per token of dense draws, more than dense": ("bits", DENSE, 4),
}


def table(section: Section, rows: dict[Setting, Row]) -> Iterator[str]:
    names = ("", *COLUMNS, "FLOPs, dense / pruned", "time, dense / pruned")
    yield f"| {' | '.join(names)} |"
    yield f"|---|{'---:|' * (len(names) - 1)}"
    for label, setting in section.settings.items():
        row = rows[setting]
        cells = [cell(row, *column) for column in COLUMNS.values()]
        blocks = row.speed.transformer
        cells += [f"{blocks.limit or 0:.2f}", f"{blocks.speedup:.2f}"]
        yield f"| {label} | {' | '.join(cells)} |"


def cell(row: Row, metric: str, against: str, digits: int) -> str:
    score = row.fidelity.score(metric, against)
    if score is None:
        return "-"
    if score.difference is None:
        return score.pruned.text(digits)
    return score.difference.text(digits, "+")


def verdicts(section: Section, rows: dict[Setting, Row]) -> Iterator[str]:
    """Yields a line for each pair of the claim, from differences per image and seed."""
    for better, worse in section.better:
        pair = rows[section.settings[better]], rows[section.settings[worse]]
        judged = (
            ("bits per token of photographs saved", paired("bits", PHOTOGRAPHS, *pair), 4),
            ("of dense draws", paired("bits", DENSE, *pair), 4),
            ("dB of PSNR gained", paired("psnr", DENSE, *reversed(pair)), 2),
        )
        parts = [f"{v.text(n, '+')} {what}: {word(v)}" for what, v, n in judged if v is not None]
        yield f"- {better} rather than {worse}: {'; '.join(parts)}."


def paired(metric: str, against: str, a: Row, b: Row) -> Interval | None:
    """Returns the interval of the differences b - a."""
    first, second = a.values(metric, against), b.values(metric, against)
    if first is None or second is None:
        return None
    return Interval.of([y - x for x, y in zip(first, second, strict=True)])


def word(difference: Interval) -> str:
    if not abs(difference.mean) > difference.half:
        return "not significant"
    return "agrees" if difference.mean > 0 else "**disagrees**"


def report(model: Case, rows: dict[Setting, Row], seeds: int, repeats: int) -> str:
    photographs = model.photographs
    count = 0 if photographs is None else len(photographs.images)
    scales = ", ".join(sides(scale) for scale in model.schedule.scales)
    about = (
        f"Token maps {scales}. Unless a row says otherwise, {percent(*PAPER)} of the tokens of the "
        f"last two steps are dropped. {seeds} seeds, {count} photographs that the model was not "
        f"trained on. ±: 95 % confidence interval of the mean by Student's t over seeds; for bits "
        f"over images. FLOPs and time are those of the transformer blocks, batches of {BATCH}, "
        f"median of {repeats} runs that alternate between all rows; {environment()}. Agreement "
        f"with the paper is judged by paired differences: same photographs, same seeds."
    )
    note = [f"{model.note.capitalize()}.", ""] if model.note else []
    lines = [f"# The effect of each part of FastVAR: {model.name}", "", *note, about, ""]
    for name, metric in METRICS.items():
        lines.append(f"- {name}: {metric}.")
    for section in sections(model.schedule.scales):
        lines += ["", f"## {section.title}", "", f"Paper: {section.claim}", ""]
        lines += [*table(section, rows), "", *verdicts(section, rows)]
    lines += ["", "## Figures", ""]
    lines += [f"![{caption}]({name})\n\n{caption}\n" for name, caption in figures.CAPTIONS.items()]
    return "\n".join(lines).rstrip() + "\n"


def environment() -> str:
    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------- main


def tiny() -> Case:
    """Returns a model with random weights, for trying the script."""
    scales = (1, 2, 3, 4, 6, 8)
    model = build(DEMO, scales=scales, depth=2, width=32, heads=2)
    return Case("a tiny VAR", model, Schedule(scales, PAPER), in_turn, note="random weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, random weights")
    options = parser.parse_args()
    torch.manual_seed(0)  # for the selection at random
    model = tiny() if options.quick else case(DEMO)
    model = replace(model, draw=in_turn)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = [s for part in sections(model.schedule.scales) for s in part.settings.values()]
    rows = measure_settings(model, settings, options.seeds, options.repeats)
    text = report(model, rows, options.seeds, options.repeats)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    draw_figures(model, rows, options.out)
    print(f"wrote {options.out / 'report.md'} and {len(figures.CAPTIONS)} figures")


def draw_figures(model: Case, rows: dict[Setting, Row], out: Path) -> None:
    scales = model.schedule.scales
    paper, merging = Setting(Schedule(scales, PAPER)), Setting(Schedule(scales, PAPER), TOME)
    fast: dict[str, nn.Module] = {
        "pruned": transform(model.model, paper.schedule),
        "ToMe": transform(model.model, paper.schedule, method=TOME),
    }
    figures.draw_steps(model, fast["pruned"], out)
    figures.draw_spectra(model, fast, out)
    figures.draw_kept_tokens(model, out)
    figures.draw_runtime(scales, rows[paper].speed, rows[merging].speed, out)
    points: dict[str, list[figures.Point]] = {}
    for section in sections(scales):
        found = [(label, rows[setting]) for label, setting in section.settings.items()]
        points[section.title] = [
            (label, row.speed.transformer.speedup, row.bits, row.spectrum) for label, row in found
        ]
    figures.draw_tradeoff(points, out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
