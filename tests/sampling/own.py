"""A user's module: models of a toy generator, and functions that draw batches of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvar_fx import Schedule
from fastvar_fx.models import var as var_models
from fastvar_fx.models.var import VAR
from fastvar_fx.sampling import one_by_one
from fastvar_fx.sampling.drawing import draw_var

SCALES = (1, 2, 3, 4, 5)
SCHEDULE = Schedule(SCALES, (0.5, 0.75))
SEED = 0
SIDE = 6


class Toy(nn.Module):
    """Draws images of SIDE x SIDE pixels in no time."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.25), requires_grad=False)


def toy() -> nn.Module:
    return Toy().eval()


def noise(model: Toy, seed: int, condition: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, SIDE, SIDE, generator=generator) * (1 - model.level)
    return images + model.level * (len(str(condition)) % 4) / 4


def draw(model: Toy, seeds: Sequence[int], conditions: Sequence[Any]) -> Tensor:
    """Draws from the seeds; the file `log` of the current folder lists them."""
    with Path("log").open("a") as log:
        log.writelines(f"{seed}\n" for seed in seeds)
    return torch.stack([noise(model, *each) for each in zip(seeds, conditions, strict=True)])


def draw_and_die(model: Toy, seeds: Sequence[int], conditions: Sequence[Any]) -> Tensor:
    """Kills the process of rank 1 while it draws image 12, unless the file `heal` is there."""
    if os.environ.get("RANK") == "1" and 12 in seeds and not Path("heal").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(model, seeds, conditions)


def draw_globally(model: Toy, seeds: Sequence[int], conditions: Sequence[Any]) -> Tensor:
    return torch.rand(len(seeds), 3, SIDE, SIDE)


@one_by_one
def draw_unseeded(model: Toy, seed: int, condition: object) -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE) * model.level


def var() -> VAR:
    return var_models.build("tiny", scales=SCALES, depth=2, seed=SEED)


def draw_var_and_die(model: VAR, seeds: Sequence[int], classes: Sequence[int]) -> Tensor:
    if os.environ.get("RANK") == "1" and 6 in seeds and not Path("heal").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return draw_var(model, seeds, classes)
