"""Measures the effect of each part of FastVAR on a trained model: the paper's ablations.

    python examples/ablations.py --out ablations          # the packaged model
    python examples/ablations.py --out ablations --quick  # a tiny one, random weights, to try it

Writes a report, `report.md`, and its figures. The scores of each row are kept in a folder
`rows-SEEDS-IMAGES` beside the report: a run that was stopped goes on with the first row that is
missing. `--share 1/2` and `--share 2/2` measure half of the rows each, at the same time, and write
no report; a run without `--share` then times the rows and writes it. Before that, calibrated
schedules are found and kept in the folder `plans`; `--plans` does this alone, and has to run before
`--share`. Every row is compared with the dense model at the same seeds, and with held-out images;
timed runs alternate between all rows. Only the paper's claims in the report are fixed text. Needs
matplotlib (the extra "cli").
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import ablation_figures as figures
import torch

from fastvar_fx import Schedule, calibrate, transform
from fastvar_fx.measuring.runs import Runs, alternate
from fastvar_fx.models.var import VAR, build
from fastvar_fx.ops import Scale
from fastvar_fx.quality.evaluate import (
    DENSE,
    HELD_OUT,
    METRICS,
    Baseline,
    Fidelity,
    Score,
    Speed,
    StepScore,
    speed_of,
)
from fastvar_fx.quality.metrics import Interval
from fastvar_fx.quality.subjects import DEMO, Case, Generation, case, draw_var

PAPER = (0.5, 0.75)
"""Ratios of the last two steps where another part is varied."""
FASTVAR, CORRECTED, GRID, TOME = "fastvar", "drift-corrected", "drift-corrected-grid", "tome"
COMPARED = {"FastVAR": FASTVAR, CORRECTED: CORRECTED, GRID: GRID, "ToMe": TOME}
"""Methods that are compared at equal speed, by their name in the report, with `GRID`."""
CALIBRATED = (FASTVAR, GRID)
"""Methods whose ratios are also calibrated."""
GUIDED = (2.0, 2.5)
"""Speed-ups by FLOPs for which ratios of `GRID` and the end of guidance are calibrated together."""
BATCH = 1
"""Images per seed; guidance doubles them."""
PUBLISHED = ("stepvar", "sparsevar", "fastervar", "depthvar", "lazyvar")
"""Methods published since, compared at the first ratios of `CURVE` only."""
CURVE = ((0.5, 0.5), (0.5, 0.75), (0.75, 0.9))
"""Ratios of the last two steps at which methods are compared by speed."""
UNSEEN = 1000
"""The first seed of the generations that schedules are calibrated on; rows have those from 0."""
GENERATIONS = 2
"""How many of them."""
GOAL = 1.8
"""Speed-up of the transformer blocks at which methods are compared."""


# --------------------------------------------------------------------------------------- ablations


@dataclass(frozen=True)
class Setting:
    """One way to prune.

    Attributes:
        schedule: When and how much.
        method: How.
        like: The setting with as many FLOPs, if the ratios were calibrated.
        speedup: Dense FLOPs over those of the schedule, if its end of guidance was also calibrated.
    """

    schedule: Schedule
    method: str = FASTVAR
    like: Setting | None = None
    speedup: float | None = None

    @property
    def name(self) -> str:
        """A name for files and progress, such as `fastvar 0.5 0.75 from 7`."""
        if self.like is not None:
            return f"{self.like.name}, calibrated"
        if self.speedup is not None:
            return f"{self.method} and guidance, calibrated, {self.speedup:g}x"
        ratios = " ".join(f"{ratio:g}" for ratio in self.ratios)
        until = self.schedule.guidance_until
        ends = "" if until is None else f" unguided from {until}"
        return f"{self.method} {ratios} from {self.schedule.cache_step}{ends}"

    @property
    def ratios(self) -> tuple[float, ...]:
        """The pruning ratios of the last steps; those of `like` if they were calibrated."""
        if self.like is not None:
            return self.like.ratios
        steps = self.schedule.steps
        return tuple(map(self.schedule.ratio, range(steps - len(self.schedule.ratios), steps)))


@dataclass(frozen=True)
class Section:
    """One ablation.

    Attributes:
        title: What is varied, and where the paper does.
        claim: What the paper finds.
        settings: By the label of their row.
        better: Pairs of labels; the paper claims that the first loses less than the second.
        curves: Labels of the rows of each method, slowest first; compared at equal speed.
    """

    title: str
    claim: str
    settings: dict[str, Setting]
    better: tuple[tuple[str, str], ...] = ()
    curves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Tried:
    """Ways to prune token maps of these scales, and the calibrated ones of as many FLOPs."""

    def __init__(self, scales: Sequence[Scale], plans: Sequence[Setting] = ()) -> None:
        self.scales = scales
        self.plans = plans
        self.paper = self.at(*PAPER)

    def at(self, *ratios: float, cache_step: int | None = None, method: str = FASTVAR) -> Setting:
        return Setting(Schedule(self.scales, ratios, cache_step=cache_step), method)

    def unguided(self, last: int, *ratios: float) -> Setting:
        """Returns a setting without guidance at the last steps."""
        until = len(self.scales) - last
        return Setting(Schedule(self.scales, ratios, guidance_until=until))

    def by(self, *methods: str) -> dict[str, Setting]:
        return {m.replace("-", " "): self.at(*PAPER, method=m) for m in methods}


def sections(scales: Sequence[Scale], plans: Sequence[Setting] = ()) -> tuple[Section, ...]:
    tried = Tried(scales, plans)
    compared = [speed(tried), reuse(tried), guidance(tried)]
    if plans:
        compared.insert(1, calibration([plan for plan in plans if plan.like is not None]))
    papers = (ratio, scale, cache_step, extreme, selection, restoration)
    return (*compared, *(section(tried) for section in papers))


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
    alone = {f"step {last - i} only": tried.at(0.75, *[0.0] * i) for i in range(3)}
    together = {f"last {n}": tried.at(*[0.75] * n) for n in (2, 3)}
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
        for i in range(3)
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


def speed(tried: Tried) -> Section:
    settings: dict[str, Setting] = {}
    curves: dict[str, tuple[str, ...]] = {}
    for name, method in (COMPARED | {m: m for m in PUBLISHED}).items():
        points = CURVE[:2] if method in PUBLISHED else CURVE
        rows = {f"{name}, {percent(*r)}": tried.at(*r, method=method) for r in points}
        settings |= rows
        curves[name] = tuple(rows)
    plans = [plan for plan in tried.plans if plan.method == GRID and plan.like]
    rows = {f"{GRID} calibrated, as {percent(*plan.ratios)}": plan for plan in plans}
    if rows:
        curves[f"{GRID} calibrated"] = tuple(rows)
    guided = {f"{p.name} by FLOPs": p for p in tried.plans if p.speedup is not None}
    if guided:
        curves[f"{GRID} and guidance, calibrated"] = tuple(guided)
    return Section(
        "Quality against speed: token merging (table 3), corrected and calibrated FastVAR, and "
        "methods published since",
        "At equal speed-up FastVAR loses less than merging. It knows none of the others.",
        settings | rows | guided,
        curves=curves,
    )


def guidance(tried: Tried) -> Section:
    pruned = percent(*PAPER)
    return Section(
        "Guidance off at the last steps, alone and with FastVAR",
        "None: the paper keeps guidance on.",
        {
            "off at the last step": tried.unguided(1),
            "off at the last three": tried.unguided(3),
            f"FastVAR, {pruned}": tried.paper,
            f"FastVAR, {pruned}, off at the last step": tried.unguided(1, *PAPER),
            f"FastVAR, {pruned}, off at the last three": tried.unguided(3, *PAPER),
        },
    )


def calibration(plans: Sequence[Setting]) -> Section:
    settings: dict[str, Setting] = {}
    better: list[tuple[str, str]] = []
    for plan in plans:
        assert plan.like is not None
        label = f"{plan.method}, {percent(*plan.ratios)}"
        settings |= {label: plan.like, f"{label}, calibrated": plan}
        better.append((f"{label}, calibrated", label))
    return Section(
        "Ratios by layer and kind of branch, calibrated, at equal FLOPs",
        "None: it names layer-wise ratios as future work.",
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
    """The results of one setting."""

    setting: Setting
    fidelity: Fidelity
    speed: Speed

    def values(self, metric: str, against: str) -> tuple[float, ...] | None:
        score = self.fidelity.score(metric, against)
        return None if score is None else score.values


def measure(
    model: Case, settings: Iterable[Setting], seeds: int, folder: Path
) -> dict[Setting, Fidelity]:
    """Returns the scores of each setting; those in the folder are not measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {setting: folder / f"{setting.name}.json" for setting in settings}
    missing = {setting: path for setting, path in found.items() if not path.exists()}
    baseline = Baseline.of(model, tuple(METRICS), range(seeds)) if missing else None
    for setting, path in missing.items():
        assert baseline is not None
        begun = time.perf_counter()
        fast = transform(model.model, setting.schedule, conditional="first", method=setting.method)
        write(path, baseline.compare(fast, setting.schedule))
        print(f"{setting.name}: {time.perf_counter() - begun:.1f} s", flush=True)
    return {setting: read(path) for setting, path in found.items()}


