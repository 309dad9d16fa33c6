"""Tools: what a model may call, told to it in the form that it knows, and bound by a grammar.

A plan stands for the tools of one request. It changes the messages for the model's template, says
which grammar binds the answer, and makes the parsers of the answers:

    plan = ToolPlan(tools, tool_choice, parallel, source=template_text)
    rendered = plan.rendered(model, messages, options)
    job = Job(..., grammar=plan.grammar)
    parser = plan.parser(key)                # one a choice
    for piece in parser.push(delta.text): ...
    for piece in parser.finish(): ...

Forms of calls: "hermes" (Qwen, Hermes: <tool_call> around JSON) and "llama3" (JSON alone, one call)
where the template tells the model so; else "own", which writes calls as hermes does, told to the
model in its system message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nomatmul.serve.grammar import GrammarSpec, Matcher, json_rule
from nomatmul.serve.json_schema import NAME, SchemaError, check_names, check_schema, check_size
from nomatmul.serve.limits import MAX_TOOLS
from nomatmul.serve.tool_calls import SYNTAX, CallDelta, Form, Syntax, ToolParser
from nomatmul.serve.tool_messages import native_messages, own_messages

if TYPE_CHECKING:
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.rendered import Rendered

__all__ = ["CallDelta", "Form", "ToolParser", "ToolPlan", "tool_form"]

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_FUNCTION_KEYS = {"name", "description", "parameters", "strict"}
_MODES = ("none", "auto", "required")


def tool_form(source: str) -> Form:
    """The form in which a chat template, given as its text, writes calls."""
    if "<tool_call>" in source and "<function=" not in source:
        return "hermes"
    if '"name": function name, "parameters"' in source:
        return "llama3"
    return "own"


class ToolPlan:
    """The tools of one request; all arguments as they stand in it.

    source: text of the model's chat template, "" for a model without. content: what the answer
    must be where it is no call (`response_format`). Raises SchemaError with the place for tools
    that are wrong or not supported.
    """

    def __init__(
        self,
        tools: Sequence[Any] | None,
        tool_choice: Any = None,
        parallel: bool = True,
        source: str = "",
        content: GrammarSpec | None = None,
    ) -> None:
        self.form = tool_form(source)
        self.held: Matcher | None = None  # keeps the compiled grammar while the request lasts
        self._syntax, self._content = SYNTAX[self.form], content
        self._functions, schemas = _checked_tools(tools)
        check_size(schemas.values(), "tools")
        self._mode, chosen = _checked_choice(tool_choice, schemas)
        self._callable = {chosen: schemas[chosen]} if chosen else schemas
        self._several = parallel and self._syntax.several and not chosen
        if content is not None and self._mode == "auto" and not self._syntax.inside:
            raise SchemaError(
                "this model writes calls as JSON, so they cannot be told from a response_format;"
                " set tool_choice",
                "response_format",
            )

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """What the template is given as `tools`; None where it is given none."""
        if self._mode == "none" or self.form == "own":
            return None
        return [{"type": "function", "function": entry} for entry in self._functions]

    @property
    def grammar(self) -> GrammarSpec | None:
        """What binds the answer; None for free text."""
        if self._mode == "none":
            return self._content
        lines = ["%llguidance {}", *_call_rules(self._syntax, self._callable, self._several)]
        if self._mode == "required":
            lines.append("start: OPENED calls")
        elif self._content is not None:
            schema = json.loads(self._content.value or '{"type": "object"}')
            lines += ["start: content | OPENED calls", f"content: {json_rule(schema)}"]
        elif self._syntax.inside:
            lines += ["start: TEXT | opened calls", r"TEXT: /(.|\n)*/"]
            lines.append(f"opened[lazy]: /(.|\\n)*{re.escape(self._syntax.trigger)}/")
        else:
            first = re.escape(self._syntax.trigger)
            lines += ["start: TEXT | OPENED calls", rf"TEXT: /([^{first}](.|\n)*)?/"]
        return GrammarSpec("lark", "\n".join(lines))

    def prompt_messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages for the template: calls and results in the form that it knows.

        Raises SchemaError for calls that are none, and for results that answer no call.
        """
        if self.form != "own":
            return native_messages(messages)
        offered = [] if self._mode == "none" else self._functions
        return own_messages(messages, offered, self._syntax)

    def rendered(
        self,
        model: ServedModel,
        messages: Sequence[dict[str, Any]],
        options: Mapping[str, Any] | None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """A conversation as token ids, with these tools told to the model.

        options: further names for the template. Raises what `prompt_messages` and
        `ServedModel.chat_ids` raise.
        """
        return model.chat_ids(
            self.prompt_messages(messages),
            tools=self.template_tools,
            options=options,
            add_generation_prompt=add_generation_prompt,
        )

    def parser(self, key: str) -> ToolParser:
        """A reader of one choice's text; key: what its ids are derived from (seed, prompt, index).

        The same key gives the same ids.
        """
        return ToolParser(None if self._mode == "none" else self._syntax, key)


def _call_rules(syntax: Syntax, schemas: dict[str, Any], several: bool) -> list[str]:
    """Rules of a lark grammar: `calls` is what follows the trigger."""
    rest = syntax.opened.removeprefix(syntax.trigger)
    more = f" ({_quoted(syntax.joined + syntax.trigger)} call)*" if several else ""
    lines = [
        f"OPENED: {_quoted(syntax.trigger)}",
        f"calls: call{more}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(schemas))),
    ]
    for number, (name, schema) in enumerate(schemas.items()):
        head, tail = _quoted(rest + name + syntax.between), _quoted(syntax.closed)
        lines.append(f"call_{number}: {head} arguments_{number} {tail}")
        lines.append(f"arguments_{number}: {json_rule(schema)}")
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text)


