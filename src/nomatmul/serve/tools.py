"""Tools: what a model may call, in which form it writes a call, and calls read as they come.

A plan stands for the tools of one request. It changes the messages for the model's template, says
which grammar binds the answer, and makes the parsers of the answers:

    plan = ToolPlan(tools, tool_choice, parallel, source=template_text)
    rendered = model.chat_ids(plan.prompt_messages(messages), tools=plan.template_tools)
    job = Job(..., grammar=plan.grammar)
    parser = plan.parser(key)                # one a choice
    for piece in parser.push(delta.text): ...
    for piece in parser.finish(): ...
    finish_reason = "tool_calls" if parser.calls and ended else ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nomatmul.serve.grammar import GrammarSpec

Form = Literal["hermes", "llama3", "own"]


@dataclass(frozen=True)
class CallDelta:
    """News of one call: `id` and `name` are there in its first delta only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


def tool_form(source: str) -> Form:
    """The form in which a chat template, given as its text, writes calls."""
    raise NotImplementedError


class ToolPlan:
    """The tools of one request; all arguments as they stand in it.

    source: text of the model's chat template, "" for a model without. content: what the answer
    must be where it is no call (`response_format`). Raises ValueError (`SchemaError` with the
    place) for tools that are wrong or not supported.
    """

    def __init__(
        self,
        tools: Sequence[Any] | None,
        tool_choice: Any = None,
        parallel: bool = True,
        source: str = "",
        content: GrammarSpec | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """What the template is given as `tools`; None where it is given none."""
        raise NotImplementedError

    @property
    def grammar(self) -> GrammarSpec | None:
        """What binds the answer; None for free text."""
        raise NotImplementedError

    def prompt_messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages for the template: calls and results in the form that it knows.

        Raises ValueError for calls without results that answer them, and the like.
        """
        raise NotImplementedError

    def parser(self, key: str) -> ToolParser:
        """A reader of one choice's text; key: what its ids are derived from (seed, prompt, index).

        The same key gives the same ids.
        """
        raise NotImplementedError


class ToolParser:
    """Reads the text of one choice as it comes. calls: how many calls have begun."""

    calls: int = 0

    def push(self, text: str) -> list[str | CallDelta]:
        """What is certain after more text: pieces of content (str), and of calls."""
        raise NotImplementedError

    def finish(self) -> list[str | CallDelta]:
        """What was held back: no call came of it."""
        raise NotImplementedError
