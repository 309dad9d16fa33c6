"""Take docs/serve.png: the chat page of `nomatmul serve` with the model in the box.

python benchmarks/serve_picture.py docs/serve.png          # extra `dev`, and a chromium
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

BEGINNINGS = ("The history of the steam engine", " Its inventor was born at", " In later years")


def main(argv: list[str] | None = None) -> None:
    """Start a server, hold the conversation, write the picture, end the server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/serve.png"))
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="dry run: fetch the page, no browser")
    arguments = parser.parse_args(argv)
    command = [sys.executable, "-m", "nomatmul", "serve", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            report: dict[str, Any] = json.loads(server.stdout.readline())
            if arguments.tiny:
                with urllib.request.urlopen(report["page"]) as answer:
                    print(f"the page has {len(answer.read())} bytes")
                return
            take(report["page"], arguments.picture, "dark" if arguments.dark else "light")
        finally:
            server.terminate()


def take(url: str, picture: Path, scheme: Any) -> None:
    """Talk with the page at this address until there is something to see."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 700}, color_scheme=scheme)
        page.goto(url)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.locator('[data-set="max_completion_tokens"]').fill("48")
        page.locator('[data-set="temperature"]').fill("0.7")
        for number, text in enumerate(BEGINNINGS, 1):
            page.locator("#ask").fill(text)
            page.keyboard.press("Enter")
            page.locator(".msg.assistant .stats").nth(number - 1).wait_for()
            if number < 3:
                again(page, number)
        page.get_by_role("button", name="Branches", exact=True).click()
        page.locator("#ask").focus()
        page.screenshot(path=picture)
        browser.close()


def again(page: Page, number: int) -> None:
    """Another answer to the last message, a branch beside the first."""
    last = page.locator(".msg.assistant").nth(number - 1)
    last.get_by_role("button", name="Answer again").click()
    page.locator(".msg.assistant").nth(number - 1).get_by_text("2 / 2").wait_for()
    page.locator(".msg.assistant .stats").nth(number - 1).wait_for()


if __name__ == "__main__":
    main()
