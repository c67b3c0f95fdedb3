"""What pruning does to what a model draws, and what it saves: `fastvar-fx evaluate`.

The pruned model is compared with the dense one at the same seeds, and both with photographs that
the model never saw. The likelihood of a photograph is that of its tokens in the model's own loop,
whose steps are then pruned as they are in generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.alternatives import Rules
from fastvar_fx.cases import Case, Generation
from fastvar_fx.errors import ModelError
from fastvar_fx.metrics import (
    Interval,
    frechet_distance,
    psnr,
    radial_spectrum,
    spectrum_distance,
    ssim,
    texture_features,
)
from fastvar_fx.models.var import VAR
from fastvar_fx.schedule import Schedule
from fastvar_fx.timing import Comparison, Progress, Runs, Spread, alternate, no_progress

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "psnr": "peak signal-to-noise ratio to the dense image of the same seed, dB",
        "ssim": "structural similarity to it, at most 1",
        "agreement": "share of the tokens of the pruned steps that are those of the dense run",
        "spectrum": "distance of radial power spectra, rms over the rings, dB",
        "frechet": "Frechet distance of fixed texture features (not FID) to the photographs",
        "bits": "bits per token that images given to the model's own loop cost: photographs, and "
        "what the dense model drew",
    }
)
"""What can be measured, by name."""

DENSE: Final = "dense"
PHOTOGRAPHS: Final = "photographs"
"""What is compared with: what the dense model drew, or images that it never saw."""

_PRUNED: Final = "pruned"


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One metric.

    Attributes:
        metric: A key of `METRICS`.
        against: What was compared with, `DENSE` or `PHOTOGRAPHS`.
        dense: Of the dense model; None where it is itself compared with.
        pruned: Of the pruned model.
        difference: Pruned less dense, with the interval of the paired differences.
        values: Of the pruned model, one per seed or image, so that rules can be compared in pairs.
    """

    metric: str
    against: str
    dense: Interval | None
    pruned: Interval
    difference: Interval | None
    values: tuple[float, ...]

    @classmethod
    def to_dense(cls, metric: str, values: Sequence[float]) -> Score:
        """Returns what compares pruned with dense, one value per seed."""
        return cls(metric, DENSE, None, Interval.of(values), None, tuple(values))

    @classmethod
    def of_both(
        cls, metric: str, against: str, dense: Sequence[float], pruned: Sequence[float]
    ) -> Score:
        """Returns what holds both against something else, in pairs of values."""
        differences = [p - d for d, p in zip(dense, pruned, strict=True)]
        of = Interval.of
        return cls(metric, against, of(dense), of(pruned), of(differences), tuple(pruned))

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        parts = ("dense", "pruned", "difference")
        intervals = {name: getattr(self, name) for name in parts}
        known = {name: i and i.as_dict() for name, i in intervals.items()}
        return {"metric": self.metric, "against": self.against} | known


@dataclass(frozen=True)
class StepScore:
    """One step.

    Attributes:
        step: Its index.
        agreement: Share of the tokens that are those of the dense run; None if not measured, or if
            the step is skipped.
        bits_dense: Bits per token, dense, of the photographs or, without any, of what the dense
            model drew; None if not measured.
        bits_pruned: The same, pruned.
    """

    step: int
    agreement: float | None = None
    bits_dense: float | None = None
    bits_pruned: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """What pruning changed: a score per metric, and what is known of each step."""

    scores: tuple[Score, ...]
    steps: tuple[StepScore, ...]

    def score(self, metric: str, against: str) -> Score | None:
        """Returns a score; None if it was not measured."""
        found = (s for s in self.scores if (s.metric, s.against) == (metric, against))
        return next(found, None)


