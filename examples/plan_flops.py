"""What plans save of the blocks' FLOPs in large models, without their weights and without a GPU.

    python examples/plan_flops.py

Each model is drawn once, dense, on tensors without data, and the matrix products and attention of
its blocks are counted. FLOPs are not time, and say nothing about quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvar_fx import Schedule
from fastvar_fx.measuring.presets import PRESETS
from fastvar_fx.measuring.runs import Runs
from fastvar_fx.models.var import VAR

MODELS = ("infinity-2b-1024", "hart-0.7b-1024", "var-d30-512", "var-d30-256")
"""Presets of `fastvar-fx bench`: the sizes of the published models."""


COLUMNS = (
    "preset",
    "dense, TFLOP",
    "ratios of the last steps",
    "token pruning alone",
    "guidance off alone",
    "step skipping alone",
    "plan: skipping x guidance off x pruning",
    "plan in all",
)


class Blocks(NamedTuple):
    """What the blocks of a model cost, of one image with guidance.

    Attributes:
        depth: How many there are; they are alike.
        first: FLOPs of the first step, which may have tokens of a prompt too.
        weights: FLOPs of a later step by its summands: 1, tokens, tokens times keys.
    """

    depth: int
    first: int
    weights: NDArray[np.float64]

    def flops(self, schedule: Schedule) -> list[float]:
        """Returns the FLOPs of each step: 0 if it is skipped, half without guidance."""
        made = [0.0] * schedule.steps
        for layer in range(self.depth):
            keys = 0
            for step in range(schedule.steps - len(schedule.full_steps)):
                kept = schedule.kept(step, layer)
                keys += kept
                whole = self.weights.dot((1, kept, kept * keys)) if step else self.first
                made[step] += float(whole) / self.depth / (1 if schedule.guided(step) else 2)
        return made


def count(name: str) -> Blocks:
    """Returns what the blocks of a preset cost."""
    preset = PRESETS[name]
    schedule = preset.schedule
    with FakeTensorMode(), torch.no_grad():
        model: Any = preset.bare().eval()
        prompt = preset.prompt(model, 1)

        def draw() -> object:
            if isinstance(model, VAR):
                return model.infer_fhat(1, 0)
            return model.autoregressive_infer_cfg(prompt, schedule.scales, negative=prompt)

        depth = len(model.blocks)
        runs = Runs(draw, model, [f"blocks.{i}" for i in range(depth)], schedule)
        runs.count()
    tokens = np.array([schedule.tokens(step) for step in range(schedule.steps)], float)
    summands = np.stack([np.ones_like(tokens), tokens, tokens * tokens.cumsum()], axis=1)
    weights, *_ = np.linalg.lstsq(summands[1:], runs.flops[1:], rcond=None)
    np.testing.assert_allclose(summands[1:] @ weights, runs.flops[1:], rtol=1e-6)
    return Blocks(depth, runs.flops[0], weights)


def plans(paper: Schedule) -> dict[str, Schedule]:
    """Returns each part of a plan alone, and the parts added one by one."""
    pruned, skipped = len(paper.ratios) - len(paper.full_steps), len(paper.full_steps)
    until = paper.steps - len(paper.ratios)
    dense, drawn = (0.0,) * pruned, (0.0,) * skipped
    skipping = replace(paper, ratios=dense + (1.0,) * skipped)
    return {
        "pruning": replace(paper, ratios=paper.ratios[:pruned] + drawn),
        "guidance": replace(paper, ratios=dense + drawn, guidance_until=until),
        "skipping": skipping,
        "skipping, guidance": replace(skipping, guidance_until=until),
        "skipping, guidance, pruning": replace(paper, guidance_until=until),
    }


def row(name: str) -> str:
    """Returns a line of the table."""
    blocks, paper = count(name), PRESETS[name].schedule
    dense = sum(blocks.flops(Schedule(paper.scales, ())))
    by = {plan: dense / sum(blocks.flops(made)) for plan, made in plans(paper).items()}
    skip, unguided, whole = (by[plan] for plan in list(by)[2:])
    parts = f"{skip:.2f} x {unguided / skip:.2f} x {whole / unguided:.2f}"
    alone: Sequence[str] = [f"{by[plan]:.2f}x" for plan in ("pruning", "guidance", "skipping")]
    ratios = ", ".join(f"{ratio:g}" for ratio in paper.ratios)
    cells = [name, f"{dense / 1e12:.1f}", ratios, *alone, parts, f"**{whole:.2f}x**"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in MODELS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
