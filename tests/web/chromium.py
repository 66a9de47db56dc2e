# SPDX-License-Identifier: Apache-2.0
"""The console in a real Chromium, in a thread beside the guard's reactor. Tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from attrs import frozen
from twisted.internet.threads import deferToThread

from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, Sandbox

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

T = TypeVar("T")
FLAGS = ("--no-sandbox", "--disable-gpu")
PATIENCE = 60_000.0
"""Milliseconds."""
WIDTHS = (360, 1920)
SCHEMES = ("light", "dark")
SERIOUS = ("serious", "critical")
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"


def chromium() -> str:
    """The browser's path. Skips the test where there is none."""
    given = os.environ.get("CHROMIUM", "")
    path = given if os.access(given, os.X_OK) else shutil.which("chromium")
    if path is None:
        pytest.skip("CHROMIUM names no executable, and no chromium is on PATH")
    pytest.importorskip("playwright.sync_api")
    return path


@frozen
class Visit:
    """A browser at the console.

    :ivar pictures: where screenshots go; ``None``: nowhere.
    """

    browser: Browser
    url: str
    pictures: Path | None

    def page(self, width: int = 1280, scheme: str = "light", *, script: bool = True) -> Page:
        """A new page on which an operator is signed in."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            java_script_enabled=script,
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(self.url)
        page.get_by_label("Operators' token").fill(ADMIN_TOKEN)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Sign out").wait_for()
        return page

    def picture(self, page: Page, name: str) -> None:
        if self.pictures is not None:
            page.screenshot(path=self.pictures / f"{name}.png")

    def first_paint(self, page: Page, times: int = 3) -> float:
        """Milliseconds from the request of a page to its first paint: the median of a few."""
        found = []
        for _ in range(times):
            page.reload()
            while not (at := float(page.evaluate(FIRST_PAINT))):  # the policy of the page forbids wait_for_function
                page.wait_for_timeout(20)
            found.append(at)
        return sorted(found)[times // 2]


def accessibility_faults(page: Page) -> list[str]:
    """What axe-core finds on a page that keeps people from using it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found: list[dict[str, Any]] = axe.run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in SERIOUS]


def overflows(page: Page) -> bool:
    """Whether the page has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


async def visit(sandbox: Sandbox, look: Callable[[Visit], T]) -> T:
    """Look at a sandbox's console in a browser. ``look`` runs in a thread."""
    path = chromium()
    kept = os.environ.get("CONSOLE_PICTURES", "")

    def run() -> T:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=False)
            try:
                return look(Visit(browser, sandbox.admin_url, Path(kept) if kept else None))
            finally:
                browser.close()

    found: T = await deferToThread(run)
    return found
