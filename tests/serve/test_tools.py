"""Tools: calls are bound to schemas, and read from streams however they are cut."""

from __future__ import annotations

import json

import jsonschema_rs
import numpy as np
import pytest
from chat_templates import FALCON, LLAMA3, QWEN3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.vocabularies import grammars_of, wander
from support.tool_calls import (
    ARGUMENTS,
    CALL,
    EMPTY,
    FORMS,
    LLAMA31,
    SOURCES,
    TOOLS,
    WEATHER,
    function,
)

import nomatmul
from nomatmul.engine.sampling import Sampling
from nomatmul.engine.text import Detokenizer
from nomatmul.serve.grammar import GrammarSpec
from nomatmul.serve.json_schema import SchemaError
from nomatmul.serve.tools import MAX_TOOLS, CallDelta, ToolPlan, tool_form

SCHEMAS = {"get_weather": WEATHER, "now": EMPTY, "now-2": {"enum": [{"a": '}\\"{'}]}}


@pytest.fixture(scope="module")
def box():
    return nomatmul.load()


@pytest.fixture(scope="module")
def grammars(box):
    return grammars_of(box)


def text_of(lm, tokens):
    detokenizer = Detokenizer(lm.tokenizer, lm.prompt_ids("a"))
    return "".join(map(detokenizer.push, tokens)) + detokenizer.finish()


def force(lm, matcher, text):
    """Make a matcher go on behind a text."""
    for token in lm.tokenizer.encode(text, add_special_tokens=False).ids:
        assert matcher.allowed()[token]
        matcher.accept(token)


def joined(pieces):
    """(content, calls as (id, name, arguments)) of what a parser gave."""
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, str):
            assert not calls
            content += piece
            continue
        if piece.id is not None:
            assert piece.index == len(calls)
            calls.append((piece.id, piece.name, ""))
        number, name, arguments = calls[piece.index]
        assert piece.index == len(calls) - 1
        calls[piece.index] = (number, name, arguments + piece.arguments)
    return content, calls


def read(plan, text, cuts=()):
    parser, pieces = plan.parser("key"), []
    for first, last in zip((0, *cuts), (*cuts, len(text)), strict=True):
        pieces += parser.push(text[first:last])
    pieces += parser.finish()
    assert parser.calls == sum(isinstance(p, CallDelta) and p.id is not None for p in pieces)
    return joined(pieces)


def test_forms_are_told_by_the_template():
    assert {name: tool_form(source) for name, source in SOURCES.items()} == {
        name: name for name in SOURCES
    }
    assert tool_form("") == "own"
    assert tool_form(FALCON) == "own"
    assert tool_form(LLAMA3) == "own"
    assert tool_form(QWEN3 + "<function=") == "own"


@FORMS
@pytest.mark.parametrize("seed", range(25))
def test_a_required_call_validates_and_names_a_tool(box, grammars, form, seed):
    plan = ToolPlan(TOOLS, "required", source=SOURCES[form])
    made = wander(grammars.compile(plan.grammar), seed, box.config.end_token_ids, steps=2000)
    content, calls = read(plan, text_of(box, made))
    assert content == ""
    assert len(calls) == 1 or form != "llama3"
    for _, name, arguments in calls:
        jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))


@FORMS
def test_a_named_function_is_the_only_one(box, grammars, form):
    choice = {"type": "function", "function": {"name": "now-2"}}
    plan = ToolPlan(TOOLS, choice, source=SOURCES[form])
    for seed in range(5):
        made = wander(grammars.compile(plan.grammar), seed, box.config.end_token_ids)
        ((_, name, arguments),) = read(plan, text_of(box, made))[1]
        assert (name, json.loads(arguments)) == ("now-2", {"a": '}\\"{'})


def test_several_calls_where_they_are_allowed(box, grammars):
    for parallel in (True, False):
        plan = ToolPlan(TOOLS, "required", parallel)
        matcher = grammars.compile(plan.grammar)
        call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        force(box, matcher, call)
        assert matcher.done is not parallel
    force(box, grammars.compile(ToolPlan(TOOLS, "required").grammar), f"{call}\n{call}")
    content, calls = read(plan, f"Well.\n{call}\n{call}")
    assert content == "Well.\n"
    assert [name for _, name, _ in calls] == ["now", "now"]
    assert len({number for number, _, _ in calls}) == 2


@FORMS
def test_a_free_answer_is_bound_from_the_trigger_on(box, grammars, form):
    plan = ToolPlan(TOOLS, "auto", source=SOURCES[form])
    before = "" if form == "llama3" else "Well, <tool <b> {\n"
    for seed in range(10):
        matcher = grammars.compile(plan.grammar)
        force(box, matcher, before + ("{" if form == "llama3" else "<tool_call>"))
        assert not set(box.config.end_token_ids) & set(np.flatnonzero(matcher.allowed()))
        made = wander(matcher, seed, box.config.end_token_ids, steps=2000)
        text = before + ("{" if form == "llama3" else "<tool_call>") + text_of(box, made)
        content, calls = read(plan, text)
        assert content == before
        assert calls
        for _, name, arguments in calls:
            jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))


