"""A model to draw many images with: named, or of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastvar_fx.cli.options import Asked
from fastvar_fx.cli.terminal import usage
from fastvar_fx.cli.user_code import call_factory, load, users_code
from fastvar_fx.errors import RunError
from fastvar_fx.measuring.presets import default_device
from fastvar_fx.sampling.drawing import Draw, draw_var
from fastvar_fx.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model, dense, and how to draw a batch of it.

    Attributes:
        model: In eval mode.
        parts: All modules with weights.
        draw: Draws a batch.
        schedule: The schedule that it is pruned by; None to draw dense.
        classes: How many classes it has; None if unknown.
    """

    model: nn.Module
    parts: tuple[nn.Module, ...]
    draw: Draw
    schedule: Schedule | None
    classes: int | None = None


def source_of(asked: Asked, draw: str | None, *, dense: bool) -> Source:
    """Returns the model that is asked for, named or of `package.module:factory`.

    Args:
        asked: The options that choose the model and its schedule.
        draw: `package.module:function` for a model of the user's own.
        dense: Whether to leave out the schedule.
    """
    find = _own if ":" in asked.model else _named
    return find(asked, draw, dense=dense)


def _named(asked: Asked, draw: str | None, *, dense: bool) -> Source:
    if draw is not None:
        usage(f"--draw is for package.module:factory; {asked.model} has its own generation loop")
    subject = asked.subject()
    model: Any = subject.model
    device = default_device()
    return Source(
        model=model.to(device),
        parts=(model, model.vae.to(device)),
        draw=draw_var,
        schedule=None if dense else subject.schedule,
        classes=model.num_classes,
    )


def _own(asked: Asked, draw: str | None, *, dense: bool) -> Source:
    if draw is None:
        usage(
            f"{asked.model} needs --draw package.module:function, which draws a batch, such as  "
            f"def draw(model, seeds, labels): return model.generate(labels, seeds)"
        )
    schedule = None if dense else asked.chosen_schedule(None)
    function = users_code(f"--draw {draw}", RunError)(load(draw, "--draw"))
    model = call_factory(asked.model)
    return Source(model=model, parts=(model,), draw=function, schedule=schedule)
