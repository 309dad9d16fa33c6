"""The page against a server that says what no good one would, is busy, or goes away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from support.browser import open_browser, open_page
from support.fake_chat import Answer, FakeChat, echo
from support.fake_chat import Running as RunningFake

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHAT = {"id": "chat", "nomatmul": {"kind": "language", "chat_template": "model"}}
ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>[x](javascript:alert(3))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    served = FakeChat(models=[CHAT])
    running = RunningFake(served)
    try:
        yield served
    finally:
        running.close()


def thread(page: Page) -> Locator:
    """The messages: an answer that has ended is also read out, elsewhere."""
    return page.locator("#thread")


def say(page: Page, text: str) -> None:
    page.locator("#ask").fill(text)
    page.keyboard.press("Enter")


def test_hostile_texts_and_names_stay_text(fake: FakeChat, browser: Browser) -> None:
    """Names of models, titles, answers, errors, languages of code; the policy stands behind."""
    name = f"{ATTACK}\u202egnp"
    fake.models = [{**CHAT, "id": name}, {"id": 7}, {"nothing": 1}]
    code = f'```"><img/onerror=alert(4)>\n{ATTACK}\n```\n'
    fake.script = lambda body: Answer(pieces=(ATTACK, "\n\n", code, "| a |\n|-|\n| ", ATTACK, " |"))
    with open_page(browser, fake.url) as page:
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        say(page, ATTACK)
        page.locator(".stats").wait_for()
        fake.script = lambda body: Answer(pieces=("x",), error=ATTACK)
        say(page, "again")
        page.locator(".note.bad").wait_for()
        page.locator("#show-tree").click()
        page.reload()
        page.locator(".msg").nth(3).wait_for()
        assert page.locator("img, #thread script, #list script, iframe").count() == 0
        assert page.locator("a[href^='javascript']").count() == 0
        assert ATTACK in page.locator(".note.bad").inner_text()
        assert ATTACK in page.locator("pre").inner_text()
        assert page.locator(".msg.user .body").first.inner_text() == ATTACK
        assert dialogs == []
        assert fake.requests[-1]["model"] == name


def test_the_policy_stops_what_the_page_would_not_do(fake: FakeChat, browser: Browser) -> None:
    """Were there a hole, the browser would refuse to make markup, load images or send texts."""
    with open_page(browser, fake.url, known="been blocked|violates") as page:
        script = """async (url) => {
            const tried = {};
            try { document.body.innerHTML = "<b>x</b>"; tried.markup = true; } catch { /* no */ }
            try { await fetch(url); tried.sent = true; } catch { /* no */ }
            tried.image = await new Promise((resolve) => {
                const image = new Image();
                image.onload = () => resolve(true);
                image.onerror = () => resolve(false);
                image.src = "/favicon.png";
            });
            return tried;
        }"""
        other = FakeChat()
        running = RunningFake(other)
        try:
            tried = page.evaluate(script, f"{other.url}/v1/models")
        finally:
            running.close()
        assert tried == {"image": False}
        assert other.keys == []


def test_a_busy_server_is_asked_again(fake: FakeChat, browser: Browser) -> None:
    def script(body: dict[str, Any]) -> Answer:
        if len(fake.requests) == 1:
            return Answer(status=429, message="64 requests wait already.", retry_after=1)
        if len(fake.requests) == 2:
            return Answer(status=429, message="64 requests wait already.", retry_after=50)
        return echo(body)

    fake.script = script
    with open_page(browser, fake.url, known="429") as page:
        say(page, "hello")
        thread(page).get_by_text("64 requests wait already. Trying again in 50 s.").wait_for()
        page.get_by_role("button", name="Try now").click()
        thread(page).get_by_text("You said: hello").wait_for()
        assert len(fake.requests) == 3
        assert page.locator(".note").count() == 0


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(fake: FakeChat, browser: Browser) -> None:
    fake.key = "secret-key"
    with open_page(browser, fake.url, known="401") as page:
        page.get_by_role("button", name="Enter the key").click()
        page.keyboard.type("secret-key")
        page.keyboard.press("Enter")
        page.locator("#model option", has_text="chat").wait_for(state="attached")
        assert page.locator("#banner").is_hidden()
        page.locator("#settings .close").click()
        say(page, "hello")
        thread(page).get_by_text("You said: hello").wait_for()
        kept = page.evaluate("JSON.stringify([localStorage, sessionStorage])")
        assert "secret-key" not in kept.split("},{")[0]
        assert fake.keys[-1] == "Bearer secret-key"
        page.reload()
        page.locator("#model option", has_text="chat").wait_for(state="attached")


def test_stopping_ends_the_request(fake: FakeChat, browser: Browser) -> None:
    fake.script = lambda body: Answer(pieces=("One", " two"), wait=True)
    with open_page(browser, fake.url) as page:
        say(page, "count")
        thread(page).get_by_text("One two").wait_for()
        assert page.locator(".msg.assistant").get_attribute("aria-busy") == "true"
        page.keyboard.press("Escape")
        thread(page).get_by_text("Stopped.").wait_for()
        assert fake.left.wait(20), "the server's side ends, too"
        assert page.locator(".msg.assistant").get_attribute("aria-busy") == "false"
        fake.script = echo
        say(page, "go on")
        thread(page).get_by_text("You said: go on").wait_for()
        roles = [message["role"] for message in fake.requests[-1]["messages"]]
        assert roles == ["user", "assistant", "user"]


def test_deleting_ends_the_answer_and_can_be_undone(fake: FakeChat, browser: Browser) -> None:
    fake.script = lambda body: Answer(pieces=("One",), wait=True)
    with open_page(browser, fake.url) as page:
        say(page, "count")
        thread(page).get_by_text("One", exact=True).wait_for()
        page.get_by_role("button", name="Delete").click()
        assert fake.left.wait(20)
        kept = "() => store.list().length"
        assert page.locator(".msg").count() == 0
        page.wait_for_timeout(100)  # for what would bring it back
        assert page.evaluate(kept) == 0
        page.get_by_role("button", name="Undo").click()
        thread(page).get_by_text("Stopped.").wait_for()
        assert page.evaluate(kept) == 1


def test_an_answer_goes_on_while_another_conversation_is_read(
    fake: FakeChat, browser: Browser
) -> None:
    fake.script = lambda body: Answer(pieces=("One ", 0.5, "two"))
    with open_page(browser, fake.url) as page:
        say(page, "first")
        thread(page).get_by_text("One", exact=True).wait_for()
        page.get_by_role("button", name="New conversation", exact=True).first.click()
        assert page.locator(".msg").count() == 0
        fake.script = echo
        say(page, "second")
        thread(page).get_by_text("You said: second").wait_for()
        page.locator("#list .open", has_text="first").click()
        thread(page).get_by_text("One two").wait_for()
        page.locator(".stats").wait_for()
        page.reload()
        thread(page).get_by_text("One two").wait_for()


def test_a_broken_answer_is_kept_and_a_lost_server_found_again(browser: Browser) -> None:
    fake = FakeChat(models=[CHAT], script=lambda body: Answer(pieces=("Half",), broken=True))
    running = RunningFake(fake)
    with open_page(browser, fake.url, known="ERR_CONNECTION_REFUSED") as page:
        say(page, "hello")
        thread(page).get_by_text("The connection broke before the answer was whole.").wait_for()
        assert page.locator(".msg.assistant .body").inner_text() == "Half"
        running.close()
        fake.script = echo
        say(page, "again")
        page.locator("#banner", has_text="No connection to the server").wait_for()
        again = RunningFake(fake, running.port)
        try:
            page.locator("#banner button").click()
            page.get_by_text("Connected again.").wait_for()
            assert page.locator("#banner").is_hidden()
            page.get_by_role("button", name="Try again").last.click()
            thread(page).get_by_text("You said: again").wait_for()
        finally:
            again.close()


def test_a_reload_keeps_what_had_come(fake: FakeChat, browser: Browser) -> None:
    fake.script = lambda body: Answer(pieces=("One", " two"), wait=True)
    with open_page(browser, fake.url) as page:
        say(page, "count")
        thread(page).get_by_text("One two").wait_for()
        page.reload()
        thread(page).get_by_text("Interrupted: the page was closed.").wait_for()
        assert page.locator(".msg.assistant .body").inner_text() == "One two"
        assert fake.left.wait(20)
        fake.script = echo
        page.get_by_role("button", name="Answer again").click()
        thread(page).get_by_text("You said: count").wait_for()


WATCH = """() => {
    window.said = "";
    const options = { childList: true, subtree: true, characterData: true };
    new MutationObserver(() => { window.said += document.body.innerText; })
        .observe(document.body, options);
}"""


def test_a_full_storage_is_said_and_the_page_goes_on(fake: FakeChat, browser: Browser) -> None:
    with open_page(browser, fake.url) as page:
        page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
        page.evaluate(WATCH)  # what is said goes after some seconds, and a machine may be slow
        say(page, "hello")
        page.wait_for_function("() => window.said.includes('storage is full or closed')")
        thread(page).get_by_text("You said: hello").wait_for()


def test_thoughts_are_folded(fake: FakeChat, browser: Browser) -> None:
    fake.script = lambda body: Answer(pieces=("<think>\nhm **x**", "\n</think>\n\n", "So *four*."))
    with open_page(browser, fake.url) as page:
        say(page, "2 + 2")
        page.locator(".stats").wait_for()
        assert page.locator(".thought .text").is_hidden()
        page.get_by_text("Thoughts").click()
        assert page.locator(".thought .text").inner_text() == "hm **x**"
        assert page.locator(".md em").inner_text() == "four"
        read_out = page.locator("#live", has_text="Answer: So *four*.")
        read_out.wait_for(state="attached")


def test_settings_reach_the_request(fake: FakeChat, browser: Browser) -> None:
    fields = {"system": "Be brief.", "temperature": "0.5", "max_completion_tokens": "9"}
    fields |= {"top_p": "0.9", "top_k": "40", "min_p": "0.05", "seed": "3", "stop": "END\n\\n\\n"}
    with open_page(browser, fake.url) as page:
        page.locator("#show-settings").click()
        for name, value in fields.items():
            page.locator(f'[data-set="{name}"]').fill(value)
        page.locator('[data-set="thinking"]').select_option("off")
        say(page, "hello")
        page.locator(".stats").wait_for()
        sent = fake.requests[-1]
        assert sent.pop("messages")[0] == {"role": "system", "content": "Be brief."}
        assert sent == {
            "model": "chat",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "max_completion_tokens": 9,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "seed": 3,
            "stop": ["END", "\n\n"],
            "chat_template_kwargs": {"enable_thinking": False},
        }


def test_a_thousand_messages_stay_fast(fake: FakeChat, browser: Browser) -> None:
    """Showing all, and an answer of many pieces behind them: within what a page is waited for."""
    fake.script = lambda body: Answer(pieces=tuple(f"word{n} " for n in range(300)))
    with open_page(browser, fake.url) as page:
        page.evaluate("""() => {
            const conv = new Conversation({ ...DEFAULTS, model: "chat" });
            let node = conv.root;
            for (let n = 0; n < 1000; n++) {
                const text = `Message ${n}\\n\\n- one **two**\\n\\n` + "word ".repeat(150);
                node = conv.add(node, n % 2 ? "assistant" : "user", text, { finish: "stop" });
            }
            store.save(conv);
            open(conv);
        }""")
        page.reload()
        page.locator(".msg").nth(999).wait_for()
        say(page, "go on")
        thread(page).get_by_text("word299").wait_for()
        page.locator("#show-tree").click()
        assert len(fake.requests[-1]["messages"]) == 1001
        left = """() => new Promise((done) => setTimeout(() => requestAnimationFrame(() => {
            const box = $("scroll");
            done(box.scrollHeight - box.scrollTop - box.clientHeight);
        }), 100))"""
        assert page.evaluate(left) < 2, "the end stays in sight"


def test_narrow_screens_and_the_keyboard(fake: FakeChat, browser: Browser) -> None:
    narrow = {"width": 360, "height": 700}
    with open_page(browser, fake.url, viewport=narrow, reduced_motion="reduce") as page:
        page.keyboard.press("Shift+Enter")
        page.locator("#ask").fill("one\ntwo " + "x" * 300)
        page.keyboard.press("Enter")
        page.locator(".stats").wait_for()
        width = page.evaluate("document.querySelector('#scroll').scrollWidth")
        assert width <= 360, "nothing is cut off at the side"
        page.locator("#menu").click()
        assert page.locator("#new").is_visible()
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "menu"
        page.locator("#ask").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        assert "user" in page.evaluate("document.activeElement.className")
        page.keyboard.press("e")
        assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
        page.reload()
        page.locator("a.skip").focus()
        assert page.locator("a.skip").bounding_box()["y"] >= 0, "it is seen when it has the focus"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "ask"
        unnamed = page.evaluate("""() => {
            const all = [...document.querySelectorAll("button, input, textarea, select")];
            const named = (el) => el.textContent.trim() || el.ariaLabel || el.labels?.length;
            return all.filter((el) => !named(el)).map((el) => el.id);
        }""")
        assert unnamed == []
