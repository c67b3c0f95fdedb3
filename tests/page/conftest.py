"""Pages that the tests look at, and the browser that shows them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastvar_fx.engine.report import Report
from fastvar_fx.measuring.demo import Measurement
from fastvar_fx.page.data import Page
from fastvar_fx.page.demonstration import of_measurement
from fastvar_fx.page.html import html
from passes.refusal import Refusal

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

NASTY = "</script><script>alert(1)</script>&\"'" + "long_name." * 30
_NAMES = ("chromium", "chromium-browser", "google-chrome")

Open = Callable[..., "Tab"]
"""(page, width=1280, scheme="light") -> the page in a tab of the browser."""


@pytest.fixture(scope="session")
def refusing(measured: Measurement, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report whose last row is refused, with names and paths of the worst kind."""
    folder = tmp_path_factory.mktemp("<b>user's & co")
    (folder / "model.py").write_text(f"# first\nreturn mix(x, {NASTY!r})\n")
    refusal = Refusal("FVX013", f"why {NASTY}", op="<op>", where=f"{folder}/model.py:2")
    *others, last = measured.report.rows
    kept = replace(last, block=NASTY, branch=NASTY, kept=last.tokens, refusal=refusal)
    return replace(measured.report, rows=(*others, kept))


@pytest.fixture(scope="session")
def demo_page(measured: Measurement, refusing: Report) -> Page:
    """What the demo shows of the tiny model, one of whose branches is refused."""
    result = replace(measured, report=refusing)
    return of_measurement(result, f"tiny {NASTY}", ("a schedule", NASTY), (NASTY,))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"needs Chromium: none of {', '.join(_NAMES)} is on the PATH")
    with api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path)
        yield launched
        launched.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens pages; afterwards, none may have logged anything or asked for another address."""
    context = browser.new_context()
    said: list[str] = []
    asked: list[str] = []

    def opened(page: Page, width: int = 1280, scheme: str = "light") -> Tab:
        file = tmp_path / "page.html"
        file.write_text(html(page), encoding="utf-8")
        tab = context.new_page()
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        if page.kept is not None:  # it is drawn once the picture is decoded
            tab.wait_for_function("document.getElementById('kept-text').textContent")
        return tab

    yield opened
    context.close()
    assert said == []
    own = (tmp_path / "page.html").as_uri()
    assert {address for address in asked if not address.startswith("data:")} == {own}
