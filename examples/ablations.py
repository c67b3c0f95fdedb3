"""Measures what each part of FastVAR is worth, on a trained model: the paper's ablations.

    python examples/ablations.py --out ablations          # the model that comes with the package
    python examples/ablations.py --out ablations --quick  # a tiny one, random weights, to try it

Writes one report, `report.md`, and its figures. Every row is held against the dense model at the
same seeds and against photographs that the model never saw; all rows are timed by turns. Nothing
in the report but the paper's claims was written beforehand. Needs matplotlib (the extra "cli").
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

from fastvar_fx import Schedule, alternatives, transform
from fastvar_fx.alternatives import Rules
from fastvar_fx.cases import DEMO, Case, Generation, case, draw_var
from fastvar_fx.evaluate import DENSE, METRICS, PHOTOGRAPHS, Baseline, Fidelity, Speed, speed_of
from fastvar_fx.metrics import Interval
from fastvar_fx.models.var import build
from fastvar_fx.ops import Scale
from fastvar_fx.timing import Runs, alternate

PAPER = (0.5, 0.75)
"""Ratios of the last two steps where something else is compared."""
METHODS = FASTVAR, TOME = "FastVAR", "ToMe"
BATCH = 3
"""Images per seed; guidance doubles them."""


# ------------------------------------------------------------------------------------ what is tried


def rules_of(scales: Sequence[Scale]) -> dict[str, Rules]:
    """All rules by name."""
    return {
        FASTVAR: {},
        "random": {"select": alternatives.random_tokens},
        "uniform grid": {"select": alternatives.uniform_grid(scales)},
        "lowest scores": {"select": alternatives.lowest_scores},
        "zeros": {"restore": alternatives.zeros},
        "nearest kept token": {"restore": alternatives.nearest_kept},
        "bilinear": {"restore": alternatives.interpolated("bilinear")},
        "nearest": {"restore": alternatives.interpolated("nearest")},
        "once per block": {"select_once": True},
        TOME: alternatives.token_merging(scales),
    }


@dataclass(frozen=True)
class Setting:
    """One way to prune."""

    schedule: Schedule
    rules: str = FASTVAR


@dataclass(frozen=True)
class Section:
    """One ablation.

    Attributes:
        title: What is varied, and where the paper does.
        claim: What the paper finds.
        settings: By the label of their row.
        better: Pairs of labels; by the claim, the first loses less than the second.
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

    def at(self, *ratios: float, cache_step: int | None = None, rules: str = FASTVAR) -> Setting:
        return Setting(Schedule(self.scales, ratios, cache_step=cache_step), rules)

    def ruled(self, *names: str) -> dict[str, Setting]:
        return {name: self.at(*PAPER, rules=name) for name in names}


def sections(scales: Sequence[Scale]) -> tuple[Section, ...]:
    ablations = (ratio, scale, cache_step, extreme, selection, restoration, reuse, merging)
    return tuple(section(Tried(scales)) for section in ablations)


def ratio(tried: Tried) -> Section:
    swept = {percent(r): tried.at(r, r) for r in (0.25, 0.5, 0.75, 0.9)}
    return Section(
        "Pruning ratio of the last two steps (figure 6)",
        "Quality falls slowly at first; the more is dropped, the more is lost.",
        swept,
        tuple(pairwise(swept)),
    )


