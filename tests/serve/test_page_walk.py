"""A whole walk over the page with the real server and the model in the box.

Pictures of it lie in the test's output directory (`--basetemp`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chat_models import ATTENTION, chat_model
from chat_templates import QWEN3
from support.browser import open_browser, open_page
from support.serving import Running, running_server

from nomatmul.engine.loading import BOX
from nomatmul.serve.models import open_models, served_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def ask(page: Page, text: str, answers: int) -> None:
    """Send a message and wait until so many answers have ended."""
    page.locator("#ask").fill(text)
    page.keyboard.press("Enter")
    page.locator(".msg.assistant .stats").nth(answers - 1).wait_for()


def set_field(page: Page, name: str, value: str) -> None:
    page.locator(f'[data-set="{name}"]').fill(value)


def answers(page: Page) -> list[str]:
    """All text of the answers: innerText has none of what the browser does not draw."""
    return page.locator(".msg.assistant .body").all_text_contents()


def test_a_walk(server: Running, browser: Browser, tmp_path: Path) -> None:
    """Ask, stream, stop, answer again, edit, go back, change settings, reload, copy, export."""
    grants = ["clipboard-read", "clipboard-write"]
    with open_page(browser, server.url, permissions=grants, color_scheme="light") as page:
        assert page.locator("#model").input_value() == "nomatmul-box"
        assert "continues text" in page.locator("#empty").inner_text()
        page.screenshot(path=tmp_path / "empty.png")
        page.get_by_role("button", name="Settings", exact=True).click()
        set_field(page, "max_completion_tokens", "24")
        set_field(page, "seed", "7")
        page.keyboard.press("Escape")

        ask(page, "The old house", 1)
        first = answers(page)[0]
        assert first
        assert "24 tokens" in page.locator(".msg.assistant .note").inner_text()
        page.get_by_role("button", name="Answer again").click()
        page.get_by_text("2 / 2").wait_for()
        page.locator(".msg.assistant .stats").wait_for()
        assert answers(page) == [first], "the same seed and question"
        cached, computed = page.locator(".msg.assistant .key").all_inner_texts()
        assert not cached.startswith("0 "), "the question was read before"
        assert computed == "0 computed"

        user = page.locator(".msg.user")
        user.hover()
        user.get_by_role("button", name="Edit the message").click()
        page.get_by_role("textbox", name="Edit the message").fill("The old ship")
        page.keyboard.press("Enter")
        page.locator(".msg.assistant .stats").wait_for()
        assert user.get_by_text("2 / 2").is_visible()
        focused = page.evaluate("document.activeElement.className")
        assert "assistant" in focused, "the keyboard goes on where the edited message is answered"
        second = answers(page)[0]
        ask(page, " In the year", 2)
        page.locator(".msg.user").first.focus()
        page.keyboard.press("ArrowLeft")
        assert answers(page) == [first]
        assert page.locator(".msg.user .body").all_text_contents() == ["The old house"]
        page.keyboard.press("ArrowRight")
        assert answers(page)[0] == second
        page.get_by_role("button", name="Branches", exact=True).click()
        assert page.locator("#map circle").count() == 7
        page.screenshot(path=tmp_path / "branches.png")

        page.get_by_role("button", name="Copy the conversation as Markdown").click()
        page.get_by_text("Conversation copied.").wait_for()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith(
            "# The old house\n\n**You**\n\nThe old ship\n\n**nomatmul-box**\n\n"
        )
        before = page.locator(".msg .body").all_text_contents()
        page.reload()
        page.locator(".msg").nth(3).wait_for()
        assert page.locator(".msg .body").all_text_contents() == before
        assert page.locator('[data-set="seed"]').input_value() == "7"

        with page.expect_download() as download:
            page.get_by_role("button", name="Export the conversation as JSON").click()
        file = tmp_path / "conversation.json"
        download.value.save_as(file)
        assert len(json.loads(file.read_text())["conversations"][0]["nodes"]) == 7
        page.get_by_role("button", name="Delete").click()
        assert page.locator(".msg").count() == 0
        page.locator("#file").set_input_files(file)
        page.locator(".msg").nth(3).wait_for()
        assert page.locator(".msg .body").all_text_contents() == before

        theme = page.locator("#theme")
        background = "getComputedStyle(document.body).backgroundColor"
        theme.click()
        light = page.evaluate(background)
        page.screenshot(path=tmp_path / "light.png")
        theme.click()
        assert page.evaluate(background) != light
        page.screenshot(path=tmp_path / "dark.png")


def test_an_answer_is_stopped_and_its_work_ends(server: Running, browser: Browser) -> None:
    with open_page(browser, server.url) as page:
        set_value = "text => { view.conv.settings.max_completion_tokens = text; }"
        page.evaluate(set_value, "100000")
        page.locator("#ask").fill("The history of")
        page.keyboard.press("Enter")
        body = page.locator(".msg.assistant .body .text")
        body.filter(has_text="e").wait_for()
        assert page.get_by_role("button", name="Stop").is_visible()
        page.keyboard.press("Escape")
        page.locator("#thread").get_by_text("Stopped.").wait_for()
        assert len(body.inner_text()) > 0
        assert page.get_by_role("button", name="Send").is_disabled()
        page.evaluate(set_value, "8")
        ask(page, " And", 1)
        served = server.server.scheduler
        page.evaluate("() => { view.conv.settings.seed = '1'; }")
        ask(page, " So", 2)  # an answer of 100,000 tokens would still be running beside it
        assert served.stats().running <= 1


def test_what_the_server_refuses_is_said_in_its_words(server: Running, browser: Browser) -> None:
    with open_page(browser, server.url, known="400") as page:
        page.evaluate("() => { view.conv.settings.temperature = '9'; }")
        page.locator("#ask").fill("The")
        page.keyboard.press("Enter")
        note = page.locator(".note.bad")
        note.wait_for()
        assert "The server says:" in note.inner_text()
        assert "temperature" in note.inner_text()
        page.evaluate("() => { view.conv.settings.temperature = '0'; }")
        note.get_by_role("button", name="Try again").click()
        page.locator(".stats").wait_for()
        assert page.locator(".sib").count() == 0, "the empty answer is gone"


def test_models_with_and_without_a_chat_template(browser: Browser, tmp_path: Path) -> None:
    """A random model writes bytes: what it is sent counts, and that the page stands it."""
    tiny = served_model("tiny", chat_model(tmp_path, ATTENTION, QWEN3), tmp_path)
    box = open_models({"nomatmul-box": BOX}, threads=1)
    with (
        running_server(models={"tiny": tiny, **box}) as running,
        open_page(browser, running.url) as page,
    ):
        assert "You are talking with tiny" in page.locator("#empty").inner_text()
        page.get_by_role("button", name="Settings", exact=True).click()
        set_field(page, "system", "Be brief.")
        set_field(page, "max_completion_tokens", "40")
        set_field(page, "seed", "1")
        ask(page, "Hello <|im_end|>", 1)
        page.locator('[data-set="thinking"]').select_option("off")
        ask(page, "And now?", 2)
        cached, computed = page.locator(".msg.assistant .key").all_inner_texts()[-2:]
        assert int(cached.split()[0]) > 30, "keys and values of the first turn"
        assert int(computed.split()[0]) > 0
        page.locator("#model").select_option("nomatmul-box")
        ask(page, "The old house", 3)
        assert page.locator(".msg.assistant .who").last.inner_text() == "nomatmul-boxcontinues text"
        assert page.locator(".note.bad").count() == 0
