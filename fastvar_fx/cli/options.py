"""Options shared by several commands, and the model that they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from torch import Tensor

from fastvar_fx import methods
from fastvar_fx.cli.terminal import usage
from fastvar_fx.cli.user_code import call_factory, load, users_code
from fastvar_fx.engine.plan import LiveRows
from fastvar_fx.errors import ModelError, RunError, ScheduleError, did_you_mean
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.models import checkpoints, demo_weights, var
from fastvar_fx.models.sampling import TOP_K, TOP_P, spread_classes
from fastvar_fx.schedule import VAR_512, Schedule

_RATIOS: Final = (0.5, 0.75)
DEMO: Final = demo_weights.NAME
"""The packaged model, which is trained."""
RANDOM: Final = "random"
"""A wider, untrained model: large enough for pruning to pay off, small enough for two cores."""
_RANDOM_SIZES: Final[dict[str, Any]] = {
    "depth": 6,
    "width": 512,
    "heads": 8,
    "num_classes": 10,
}
_KNOWN: Final = (DEMO, RANDOM, *(name for name in var.CONFIGS if name != DEMO))
NAMES: Final = f"{', '.join(_KNOWN)} (random weights except for {DEMO})"
_MOST_CLASSES: Final = 100_000
_TRAINED: Final = "trained on rendered solids for hours on one core: the pictures are rough"
_UNTRAINED: Final = "random weights: the pictures show texture, no objects"


class OnFull(Enum):
    """Choices of `--on-full`."""

    SKIP = "skip"
    CACHE = "cache"


class HalfName(Enum):
    """Choices of `--conditional`."""

    FIRST = "first"
    LAST = "last"


ModelName = Annotated[
    str,
    typer.Argument(
        help=f"One of {NAMES}, or package.module:factory, "
        f"where factory() returns a model in eval mode."
    ),
]
PresetName = Annotated[str | None, typer.Option("--preset", help="Name of a schedule.")]
ScheduleFile = Annotated[
    Path | None,
    typer.Option("--schedule", exists=True, dir_okay=False, help="JSON file of a schedule."),
]
Ratios = Annotated[
    str | None,
    typer.Option("--ratios", help="Pruning ratios of the last steps, such as 0.5,0.75."),
]
GuidanceUntil = Annotated[
    int | None,
    typer.Option(
        "--guidance-until",
        min=1,
        help="First step without guidance, counted from 0: from there on the blocks run the "
        "conditional half of the batch.",
    ),
]
Conditional = Annotated[
    HalfName | None,
    typer.Option(
        "--conditional",
        help="Which half of the batch is the conditional one, for a model of your own.",
    ),
]
Blocks = Annotated[
    str | None,
    typer.Option("--blocks", help="Module path of the transformer blocks; found if not given."),
]
OnFullName = Annotated[
    OnFull,
    typer.Option("--on-full", help="Whether the last steps of ratio 1 are left out, or run."),
]
Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        help="package.module:function, where function(model) runs one generation and (for the "
        "demo) returns images (B, 3, H, W) in [0, 1]. Needed for a model of your own.",
    ),
]
MethodName = Annotated[
    str, typer.Option("--method", help=f"How branches are pruned: {', '.join(methods.names())}.")
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Images at once.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that choose the model, the schedule and how to run it."""

    model: str
    preset: str | None
    schedule_file: Path | None
    ratios: str | None
    blocks: str | None
    run: str | None
    batch: int | None
    guidance_until: int | None = None
    conditional: HalfName | None = None
    seed: int = 0

    @property
    def half(self) -> LiveRows | None:
        """Which half of the batch is the conditional one; the first in the named models."""
        if ":" not in self.model:
            return "first"
        if self.conditional is None:
            return None
        return "first" if self.conditional is HalfName.FIRST else "last"

    def subject(self) -> Subject:
        """Builds the model and its schedule."""
        return self._own_model() if ":" in self.model else self._named_model()

    def _named_model(self) -> Subject:
        if self.run is not None:
            usage(f"--run is for package.module:factory; {self.model} has its own generation loop")
        if self.conditional is not None:
            usage(f"--conditional is for package.module:factory; it is known of {self.model}")
        schedule = self.chosen_schedule(self._named_scales())
        sides = _square_sides(schedule)
        try:
            model = _trained(sides) if self.model == DEMO else _random(self.model, sides)
        except (OSError, TypeError, ValueError) as error:
            raise ModelError(f"{self.model} cannot be built: {error}") from error
        name = f"VAR, {model.depth} blocks, width {model.width}"
        note = _TRAINED if self.model == DEMO else _UNTRAINED
        batch = self.batch or 2
        run = partial(_run_var, batch=batch, seed=self.seed)
        by_step = partial(_run_var_by_step, batch=batch, seed=self.seed)
        return Subject(name, model, schedule, run, self.blocks, self.seed, note, by_step)

    def _named_scales(self) -> tuple[int, ...]:
        if self.model == RANDOM:
            return VAR_512
        if self.model not in var.CONFIGS:
            raise ModelError(
                f"no model is named {self.model!r}; {did_you_mean(self.model, _KNOWN)} Give your "
                f"own model as package.module:factory"
            )
        return var.CONFIGS[self.model].scales

    def _own_model(self) -> Subject:
        if self.run is None:
            usage(
                f"{self.model} needs --run package.module:function, which runs one generation, "
                f"such as  def run(model): return model.generate(batch=2)"
            )
        if self.batch is not None:
            usage("--batch is for the named models; your --run function decides the batch")
        schedule = self.chosen_schedule(None)
        run = users_code(f"--run {self.run}", RunError)(load(self.run, "--run"))
        return Subject(
            self.model,
            call_factory(self.model),
            schedule,
            run,
            self.blocks,
            self.seed,
            conditional=self.half,
        )

    def generations(self, subject: Subject, seeds: Iterable[int]) -> list[Callable[[Any], Any]]:
        """Returns generations of the model from several seeds."""
        if ":" in self.model:
            return [replace(subject, seed=seed).generate for seed in seeds]
        return [partial(_run_var, batch=self.batch or 2, seed=seed) for seed in seeds]

    @property
    def head(self) -> str | None:
        """The module path of what returns the logits of a named model."""
        return None if ":" in self.model else "head"

    def chosen_schedule(self, own: Sequence[int] | None) -> Schedule:
        """Returns the schedule that is asked for; `own` are the scales of a named model."""
        base = None if own is None else Schedule(own, _RATIOS)
        chosen = chosen_schedule(self.model, self.preset, self.schedule_file, self.ratios, base)
        return with_guidance(chosen, self.guidance_until)


