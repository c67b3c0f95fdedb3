"""Quality and speed of a pruned model, compared with the dense one: `fastvar-fx evaluate`.

Both models draw from the same seeds, and are also compared with held-out images, which they were
not trained on. The likelihood of a held-out image is that of its tokens, given to the model's own
loop step by step; the loop prunes the same steps as in generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.engine.engine import Engine
from fastvar_fx.errors import ModelError, did_you_mean
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.measuring.runs import Progress, Runs, alternate, no_progress
from fastvar_fx.models.sampling import CFG
from fastvar_fx.models.var import VAR
from fastvar_fx.quality.metrics import (
    Interval,
    frechet_distance,
    psnr,
    radial_spectrum,
    spectrum_distance,
    ssim,
    texture_features,
)
from fastvar_fx.quality.subjects import Case, Generation
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import transform

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "psnr": "peak signal-to-noise ratio to the dense image of the same seed, dB",
        "ssim": "structural similarity to it, at most 1",
        "agreement": "share of the tokens of the pruned steps that equal those of the dense run",
        "spectrum": "distance of radial power spectra, rms over the rings, dB",
        "frechet": "Frechet distance of fixed texture features (not FID) to the held-out images",
        "bits": "bits per token of given images, teacher-forced through the model's own loop: of "
        "held-out ones without guidance, of dense draws with the guidance of the draws",
    }
)
"""The metrics by name."""

DENSE: Final = "dense"
HELD_OUT: Final = "held-out images"
"""The references of a metric: the dense model's draws, or images that it was not trained on."""

_Images = Sequence[tuple[Tensor, Tensor]]
"""What the dense and the pruned model drew, seed by seed."""

_PRUNED: Final = "pruned"

_SCORED: Final = 8
"""Images whose likelihood is found at once."""


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One metric.

    Attributes:
        metric: A key of `METRICS`.
        against: The reference, `DENSE` or `HELD_OUT`.
        dense: The dense model's; None if it is the reference.
        pruned: The pruned model's.
        difference: Pruned minus dense, with the interval of the paired differences; None if the
            dense model is the reference.
        values: The pruned model's, one per seed or image, for paired comparisons of methods.
        dense_values: The dense model's; empty if it is the reference.
    """

    metric: str
    against: str
    dense: Interval | None
    pruned: Interval
    difference: Interval | None
    values: tuple[float, ...]
    dense_values: tuple[float, ...] = ()

    @classmethod
    def to_dense(cls, metric: str, values: Sequence[float]) -> Score:
        """Returns a score of the pruned model against the dense one, from one value per seed."""
        return cls(metric, DENSE, None, Interval.of(values), None, tuple(values))

    @classmethod
    def of_both(
        cls, metric: str, against: str, dense: Sequence[float], pruned: Sequence[float]
    ) -> Score:
        """Returns a score of both models against another reference, from paired values."""
        differences = [p - d for d, p in zip(dense, pruned, strict=True)]
        of = Interval.of
        both = tuple(pruned), tuple(dense)
        return cls(metric, against, of(dense), of(pruned), of(differences), *both)

    @classmethod
    def to_held_out(cls, metric: str, pairs: _Images, distance: Callable[[Tensor], float]) -> Score:
        """Returns a score of both models from the distances of their values to held-out images."""
        dense, pruned = ([distance(value) for value in of] for of in zip(*pairs, strict=True))
        return cls.of_both(metric, HELD_OUT, dense, pruned)

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
        agreement: Share of the tokens that equal those of the dense run; None if not measured, or
            if the step is skipped.
        bits_dense: Bits per token, dense, of the held-out images or, without any, of what the dense
            model drew; None if not measured.
        bits_pruned: The same, pruned.
    """

    step: int
    agreement: float | None = None
    bits_dense: float | None = None
    bits_pruned: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """What pruning changed: scores of the whole images, and of each step."""

    scores: tuple[Score, ...]
    steps: tuple[StepScore, ...]

    def score(self, metric: str, against: str) -> Score | None:
        """Returns a score; None if it was not measured."""
        found = (s for s in self.scores if (s.metric, s.against) == (metric, against))
        return next(found, None)