def _checked_tools(
    tools: Sequence[Any] | None,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """(functions as they are told to the model, what binds the arguments of each by its name)."""
    if tools is None:
        return [], {}
    if not isinstance(tools, list | tuple) or not 1 <= len(tools) <= MAX_TOOLS:
        raise SchemaError(f"tools must be a list of 1 to {MAX_TOOLS} tools", "tools")
    functions: list[dict[str, Any]] = []
    schemas: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(tools):
        param = f"tools[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise SchemaError('only tools of type "function" are supported', f"{param}.type")
        check_names(tool, {"type", "function"}, param)
        param += ".function"
        function = tool.get("function")
        if not isinstance(function, dict):
            raise SchemaError(f"{param} must be an object", param)
        check_names(function, _FUNCTION_KEYS, param)
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SchemaError(
                "a name must have 1 to 64 of the characters a-z, A-Z, 0-9, _ and -",
                f"{param}.name",
            )
        if name in schemas:
            raise SchemaError(f"two tools are named {name!r}", f"{param}.name")
        if not isinstance(function.get("description", ""), str | None):
            raise SchemaError("a description must be a text", f"{param}.description")
        schemas[name] = _parameters(function, f"{param}.parameters")
        told = {"name": name, "description": function.get("description") or ""}
        functions.append({**told, "parameters": function.get("parameters") or _NO_ARGUMENTS})
    return functions, schemas


def _parameters(function: dict[str, Any], param: str) -> dict[str, Any]:
    given = function.get("parameters")
    if given is None or given == {}:
        return _NO_ARGUMENTS
    schema = check_schema(given, param)
    if schema.get("type", "object") != "object":
        raise SchemaError('the parameters of a function must be of type "object"', param)
    return {"type": "object", **schema}


def _checked_choice(choice: Any, schemas: dict[str, Any]) -> tuple[str, str | None]:
    """(one of _MODES, the only function that is to be called)."""
    if choice is None:
        return ("auto" if schemas else "none"), None
    if isinstance(choice, str) and choice in _MODES:
        if choice != "none" and not schemas:
            raise SchemaError("tool_choice is given without tools", "tool_choice")
        return choice, None
    name = _named(choice)
    if name is None:
        raise SchemaError(
            f"tool_choice must be one of {', '.join(_MODES)}, or"
            ' {"type": "function", "function": {"name": ...}}',
            "tool_choice",
        )
    if name not in schemas:
        raise SchemaError(f"no tool is named {name[:64]!r}", "tool_choice.function.name")
    return "required", name


def _named(choice: Any) -> str | None:
    """The name in {"type": "function", "function": {"name": ...}}."""
    if not isinstance(choice, dict) or choice.keys() != {"type", "function"}:
        return None
    function = choice["function"]
    if not isinstance(function, dict) or function.keys() != {"name"}:
        return None
    name = function["name"]
    return name if choice["type"] == "function" and isinstance(name, str) else None
