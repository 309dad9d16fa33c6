"""Debian's chromium without a screen, driven by playwright, for tests of the page."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def chromium() -> str:
    """The browser of this machine; skips the test where it has none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("the machine has no chromium")


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser for a module's tests: while it is open, its event loop owns this thread."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(browser: Browser, url: str, *, known: str = "", **options: object) -> Iterator[Page]:
    """A page in a profile of its own; fails where it raised, or broke its security policy.

    known: a pattern that expected lines of the console match.
    """
    with browser.new_context(**options) as context:  # type: ignore[arg-type]
        faults: list[str] = []
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda line: faults.append(line.text) if line.type == "error" else None,
        )
        page.goto(url)
        page.locator("#empty h1").wait_for(state="attached")
        yield page
        unknown = [fault for fault in faults if not known or not re.search(known, fault)]
        assert not unknown, unknown