@dataclass(frozen=True)
class Speed:
    """Times and FLOPs of one batch, dense and pruned.

    Attributes:
        transformer: The blocks over a generation.
        total: The whole generation, image decoder included.
        flops_dense: FLOPs of the blocks' matrix products.
        flops_pruned: The same, pruned.
        steps: The blocks at each step, dense and pruned; skipped steps take no time.
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
        case: The model, its schedule and the held-out images.
        seeds: The seeds drawn from.
        batch: Images per seed.
        fidelity: What pruning changed.
        speed: Times and FLOPs; None if nothing was timed.
        left_out: Metrics that do not apply, with the reason.
        method: The name of the method that prunes.
    """

    case: Case
    seeds: tuple[int, ...]
    batch: int
    fidelity: Fidelity
    speed: Speed | None
    left_out: dict[str, str]
    method: str


# --- measuring --------------------------------------------------------------------------------


def token_bits(model: VAR, tokens: Sequence[Tensor], labels: Tensor, cfg: float = 0.0) -> Tensor:
    """Returns the bits per token of given images at each step, float64 (N, K), means over the map.

    The tokens are given to the model's own inference loop, so a transformed model prunes as in
    generation.

    Args:
        model: Original or transformed.
        tokens: Token maps of N images, int64 (N, l) each.
        labels: Their classes, (N,); -1 for no class.
        cfg: Strength of guidance at the last step; 0 for none.

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

    model.infer_fhat(len(labels), labels, cfg=cfg, choose=force)
    return torch.stack(bits, dim=1).cpu()


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the metrics asked for, in the order of `METRICS`.

    Raises:
        ModelError: If one is unknown, or there is none.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ModelError(f"no metric is named {unknown[0]!r}; {did_you_mean(unknown[0], METRICS)}")
    if not names:
        raise ModelError(f"no metric asked for; choose from {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The dense model's draws and likelihoods, with which pruned models are compared.

    Attributes:
        case: What is evaluated.
        metrics: Those of the metrics asked for that apply.
        left_out: The others, with the reason.
        generations: What the dense model drew, by seed.
        given: Images whose likelihood is compared, with the dense bits per token (N, K).
        progress: Called with a short text before each draw.
    """

    case: Case
    metrics: tuple[str, ...]
    left_out: dict[str, str]
    generations: dict[int, Generation]
    given: tuple[tuple[_Given, Tensor], ...]
    progress: Progress

    @classmethod
    def of(
        cls,
        case: Case,
        metrics: Sequence[str] = tuple(METRICS),
        seeds: Sequence[int] = (0, 1, 2, 3),
        progress: Progress = no_progress,
    ) -> Baseline:
        """Runs the dense model: draws from every seed, and measures the likelihoods."""
        asked = check_metrics(metrics)
        generations = dict(_draw(case, case.model, seeds, DENSE, progress))
        reasons = _why_not(case, next(iter(generations.values())))
        applicable = tuple(name for name in asked if name not in reasons)
        given = _given_tokens(case, generations) if "bits" in applicable else []
        return cls(
            case=case,
            metrics=applicable,
            left_out={name: reasons[name] for name in asked if name in reasons},
            generations=generations,
            given=tuple((each, each.bits(case.model, DENSE, progress)) for each in given),
            progress=progress,
        )

    def compare(self, fast: nn.Module, schedule: Schedule | None = None) -> Fidelity:
        """Returns how a transformed model differs from the dense one.

        Args:
            fast: A transform of the case's model.
            schedule: The schedule it was transformed with; None for the case's.
        """
        schedule = schedule or self.case.schedule
        drawn = schedule.steps - len(schedule.full_steps)
        pruned = dict(_draw(self.case, fast, self.generations, _PRUNED, self.progress))
        pairs = [(self.generations[seed], generation) for seed, generation in pruned.items()]
        pruned_steps = [step for step in schedule.pruned_steps if step < drawn]
        scores = list(self._scores(pairs, pruned_steps))
        steps = [StepScore(step) for step in range(schedule.steps)]
        if "agreement" in self.metrics:
            for step in range(drawn):
                agreement = Interval.of([_agreement(d, p, [step]) for d, p in pairs]).mean
                steps[step] = replace(steps[step], agreement=agreement)
        for number, (given, dense) in enumerate(self.given if drawn == schedule.steps else ()):
            scored = fast if given.cfg else self._guided(fast, schedule)
            bits = given.bits(scored, _PRUNED, self.progress)
            scores.append(_bits_score(given.against, dense, bits, schedule))
            if number == 0:
                means = zip(steps, dense.mean(0).tolist(), bits.mean(0).tolist(), strict=True)
                steps = [replace(s, bits_dense=d, bits_pruned=p) for s, d, p in means]
        return Fidelity(tuple(scores), tuple(steps))

    def _guided(self, fast: nn.Module, schedule: Schedule) -> nn.Module:
        """Returns a transformed model that runs all rows: what is given has no guidance to end."""
        if schedule.guidance_until is None:
            return fast
        whole, method = replace(schedule, guidance_until=None), Engine.of(fast).plan.method
        return transform(self.case.model, whole, method=method, strict=False)

    def _scores(
        self, pairs: Sequence[tuple[Generation, Generation]], pruned_steps: Sequence[int]
    ) -> Iterator[Score]:
        """Yields all scores but the bits."""
        images = [(dense.picture, pruned.picture) for dense, pruned in pairs]
        scorers: dict[str, Callable[[], Iterator[Score]]] = {
            "psnr": lambda: self._psnr(images),
            "ssim": lambda: self._ssim(images),
            "agreement": lambda: self._agreement(pairs, pruned_steps),
            "spectrum": lambda: self._spectrum(images),
            "frechet": lambda: self._frechet(images),
        }
        for name in self.metrics:
            if name in scorers:
                yield from scorers[name]()

    def _psnr(self, images: _Images) -> Iterator[Score]:
        span = _span(list(self.generations.values()))
        yield Score.to_dense("psnr", [float(psnr(p, d, span).mean()) for d, p in images])

    def _ssim(self, images: _Images) -> Iterator[Score]:
        yield Score.to_dense("ssim", [float(ssim(p, d).mean()) for d, p in images])

    def _agreement(
        self, pairs: Sequence[tuple[Generation, Generation]], steps: Sequence[int]
    ) -> Iterator[Score]:
        if steps:
            yield Score.to_dense("agreement", [_agreement(d, p, steps) for d, p in pairs])

    def _spectrum(self, images: _Images) -> Iterator[Score]:
        spectra = [(radial_spectrum(d), radial_spectrum(p)) for d, p in images]
        values = [float(spectrum_distance(p, d).mean()) for d, p in spectra]
        yield Score.to_dense("spectrum", values)
        if self.case.held_out is not None:
            reference = radial_spectrum(self.case.held_out.images).mean(0)
            yield Score.to_held_out(
                "spectrum", spectra, lambda s: float(spectrum_distance(s.mean(0), reference))
            )

    def _frechet(self, images: _Images) -> Iterator[Score]:
        if self.case.held_out is not None:
            reference = texture_features(self.case.held_out.images)
            features = [(texture_features(d), texture_features(p)) for d, p in images]
            yield Score.to_held_out("frechet", features, lambda f: frechet_distance(f, reference))


