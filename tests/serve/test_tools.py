"""Tools: calls are bound to schemas, read from streams however they are cut, and told back."""

from __future__ import annotations

import json

import jsonschema_rs
import numpy as np
import pytest
from chat_models import ATTENTION, SPECIAL, chat_model, with_tokenizer, write_chat_files
from chat_templates import CHATML, FALCON, LLAMA3, QWEN3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.vocabularies import grammars_of, wander
from tokenizers import Tokenizer

import nomatmul
from nomatmul.engine.sampling import Sampling
from nomatmul.engine.text import Detokenizer
from nomatmul.serve.grammar import GrammarSpec
from nomatmul.serve.json_schema import SchemaError
from nomatmul.serve.models import served_model
from nomatmul.serve.tools import MAX_TOOLS, CallDelta, ToolPlan, tool_form

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8, "description": "where"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"],
                  "additionalProperties": False},
    },
    "required": ["city", "where"],
    "additionalProperties": False,
}  # fmt: skip
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "now": EMPTY, "now-2": {"enum": [{"a": '}\\"{'}]}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
    {"type": "function", "function": {"name": "now-2", "strict": True,
                                      "parameters": {"enum": [{"a": "}\\\"{"}], "type": "object"}}},
]  # fmt: skip
LLAMA31 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if tools %}{{ 'Respond in the format"
    ' {"name": function name, "parameters": dictionary of argument name and its value}\' }}'
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
)
SOURCES = {"own": CHATML, "hermes": QWEN3, "llama3": LLAMA31}
FORMS = pytest.mark.parametrize("form", SOURCES)


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


ARGUMENTS = '{"a": "}{</tool_call>\\"", "b": [{}]}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
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


QUESTION = {"role": "user", "content": "Weather?"}
ASKED = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "now", "arguments": '{"a": "\u00e9"}'},
        },
        {"id": "2", "type": "function", "function": {"name": "now", "arguments": ""}},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "2", "content": "late"},
    {"role": "tool", "tool_call_id": "1", "content": "early"},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = {}
    for form, source in SOURCES.items():
        directory = tmp_path_factory.mktemp(form)
        made[form] = served_model(form, chat_model(directory, ATTENTION, source), directory)
    return made


def rendered(model, messages, tools=None, **options):
    plan = ToolPlan(tools, source=model.source, **options)
    return model.chat_ids(plan.prompt_messages(messages), tools=plan.template_tools)


def test_templates_that_know_tools_get_objects(served):
    text = rendered(served["hermes"], [QUESTION, ASKED, *RESULTS], TOOLS).text
    assert (
        '<tool_call>\n{"name": "now", "arguments": {"a": "\u00e9"}}\n</tool_call>\n<tool_call>'
        in text
    )
    assert "<tool_response>\nlate\n</tool_response>" in text
    assert '"description": "where"' in text  # annotations are for the model
    text = rendered(
        served["llama3"], [QUESTION, {**ASKED, "tool_calls": ASKED["tool_calls"][:1]}]
    ).text
    assert '{"name": "now", "parameters": {"a": "\u00e9"}}' in text


def test_other_templates_are_told_in_the_system_message(served):
    system = {"role": "system", "content": "Be brief."}
    text = rendered(served["own"], [system, QUESTION, ASKED, *RESULTS], TOOLS).text
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert '"name": "get_weather"' in text
    assert '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>' in text
    call = '<tool_call>\n{"name": "now", "arguments": {"a": "\u00e9"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}\n<tool_call>" in text
    results = "<tool_response>\nlate\n</tool_response>\n<tool_response>\nearly\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text


def test_what_the_user_says_behind_results_joins_them(served):
    plan = ToolPlan(TOOLS, source=CHATML)
    messages = plan.prompt_messages([QUESTION, ASKED, RESULTS[0], {**QUESTION, "content": "And?"}])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1]["content"].endswith("</tool_response>\nAnd?")
    assert set(messages[-1]) == {"role", "content"}


@FORMS
def test_nothing_that_is_typed_is_a_special_token(served, form):
    """In contents, results, arguments, names, descriptions: as many as with harmless texts."""
    model = served[form]

    def count(text):
        call = {"id": "1", "type": "function"}
        call["function"] = {"name": "now", "arguments": json.dumps({"a": text})}
        tool = {"type": "function", "function": {"name": "now", "description": text,
                "parameters": {"type": "object", "description": text}}}  # fmt: skip
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": text},
        ]
        ids = rendered(model, messages, [tool]).ids
        special = set(range(256, 256 + len(SPECIAL)))
        return sum(token in special for token in ids), len(ids)

    harmless, nasty = count("x" * 50), count("".join(SPECIAL) * 2)
    assert nasty[0] == harmless[0]
    assert nasty[1] > harmless[1]


def test_a_token_that_begins_calls_comes_from_the_template_alone(tmp_path):
    """It is no special token in such models (Qwen), so a text that spells it would be one."""
    write_chat_files(tmp_path, QWEN3)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = served_model("qwen", with_tokenizer(ATTENTION, tmp_path), tmp_path)
    begins = tokenizer.token_to_id("<tool_call>")
    messages = [
        {"role": "user", "content": CALL},
        {"role": "assistant", "content": CALL, "tool_calls": ASKED["tool_calls"]},
        {**RESULTS[0], "content": CALL},
    ]
    found = rendered(model, messages, function(description=CALL))
    assert found.ids.count(begins) == 2  # of the two calls
    assert found.text.count("<tool_call>") == 2 + 4
    assert "\ufdd1" not in found.text
    kept = [token for token in found.ids if token != begins]
    text = tokenizer.decode(kept, skip_special_tokens=False)
    assert text.count("<tool_call>") == found.text.count("<tool_call>") - 2


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([RESULTS[0]], "messages[0].tool_call_id"),
        ([ASKED, QUESTION, RESULTS[0]], "messages[2].tool_call_id"),
        ([ASKED, {**RESULTS[0], "tool_call_id": "3"}], "messages[1].tool_call_id"),
        (
            [{"role": "assistant", "tool_calls": [
                {"id": "1", "function": {"name": "now", "arguments": "[1]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", [CHATML, QWEN3])
def test_messages_that_do_not_fit_are_refused(source, messages, param):
    with pytest.raises(SchemaError) as found:
        ToolPlan(TOOLS, source=source).prompt_messages(messages)
    assert found.value.param == param


def function(**fields):
    return [{"type": "function", "function": {"name": "f", **fields}}]


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