def write(path: Path, fidelity: Fidelity) -> None:
    """Writes scores whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(fidelity)), encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> Fidelity:
    """Returns the scores that `write` wrote.

    Raises:
        SystemExit: If the file is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        scores = tuple(_score(**score) for score in kept["scores"])
        return Fidelity(scores, tuple(StepScore(**step) for step in kept["steps"]))
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it and run again"
        ) from error


def _score(*, values: list[float], dense_values: list[float], **parts: Any) -> Score:
    for name in ("dense", "pruned", "difference"):
        if parts[name] is not None:
            parts[name] = Interval(**parts[name])
    return Score(**parts, values=tuple(values), dense_values=tuple(dense_values))


def time_settings(model: Case, settings: Iterable[Setting], repeats: int) -> dict[Setting, Speed]:
    """Returns the times of each setting; their runs alternate."""
    subject = model.subject(0)
    dense = subject.runs(model.model)
    dense.count()
    runs: dict[Setting, Runs] = {}
    for setting in dict.fromkeys(settings):
        schedule = setting.schedule
        fast = transform(model.model, schedule, conditional="first", method=setting.method)
        model.draw(fast, 0)  # makes its programs, whose FLOPs do not count
        runs[setting] = subject.runs(fast, schedule.steps - len(schedule.full_steps))
        runs[setting].count()
    timed = {"dense": dense} | {setting.name: each for setting, each in runs.items()}
    alternate(timed, repeats, progress=partial(print, flush=True))
    return {setting: speed_of(dense, each) for setting, each in runs.items()}