@dataclass(frozen=True)
class Speed:
    """What pruning saved, of one batch.

    Attributes:
        transformer: The blocks over a generation.
        total: The whole generation, image decoder included.
        flops_dense: FLOPs of the blocks' matrix products.
        flops_pruned: The same, pruned.
        steps: The blocks at each step; those that are skipped take no time.
        repeats: Timed runs of each model.
    """

    transformer: Comparison
    total: Comparison
    flops_dense: int
    flops_pruned: int
    steps: tuple[tuple[Spread, Spread], ...]
    repeats: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data; times in milliseconds."""
        steps = [{"dense": d.as_dict(), "pruned": p.as_dict()} for d, p in self.steps]
        return {
            "transformer": self.transformer.as_dict(),
            "total": self.total.as_dict(),
            "flops_dense": self.flops_dense,
            "flops_pruned": self.flops_pruned,
            "step_ms": steps,
            "repeats": self.repeats,
        }


@dataclass(frozen=True)
class Evaluation:
    """Quality and speed of a pruned model.

    Attributes:
        case: What was evaluated.
        seeds: The seeds drawn from.
        batch: Images of each.
        fidelity: What pruning changed.
        speed: What it saved; None if nothing was timed.
        left_out: Metrics that do not apply, and why.
    """

    case: Case
    seeds: tuple[int, ...]
    batch: int
    fidelity: Fidelity
    speed: Speed | None
    left_out: dict[str, str]


# --- measuring --------------------------------------------------------------------------------


def token_bits(model: VAR, tokens: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Returns how many bits a token of each step costs, float64 (N, K), mean over the map.

    The tokens are given to the model's own inference loop, so that a transformed model prunes as it
    does in generation. There is no guidance: these are probabilities of the class's tokens.

    Args:
        model: Original or transformed.
        tokens: Token maps of N images, int64 (N, l) each.
        labels: Their classes, (N,); -1 for no class.

    Example:
        >>> from fastvar_fx.models.var import build
        >>> var = build("tiny", scales=(1, 2))
        >>> maps = [torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)]
        >>> token_bits(var, maps, torch.tensor([3])).shape
        torch.Size([1, 2])
    """
    bits: list[Tensor] = []
    device = model.lvl_1L.device

    def force(step: int, logits: Tensor) -> Tensor:
        given = tokens[step].to(device)
        nats = F.cross_entropy(logits.transpose(1, 2), given, reduction="none")  # (N, l)
        bits.append(nats.double().mean(1) / math.log(2))
        return given

    model.infer_fhat(len(labels), labels, cfg=0.0, choose=force)
    return torch.stack(bits, dim=1).cpu()


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the metrics asked for, in the order of `METRICS`.

    Raises:
        ModelError: If one is unknown, or there is none.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        close = " or ".join(get_close_matches(unknown[0], METRICS) or METRICS)
        raise ModelError(f"no metric is named {unknown[0]!r}; did you mean {close}?")
    if not names:
        raise ModelError(f"no metric asked for; choose of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


class Baseline:
    """The dense model's draws and what it says of the photographs; pruned ones are held against it.

    Attributes:
        case: What is evaluated.
        metrics: Those that apply, of what was asked for.
        left_out: The others, and why.
        generations: What the dense model drew, by seed.
    """

    def __init__(
        self,
        case: Case,
        metrics: Sequence[str] = tuple(METRICS),
        seeds: Sequence[int] = (0, 1, 2, 3),
        progress: Progress = no_progress,
    ) -> None:
        self.case = case
        self._progress = progress
        self.generations = dict(self._draw(case.model, seeds, DENSE))
        self._first = next(iter(self.generations.values()))
        reasons = _why_not(case, self._first)
        asked = check_metrics(metrics)
        self.left_out = {name: reasons[name] for name in asked if name in reasons}
        self.metrics = tuple(name for name in asked if name not in reasons)
        self._span = _span(list(self.generations.values()))
        photographs = case.photographs
        if photographs is not None:
            self._spectrum = radial_spectrum(photographs.images).mean(0)
            self._features = texture_features(photographs.images)
        given = _given_tokens(case, self.generations) if "bits" in self.metrics else []
        self._given = [(each, self._all_bits(case.model, each, DENSE)) for each in given]

    def compare(self, fast: nn.Module, schedule: Schedule | None = None) -> Fidelity:
        """Returns how a transformed model differs from the dense one.

        Args:
            fast: A transform of the case's model.
            schedule: By what schedule; None for the case's.
        """
        schedule = schedule or self.case.schedule
        drawn = schedule.steps - len(schedule.full_steps)
        pairs = [(self.generations[s], g) for s, g in self._draw(fast, self.generations, _PRUNED)]
        scores = list(self._scores(pairs, [s for s in schedule.pruned_steps if s < drawn]))
        steps = [StepScore(step) for step in range(schedule.steps)]
        if "agreement" in self.metrics:
            for step in range(drawn):
                agreement = Interval.of([_agreement(d, p, [step]) for d, p in pairs]).mean
                steps[step] = replace(steps[step], agreement=agreement)
        for given, dense in self._given if drawn == schedule.steps else ():
            pruned = self._all_bits(fast, given, _PRUNED)
            scores.append(_bits_score(given.against, dense, pruned, schedule))
            if given is self._given[0][0]:
                means = zip(steps, dense.mean(0).tolist(), pruned.mean(0).tolist(), strict=True)
                steps = [replace(s, bits_dense=d, bits_pruned=p) for s, d, p in means]
        return Fidelity(tuple(scores), tuple(steps))

    def _draw(
        self, model: nn.Module, seeds: Sequence[int] | Mapping[int, Any], kind: str
    ) -> Iterator[tuple[int, Generation]]:
        for seed in seeds:
            self._progress(f"{kind}, seed {seed}")
            yield seed, self.case.draw(model, seed)

    def _scores(
        self, pairs: Sequence[tuple[Generation, Generation]], pruned_steps: Sequence[int]
    ) -> Iterator[Score]:
        """Yields all scores but the bits."""
        images = [(dense.picture, pruned.picture) for dense, pruned in pairs]
        if "psnr" in self.metrics:
            values = [float(psnr(p, d, self._span).mean()) for d, p in images]
            yield Score.to_dense("psnr", values)
        if "ssim" in self.metrics:
            yield Score.to_dense("ssim", [float(ssim(p, d).mean()) for d, p in images])
        if "agreement" in self.metrics and pruned_steps:
            values = [_agreement(d, p, pruned_steps) for d, p in pairs]
            yield Score.to_dense("agreement", values)
        if "spectrum" in self.metrics:
            spectra = [(radial_spectrum(d), radial_spectrum(p)) for d, p in images]
            values = [float(spectrum_distance(p, d).mean()) for d, p in spectra]
            yield Score.to_dense("spectrum", values)
            if self.case.photographs is not None:
                yield self._to_photographs(
                    "spectrum",
                    spectra,
                    lambda s: float(spectrum_distance(s.mean(0), self._spectrum)),
                )
        if "frechet" in self.metrics:
            features = [(texture_features(d), texture_features(p)) for d, p in images]
            yield self._to_photographs(
                "frechet", features, lambda f: frechet_distance(f, self._features)
            )

    @staticmethod
    def _to_photographs(
        metric: str, pairs: Sequence[tuple[Tensor, Tensor]], distance: Callable[[Tensor], float]
    ) -> Score:
        dense, pruned = (
            [distance(value) for value in values] for values in zip(*pairs, strict=True)
        )
        return Score.of_both(metric, PHOTOGRAPHS, dense, pruned)

    def _all_bits(self, model: Any, given: _Given, kind: str) -> Tensor:
        """Returns bits per token of each image and step, (N, K).

        The images are taken in batches of a generation's size, for which there are programs; the
        last is filled up with the first images.
        """
        self._progress(f"{kind}, bits of given tokens of {given.against}")
        count, batch = len(given.labels), len(self._first.latents)
        indices = (torch.arange(-(-count // batch) * batch) % count).view(-1, batch)
        bits = [
            token_bits(model, [t[at] for t in given.tokens], given.labels[at]) for at in indices
        ]
        return torch.cat(bits)[:count]


@dataclass(frozen=True)
class _Given:
    """Token maps that are given to the model, the classes of the images, and whose they are."""

    labels: Tensor
    tokens: tuple[Tensor, ...]
    against: str


def _given_tokens(case: Case, generations: Mapping[int, Generation]) -> list[_Given]:
    """Returns the tokens of the photographs, if there are any, and those that were drawn."""
    drawn = [(g.labels, g.tokens) for g in generations.values()]
    known = [(labels, maps) for labels, maps in drawn if labels is not None and maps is not None]
    maps = tuple(torch.cat(tokens) for tokens in zip(*(maps for _, maps in known), strict=True))
    given = [_Given(torch.cat([labels for labels, _ in known]), maps, DENSE)]
    photographs = case.photographs
    if photographs is not None and photographs.tokens is not None:
        given.insert(0, _Given(photographs.labels, photographs.tokens, PHOTOGRAPHS))
    return given


def _why_not(case: Case, drawn: Generation) -> dict[str, str]:
    """Returns the metrics that do not apply, and why."""
    reasons: dict[str, str] = {}
    if drawn.images is None:
        no_decoder = "the package has no image decoder for this model; others are of its latents"
        reasons |= dict.fromkeys(("ssim", "frechet"), no_decoder)
    elif case.photographs is None:
        reasons["frechet"] = "there are no photographs to compare with"
    if drawn.tokens is None:
        reasons |= dict.fromkeys(("agreement", "bits"), "its loop does not tell the tokens")
    elif case.schedule.full_steps:
        reasons["bits"] = "a skipped step says nothing of the likelihood of its tokens"
    return reasons


def _span(generations: Sequence[Generation]) -> float:
    """Returns the range of values: 1 for images, that of the dense draws for latents."""
    if generations[0].images is not None:
        return 1.0
    values = torch.cat([generation.latents.flatten() for generation in generations])
    return float(values.max() - values.min())


def _agreement(dense: Generation, pruned: Generation, steps: Sequence[int]) -> float:
    if dense.tokens is None or pruned.tokens is None:
        raise AssertionError("agreement was asked for where it does not apply")
    equal = torch.cat([(dense.tokens[s] == pruned.tokens[s]).flatten() for s in steps])
    return float(equal.float().mean())


def _bits_score(against: str, dense: Tensor, pruned: Tensor, schedule: Schedule) -> Score:
    """Returns the bits per token over all steps, one value per image."""
    counts = torch.tensor([schedule.tokens(s) for s in range(schedule.steps)], dtype=dense.dtype)
    per_image = ((bits @ counts / counts.sum()).tolist() for bits in (dense, pruned))
    return Score.of_both("bits", against, *per_image)


def measure_speed(
    case: Case, fast: nn.Module, repeats: int, progress: Progress = no_progress
) -> Speed:
    """Returns times and FLOPs of alternating runs of the dense and the transformed model.

    Args:
        case: The dense model and how to run it; the first seed is drawn.
        fast: Its transform, by the case's schedule.
        repeats: Timed runs of each, at least 1.
        progress: Called with a few words before each run.
    """
    schedule = case.schedule
    subject = case.subject(0)
    dense = subject.runs(case.model)
    pruned = subject.runs(fast, schedule.steps - len(schedule.full_steps))
    both = {DENSE: dense, _PRUNED: pruned}
    for name, runs in both.items():
        progress(f"{name}, FLOPs")
        runs.count()
    alternate(both, repeats, progress=progress)
    return speed_of(dense, pruned)


def speed_of(dense: Runs, pruned: Runs) -> Speed:
    """Returns the speed that counted and timed runs of both models show."""
    return Speed(
        Comparison.of_blocks(dense, pruned),
        Comparison.of_runs(dense, pruned),
        sum(dense.flops),
        sum(pruned.flops),
        tuple(zip(dense.by_step, pruned.by_step, strict=True)),
        len(dense.seconds),
    )


def evaluate(
    case: Case,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    seeds: int = 4,
    repeats: int = 3,
    rules: Rules | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Returns quality and speed of a pruned model.

    Args:
        case: The model, its schedule and the photographs.
        metrics: Keys of `METRICS`; those that do not apply are told in the result.
        seeds: How many seeds to draw from, each a batch; at least 1.
        repeats: Timed runs of each model; 0 to time nothing.
        rules: Rules of selection and restoration other than the paper's.
        progress: Called with a few words before each part.

    Raises:
        ModelError: An unknown metric, no seed, or negative repeats.
        NothingPrunedError: If nothing could be pruned.
    """
    chosen = check_metrics(metrics)
    if seeds < 1 or repeats < 0:
        raise ModelError(f"asked for {seeds} seeds and {repeats} repeats; give 1 and 0 at least")
    baseline = Baseline(case, chosen, range(seeds), progress)
    progress("tracing")
    fast = case.pruned(rules)
    fidelity = baseline.compare(fast)
    speed = measure_speed(case, fast, repeats, progress) if repeats else None
    batch = len(baseline.generations[0].latents)
    return Evaluation(case, tuple(range(seeds)), batch, fidelity, speed, baseline.left_out)
