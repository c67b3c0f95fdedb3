"""The models that `evaluate` knows, each with its schedule, its loop and its held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvar_fx.errors import ModelError, ScheduleError, did_you_mean
from fastvar_fx.measuring.presets import PRESETS, default_device, random_text
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.methods import Method
from fastvar_fx.models import demo_weights, load, var
from fastvar_fx.models.hart import HART
from fastvar_fx.models.infinity import Infinity
from fastvar_fx.models.sampling import CFG, TOP_K, TOP_P, sample_top_k_top_p, spread_classes
from fastvar_fx.models.var import VAR
from fastvar_fx.models.vqvae import VQVAE
from fastvar_fx.schedule import Schedule
from fastvar_fx.transform import trace, transform

DEMO: Final = demo_weights.NAME
"""The model whose weights are packaged."""

_SUFFIXES: Final = (".jpeg", ".jpg", ".png", ".webp")
_RATIOS: Final = (0.5, 0.75)
_MOST_CLASSES: Final = 5


# --- what is evaluated ------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """The result of one seed, on the CPU.

    Attributes:
        latents: (B, C, h, w).
        images: (B, 3, H, W) in [0, 1]; None where the package has no image decoder.
        tokens: The token map of each step, int64 (B, l); None if the loop does not return them.
        labels: The classes drawn, int64 (B,); None where there are none.
    """

    latents: Tensor
    images: Tensor | None = None
    tokens: tuple[Tensor, ...] | None = None
    labels: Tensor | None = None

    @property
    def picture(self) -> Tensor:
        """The images, or the latents where there are none."""
        return self.latents if self.images is None else self.images


@dataclass(frozen=True)
class HeldOut:
    """Images that a model was not trained on.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        labels: Their classes, int64 (N,), -1 where unknown.
        tokens: Their token maps, int64 (N, l) each; None if the model has no encoder.
    """

    images: Tensor
    labels: Tensor
    tokens: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Case:
    """A model to evaluate.

    Attributes:
        name: Its name in reports.
        model: The dense model, in eval mode.
        schedule: The scales that it draws, and the pruning ratios.
        draw: Draws a batch from a seed: (model, seed) -> generation.
        held_out: Images to compare with, if there are any.
        note: A remark for the reader of a report; may be empty.
    """

    name: str
    model: nn.Module
    schedule: Schedule
    draw: Callable[[Any, int], Generation]
    held_out: HeldOut | None = None
    note: str = ""

    def subject(self, seed: int) -> Subject:
        """Returns the subject of counting and timing, one generation from this seed."""
        return Subject(
            self.name, self.model, self.schedule, lambda model: self.draw(model, seed), seed=seed
        )

    def pruned(self, method: str | Method = "fastvar") -> nn.Module:
        """Returns the transformed model, with its programs traced."""
        fast = transform(self.model, self.schedule, conditional="first", method=method)
        trace(fast, lambda model: self.draw(model, 0))
        return fast


def draw_var(
    model: VAR, seed: int, classes: Sequence[int], on_step: var.OnStep | None = None
) -> Generation:
    """Draws an image of each class, with classifier-free guidance of strength `CFG`.

    Args:
        model: Original or transformed.
        seed: Seed of the draws; two models draw the same tokens as long as their logits agree.
        classes: The class of each image.
        on_step: Called after each step with its index and the latents so far.
    """
    device = model.lvl_1L.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens: list[Tensor] = []

    def choose(step: int, logits: Tensor) -> Tensor:
        likeliest = min(TOP_K, logits.shape[-1])
        tokens.append(sample_top_k_top_p(logits, likeliest, TOP_P, generator))
        return tokens[-1]

    labels = torch.tensor(classes)
    with torch.no_grad():
        latents = model.infer_fhat(len(classes), labels, on_step=on_step, cfg=CFG, choose=choose)
        images = model.vae.decode(latents).float().cpu()
    return Generation(latents.cpu(), images, tuple(t.cpu() for t in tokens), labels)


# --- by name ----------------------------------------------------------------------------------


def case_names() -> tuple[str, ...]:
    """Returns the names of the models that `case` knows."""
    return (DEMO, *PRESETS)


def own_schedule(name: str) -> Schedule:
    """Returns the schedule with which a model is evaluated by default.

    Raises:
        ModelError: If no model has this name; the message offers close ones.
    """
    if name == DEMO:
        return Schedule(var.CONFIGS[DEMO].scales, _RATIOS)
    if name not in PRESETS:
        close = did_you_mean(name, case_names())
        raise ModelError(f"no model to evaluate is named {name!r}; {close}")
    return PRESETS[name].schedule


def case(
    name: str,
    schedule: Schedule | None = None,
    *,
    classes: Sequence[int] | None = None,
    folder: Path | None = None,
    held_out: int = 8,
) -> Case:
    """Returns a model to evaluate, on the GPU if there is one, else on the CPU.

    Args:
        name: One of `case_names()`.
        schedule: Its scales and pruning ratios; None for its own.
        classes: Classes to draw, one image each per seed; None for five spread evenly.
        folder: Folder of held-out images, of the size that the model draws. A number and a dash at
            the beginning of a file's name are its class, as in `3-lake.jpg`; other files have none.
        held_out: Number of held-out images of the packaged model, where no folder is given.

    Raises:
        ModelError: If the name or a class is unknown, classes or held-out images are given for a
            model that has none, or the folder has no usable images.
        ScheduleError: If the trained model draws other scales.
    """
    schedule = schedule or own_schedule(name)
    device = default_device()
    model: Any = _model(name, schedule).to(device)
    note = "" if name == DEMO else "random weights: the numbers do not hold for trained models"
    if isinstance(model, VAR):
        model.vae.to(device)
        drawn = _check_classes(model, classes)
        others = _held_out_of(model, name, folder, held_out)
        draw: Callable[[Any, int], Generation] = partial(draw_var, classes=drawn)
        return Case(name, model, schedule, draw, others, note)
    for what, given in (("classes", classes), ("decoder for images to compare", folder)):
        if given is not None:
            raise ModelError(f"{name} has no {what}; leave them out")
    return Case(name, model, schedule, partial(_draw_text, scales=schedule.scales), note=note)


def _model(name: str, schedule: Schedule) -> nn.Module:
    own = own_schedule(name)
    if name != DEMO:
        return PRESETS[name].at(schedule).build()
    if schedule.scales != own.scales:
        raise ScheduleError(
            f"{name} was trained on maps {own.scales}, but the schedule has {schedule.scales}; "
            f"give a schedule with the maps of the model"
        )
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be loaded: {error}") from error


def _draw_text(model: Infinity | HART, seed: int, scales: Any) -> Generation:
    """Draws one image of a random prompt."""
    text = random_text(model, 1, seed)
    with torch.no_grad():
        return Generation(model.autoregressive_infer_cfg(text, scales, g_seed=seed).float().cpu())


def _check_classes(model: VAR, classes: Sequence[int] | None) -> tuple[int, ...]:
    if classes is None:
        return spread_classes(model.num_classes, min(model.num_classes, _MOST_CLASSES))
    unknown = [c for c in classes if not 0 <= c < model.num_classes]
    if unknown or not classes:
        found = unknown[0] if unknown else "none"
        raise ModelError(f"the model has classes 0 to {model.num_classes - 1}; found {found}")
    return tuple(classes)


# --- held-out images ------------------------------------------------------------------------------


def _held_out_of(model: VAR, name: str, folder: Path | None, count: int) -> HeldOut | None:
    if folder is not None:
        side = model.vae.pyramid.factor * model.scales[-1]
        images, labels = read_folder(folder, side, model.num_classes)
    elif name == DEMO:
        images, labels = demo_weights.held_out(count)
        images = (images + 1) / 2
    else:
        return None
    return HeldOut(images, labels, _tokens_of(model, images))


def _tokens_of(model: VAR, images: Tensor) -> tuple[Tensor, ...] | None:
    if not isinstance(model.vae, VQVAE):
        return None
    parts = [
        model.vae.encode(some.to(model.lvl_1L.device) * 2 - 1, model.scales)
        for some in torch.split(images, 8)
    ]
    return tuple(torch.cat(maps).cpu() for maps in zip(*parts, strict=True))


def read_folder(folder: Path, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Returns the images of a folder (N, 3, side, side) in [0, 1] and their classes, int64 (N,).

    Args:
        folder: Its files are read in the order of their names, without subfolders.
        side: Required height and width in pixels.
        classes: Number of classes; see `case` for the class in a file's name.

    Raises:
        ModelError: If there is no such folder or no image in it, a file cannot be read, or an image
            has another size or an unknown class.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give one with held-out images")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise ModelError(f"{folder} holds no image; put files {', '.join(_SUFFIXES)} there")
    images = torch.stack([_read(file, side) for file in files])
    return images, torch.tensor([_class_of(file, classes) for file in files])


def _read(file: Path, side: int) -> Tensor:
    try:
        pixels = demo_weights.read_image(file)
    except OSError as error:
        raise ModelError(f"{file} is not an image that pillow can read: {error}") from error
    height, width = pixels.shape[1:]
    if (height, width) != (side, side):
        raise ModelError(
            f"the model draws {side} x {side} pixels, but {file} has {width} x {height}; crop or "
            f"resize it"
        )
    return pixels.float() / 255


def _class_of(file: Path, classes: int) -> int:
    number, dash, _ = file.name.partition("-")
    if not (dash and number.isdecimal()):
        return -1
    if int(number) >= classes:
        raise ModelError(
            f"the name of {file} begins with class {number}; the model has classes 0 to "
            f"{classes - 1}"
        )
    return int(number)