def found_plans(model: Case, folder: Path) -> list[Setting]:
    """Returns the calibrated settings; those in the folder are not calibrated again."""
    folder.mkdir(parents=True, exist_ok=True)
    tried = Tried(model.schedule.scales)
    like = [tried.at(*PAPER, method=method) for method in CALIBRATED]
    settings = [replace(s, schedule=plan_like(model, s, folder), like=s) for s in like]
    guided = [replace(tried.at(*PAPER, method=GRID), speedup=speedup) for speedup in GUIDED]
    return settings + [replace(s, schedule=guided_plan(model, s, folder)) for s in guided]


def plan_like(model: Case, setting: Setting, folder: Path) -> Schedule:
    """Returns the calibrated schedule with the FLOPs of a setting."""
    speedup = partial(flop_speedup, model, setting)
    return plan(model, setting, speedup, folder, f"{setting.method}.measured.json")


def guided_plan(model: Case, setting: Setting, folder: Path) -> Schedule:
    """Returns the schedule of a speed-up whose end of guidance is calibrated too."""
    return plan(
        model,
        setting,
        lambda: setting.speedup,
        folder,
        f"{setting.method} and guidance.measured.json",
        guidance=cast("VAR", model.model).guidance_strengths(),
        conditional="first",
    )


def plan(
    model: Case,
    setting: Setting,
    speedup: Callable[[], float | None],
    folder: Path,
    measured: str,
    **options: Any,
) -> Schedule:
    """Returns a calibrated schedule, on generations of its own; one in the folder is taken."""
    path = folder / f"{setting.name}.json"
    if not path.exists():
        seeds = range(UNSEEN, UNSEEN + GENERATIONS)
        found = calibrate(
            model.model,
            [partial(draw_latents, seed=seed) for seed in seeds],
            Schedule(model.schedule.scales, PAPER),
            speedup=speedup(),
            logits="head",
            file=folder / measured,
            progress=partial(print, flush=True),
            method=setting.method,
            **options,
        )
        path.write_text(found.to_json(), encoding="utf-8")
    return Schedule.from_json(path.read_text(encoding="utf-8"))


