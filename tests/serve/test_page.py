"""The page as a file: how it is served, and its functions on their own, in the browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from support.browser import open_browser, open_page
from support.fake_chat import FakeChat
from support.fake_chat import Running as RunningFake

from nomatmul.serve.page import content_security_policy, load_page, router

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of which only the functions are asked."""
    running = RunningFake(FakeChat())
    try:
        with (
            open_browser() as browser,
            open_page(browser, f"http://127.0.0.1:{running.port}") as opened,
        ):
            yield opened
    finally:
        running.close()


def test_the_file_is_served_with_its_policy(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    policy = answer.headers["content-security-policy"]
    script = answer.text.split("<script>")[1].split("</script>")[0]
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{checksum}';" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy


def test_the_browser_keeps_the_file_and_asks_for_changes(client: TestClient) -> None:
    tag = client.get("/").headers["etag"]
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in again.headers
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head("/")
    assert (head.status_code, head.content) == (200, b"")


def test_the_file_is_packed_for_who_takes_that(client: TestClient) -> None:
    plain = client.get("/", headers={"Accept-Encoding": "identity"})
    packed = client.get("/", headers={"Accept-Encoding": "gzip, br"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < 40_000 < len(plain.content)
    assert packed.content == plain.content
    assert packed.headers["vary"] == "Accept-Encoding"


def test_nothing_comes_from_elsewhere_and_no_markup_is_made_of_texts() -> None:
    text = load_page().body.decode()
    loaded = re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']*)""", text)
    assert loaded == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    assert not re.search(r"""\son\w+=["']|style=["']|@import|url\(""", text)


def test_each_script_and_style_gets_a_checksum() -> None:
    policy = content_security_policy("<style>a</style><script>b</script><script>c</script>")
    assert len(re.findall("sha256-", policy)) == 3
    assert policy.index("style-src") > policy.index("script-src")


def rendered(page: Page, text: str) -> str:
    """The markup of a text's Markdown."""
    return page.evaluate("text => markdown(document.createElement('div'), text).innerHTML", text)


PARAGRAPH = '<p dir="auto">{}</p>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b** and *c*", "a <strong>b</strong> and <em>c</em>"),
        ("***both***", "<strong><em>both</em></strong>"),
        ("**a *b* c**", "<strong>a <em>b</em> c</strong>"),
        ("*a **b***", "<em>a <strong>b</strong></em>"),
        ("~~gone~~ ~kept~", "<del>gone</del> ~kept~"),
        ("snake_case_name _em_", "snake_case_name <em>em</em>"),
        ("2 * 3 * 4 ** 5", "2 * 3 * 4 ** 5"),
        ("`a*b*` ``x`y``", '<code dir="ltr">a*b*</code> <code dir="ltr">x`y</code>'),
        (r"\*plain\* \d", r"*plain* \d"),
        ("<b>x</b> &amp;", "&lt;b&gt;x&lt;/b&gt; &amp;amp;"),
        ("[x](javascript:alert(1))", "[x](javascript:alert(1))"),
        ("[x](data:text/html,y)", "[x](data:text/html,y)"),
        ("[x](/v1/models)", "[x](/v1/models)"),
    ],
)
def test_marks_within_a_line(page: Page, text: str, expected: str) -> None:
    assert rendered(page, text) == PARAGRAPH.format(expected)


def test_links_are_named_and_images_are_not_loaded(page: Page) -> None:
    shown = rendered(
        page, '[a *b*](https://x.org/(y) "t"), ![i](https://x.org/i.png), https://y.org/z.'
    )
    assert re.findall('href="([^"]*)"', shown) == [
        "https://x.org/(y)",
        "https://x.org/i.png",
        "https://y.org/z",
    ]
    assert shown.count('rel="noopener noreferrer nofollow"') == 3
    assert "<img" not in shown
    assert "a <em>b</em></a>" in shown
    assert "image: i</a>" in shown


def test_blocks(page: Page) -> None:
    text = (
        "# One\ntext\n- a\n- b\n  1. c\n\n     d\n> q\n> *r*\n\n---\n"
        "| x | y |\n|---|:-:|\n| 1 | 2 |\n"
        "```py\n<i>\n\n```\nlast\n3. three\n\n3. four"
    )
    shown = re.sub(r' (dir|tabindex|role|aria-label|class)="[^"]*"', "", rendered(page, text))
    assert (
        "<h1>One</h1><p>text</p><ul><li>a</li><li><p>b</p><ol><li><p>c</p><p>d</p></li></ol></li></ul>"
        in shown
    )
    assert "<blockquote><p>q\n<em>r</em></p></blockquote><hr>" in shown
    assert (
        "<thead><tr><th>x</th><th>y</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody>"
        in shown
    )
    assert "<pre><code>&lt;i&gt;\n</code></pre>" in shown
    assert '<p>last\n3. three</p><ol start="3"><li>four</li></ol>' in shown


SIGNS = st.lists(
    st.sampled_from(
        [
            *"abc -*_`~#>|[]()!<h1.\\\n",
            "\n\n",
            "```",
            "**",
            "- ",
            "1. ",
            "|-|\n",
            "> ",
            "    ",
            "https://a.b/",
        ]
    ),
    max_size=60,
).map("".join)


@settings(max_examples=150)
@given(text=SIGNS, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_a_text_that_grows_ends_as_the_whole_does(page: Page, text: str, cuts: list[int]) -> None:
    """And no text loses letters or digits, whatever marks surround them."""
    script = """([text, cuts]) => {
        const into = document.createElement("div"), growing = new Growing(into);
        for (const cut of cuts) growing.update(text.slice(0, cut));
        growing.update(text);
        const whole = markdown(document.createElement("div"), text);
        return [into.innerHTML, whole.innerHTML, into.textContent];
    }"""
    grown, whole, shown = page.evaluate(script, [text, sorted(cuts)])
    assert grown == whole
    kept = re.sub(r"[^abc]", "", re.sub(r"https://a.b/|`{3,}.*|~{3,}.*", "", text))
    assert all(letter in shown for letter in set(kept))


HOSTILE = {
    "brackets": "[" * 50_000,
    "links": "[a](" * 20_000,
    "stars": "*a **b " * 20_000,
    "ticks": "".join("`" * (n % 19 + 1) + "a" for n in range(10_000)),
    "quotes": ">" * 50_000,
    "lists": "\n".join("  " * n + "- a" for n in range(500)),
    "tables": "a|b\n-|-\n" + "|" * 100_000,
    "one line": "a" * 1_000_000,
    "rules": "- " * 50_000 + "x",
    "spaces": " " * 200_000 + "x",
    "autolinks": "https://" * 20_000,
    "lines": "a\n" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_take_no_more_than_a_moment(page: Page, name: str) -> None:
    """Quadratic work on these would take minutes; the limit lets a slow machine pass."""
    script = """text => {
        const began = performance.now();
        markdown(document.createElement("div"), text);
        return performance.now() - began;
    }"""
    assert page.evaluate(script, HOSTILE[name]) < 60_000


def parsed(page: Page, pieces: list[str]) -> list[dict[str, Any]]:
    script = """pieces => {
        const parser = new EventParser();
        return pieces.flatMap((piece) => parser.push(piece));
    }"""
    return page.evaluate(script, pieces)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_are_the_same_wherever_they_are_cut(page: Page, end: str) -> None:
    text = ": waiting\n\ndata: one\n\nevent: error\ndata: two\ndata:three\nid: 4\n\ndata: a: b\n\n"
    text = text.replace("\n", end)
    expected = [
        {"event": "message", "data": "one"},
        {"event": "error", "data": "two\nthree"},
        {"event": "message", "data": "a: b"},
    ]
    whole = parsed(page, [text, ": end"])
    assert whole == expected
    for cut in range(len(text)):
        assert parsed(page, [text[:cut], text[cut:], ": end"]) == expected


@pytest.mark.parametrize(
    ("text", "thought", "answer", "open_"),
    [
        ("plain", "", "plain", False),
        ("<think>\nhm", "hm", "", True),
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes", False),
        ("hm\n</think>\n\nyes", "hm", "yes", False),
        ("the tag `</think>` ends it", "", "the tag `</think>` ends it", False),
    ],
)
def test_thoughts_are_told_from_the_answer(
    page: Page, text: str, thought: str, answer: str, open_: bool
) -> None:
    assert page.evaluate("text => thinking(text)", text) == {
        "thought": thought,
        "answer": answer,
        "open": open_,
    }


def conversation(nodes: list[Any], **more: Any) -> dict[str, Any]:
    return {"title": "t", "nodes": nodes, **more}


USER = {"parent": -1, "role": "user", "text": "a"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        conversation([{**USER, "role": "system"}]),
        conversation([{**USER, "text": 1}]),
        conversation([{**USER, "parent": 0}]),
        conversation([{**USER, "parent": "constructor"}]),
        conversation([None]),
    ],
)
def test_what_is_no_conversation_is_refused(page: Page, data: Any) -> None:
    script = """data => {
        try { Conversation.from(data); return ""; } catch (fault) { return fault.message; }
    }"""
    assert page.evaluate(script, data) != ""


def test_a_conversation_survives_being_written_and_read(page: Page) -> None:
    answer = {
        "role": "assistant",
        "text": "b",
        "model": "m",
        "finish": "stop",
        "stats": {"cached": 3},
    }
    nodes = [
        USER,
        {**answer, "parent": 0},
        {**answer, "parent": 0, "text": "c"},
        {**USER, "parent": 2},
        {**USER, "text": "d"},
    ]
    nodes[0] = {**USER, "chosen": 1}
    data = conversation(nodes, chosen=0, settings={"system": "s", "__proto__": "x", "odd": "y"})
    written = page.evaluate("data => JSON.parse(JSON.stringify(Conversation.from(data)))", data)
    assert written["nodes"] == nodes
    assert written["settings"]["system"] == "s"
    assert "odd" not in written["settings"]
    script = "data => Conversation.from(data).path().map((node) => node.text)"
    assert page.evaluate(script, data) == ["a", "c", "a"]


def test_long_conversations_are_written_and_read(page: Page) -> None:
    """Nothing recurses over their messages."""
    script = """() => {
        const node = (_, n) => ({ parent: n - 1, role: "user", text: "a" });
        const nodes = Array.from({ length: 20000 }, node);
        const read = () => Conversation.from(JSON.parse(text));
        const text = JSON.stringify(Conversation.from({ nodes }));
        return read().path().length;
    }"""
    assert page.evaluate(script) == 20_000
