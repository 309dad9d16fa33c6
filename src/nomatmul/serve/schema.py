"""What requests may say: /v1/chat/completions and /v1/completions.

Fields of OpenAI's that change no answer here are taken and ignored; those that would change it and
are not supported are refused by name. Beyond OpenAI's: top_k, min_p, repetition_penalty, state,
chat_template_kwargs.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from nomatmul.serve.fields import Fields
from nomatmul.serve.limits import (
    MAX_BIASED,
    MAX_CHOICES,
    MAX_ID_LENGTH,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_OLD_LOGPROBS,
    MAX_STOP,
    MAX_STOP_LENGTH,
    MAX_TOKENS,
    MAX_TOOLS,
)

Name = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
_TAKEN = frozenset({"messages", "tools", "add_generation_prompt", "self"})


def _not_taken(options: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(_TAKEN.intersection(options)):
        raise PydanticCustomError("taken", "{name} is no option", {"name": name})
    return options


TemplateOptions = Annotated[dict[str, Any], AfterValidator(_not_taken)]
Ignored = Any  # of OpenAI's, without effect on the answer


class StreamOptions(Fields):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class Request(Fields):
    """What both kinds of requests have in common."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASED),
        ]
        | None
    ) = None
    state: Name | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _whole(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "it is only allowed with stream: true")
        return self


def fault(name: str, reason: str) -> PydanticCustomError:
    """An error of a whole object that one of its fields is at fault of."""
    return PydanticCustomError("fault", "{reason}", {"name": name, "reason": reason})


class CompletionRequest(Request):
    """POST /v1/completions. prompt: a text, texts, token ids, or lists of token ids."""

    refused: ClassVar[dict[str, str]] = {"suffix": "these models continue a text, they fill no gap"}

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_OLD_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fault("best_of", "it must equal n: no choice is made and thrown away")
        return self


class TextPart(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "refused",
                "{reason}",
                {"name": "type", "reason": f"{kind[:40]!r} parts; this server reads text alone"},
            )
        return values


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Fields):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Fields):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Fields):
    name: Name
    arguments: str
    parsed_arguments: Ignored = None  # what OpenAI's client adds, and sends back


class ToolCall(Fields):
    """A call that the assistant made."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None  # streams have it, and clients put their pieces together with it


class AssistantMessage(Fields):
    """An earlier answer, as clients send it back: their fields without content are null."""

    refused: ClassVar[dict[str, str]] = {
        "function_call": "use tool_calls",
        "audio": "this server reads text alone",
    }

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    reasoning_content: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    parsed: Ignored = None  # what OpenAI's client adds, and sends back

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise fault("content", "it may be null only beside tool_calls")
        return self


class ToolMessage(Fields):
    role: Literal["tool"]
    content: Content
    tool_call_id: Name
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    refused: ClassVar[dict[str, str]] = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this server writes text alone",
        "web_search_options": "this server searches nothing",
        "reasoning_effort": "give the template's own option in chat_template_kwargs",
        "verbosity": "say it in a message",
        "moderation": "this server moderates nothing",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    prediction: Ignored = None  # it makes OpenAI's answers faster, never others

    @model_validator(mode="after")
    def _possible(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "it is only allowed with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise fault("max_tokens", "give it or max_completion_tokens, not both")
        return self
