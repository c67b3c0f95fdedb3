"""The report of the ablations: what is tried, what is said of it, and that it can be drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from PIL import Image

from fastvar_fx import Schedule, methods
from fastvar_fx.quality.evaluate import HELD_OUT, Fidelity, Score, Speed
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
        f"K-N{-i or ''}: step {7 - i} ({SIDES[7 - i]} x {SIDES[7 - i]})": 7 - i for i in range(3)
    }
    alone = sections["Which scales are pruned, by 75 %"].settings["step 7 only"].schedule
    assert alone.pruned_steps == (7,)
    assert alone.cache_step == 6


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


def row_of(speedup: float, bits: list[float], dense: list[float]) -> ablations.Row:
    score = Score.of_both("bits", HELD_OUT, dense, bits)
    speed = SimpleNamespace(transformer=SimpleNamespace(speedup=speedup))
    setting = ablations.Setting(Schedule(SCALES, (0.5,)))
    return ablations.Row(setting, Fidelity((score,), ()), cast("Speed", speed))


def test_methods_are_compared_at_equal_speed() -> None:
    """Between rows of 1.6x and 2x the bits at 1.8x are their mean, image by image."""
    dense = [2.0, 4.0]
    slow, fast = row_of(1.6, [2.1, 4.2], dense), row_of(2.0, [2.3, 4.2], dense)
    lost = ablations.at_speed([fast, slow], HELD_OUT)
    assert lost is not None
    assert lost.lost == pytest.approx([0.2, 0.2])
    assert lost.share == pytest.approx([10, 5])
    assert ablations.at_speed([slow], HELD_OUT) is None
    alone = ablations.at_speed([fast], HELD_OUT)
    assert alone is not None
    assert alone.lost == pytest.approx([0.8 * 0.3, 0.8 * 0.2]), "the dense model is 1x"


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    kept = row_of(2, [2.1, 4.2], [2.0, 4.0]).fidelity
    ablations.write(path, kept)
    assert ablations.read(path) == kept
    path.write_text(path.read_text()[:40])
    with pytest.raises(SystemExit, match=r"row.json is damaged .*; delete it"):
        ablations.read(path)


def test_shares() -> None:
    assert ablations.share("2/3") == (2, 3)
    for wrong in ("0/2", "3/2", "half", "1/"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"a share is n/m"):
            ablations.share(wrong)


@pytest.mark.slow
@torch.no_grad()
def test_the_report_and_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = ablations.sections

    def some(scales: tuple[tuple[int, int], ...], plans: object) -> tuple[ablations.Section, ...]:
        """The ratios, and the curves of quality against speed."""
        found = everything(scales)
        ratios = next(section for section in found if "ratio" in section.title)
        return (ratios, *[section for section in found if section.curves])

    monkeypatch.setattr(ablations, "sections", some)
    monkeypatch.setattr(ablations, "found_plans", lambda *_: [])
    (tmp_path / "plans").mkdir()
    monkeypatch.setattr(ablations, "PUBLISHED", ("stepvar",))
    monkeypatch.setattr(ablations, "CURVE", ((0.5, 0.5), (0.5, 0.75)))
    monkeypatch.setattr(ablation_figures, "RATIOS", (0.5,))
    arguments = ["--quick", "--seeds", "2", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments, "--share", "1/2"])
    ablations.main()
    half = {path: path.stat().st_mtime_ns for path in tmp_path.glob("rows-*/*.json")}
    assert not (tmp_path / "report.md").exists()
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments])
    ablations.main()
    assert {path: path.stat().st_mtime_ns for path in half} == half, "nothing is measured twice"
    measured = len(list(tmp_path.glob("rows-2-0/*.json")))
    assert len(half) == -(-measured // 2)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "%" in line]
    assert len(rows) == 1 + measured, "FastVAR at 50 % is in both sections"
    assert len({row.split(" | ")[6] for row in rows}) >= measured, "equal settings, equal bits"
    assert "2 seeds and 0 held-out images" in text
    limits = [float(row.split(" | ")[7]) for row in rows]
    assert min(limits) > 1, "pruning takes fewer FLOPs, and those of the tracing do not count"
    for name, caption in ablation_figures.CAPTIONS.items():
        assert f"![{caption}]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    assert "report.md and 6 figures" in capsys.readouterr().out


@pytest.mark.slow
@torch.no_grad()
def test_calibrated_schedules_are_found_once_and_compared_with_those_they_are_like(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ablations, "CALIBRATED", ("fastvar",))
    monkeypatch.setattr(ablations, "GENERATIONS", 1)
    monkeypatch.setattr(ablations, "GUIDED", (1.5,))
    model = ablations.tiny()
    plan, guided = ablations.found_plans(model, tmp_path)
    assert plan.like == ablations.Setting(model.schedule)
    assert plan.name == "fastvar 0.5 0.75 from 3, calibrated"
    fast, like = (ablations.flop_speedup(model, setting) for setting in (plan, plan.like))
    assert like <= fast <= 1.1 * like
    begun = (tmp_path / "fastvar.measured.json").stat().st_mtime_ns
    assert ablations.found_plans(model, tmp_path) == [plan, guided]
    assert (tmp_path / "fastvar.measured.json").stat().st_mtime_ns == begun
    assert guided.name == "drift-corrected-grid and guidance, calibrated, 1.5x"
    assert ablations.flop_speedup(model, guided) >= 1.5
    section = ablations.calibration([plan])
    assert list(section.settings.values()) == [plan.like, plan]