def scale(tried: Tried) -> Section:
    last = len(tried.scales) - 1
    alone = {f"step {last - i} only": tried.at(0.75, *[0.0] * i) for i in range(4)}
    together = {f"last {n}": tried.at(*[0.75] * n) for n in (2, 3, 4)}
    return Section(
        "Which scales are pruned, by 75 % (table 4)",
        "The late scales bear pruning best. (They also have more tokens to drop.)",
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
        "The nearest to the pruned steps, K-N, is best.",
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
    others = tried.ruled("random", "uniform grid", "lowest scores")
    chosen = {"pivotal tokens": tried.paper} | others
    return Section(
        "Which tokens are kept",
        "Those that carry the high frequencies: pivotal token selection is best.",
        chosen,
        first_than_others(chosen),
    )


def restoration(tried: Tried) -> Section:
    restored = {"area of cached": tried.paper} | tried.ruled("zeros", "nearest kept token")
    modes = tried.ruled("bilinear", "nearest")
    restored |= {f"{mode} of cached": setting for mode, setting in modes.items()}
    return Section(
        "What the others get",
        "The cached output of the branch, area-interpolated, is best.",
        restored,
        first_than_others(restored),
    )


def reuse(tried: Tried) -> Section:
    selected = {"per branch": tried.paper} | tried.ruled("once per block")
    return Section(
        "How often tokens are selected",
        "Each branch selects anew.",
        selected,
        first_than_others(selected),
    )


def merging(tried: Tried) -> Section:
    settings: dict[str, Setting] = {}
    better: list[tuple[str, str]] = []
    for ratios in ((0.5, 0.5), PAPER):
        pair = {f"{rules}, {percent(*ratios)}": tried.at(*ratios, rules=rules) for rules in METHODS}
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
    """What one setting does."""

    setting: Setting
    fidelity: Fidelity
    speed: Speed

    def values(self, metric: str, against: str) -> tuple[float, ...] | None:
        score = self.fidelity.score(metric, against)
        return None if score is None else score.values

    @property
    def bits(self) -> float | None:
        """Bits per token of what the dense model drew, more than its own."""
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
    """A row for each setting."""
    rules = rules_of(model.schedule.scales)
    baseline = Baseline(model, tuple(METRICS), range(seeds))
    subject = model.subject(0)
    dense = subject.runs(model.model)
    dense.count()
    fidelity: dict[Setting, Fidelity] = {}
    runs: dict[Setting, Runs] = {}
    for setting in dict.fromkeys(settings):
        schedule, begun = setting.schedule, time.perf_counter()
        fast = transform(model.model, schedule, **rules[setting.rules])
        fidelity[setting] = baseline.compare(fast, schedule)
        runs[setting] = subject.runs(fast, schedule.steps - len(schedule.full_steps))
        runs[setting].count()
        took = time.perf_counter() - begun
        print(f"{setting.rules}, {percent(*schedule.ratios)}: {took:.1f} s", flush=True)
    timed = {"dense": dense}
    timed |= {f"{s.rules}, {percent(*s.schedule.ratios)}": each for s, each in runs.items()}
    alternate(timed, repeats, progress=partial(print, flush=True))
    return {s: Row(s, fidelity[s], speed_of(dense, each)) for s, each in runs.items()}


def in_turn(model: Any, seed: int) -> Generation:
    """A few classes per seed, and all in turn."""
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
    """What the pairs of the claim say, each image and seed held against itself."""
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
    """The differences b - a."""
    first, second = a.values(metric, against), b.values(metric, against)
    if first is None or second is None:
        return None
    return Interval.of([y - x for x, y in zip(first, second, strict=True)])


def word(difference: Interval) -> str:
    if not abs(difference.mean) > difference.half:
        return "not told apart"
    return "agrees" if difference.mean > 0 else "**disagrees**"


def report(model: Case, rows: dict[Setting, Row], seeds: int, repeats: int) -> str:
    photographs = model.photographs
    count = 0 if photographs is None else len(photographs.images)
    scales = ", ".join(sides(scale) for scale in model.schedule.scales)
    about = (
        f"Token maps {scales}; where nothing else is said, {percent(*PAPER)} of the last two steps "
        f"are dropped. {seeds} seeds, {count} photographs that the model never saw. ±: 95 % "
        f"confidence interval of the mean by Student's t, over seeds, for bits over images. "
        f"FLOPs and time are of the transformer blocks, batches of {BATCH}, median of {repeats} "
        f"runs of all rows by turns; {environment()}. Agreement with the paper is told from the "
        f"differences of pairs: the same photographs and the same seeds."
    )
    note = [f"{model.note.capitalize()}.", ""] if model.note else []
    lines = [f"# What each part of FastVAR is worth: {model.name}", "", *note, about, ""]
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
    """A model with random weights, for trying the script."""
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
        "ToMe": transform(model.model, paper.schedule, **rules_of(scales)[TOME]),
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