def draw_latents(model: Any, seed: int) -> torch.Tensor:
    """Draws two classes, other ones for each seed."""
    classes = torch.tensor([(2 * seed + i) % model.num_classes for i in range(2)])
    return torch.as_tensor(model.infer_fhat(2, classes, g_seed=seed))


def flop_speedup(model: Case, setting: Setting) -> float:
    """Returns dense FLOPs of the blocks over those of a setting."""
    fast = transform(model.model, setting.schedule, conditional="first", method=setting.method)
    model.draw(fast, 0)  # makes its programs, whose FLOPs do not count
    counted = [model.subject(0).runs(each) for each in (model.model, fast)]
    for runs in counted:
        runs.count()
    dense, pruned = (sum(runs.flops) for runs in counted)
    return dense / pruned


def in_turn(model: Any, seed: int) -> Generation:
    """Draws a few classes, other ones for each seed."""
    return draw_var(model, seed, [(seed * BATCH + i) % model.num_classes for i in range(BATCH)])


# ------------------------------------------------------------------------------------------- report

COLUMNS = {
    "PSNR to dense, dB": ("psnr", DENSE, 2),
    "tokens as dense": ("agreement", DENSE, 3),
    "spectrum to dense, dB": ("spectrum", DENSE, 2),
    "Frechet to held-out images, more than dense": ("frechet", HELD_OUT, 2),
    "bits per token of held-out images, more than dense": ("bits", HELD_OUT, 4),
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
            ("bits per token of held-out images saved", paired("bits", HELD_OUT, *pair), 4),
            ("of dense draws", paired("bits", DENSE, *pair), 4),
            ("dB of PSNR gained", paired("psnr", DENSE, *reversed(pair)), 2),
        )
        parts = [f"{v.text(n, '+')} {what}: {word(v)}" for what, v, n in judged if v is not None]
        yield f"- {better} rather than {worse}: {'; '.join(parts)}."


def at_equal_speed(section: Section, rows: dict[Setting, Row]) -> Iterator[str]:
    """Yields a line for each method of a curve: what it loses at the speed-up of the goal."""
    for name, labels in section.curves.items():
        curve = [rows[section.settings[label]] for label in labels]
        parts = []
        for against in (HELD_OUT, DENSE):
            lost = at_speed(curve, against)
            if lost is None:
                continue
            bits, share = Interval.of(lost.lost), Interval.of(lost.share)
            of = against if against == HELD_OUT else "dense draws"
            parts.append(f"{bits.text(4)} bits per token of {of}, {share.text(2, '+')} %")
        if parts:
            yield f"- {name} at {GOAL:g}x loses {', and '.join(parts)}."
        else:
            yield f"- {name} has no rows around a speed-up of {GOAL:g}x, or no bits."


@dataclass(frozen=True)
class Lost:
    """Bits per token that a method loses on each image, and their share in percent."""

    lost: list[float]
    share: list[float]


def at_speed(curve: Sequence[Row], against: str) -> Lost | None:
    """Returns what a method loses at the speed-up of the goal, by its rows on both sides of it.

    The dense model is a row with speed-up 1. None where all rows are on one side.
    """
    scores = {row.speed.transformer.speedup: row.fidelity.score("bits", against) for row in curve}
    known = [(speed, score) for speed, score in scores.items() if score is not None]
    if not known:
        return None
    dense = known[0][1].dense_values
    points = [(1.0, dense), *((speed, score.values) for speed, score in known)]
    for (slow, a), (fast, b) in pairwise(sorted(points)):
        if slow <= GOAL <= fast:
            place = (GOAL - slow) / (fast - slow)
            lost = [x + place * (y - x) - d for x, y, d in zip(a, b, dense, strict=True)]
            return Lost(lost, [100 * n / d for n, d in zip(lost, dense, strict=True)])
    return None


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


