"""The report of the ablations: what is tried, what is said of it, and that it can be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvar_fx import methods
from fastvar_fx.quality.metrics import Interval

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))

import ablation_figures  # noqa: E402
import ablations  # noqa: E402

sys.path.remove(str(EXAMPLES))

SIDES = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES = tuple((side, side) for side in SIDES)


def test_what_is_tried_is_named_once_and_compared_by_name() -> None:
    tried = set()
    for section in ablations.sections(SCALES):
        labels = set(section.settings)
        assert {label for pair in section.better for label in pair} <= labels, section.title
        assert len(set(section.settings.values())) == len(labels), section.title
        tried |= {setting.method for setting in section.settings.values()}
    assert tried == set(methods.names()), "every method is in a table"


def test_the_rows_say_what_they_vary() -> None:
    sections = {section.title.split(" (")[0]: section for section in ablations.sections(SCALES)}
    cached = sections["Cache step"].settings
    assert next(iter(cached)) == "K-N: step 7 (18 x 18)"
    assert {label: s.schedule.cache_step for label, s in cached.items()} == {
        f"K-N{-i or ''}: step {7 - i} ({SIDES[7 - i]} x {SIDES[7 - i]})": 7 - i for i in range(4)
    }
    alone = sections["Which scales are pruned, by 75 %"].settings["step 6 only"].schedule
    assert alone.pruned_steps == (6,)
    assert alone.cache_step == 5


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [
        (0.3, 0.1, "agrees"),
        (-0.3, 0.1, "**disagrees**"),
        (0.3, 0.4, "not significant"),
        (0.3, float("nan"), "not significant"),
    ],
)
def test_a_difference_within_its_interval_is_not_significant(
    mean: float, half: float, word: str
) -> None:
    assert ablations.word(Interval(mean, half, 3)) == word


@pytest.mark.slow
@torch.no_grad()
def test_the_report_and_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = ablations.sections

    def some(scales: tuple[tuple[int, int], ...]) -> tuple[ablations.Section, ...]:
        """The ratios, for the line of the figure, and merging."""
        found = everything(scales)
        return (found[0], found[-1])

    monkeypatch.setattr(ablations, "sections", some)
    monkeypatch.setattr(ablation_figures, "RATIOS", (0.5,))
    arguments = ["--quick", "--seeds", "2", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments])
    ablations.main()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "%" in line]
    assert len(rows) == 8
    assert len({row.split(" | ")[6] for row in rows}) == 7, "equal settings have equal bits"
    assert "rather than ToMe, 50, 75 %" in text
    assert "0 photographs" in text
    for name, caption in ablation_figures.CAPTIONS.items():
        assert f"![{caption}]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    assert "report.md and 5 figures" in capsys.readouterr().out
