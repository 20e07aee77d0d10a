"""The page in a real browser: it loads without errors, sorts, filters, fits a phone, turns dark."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noiseproof.report import report
from reports import write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
METHODS = {"CrossEntropy": 0.70, "GCE": 0.85, "ELR": 0.80, "CleaR": 0.90, "SmallLoss": 0.75}

SHARES = ("test_accuracy", "test_accuracy_late", "test_accuracy_best", "test_macro_f1", "test_ece",
          "memorization", "clean_fit", "detection_auroc", "detection_ap")  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: the one that is installed, else playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        if found is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip(f"no browser found; install one of {', '.join(BROWSERS)}")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report on a grid, and one on a single run whose texts try to run scripts."""
    folder = tmp_path_factory.mktemp("report")
    for noise in ("none", "symmetric:0.2", "symmetric:0.4"):
        for method, accuracy in METHODS.items():
            for seed in range(3):
                place = folder / "grid" / noise.replace(":", "-") / method / str(seed)
                accuracies = dict.fromkeys(SHARES, accuracy + seed / 100)
                write_run(place, method=method, noise=noise, seed=seed, metrics=accuracies)
    evil = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    write_run(folder / "one", method=evil, data={"rows": 9, "label_names": [evil, evil]})
    long = "a" * 400
    (folder / "one/suspects.csv").write_text(f"row_id,text\n1,{evil}\n2,{long}\n", encoding="utf-8")
    return {
        name: report(folder / name, folder / f"{name}.html").resolve() for name in ("grid", "one")
    }


class Opened:
    """A page with all that went wrong on it."""

    def __init__(self, browser: Any, path: Path, width: int = 1200, **options: Any) -> None:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        self.page = context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(request.url))
        self.page.on("request", lambda request: self._ask(request, path))
        self.page.goto(path.as_uri())

    def _ask(self, request: Any, path: Path) -> None:
        if request.url != path.as_uri():
            self.problems.append(f"asked for {request.url}")

    def colours(self) -> Any:
        """A screenshot of what is in view, as an array (height, width, 3)."""
        from PIL import Image

        image = Image.open(io.BytesIO(self.page.screenshot()))
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("name", ["grid", "one"])
def test_it_loads_without_an_error_and_runs_no_foreign_script(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    opened = Opened(browser, pages[name])
    opened.page.wait_for_timeout(100)
    assert opened.problems == []
    assert opened.page.evaluate("window.pwned") is None
    assert opened.page.locator("svg.chart").count() >= 3


def test_tables_sort_by_mouse_and_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["grid"])
    table = opened.page.locator("section:has(> h2:text('symmetric:0.4')) table")
    heading = table.locator("thead th", has_text="Last epoch")

    def order() -> list[str]:
        return [text.strip() for text in table.locator("tbody th").all_inner_texts()]

    ascending = sorted(METHODS, key=lambda method: METHODS[method])
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending" and order() == ascending[::-1]
    heading.locator("button").focus()
    opened.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending" and order() == ascending
    table.locator("thead th button", has_text="Method").click()
    assert order() == sorted(METHODS) or order() == sorted(METHODS, key=str.lower)
    assert table.locator("[aria-sort]").count() == 1
    assert opened.problems == []


def test_the_table_of_a_noisy_setting_fits_a_screen_and_heads_stand_above_their_numbers(
    browser: Any, pages: dict[str, Path]
) -> None:
    opened = Opened(browser, pages["grid"])
    scroll = opened.page.locator("section:has(> h2:text('symmetric:0.4')) .scroll").first
    assert scroll.locator("thead th").count() == 12
    assert scroll.evaluate("box => box.scrollWidth <= box.clientWidth")
    ends = """row => [...row.querySelectorAll('.number')].map(cell => {
        const range = document.createRange();
        range.selectNodeContents(cell.querySelector('button') ?? cell.firstChild);
        return Math.round(range.getBoundingClientRect().right);
    })"""
    heads = scroll.locator("thead tr").evaluate(ends)
    numbers = scroll.locator("tbody tr").first.evaluate(ends)
    assert len(heads) == 11
    assert all(abs(head - number) <= 1 for head, number in zip(heads, numbers, strict=True))


def test_tables_filter_by_words(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["grid"])
    figure = opened.page.locator("section:has(> h2:text('symmetric:0.4')) figure.table")
    field = figure.get_by_label("Filter rows")
    field.fill("entropy cross")
    assert figure.locator("tbody tr:visible").count() == 1
    field.fill("")
    assert figure.locator("tbody tr:visible").count() == len(METHODS)


def test_without_scripts_the_numbers_are_there(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["grid"], java_script_enabled=False)
    table = opened.page.locator("section:has(> h2:text('symmetric:0.4')) table")
    assert "91.0" in table.inner_text() and opened.page.locator("button, input").count() == 0


@pytest.mark.parametrize("name", ["grid", "one"])
def test_a_phone_scrolls_tables_not_the_page(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    opened = Opened(browser, pages[name], width=360)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    boxes = opened.page.locator(".scroll").evaluate_all(
        "boxes => boxes.map(box => [box.scrollWidth > box.clientWidth, box.clientWidth])"
    )
    assert any(scrolls for scrolls, _ in boxes) and all(width <= 360 for _, width in boxes)


def test_it_is_not_blank_and_follows_the_colours_of_the_system(
    browser: Any, pages: dict[str, Path]
) -> None:
    light, dark = (
        Opened(browser, pages["grid"], color_scheme=scheme).colours()
        for scheme in ("light", "dark")
    )
    assert light.shape == dark.shape == (800, 1200, 3)
    assert np.median(light) > 240 and np.median(dark) < 40
    for shot in (light, dark):
        paper = np.median(shot.reshape(-1, 3), axis=0)
        ink = np.abs(shot - paper).sum(axis=2) > 200  # (height, width)
        assert 0.005 < ink.mean() < 0.5


def test_it_prints_with_all_tables(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["grid"], color_scheme="dark")
    opened.page.emulate_media(media="print")
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    assert opened.page.locator("input:visible").count() == 0
    assert opened.page.pdf()[:5] == b"%PDF-"
