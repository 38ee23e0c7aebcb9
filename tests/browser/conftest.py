"""A real Chromium, driven headless, on pages of this machine alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, sync_playwright

from cascade.stack.ports import HOST

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
# The machine may be busy with other tests.
PATIENCE_SECONDS = 180
WIDTH, HEIGHT = 1440, 900


class Screen:
    """A page, and what it looked like: one picture a step, in a folder that Git ignores.

    Two of them are kept in deploy/screenshots for the README: the form and the family's card.
    """

    def __init__(self, page: Page) -> None:
        self.page, self.pictures = page, 0
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def shot(self, name: str, *, whole: bool = False) -> Path:
        """Keep what is visible, or the whole page, as a file."""
        self.pictures += 1
        path = SCREENSHOTS / f"{self.pictures:02}-{name}.jpg"
        self.page.screenshot(path=path, full_page=whole, animations="disabled", type="jpeg", quality=80)
        return path


def local_only(route: Route) -> None:
    """The pages ask for usage statistics elsewhere; a test must neither send any nor wait for them."""
    if f"//{HOST}:" in route.request.url:
        route.continue_()
    else:
        route.abort()


@pytest.fixture
def screen() -> Iterator[Screen]:
    """An empty page of a new browser; where its pictures lie is printed."""
    if CHROMIUM is None:
        pytest.skip("no chromium: as root `make programs` installs Debian's package")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        page.route("**/*", local_only)
        try:
            yield Screen(page)
        finally:
            browser.close()
            print(f"screenshots: {SCREENSHOTS}")