def chosen_schedule(
    model: str, preset: str | None, file: Path | None, ratios: str | None, own: Schedule | None
) -> Schedule:
    """Returns the chosen schedule, or the model's own, with other ratios if some are given."""
    if preset is not None and file is not None:
        usage("--preset and --schedule exclude each other")
    if preset is not None:
        base = Schedule.preset(preset)
    elif file is not None:
        base = Schedule.from_json(file.read_text(encoding="utf-8"))
    elif own is not None:
        base = own
    else:
        usage(f"{model} needs --preset NAME or --schedule FILE with the scales it draws")
    return base if ratios is None else _with_ratios(base, ratios)


def with_guidance(schedule: Schedule, until: int | None) -> Schedule:
    """Returns a schedule whose guidance ends at a step; None leaves it as it is."""
    return schedule if until is None else replace(schedule, guidance_until=until)


def _with_ratios(schedule: Schedule, text: str) -> Schedule:
    """Returns a schedule with other ratios; the cache step moves if their number changes."""
    ratios = number_list("--ratios", text)
    kept = len(ratios) == len(schedule.ratios)
    cache_step = schedule.cache_step if kept else schedule.steps - len(ratios) - 1
    return replace(schedule, ratios=tuple(ratios), cache_step=cache_step)


def number_list(option: str, text: str) -> list[float]:
    """Returns the numbers in a text such as `0.5,0.75`, the value of an option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        usage(f"{option} takes numbers with commas, such as 0.5,0.75; found {text!r}")


def class_list(text: str | None) -> list[int] | None:
    """Returns the classes in a text such as `0,3` or `0-999`; None for None."""
    if text is None:
        return None
    classes: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not (low.isdecimal() and (high.isdecimal() or not dash)):
            usage(
                f"--classes takes numbers separated by commas, and ranges, such as 0,3 or 0-9; "
                f"found {text!r}"
            )
        classes += range(int(low), min(int(high or low), int(low) + _MOST_CLASSES) + 1)
    if not 1 <= len(classes) <= _MOST_CLASSES:
        usage(f"--classes takes 1 to {_MOST_CLASSES} classes; found {text!r}")
    return classes


def _square_sides(schedule: Schedule) -> tuple[int, ...]:
    if any(len(scale) != 2 or scale[0] != scale[1] for scale in schedule.scales):
        raise ScheduleError(
            f"the named models draw square maps; found {schedule.scales}. Give a model of your own "
            f"as package.module:factory"
        )
    return tuple(scale[0] for scale in schedule.scales)


def _trained(sides: tuple[int, ...]) -> var.VAR:
    model = checkpoints.load(DEMO)
    if sides != model.scales:
        raise ScheduleError(
            f"{DEMO} was trained on maps of sides {model.scales}; found {sides}. --model {RANDOM} "
            f"takes any"
        )
    return model


def _random(name: str, sides: tuple[int, ...]) -> var.VAR:
    if name == RANDOM:
        return var.build("tiny", scales=sides, **_RANDOM_SIZES)
    return var.build(name, scales=sides)


def _run_var(model: var.VAR, *, batch: int, seed: int, on_step: var.OnStep | None = None) -> Tensor:
    classes = torch.tensor(spread_classes(model.num_classes, batch))
    return model.autoregressive_infer_cfg(
        batch, classes, g_seed=seed, top_k=TOP_K, top_p=TOP_P, on_step=on_step
    )


def _run_var_by_step(model: var.VAR, *, batch: int, seed: int) -> Tensor:
    """Returns the first image after each step, (K, 3, H, W)."""
    latents: list[Tensor] = []
    _run_var(model, batch=batch, seed=seed, on_step=lambda _, f_hat: latents.append(f_hat[:1]))
    return torch.cat([model.vae.decode(each) for each in latents])
