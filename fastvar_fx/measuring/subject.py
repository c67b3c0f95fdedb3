"""A model to be measured: its schedule, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvar_fx.engine.find_blocks import find_blocks
from fastvar_fx.engine.plan import LiveRows
from fastvar_fx.measuring.runs import Runs
from fastvar_fx.schedule import Schedule


@dataclass(frozen=True)
class Subject:
    """A model, the schedule it is pruned by and how to run it.

    Attributes:
        name: What to call it.
        model: In eval mode.
        schedule: The scales its loop draws and the pruning ratios.
        run: Runs one generation of the model; the demo needs images (B, 3, H, W) in [0, 1] back.
        blocks: Module path of the transformer blocks; None to find them.
        seed: Seed of torch's global generators for each generation.
        note: What a reader of the pictures has to know; may be empty.
        run_by_step: As `run`, but returns the first image after each step, (K, 3, H, W); None if
            the model's steps cannot be drawn.
        conditional: Which half of the batch is the conditional one, as in `transform`.
    """

    name: str
    model: nn.Module
    schedule: Schedule
    run: Callable[[Any], Any]
    blocks: str | None = None
    seed: int = 0
    note: str = ""
    run_by_step: Callable[[Any], Any] | None = None
    conditional: LiveRows | None = "first"

    @property
    def weight(self) -> Tensor:
        """A parameter of the blocks, which has the model's device and dtype."""
        block = next(iter(find_blocks(self.model, self.blocks).values()))
        return next(block.parameters())

    def generate(self, model: nn.Module) -> Any:
        """Runs one generation from the seed; torch's global generators stay as they were."""
        return self._from_seed(self.run, model)

    def generate_by_step(self, model: nn.Module) -> Any:
        """Runs `run_by_step` as `generate` runs `run`."""
        assert self.run_by_step is not None
        return self._from_seed(self.run_by_step, model)

    def _from_seed(self, run: Callable[[Any], Any], model: nn.Module) -> Any:
        device = self.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.seed)
            return run(model)

    def runs(self, model: nn.Module, drawn: int | None = None) -> Runs:
        """Returns runs of the model or of a transform of it, none made yet.

        Args:
            model: The model to run.
            drawn: How many steps of the schedule it draws; None for all.
        """
        blocks = tuple(find_blocks(self.model, self.blocks))
        return Runs(partial(self.generate, model), model, blocks, self.schedule, drawn)
