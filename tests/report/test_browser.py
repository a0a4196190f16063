"""Both reports in a real browser, on a phone and a desktop, in light and dark mode."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import example_folders as example

from metavpt.report import write_report
from metavpt.report.comparison import write_comparison_report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser on this machine: none of {', '.join(BROWSERS)}"
)

IMAGES = "[...document.images].map(image => image.complete ? image.naturalWidth : 0)"
CHARTS = (
    "[...document.querySelectorAll('.curves svg')].map(svg => svg.getBoundingClientRect())"
    ".map(box => Math.min(box.width, box.height))"
)
LUMINANCE = (
    "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"
    ".map(Number).reduce((a, b) => a + b) / 765"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
WIDE = """[...document.querySelectorAll('body *')]
    .filter(e => !e.closest('.scroll, .strip, pre, svg')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--disable-gpu", "--disable-dev-shm-usage"],
            chromium_sandbox=False,
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    long = ("one_step feedback.depth_weight=4", "unrolled")  # a row of a sweep: names can be long
    comparison = example.write_comparison(folder / "comparison", ("fixed", "uniform", *long))
    return {
        "run": write_report(example.write_run(folder / "run", example.records("one_step", 0))),
        "comparison": write_comparison_report(comparison),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_the_page_renders(
    browser: Any, reports: dict[str, Path], kind: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(request.url))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[kind].as_uri(), wait_until="load")
    widths, charts = page.evaluate(IMAGES), page.evaluate(CHARTS)
    assert troubles == []
    assert [url for url in requests if not url.startswith("data:")] == [reports[kind].as_uri()]
    assert len(widths) == {"run": 12, "comparison": 24}[kind]
    assert min(widths) > 0
    assert len(charts) > 8
    assert min(charts) > 80  # pixels: none has collapsed
    assert page.evaluate(OVERFLOW) <= 0
    assert page.evaluate(WIDE) == []
    assert (page.evaluate(LUMINANCE) > 0.5) == (scheme == "light")
    page.close()
