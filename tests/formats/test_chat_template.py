"""Chat templates: found where models keep them, rendered as transformers does, and kept in bounds.

What transformers renders is recorded by its own function in the same run.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import pytest
from chat_templates import ALL, BITNET, LLAMA2

from nomatmul.formats.chat_template import MAX_TEMPLATE, ChatTemplate, find_template
from nomatmul.formats.errors import FormatError

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": " What is 2 < 3?\nSay & go. "}
TURNS = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue.\n"}, USER]
SYSTEM = {"role": "system", "content": " Be brief. "}
TOOL = {
    "type": "function",
    "function": {"name": "é_add", "description": "adds <b>", "parameters": {"type": "object"}},
}
CALLED = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "é_add", "arguments": {"a": 1, "b": [None, 2.5]}}}],
    },
    {"role": "tool", "content": "3"},
]
CONVERSATIONS = {
    "one": [USER],
    "turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "answered": TURNS[:2],
    "called": CALLED,
}
OPTIONS: tuple[dict, ...] = ({}, {"enable_thinking": False}, {"tools": [TOOL]})


@pytest.mark.train
@pytest.mark.parametrize("name", ALL)
def test_texts_are_those_of_transformers(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    compiled, texts = ChatTemplate(ALL[name], NAMES), set()
    for (case, messages), options, prompt in itertools.product(
        CONVERSATIONS.items(), OPTIONS, (True, False)
    ):
        if name == "llama2" and case == "called":
            continue  # it refuses these roles
        rendered, _ = render_jinja_template(
            [messages], chat_template=ALL[name], add_generation_prompt=prompt, **NAMES, **options
        )
        ours = compiled.render(messages, add_generation_prompt=prompt, **options)
        assert ours == rendered[0], (case, options, prompt)
        texts.add(ours)
    assert len(texts) > 3


def test_bitnet_asks_as_it_was_trained():
    text = ChatTemplate(BITNET, {"bos_token": "<|begin_of_text|>"}).render([SYSTEM, USER])
    assert text == (
        "<|begin_of_text|>System: Be brief.<|eot_id|>User: What is 2 < 3?\nSay & go.<|eot_id|>"
        "Assistant: "
    )


def test_a_template_may_refuse_a_conversation():
    with pytest.raises(ValueError, match="template fails: Conversation roles must alternate"):
        ChatTemplate(LLAMA2, NAMES).render([USER, USER])


HUGE = "x" * 50_000
UNSAFE = {
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops in loops": (
        "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
        "{% endfor %}{% endfor %}",
        "more than",
    ),
    "endless recursion": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "itself endlessly"),
    "wide recursion": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "more than",
    ),
    "a loop of itself": (
        "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
        "endlessly",
    ),
    "filters in a loop": (
        "{% for i in range(100000) %}{{ range(100000)|map('string')|list|length }}{% endfor %}",
        "more than",
    ),
    "a long text": ("{{ 'a' * 10**9 }}", "more than 8,388,608 characters"),
    "a long list": ("{{ [1] * 10**9 }}", "more than 8,388,608 characters"),
    "a large number": ("{{ 9**9**9 }}", "64 bits"),
    "a doubled text": (
        "{% set ns=namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}",
        "more than",
    ),
    "a doubled block": (
        "{% set ns=namespace(s='ab') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}"
        "{% endset %}{% endfor %}",
        "more than",
    ),
    "a doubled list": (
        "{% set ns=namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
        "{% endfor %}{{ ns.s }}",
        "more than",
    ),
    "much output": (f"{{% for i in range(100000) %}}{HUGE}{{% endfor %}}", "more than"),
    "a large block": (
        f"{{% set x %}}{{% for i in range(100000) %}}{HUGE}{{% endfor %}}{{% endset %}}",
        "more than",
    ),
    "replace": ("{{ ('a'*1000000).replace('', 'b'*1000000) }}", "more than"),
    "the filter replace": ("{{ ('a'*1000000)|replace('a', 'b'*1000000) }}", "more than"),
    "join": ("{{ ('b'*1000000).join(['a']*100000) }}", "more than"),
    "the filter join": ("{{ range(100000)|join('b'*1000000) }}", "more than"),
    "a long chain": (
        "{% set s = 'a' * 8000000 %}{{ s" + "~s" * 9000 + " }}",
        "more than 8,388,608 characters",
    ),
    "values of a format": (
        "{% set s = 'a' * 8000000 %}{{ '%s%s%s' % (s, s, s) }}",
        "more than 8,388,608 characters",
    ),
    "round": ("{{ 5|round(-10**9) }}", "from -100 to 100"),
    "round up": ("{{ 5.5|round(10**9, 'ceil') }}", "from -100 to 100"),
    "a wide format": ("{{ '%999999999d' % 1 }}", "widths of four digits"),
    "format": ("{{ '{:999999999}'.format(1) }}", "'format' of a str is forbidden"),
    "center": ("{{ 'a'.center(10**9) }}", "'center' of a str is forbidden"),
    "a wide date": ("{{ strftime_now('%999999999d') }}", "no format of a date"),
    "wide JSON": ("{{ messages|tojson(indent=10**9) }}", "16"),
    "bytes": ("{{ (1).to_bytes(10**9, 'big') }}", "'to_bytes' of a int is forbidden"),
    "Python's classes": ("{{ messages.__class__ }}", "'__class__' of a list is forbidden"),
    "bases of a class": ("{{ ''.__class__.__mro__ }}", "'__class__' of a str is forbidden"),
    "the filter attr": ("{{ ''|attr('__class__') }}", "No filter named 'attr'"),
    "a function's globals": ("{{ raise_exception.__globals__ }}", "is forbidden"),
    "the template itself": ("{{ self.__init__ }}", "is forbidden"),
    "changing messages": ("{{ messages.append(1) }}", "'append' of a list is forbidden"),
    "internals of a namespace": ("{% set n=namespace() %}{% set n._x = 1 %}", "may not hold '_x'"),
    "files": ("{% include '/etc/passwd' %}", "asks for the file '/etc/passwd'"),
    "modules": ("{% import 'os' as os %}", "asks for the file 'os'"),
    "bad syntax": ("{% if %}", "does not compile: Expected an expression"),
    "deep syntax": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "does not compile"),
    "an unknown name": ("{{ tool.name.first }}", "'tool' is undefined"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_templates_end_in_one_line(case):
    template, message = UNSAFE[case]
    start = time.thread_time()
    with pytest.raises(ValueError, match="the chat template") as error:
        ChatTemplate(template).render([USER])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert time.thread_time() - start < 10  # of this thread; the limit is 1


def test_a_value_is_data_whatever_its_type(tmp_path):
    """Objects with methods of their own never reach a template."""
    text = ChatTemplate("{{ messages[0].content }}").render([{"content": tmp_path}])
    assert text == f"<{type(tmp_path).__name__}>"


def test_templates_are_found_where_models_keep_them(tmp_path):
    assert find_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for nothing in (None, "", [], {}):
        config.write_text(json.dumps({"chat_template": nothing}))
        assert find_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert find_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "</s>"}}))
    assert find_template(tmp_path) == "three"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert find_template(tmp_path) == "two"  # the only one
    config.write_text(json.dumps({"chat_template": [*named[:1], {"name": "rag", "template": "4"}]}))
    with pytest.warns(UserWarning, match="templates rag, tool_use, and none is the default: none"):
        assert find_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(FormatError, match="the chat template 'default' is no text"):
        find_template(tmp_path)
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(FormatError, match="must be a text or named texts, found int"):
        find_template(tmp_path)
    config.write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}")
    compiled = ChatTemplate.of(tmp_path)
    assert compiled is not None
    assert compiled.render([{"role": "user", "content": "hi"}]) == "<s>hi</s>"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="is not UTF-8 text"):
        find_template(tmp_path)
    for size in (MAX_TEMPLATE + 1, 5 * MAX_TEMPLATE):
        file.write_text("x" * size)
        with pytest.raises(FormatError, match=f"has {size:,} .* at most {MAX_TEMPLATE:,}"):
            find_template(tmp_path)


def test_without_jinja2_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "nomatmul.formats.template_sandbox", raising=False)
    with pytest.raises(ImportError, match=r'chat templates need jinja2 .*"nomatmul\[chat\]"'):
        ChatTemplate("x")
