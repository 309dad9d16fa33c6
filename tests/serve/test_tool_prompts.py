"""Tools in prompts: calls and results are told as the template has them; typed text stays text."""

from __future__ import annotations

import json

import pytest
from chat_models import ATTENTION, SPECIAL, chat_model, with_tokenizer, write_chat_files
from chat_templates import CHATML, QWEN3
from support.tool_calls import CALL, FORMS, SOURCES, TOOLS, function
from tokenizers import Tokenizer

from nomatmul.serve.json_schema import SchemaError
from nomatmul.serve.models import served_model
from nomatmul.serve.tools import ToolPlan

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
