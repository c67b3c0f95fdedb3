"""What plans save of the FLOPs of large models, as an example counts it."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.measuring.presets import PRESETS, subject_of

EXAMPLE: Any = runpy.run_path(
    str(Path(__file__).parent.parent / "examples" / "plan_flops.py"), run_name="example"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infinity-tiny", "hart-tiny", "var-tiny"])
def test_flops_are_those_that_models_run(name: str) -> None:
    preset = PRESETS[name]
    subject = subject_of(name, preset, 1, torch.device("cpu"))
    fast = fastvar_fx.transform(subject.model, preset.schedule, blocks="blocks")
    report = fastvar_fx.trace(fast, subject.generate)
    blocks = EXAMPLE["count"](name)
    of_no_branch = blocks.weights[0]  # such as AdaLN
    drawn = [step for step in preset.schedule.pruned_steps if step not in report.skipping.steps]
    assert len(drawn) == 2
    as_run, dense = (
        blocks.flops(s) for s in (preset.schedule, Schedule(subject.schedule.scales, ()))
    )
    for step in drawn:
        assert as_run[step] - of_no_branch == pytest.approx(report.flops(step)[1])
    skipped = [dense[step] - of_no_branch for step in report.skipping.steps]
    assert sum(skipped) == pytest.approx(report.skipping.flops)


def test_each_part_of_a_plan_is_alone_and_added() -> None:
    paper = Schedule((1, 2, 3, 4, 5), (0.5, 0.75, 1.0), layers=[1])
    made = EXAMPLE["plans"](paper)
    assert {name: (plan.ratios, plan.guidance_until) for name, plan in made.items()} == {
        "pruning": ((0.5, 0.75, 0.0), None),
        "guidance": ((0.0, 0.0, 0.0), 2),
        "skipping": ((0.0, 0.0, 1.0), None),
        "skipping, guidance": ((0.0, 0.0, 1.0), 2),
        "skipping, guidance, pruning": ((0.5, 0.75, 1.0), 2),
    }
    blocks = EXAMPLE["Blocks"](
        2, 10, np.array([0.0, 2.0, 1.0])
    )  # two blocks, of which the second prunes
    assert blocks.flops(paper) == [10, 28, 102, 288, 0]
    assert blocks.flops(made["skipping, guidance, pruning"]) == [10, 28, 51, 144, 0]