def _draw(
    case: Case, model: nn.Module, seeds: Iterable[int], kind: str, progress: Progress
) -> Iterator[tuple[int, Generation]]:
    for seed in seeds:
        progress(f"{kind}, seed {seed}")
        yield seed, case.draw(model, seed)


@dataclass(frozen=True)
class _Given:
    """Images whose tokens are given to a model.

    Attributes:
        labels: Their classes, int64 (N,).
        tokens: Their token maps, int64 (N, l) each.
        against: Where they come from, `DENSE` or `HELD_OUT`.
        cfg: Strength of the guidance with which they are scored; 0 for none.
    """

    labels: Tensor
    tokens: tuple[Tensor, ...]
    against: str
    cfg: float

    def bits(self, model: Any, kind: str, progress: Progress) -> Tensor:
        """Returns the bits per token of each image and step, float64 (N, K).

        The images are taken in batches; the last one is filled up with the first images.
        """
        progress(f"{kind}, bits of given tokens of {self.against}")
        count = len(self.labels)
        batch = min(_SCORED, count)
        indices = (torch.arange(-(-count // batch) * batch) % count).view(-1, batch)
        bits = [
            token_bits(model, [t[at] for t in self.tokens], self.labels[at], self.cfg)
            for at in indices
        ]
        return torch.cat(bits)[:count]


def _given_tokens(case: Case, generations: Mapping[int, Generation]) -> list[_Given]:
    """Returns the tokens of the held-out images, if there are any, and of the dense draws."""
    drawn = [(g.labels, g.tokens) for g in generations.values()]
    known = [(labels, maps) for labels, maps in drawn if labels is not None and maps is not None]
    maps = tuple(torch.cat(tokens) for tokens in zip(*(maps for _, maps in known), strict=True))
    given = [_Given(torch.cat([labels for labels, _ in known]), maps, DENSE, CFG)]
    held_out = case.held_out
    if held_out is not None and held_out.tokens is not None:
        given.insert(0, _Given(held_out.labels, held_out.tokens, HELD_OUT, 0.0))
    return given


def _why_not(case: Case, drawn: Generation) -> dict[str, str]:
    """Returns the metrics that do not apply, with the reason."""
    reasons: dict[str, str] = {}
    if drawn.images is None:
        no_decoder = "the package has no image decoder for this model; others compare latents"
        reasons |= dict.fromkeys(("ssim", "frechet"), no_decoder)
    elif case.held_out is None:
        reasons["frechet"] = "there are no held-out images to compare with"
    if drawn.tokens is None:
        reasons |= dict.fromkeys(("agreement", "bits"), "its loop does not return the tokens")
    elif case.schedule.full_steps:
        reasons["bits"] = "a skipped step gives its tokens no likelihood"
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
        progress: Called with a short text before each run.
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
    """Returns the speed of two models whose runs were counted and timed."""
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
    method: str = "fastvar",
    metrics: Sequence[str] = tuple(METRICS),
    seeds: int = 4,
    repeats: int = 3,
    progress: Progress = no_progress,
) -> Evaluation:
    """Returns quality and speed of a pruned model.

    Args:
        case: The model, its schedule and the held-out images.
        method: How branches are pruned, one of `fastvar_fx.methods.names()`.
        metrics: Keys of `METRICS`; the result lists those that do not apply.
        seeds: How many seeds to draw from, each a batch; at least 1.
        repeats: Timed runs of each model; 0 to time nothing.
        progress: Called with a short text before each part.

    Raises:
        ArgumentError: An unknown method.
        ModelError: An unknown metric, no seed, or negative repeats.
        NothingPrunedError: If nothing could be pruned.
    """
    chosen = check_metrics(metrics)
    if seeds < 1 or repeats < 0:
        raise ModelError(f"asked for {seeds} seeds and {repeats} repeats; give 1 and 0 at least")
    progress("tracing")
    fast = case.pruned(method)
    baseline = Baseline.of(case, chosen, range(seeds), progress)
    fidelity = baseline.compare(fast)
    speed = measure_speed(case, fast, repeats, progress) if repeats else None
    batch = len(baseline.generations[0].latents)
    chosen_seeds = tuple(range(seeds))
    return Evaluation(case, chosen_seeds, batch, fidelity, speed, baseline.left_out, method)