@pytest.mark.parametrize("seed", range(3))
def test_free_text_is_what_it_is_without_tools(box, grammars, seed):
    plan, sampling = ToolPlan(TOOLS, "auto"), Sampling(temperature=0.7, seed=seed)
    made = box.text_generation("The", 60, sampling, matcher=grammars.compile(plan.grammar))
    session, text = box.session(), ""
    while made.needs:
        text += made.take(session.append(made.needs))
    assert text == box.generate("The", max_tokens=60, sampling=sampling)
    assert read(plan, text) == (text, [])


TEXTS = {
    "own": ["", "Just text", f"Well\n{CALL}", CALL, f"{CALL}\n{CALL}", "<b <tool <tool_c", "<tool"],
    "llama3": ["", "Just {text}", '{"name": "now", "parameters": {"a": {"}": "{"}}}', " {}"],
}  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("form", TEXTS)
def test_how_a_text_is_cut_changes_nothing(form, data):
    plan = ToolPlan(TOOLS, "auto", source=SOURCES[form])
    text = data.draw(st.sampled_from(TEXTS[form]))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=len(text) + 1))
    assert read(plan, text, tuple(sorted(cuts))) == read(plan, text)
    content, calls = read(plan, text)
    if not calls:
        assert content == text


def test_arguments_come_as_they_are_made():
    parser = ToolPlan(TOOLS, "auto").parser("key")
    found = [parser.push(letter) for letter in CALL]
    pieces = [piece.arguments for deltas in found for piece in deltas if piece.id is None]
    assert "".join(pieces) == ARGUMENTS
    assert max(map(len, pieces)) == 1


def test_a_call_that_is_cut_off_says_what_there_is():
    plan = ToolPlan(TOOLS, "auto")
    _, ((_, name, arguments),) = read(plan, CALL[: CALL.index('"b"') + 2])
    assert (name, arguments) == ("get_weather", '{"a": "}{</tool_call>\\"", "b')
    assert read(plan, CALL[:20]) == ("", [])  # no name yet
    assert read(plan, "Well" + CALL[:5]) == ("Well" + CALL[:5], [])


def test_ids_follow_from_the_key():
    plan = ToolPlan(TOOLS, "auto")

    def ids(key):
        return [
            p.id
            for p in plan.parser(key).push(f"{CALL}\n{CALL}")
            if not isinstance(p, str) and p.id
        ]

    assert ids("a") == ids("a")
    assert len({*ids("a"), *ids("b")}) == 4
    assert all(number.startswith("call_") and len(number) == 29 for number in ids("a"))


def test_content_may_be_bound_too(box, grammars):
    content = GrammarSpec("json_schema", '{"enum": ["yes", "no"]}')
    plan = ToolPlan(TOOLS, "auto", content=content)
    force(box, grammars.compile(plan.grammar), '"yes"')
    force(box, grammars.compile(plan.grammar), CALL[:11])
    allowed = grammars.compile(plan.grammar).allowed()
    assert not allowed[box.tokenizer.encode("W").ids[0]]
    assert ToolPlan(None, content=content).grammar == content
    assert ToolPlan(TOOLS, "none", content=content).grammar == content
    with pytest.raises(SchemaError, match="set tool_choice") as found:
        ToolPlan(TOOLS, "auto", source=LLAMA31, content=content)
    assert found.value.param == "response_format"


def test_without_tools_everything_is_text():
    for plan in (ToolPlan(None), ToolPlan(TOOLS, "none")):
        assert plan.grammar is None
        assert plan.template_tools is None
        assert read(plan, CALL) == (CALL, [])


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([], None, "tools"),
        (TOOLS * MAX_TOOLS, None, "tools"),
        ([3], None, "tools[0].type"),
        ([{"type": "custom"}], None, "tools[0].type"),
        ([{**TOOLS[0], "x": 1}], None, "tools[0].x"),
        ([{"type": "function"}], None, "tools[0].function"),
        (function(name="a b"), None, "tools[0].function.name"),
        (function(name="x" * 65), None, "tools[0].function.name"),
        (function(description=3), None, "tools[0].function.description"),
        (function(code="x"), None, "tools[0].function.code"),
        ([TOOLS[1], TOOLS[1]], None, "tools[1].function.name"),
        (function(parameters={"type": "array"}), None, "tools[0].function.parameters"),
        (
            function(parameters={"properties": {"x": {"not": {}}}}),
            None,
            "tools[0].function.parameters.properties.x.not",
        ),
        (
            [
                {
                    "type": "function",
                    "function": {
                        "name": f"f{i}",
                        "parameters": {"properties": {"x" * 90 + str(j): {} for j in range(40)}},
                    },
                }
                for i in range(100)
            ],
            None,
            "tools",
        ),
        (TOOLS, "any", "tool_choice"),
        (TOOLS, {"type": "function"}, "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "tool_choice.function.name"),
        (None, "required", "tool_choice"),
        (None, {"type": "function", "function": {"name": "x"}}, "tool_choice.function.name"),
    ],
)
def test_tools_are_checked(tools, choice, param):
    with pytest.raises(SchemaError) as found:
        ToolPlan(tools, choice)
    assert found.value.param == param


def test_a_schema_that_the_compiler_refuses_is_named(grammars):
    tools = [TOOLS[1], *function(parameters={"properties": {"x": {"pattern": "(?=a)"}}})]
    with pytest.raises(ValueError, match="arguments_1#/properties/x"):
        grammars.compile(ToolPlan(tools).grammar)
