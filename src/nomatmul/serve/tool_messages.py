"""Messages with calls and results, as a chat template reads them.

Templates that know tools are given OpenAI's messages with the arguments of calls as objects. For
all others (the form "own") the tools stand in the system message, a call is text of the assistant,
and results are what the user says next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nomatmul.serve.json_schema import SchemaError
from nomatmul.serve.tool_calls import Syntax

Message = dict[str, Any]

_PREAMBLE = """\
You can call functions. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call a function, answer with its name and its arguments as JSON, just like this:
{opened}NAME{between}{{"ARGUMENT": "VALUE"}}{closed}"""


def native_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages for a template that knows tools. Raises SchemaError; see `_checked`."""
    result = []
    for message, calls, name in _checked(messages):
        changed = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls:
            changed["content"] = changed.get("content") or ""
            changed["tool_calls"] = [
                {"id": call["id"], "type": "function", "function": {"name": called, "arguments": a}}
                for call, called, a in calls
            ]
        if name is not None:
            changed["name"] = name
        result.append(changed)
    return result


def own_messages(
    messages: Sequence[Message], functions: Sequence[dict[str, Any]], syntax: Syntax
) -> list[Message]:
    """Messages for a template that knows no tools; functions: those that are offered."""
    result: list[Message] = []
    for message, calls, name in _checked(messages):
        role, content = message["role"], message.get("content") or ""
        if calls:
            texts = [
                f"{syntax.opened}{called}{syntax.between}{_json(arguments)}{syntax.closed}"
                for _, called, arguments in calls
            ]
            written = syntax.joined.join(texts)
            result.append(
                {"role": role, "content": f"{content}\n{written}" if content else written}
            )
        elif name is not None:
            _say(result, f"<tool_response>\n{content}\n</tool_response>", answers=True)
        elif role == "user" and result and result[-1].get("answers"):
            _say(result, content, answers=False)
        else:
            result.append(dict(message))
    if functions:
        lines = "\n".join(_json({"type": "function", "function": entry}) for entry in functions)
        preamble = _PREAMBLE.format(tools=lines, **vars(syntax))
        first = result[0] if result and result[0]["role"] in ("system", "developer") else None
        if first is None:
            result.insert(0, {"role": "system", "content": preamble})
        else:
            result[0] = {**first, "content": f"{first['content']}\n\n{preamble}"}
    return [{k: v for k, v in message.items() if k != "answers"} for message in result]


def _say(result: list[Message], text: str, answers: bool) -> None:
    """Add a text of the user; what follows results joins them, since many templates want user and
    assistant in turn."""
    if result and result[-1].get("answers"):
        before = result.pop()["content"]
        text = f"{before}\n{text}"
    result.append({"role": "user", "content": text, "answers": answers})


def _checked(
    messages: Sequence[Message],
) -> list[tuple[Message, list[tuple[dict[str, Any], str, dict[str, Any]]], str | None]]:
    """Each message with its calls (call, name, arguments), and for a result the name of what was
    called.

    Raises SchemaError for arguments that are no JSON object, and a result that answers no call of
    the assistant's message before it.
    """
    result, open_calls = [], dict[str, str]()
    for number, message in enumerate(messages):
        calls, name = [], None
        if message["role"] == "tool":
            wanted = message.get("tool_call_id")
            if wanted not in open_calls:
                raise SchemaError(
                    f"no call of the assistant's message before it has the id {str(wanted)[:64]!r}",
                    f"messages[{number}].tool_call_id",
                )
            name = open_calls[wanted]
        else:
            open_calls = {}
            for at, call in enumerate(message.get("tool_calls") or ()):
                place = f"messages[{number}].tool_calls[{at}]"
                function = call["function"]
                calls.append((call, function["name"], _arguments(function, place)))
                open_calls[call["id"]] = function["name"]
        result.append((message, calls, name))
    return result


def _arguments(function: dict[str, Any], place: str) -> dict[str, Any]:
    try:
        found = json.loads(function["arguments"] or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SchemaError(
            "the arguments of a call must be a JSON object as text", f"{place}.function.arguments"
        )
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
