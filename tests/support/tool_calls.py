"""Three tools, a call of one, and templates that tell calls in three forms."""

from __future__ import annotations

import pytest
from chat_templates import CHATML, QWEN3

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
ARGUMENTS = '{"a": "}{</tool_call>\\"", "b": [{}]}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


def function(**fields: object) -> list[dict[str, object]]:
    """A list of one tool with these fields."""
    return [{"type": "function", "function": {"name": "f", **fields}}]
