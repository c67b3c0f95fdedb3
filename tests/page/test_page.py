"""What a page holds, and how it is written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.report import Report
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.measuring.demo import Measurement
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.page.data import Page
from fastvar_fx.page.demonstration import of_measurement
from fastvar_fx.page.explained import of_report
from fastvar_fx.page.html import html, written_whole
from tests.page.conftest import NASTY


def test_what_comes_from_the_user_is_escaped(demo_page: Page) -> None:
    page = html(demo_page)
    assert len(re.findall("<script", page)) == 2
    assert len(re.findall("</script", page)) == 2
    assert "<b>user" not in page
    assert "&lt;b&gt;user" in page


def test_it_names_no_address(demo_page: Page) -> None:
    page = html(demo_page)
    assert "//" not in re.sub(r"data:image/jpeg;base64,[\w+/=]+|^\s*// .*$", "", page, flags=re.M)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 * 3 + 1 + 2 + 2 * 6 + 1
    assert all(source.startswith("data:") for source in sources)


@pytest.mark.slow
def test_large_images_are_reduced(measured: Measurement) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 8, 3, 1024, 1024, generator=generator)
    assert measured.growth is not None
    growth = replace(measured.growth, dense=noise[0, :6], pruned=noise[1, :6])
    result = replace(measured, dense_images=noise[0], pruned_images=noise[1], growth=growth)
    page = of_measurement(result, "noise", (), ())
    assert page.samples is not None
    assert (len(page.samples.images), page.samples.batch) == (4, 8)
    assert len(html(page)) < 3e6  # noise is the worst case of a JPEG


def test_without_growth_its_section_is_left_out(measured: Measurement) -> None:
    page = html(of_measurement(replace(measured, growth=None), "tiny", (), ()))
    assert 'id="growth"' not in page
    assert 'id="tokens"' in page


def test_a_report_of_one_of_several_schedules(subject: Subject) -> None:
    small = Schedule((1, 2, 3, 4, 6), (0.5,))
    fast = fastvar_fx.transform(subject.model, [small, subject.schedule])
    fastvar_fx.use(fast, subject.schedule)
    before = of_report(fastvar_fx.explain(fast), "two", ())
    assert (before.lines, before.charts) == ((), ())
    assert "no step of the schedule was run yet" in html(before)
    page = of_report(fastvar_fx.trace(fast, subject.generate), "two", ())
    assert [line.kept for line in page.lines[-2:]] == ["16 of 64", "16 of 64"]
    assert "16 of 64" in html(page)


def test_a_model_in_which_nothing_prunes(measured: Measurement) -> None:
    rows = tuple(replace(row, kept=row.tokens) for row in measured.report.rows)
    pruning = replace(measured.report.pruning, pruned_flops=measured.report.pruning.flops)
    page = of_report(replace(measured.report, rows=rows, pruning=pruning), "dense", ())
    values = {tile.label: tile.value for tile in page.tiles}
    assert values["branches that prune"] == "0 of 8"
    assert values["tokens kept"] == "all"
    assert all(" of " not in line.kept for line in page.lines)
    assert "no branch prunes" in html(page)


def test_a_step_of_ratio_one_keeps_nothing(measured: Measurement) -> None:
    last = replace(measured.steps[5], kept=0, pruned_flops=0, limit=None)
    steps = (*measured.steps[:5], last)
    kept = tuple(each for each in measured.kept_tokens if each.step != 5)
    result = replace(measured, steps=steps, kept_tokens=kept)
    page = of_measurement(result, "tiny", (), ())
    assert page.kept is not None
    assert page.kept.steps[1].kept == 0
    assert "0 of 64 tokens" in html(page)


def test_of_maps_drawn_jointly_the_first_is_shown(measured: Measurement) -> None:
    scales = {4: (2, 3, 6), 5: (2, 4, 8)}
    steps = tuple(replace(s, scale=scales.get(s.step, s.scale)) for s in measured.steps)
    kept = tuple(replace(k, tokens=k.tokens.view(scales[k.step])) for k in measured.kept_tokens)
    page = of_measurement(replace(measured, steps=steps, kept_tokens=kept), "joint", (), ())
    assert page.kept is not None
    assert [(step.rows, step.columns) for step in page.kept.steps] == [(3, 6), (4, 8)]
    for each, shown in zip(kept, page.kept.maps, strict=True):
        first = "".join(str(int(token)) for token in each.tokens[0].flatten())
        assert f"{int(shown.bits, 16):0{4 * len(shown.bits)}b}"[: len(first)] == first
    assert "the first is shown" in html(page)


def test_timed_steps_have_bars_and_the_limit_of_their_flops(measured: Measurement) -> None:
    times = Comparison(Spread.of([0.004]), Spread.of([0.002]))
    report = replace(measured.report, step_times={5: times})
    chart = of_report(report, "timed", ()).charts[1]
    (group,) = chart.groups
    dense, pruned = report.flops(5)
    assert group.result == f"2.00x, limit {dense / pruned:.2f}x"
    assert [(bar.value, bar.length) for bar in group.bars] == [("4.0 ms", 1), ("2.0 ms", 0.5)]
    assert group.bars[1].limit == pytest.approx(pruned / dense)


def test_blocks_that_do_the_same_share_a_line(measured: Measurement) -> None:
    page = of_report(measured.report, "tiny", ())
    assert [(line.step, line.branch) for line in page.lines] == [
        (step, branch) for step in (3, 4, 5) for branch in ("attn", "ffn")
    ]
    assert {line.blocks for line in page.lines} == {"blocks.0..1"}


def test_a_refusal_without_a_line_that_can_be_read(refusing: Report) -> None:
    (row,) = refusing.refusals
    assert row.refusal is not None
    for where in ("", "<string>:1", "nowhere.py:x", "missing.py:3"):
        refusal = replace(row.refusal, where=where)
        page = of_report(replace(refusing, rows=(replace(row, refusal=refusal),)), "one", ())
        assert page.lines[0].source == ""
        assert NASTY not in html(page)


# --- writing ----------------------------------------------------------------------------------


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path, link = tmp_path / "page.html", tmp_path / "link.html"
    path.write_text("older")
    link.symlink_to(path)
    with written_whole(link) as file:
        file.write("newer")
        assert path.read_text() == "older"
    assert path.read_text() == "newer"
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_a_file_stays_as_it_was_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("older")

    def write_a_part() -> None:
        with written_whole(path) as file:
            file.write("new")
            raise KeyError

    with pytest.raises(KeyError):
        write_a_part()
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_or_a_missing_folder_is_an_error_at_once(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "no regular file"), (tmp_path / "a" / "b", "No such file")):
        message = f"asked to write a page to {path}, .*{reason}"
        with pytest.raises(OSError, match=message), written_whole(path):
            pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []
