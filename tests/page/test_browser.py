"""What a page does in a browser."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fastvar_fx.engine.report import Report
from fastvar_fx.measuring.demo import Measurement
from fastvar_fx.page.data import Page
from fastvar_fx.page.explained import of_report
from tests.page.conftest import NASTY, Open

if TYPE_CHECKING:
    from playwright.sync_api import Page as Tab

ALPHAS = """() => {
  const canvas = document.getElementById("kept");
  const { rows, columns } = steps[document.getElementById("step").value];
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  const at = (i, count, size) => Math.floor(((i + 0.5) * size) / count);
  return [...Array(rows)].map((_, y) => [...Array(columns)].map((_, x) =>
    data[4 * (at(y, rows, canvas.height) * canvas.width + at(x, columns, canvas.width)) + 3]));
}"""
"""The opacity of the picture in colour at the middle of each token, (h, w), 0 to 255."""


def set_slider(tab: Tab, name: str, value: int) -> None:
    slider = tab.get_by_role("slider", name=name, exact=True)
    slider.press("Home")
    for _ in range(value):
        slider.press("ArrowRight")
    assert slider.input_value() == str(value)


def style(tab: Tab, selector: str, key: str) -> str:
    found: str = tab.eval_on_selector(selector, f"element => getComputedStyle(element)['{key}']")
    return found


# --- pictures ---------------------------------------------------------------------------------


def test_the_wipe_cuts_the_pruned_image_and_moves_the_line(show: Open, demo_page: Page) -> None:
    tab = show(demo_page)
    visible = ".sample:not([hidden]) .over"
    assert style(tab, visible, "clip-path") == "inset(0px 0px 0px 50%)"
    set_slider(tab, "Wipe", 20)
    assert style(tab, visible, "clip-path") == "inset(0px 0px 0px 20%)"
    picture, edge = (tab.locator(at).bounding_box() for at in ("#wiped", "#wiped .edge"))
    assert picture is not None
    assert edge is not None
    assert edge["x"] + 1 - picture["x"] == pytest.approx(0.2 * picture["width"], abs=1)


def test_the_line_follows_the_pointer_on_the_picture(show: Open, demo_page: Page) -> None:
    tab = show(demo_page)
    box = tab.locator("#wiped").bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 80)
    tab.mouse.up()
    tab.mouse.move(box["x"], box["y"] + 80)
    assert tab.get_by_role("slider", name="Wipe").input_value() == "75"
    assert tab.get_by_role("slider", name="Wipe").get_attribute("aria-valuetext") == "75 %"


def test_another_image_replaces_both_pictures(show: Open, demo_page: Page) -> None:
    assert demo_page.samples is not None
    tab = show(demo_page)
    shown = ".sample:not([hidden]) img"
    for chosen in (0, 1):
        image = demo_page.samples.images[chosen]
        set_slider(tab, "Image", chosen)
        sources = [tab.locator(shown).nth(i).get_attribute("src") for i in range(3)]
        assert sources == [image.dense, image.pruned, image.difference]
        assert tab.locator("#psnr").inner_text() == image.psnr


def test_kept_tokens_are_those_that_the_chosen_branch_kept(
    show: Open, demo_page: Page, measured: Measurement
) -> None:
    assert demo_page.kept is not None
    tab = show(demo_page)
    for step, steps in enumerate((4, 5)):
        set_slider(tab, "Step", step)
        for each in measured.kept_tokens:
            if each.step != steps:
                continue
            set_slider(tab, "Block", 1 + demo_page.kept.blocks.index(each.block))
            set_slider(tab, "Branch", 1 + demo_page.kept.branches.index(each.branch))
            assert tab.evaluate(ALPHAS) == (255 * each.tokens.int()).tolist()
            kept, tokens = int(each.tokens.sum()), each.tokens.numel()
            text = f"1 branch keeps {kept} of {tokens} tokens"
            assert tab.locator("#kept-text").inner_text() == text


def test_of_all_branches_the_share_is_shown(
    show: Open, demo_page: Page, measured: Measurement
) -> None:
    tab = show(demo_page)
    found = torch.tensor(tab.evaluate(ALPHAS)) / 255  # the last step, all blocks and branches
    torch.testing.assert_close(found, measured.kept_shares[5], atol=0.01, rtol=0)
    assert tab.locator("#kept-text").inner_text() == "4 branches, each keeps 16 of 64 tokens"
    assert len(set(found.flatten().tolist())) > 2


def test_a_branch_that_does_not_prune_is_in_full_colour(show: Open, demo_page: Page) -> None:
    assert demo_page.kept is not None
    maps = tuple(each for each in demo_page.kept.maps if each.block == 0)
    tab = show(replace(demo_page, kept=replace(demo_page.kept, maps=maps)))
    set_slider(tab, "Block", 2)
    assert tab.locator("#kept-text").inner_text() == "dense here: all 64 tokens"
    assert {alpha for row in tab.evaluate(ALPHAS) for alpha in row} == {255}


def test_the_growing_image_is_that_of_the_chosen_step(show: Open, demo_page: Page) -> None:
    tab = show(demo_page)
    for step in (5, 0, 4):
        set_slider(tab, "After", step)
        grown = demo_page.growth[step]
        sources = [tab.locator(".chosen").nth(i).get_attribute("src") for i in range(2)]
        assert sources == [grown.dense, grown.pruned]
        assert (
            tab.get_by_role("slider", name="After").get_attribute("aria-valuetext") == grown.label
        )
    tab.locator(".strip img").nth(2).click()
    assert tab.get_by_role("slider", name="After").input_value() == "2"


# --- figures ----------------------------------------------------------------------------------


def test_bars_are_as_long_as_the_times_and_the_mark_is_at_the_limit(
    show: Open, demo_page: Page, measured: Measurement
) -> None:
    tab = show(demo_page)
    whole = tab.locator(".chart").first.locator("li").last

    def width(selector: str) -> float:
        box = whole.locator(selector).first.bounding_box()
        assert box is not None
        return box["width"]

    part = measured.total
    expected = min(part.pruned.median / part.dense.median, part.dense.median / part.pruned.median)
    shares = sorted((width(".dense .fill"), width(".pruned .fill")))
    assert shares[0] / shares[1] == pytest.approx(expected, abs=0.01)
    track, mark = (whole.locator(at).bounding_box() for at in (".pruned .track", ".limit"))
    assert track is not None
    assert mark is not None
    at = (mark["x"] + mark["width"] / 2 - track["x"]) / width(".dense .fill")
    assert part.limit is not None
    assert at == pytest.approx(1 / part.limit, abs=0.01)


def test_refusals_unfold_by_keyboard_to_the_users_line(
    show: Open, demo_page: Page, refusing: Report
) -> None:
    refusal = refusing.refusals[0].refusal
    assert refusal is not None
    tab = show(demo_page)
    details = tab.locator("details")
    assert details.count() == 1
    assert not details.locator("dl").is_visible()
    details.locator("summary").press("Enter")
    text = details.inner_text()
    for part in (refusal.code, refusal.title, refusal.reason, refusal.hint, refusal.where):
        assert part in text
    assert details.locator("pre").inner_text() == f"return mix(x, {NASTY!r})"
    details.locator("summary").press("Enter")
    assert not details.locator("dl").is_visible()


# --- for everyone -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("pictures", [True, False])
def test_the_page_is_no_wider_than_the_screen(
    show: Open, demo_page: Page, refusing: Report, width: int, pictures: bool
) -> None:
    tab = show(demo_page if pictures else of_report(refusing, NASTY, [NASTY]), width)
    tab.locator("summary").click()
    root = "document.documentElement"
    assert tab.evaluate(f"[{root}.scrollWidth, {root}.clientWidth]") == [width, width]
    outside: list[Any] = tab.evaluate(
        """() => [...document.querySelectorAll("main *")]
          .filter((element) => !element.closest(".scroll, .picture"))
          .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
          .map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_every_slider_and_picture_has_a_name(show: Open, demo_page: Page) -> None:
    tab = show(demo_page)
    names = ["Image", "Wipe", "Step", "Block", "Branch", "After"]
    labels = tab.evaluate("[...document.querySelectorAll('input')].map(i => i.labels[0].innerText)")
    assert labels == names
    texts = tab.evaluate("[...document.querySelectorAll('input')].map(i => i.ariaValueText)")
    assert all(texts)
    assert tab.locator("img:not([alt]), img[alt='']").count() == 0
    assert "of 64 tokens" in (tab.locator("canvas").get_attribute("aria-label") or "")


def test_dark_and_light(show: Open, demo_page: Page) -> None:
    def contrast(scheme: str) -> float:
        tab = show(demo_page, scheme=scheme)
        colors = [style(tab, "body", key) for key in ("color", "backgroundColor")]
        ink, paper = (sum(map(int, color[4:-1].split(","))) / 765 for color in colors)
        return paper - ink

    assert contrast("light") > 0.7
    assert contrast("dark") < -0.7