def report(
    model: Case,
    rows: dict[Setting, Row],
    made: Iterable[Section],
    options: argparse.Namespace,
) -> str:
    scales = ", ".join(sides(scale) for scale in model.schedule.scales)
    about = (
        f"Token maps {scales}. {options.seeds} seeds and {options.held_out} held-out images. "
        f"Unless a row says otherwise, {percent(*PAPER)} of the tokens of the last two steps are "
        f"dropped. ±: 95 % confidence interval of the mean by Student's t over seeds; for bits "
        f"over images. FLOPs and time are those of the transformer blocks, batches of {BATCH}, "
        f"median of {options.repeats} runs that alternate between all rows; {environment()}. "
        f"Agreement with the paper is judged by paired differences: same held-out images, same "
        f"seeds."
    )
    note = [f"{model.note.capitalize()}.", ""] if model.note else []
    lines = [f"# The effect of each part of FastVAR: {model.name}", "", *note, about, ""]
    for name, metric in METRICS.items():
        lines.append(f"- {name}: {metric}.")
    for section in made:
        lines += ["", f"## {section.title}", "", f"Paper: {section.claim}"]
        lines += ["", *table(section, rows), "", *verdicts(section, rows)]
        lines += at_equal_speed(section, rows)
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
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=256, help="number of held-out images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plans", action="store_true", help="only calibrate")
    parser.add_argument("--share", type=share, help="measure a share of the rows, such as 1/2")
    parser.add_argument("--quick", action="store_true", help="a tiny model, random weights")
    options = parser.parse_args()
    torch.manual_seed(0)  # for the selection at random
    options.held_out = 0 if options.quick else options.held_out
    model = tiny() if options.quick else case(DEMO, held_out=options.held_out)
    model = replace(model, draw=in_turn)
    folder = options.out / "plans"
    if options.share and not folder.exists():
        raise SystemExit(f"{folder} has no calibrated schedules; run with --plans first")
    plans = found_plans(model, folder)
    if options.plans:
        return
    made = sections(model.schedule.scales, plans)
    number, of = options.share or (1, 1)
    settings = list(settings_of(made))
    rows_folder = options.out / f"rows-{options.seeds}-{options.held_out}"
    fidelity = measure(model, settings[number - 1 :: of], options.seeds, rows_folder)
    if options.share:
        return
    speeds = time_settings(model, settings, options.repeats)
    rows = {setting: Row(setting, found, speeds[setting]) for setting, found in fidelity.items()}
    text = report(model, rows, made, options)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    draw_figures(model, rows, made, options.out)
    print(f"wrote {options.out / 'report.md'} and {len(figures.CAPTIONS)} figures")


def settings_of(made: Iterable[Section]) -> Iterable[Setting]:
    """Returns the settings of sections, each once."""
    return dict.fromkeys(s for section in made for s in section.settings.values())


def share(text: str) -> tuple[int, int]:
    """Returns the numbers of a share such as 1/2."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"a share is n/m with n from 1 to m; found {text}")
    return int(number), int(of)


def draw_figures(model: Case, rows: dict[Setting, Row], made: Iterable[Section], out: Path) -> None:
    scales = model.schedule.scales
    fast = {
        name: transform(model.model, Schedule(scales, PAPER), method=method)
        for name, method in COMPARED.items()
    }
    shown = dict(fast)
    for plan in (setting for setting in rows if setting.speedup == GUIDED[-1]):
        shown["calibrated"] = transform(
            model.model, plan.schedule, conditional="first", method=plan.method
        )
    figures.draw_samples(model, shown, out)
    figures.draw_steps(model, fast["FastVAR"], out)
    figures.draw_spectra(model, fast, out)
    figures.draw_kept_tokens(model, out)
    speeds = {
        name: rows[Setting(Schedule(scales, PAPER), method)].speed
        for name, method in (("FastVAR", FASTVAR), ("ToMe", TOME))
    }
    figures.draw_runtime(scales, speeds, out)
    for section in made:
        if section.curves:
            curves = {
                name: [point(rows[section.settings[label]]) for label in labels]
                for name, labels in section.curves.items()
            }
            figures.draw_tradeoff(curves, out)


def point(row: Row) -> figures.Point:
    """Returns the place of a row in the figure of quality against speed."""
    speedup = row.speed.transformer.speedup
    scores = [row.fidelity.score("bits", against) for against in (HELD_OUT, DENSE)]
    held_out, draws = (score.difference if score is not None else None for score in scores)
    by_flops = row.setting.speedup
    label = percent(*row.setting.ratios) if by_flops is None else f"{by_flops:g}x by FLOPs"
    return figures.Point(label, speedup, held_out, draws)


if __name__ == "__main__":
    with torch.no_grad():
        main()
