"""The reports in headless Chromium, from phone to desktop, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_pages import example_comparison, example_content

from diffult.config import load_preset
from diffult.reporting import comparison, run

MANY = tuple(f"class number {i}" for i in range(120))
PAGES = {
    "run": lambda: run.render(example_content(load_preset("digits-lt", ["generate.balance_to=40"]))),
    "run of 120 classes": lambda: run.render(
        example_content(load_preset("digits-lt", ["generate.balance_to=40"]), MANY)
    ),
    "comparison": lambda: comparison.render(example_comparison()),
    "comparison of one seed": lambda: comparison.render(example_comparison(MANY, seeds=1)),
}
# Relative luminance and contrast as in WCAG 2: of every text against the page, the ground of most of them.
CONTRAST = """() => {
  const light = colour => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255);
    const [r, g, b] = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const of = colour => { const l = light(colour); return (Math.max(l, page) + 0.05) / (Math.min(l, page) + 0.05); };
  const html = [...document.querySelectorAll("p, th, td, dt, dd, figcaption, caption, summary, a, h1, h2, h3")];
  const drawn = [...document.querySelectorAll("svg text")];
  return Math.min(...html.map(e => of(getComputedStyle(e).color)), ...drawn.map(e => of(getComputedStyle(e).fill)));
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="the test extra (playwright) is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, html in PAGES.items():
        (folder / f"{name}.html").write_text(html(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.fixture(params=list(PAGES))
def file(request: pytest.FixtureRequest, chromium: Any, files: dict[str, Path]) -> Path:
    return files[request.param]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_phone_and_desktop_and_is_legible(chromium: Any, file: Path, scheme: str) -> None:
    page = chromium.new_page(color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    for width in (360, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate("[...document.querySelectorAll('svg')].every(svg => svg.getBBox().width > 100)")
        assert page.evaluate(CONTRAST) >= 4.5
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert not problems
    page.close()


@pytest.mark.parametrize(("width", "beside"), [(360, False), (760, True)])
def test_panels_stack_on_a_phone(chromium: Any, file: Path, width: int, beside: bool) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.goto(file.as_uri())
    places = "e => [...e.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().y)"
    rows = page.evaluate(f"[...document.querySelectorAll('.panels')].map({places})")
    assert rows and all((len(set(row)) == 1) == beside for row in rows)
    assert page.evaluate("[...document.querySelectorAll('.panels')].every(e => e.scrollWidth <= e.clientWidth)")
    sizes = "e => e.checkVisibility() ? e.getScreenCTM().a * parseFloat(e.style.fontSize) : 99"
    assert min(page.evaluate(f"[...document.querySelectorAll('.panels text')].map({sizes})")) > 9  # pixels
    page.close()


def test_what_scrolls_is_reached_by_keyboard_and_has_a_name(chromium: Any, file: Path) -> None:
    page = chromium.new_page(viewport={"width": 360, "height": 800})
    page.goto(file.as_uri())
    wide = "e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'auto'"
    scrolling = page.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).map(e => [e.role, e.tabIndex])")
    assert scrolling and all(role == ["region", 0] for role in scrolling)
    names = page.evaluate("[...document.querySelectorAll('[role=region]')].map(e => e.ariaLabel)")
    assert all(names) and len(set(names)) == len(names)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    summaries = page.locator("summary")
    for i in range(summaries.count()):
        before = summaries.nth(i).evaluate("e => e.parentElement.open")
        summaries.nth(i).press("Enter")
        assert summaries.nth(i).evaluate("e => e.parentElement.open") != before
    page.close()


def test_a_reader_of_the_page_aloud_finds_headings_tables_and_figures(chromium: Any, file: Path) -> None:
    page = chromium.new_page()
    page.goto(file.as_uri())
    assert page.get_by_role("heading", level=1).count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert all(below - above <= 1 for above, below in pairwise(levels))
    named = "t => t.caption && t.querySelector('th[scope=row]')"
    assert page.evaluate(f"[...document.querySelectorAll('table')].every({named})")
    assert page.evaluate("[...document.querySelectorAll('thead th')].every(e => e.scope === 'col')")
    assert page.get_by_role("main").count() == 1 and page.get_by_role("navigation").count() == 1
    targets = page.evaluate("[...document.querySelectorAll('a')].map(a => a.hash.slice(1))")
    assert all(page.evaluate("id => document.getElementById(id) !== null", target) for target in targets)
    page.close()
