"""The page in a browser: it opens from disk, shows a token's numbers, and switches between runs."""

import shutil

import pytest

from tests.report.conftest import token_record

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


def test_tokens_and_runs_in_a_browser(page):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER)
        tab = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
        errors = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        tab.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else errors.append(request.url)
            ),
        )
        tab.goto(page.as_uri())
        run = tab.locator("#run-0")
        run.locator(".tokens span").first.wait_for()
        assert tab.locator("#run-2").is_hidden()
        images = tab.locator("img:visible")
        assert images.count() > 8
        assert all(images.nth(i).evaluate("image => image.naturalWidth > 100") for i in range(images.count()))
        assert run.locator(".tokens span").all_text_contents() == ["2", "⏎\n", "</script>", "∑"]

        run.locator(".tokens span").nth(2).hover()
        tip = tab.locator("#tip").inner_text()
        record = token_record(True)
        assert "token 3 of 9" in tip
        assert "masked by the budget" in tip
        for name, value in (("D", 0.01235), ("w", 0.85), ("c", -0.18), ("S/W", 0.1202), ("π/μ", 1.1)):
            assert f"{name} = {value}" in tip
        assert f"δ_b = {record['delta_b']:.4f}"[:10] in tip
        assert (
            run.locator(".tokens span").nth(2).evaluate("e => getComputedStyle(e).backgroundColor")
            == "rgb(142, 68, 173)"
        )
        assert "first 4 of 9 tokens" in run.locator(".cut").inner_text()

        tab.select_option("#run", label="dppo")
        dppo = tab.locator("#run-2")
        dppo.locator(".spending").wait_for()
        assert run.is_hidden()
        dppo.locator(".tokens span").nth(1).hover()
        tip = tab.locator("#tip").inner_text()
        assert "masked by the threshold" in tip
        assert "D = 0.3" in tip
        assert "S/W" not in tip
        assert "Theorem" not in dppo.inner_text()

        tab.set_viewport_size({"width": 390, "height": 844})  # a phone: the page itself never scrolls sideways
        tab.select_option("#run", label="cppo-0")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.locator(".outcome table").bounding_box()["x"] >= 0
        assert errors == []
        browser.close()
