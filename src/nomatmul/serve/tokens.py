"""/tokenize and /detokenize, in the form that vLLM has, which evaluation harnesses know.

/tokenize: {"model", "prompt", "add_special_tokens": true} or {"model", "messages",
"add_generation_prompt": true, "tools", "chat_template_kwargs"}, and "return_token_strs": false;
answers {"count", "max_model_len", "tokens", "token_strs"}. A prompt's tokens are those that
/v1/completions feeds (of an encoder: that /v1/embeddings reads), messages' those of
/v1/chat/completions. /detokenize: {"model", "tokens"} answers {"prompt"}. With one model served
"model" may be left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from nomatmul.engine.language_model import LanguageModel
from nomatmul.engine.text import encoding_of
from nomatmul.serve.answers import json_response
from nomatmul.serve.body import read_body
from nomatmul.serve.documents import documented
from nomatmul.serve.errors import ApiError, unknown_model
from nomatmul.serve.fields import Fields
from nomatmul.serve.limits import MAX_MESSAGES, MAX_TOOLS, check_size
from nomatmul.serve.offload import offload
from nomatmul.serve.prepare import blame, plain_message, server_of
from nomatmul.serve.schema import Message, Name, TemplateOptions, TokenId, fault
from nomatmul.serve.tools import ToolPlan

if TYPE_CHECKING:
    from nomatmul.serve.models import ServedModel

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Fields):
    """POST /tokenize."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "give it or messages")
        if self.messages is not None and self.add_special_tokens:
            raise fault("add_special_tokens", "the chat template writes those of messages")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


@router.post("/tokenize", openapi_extra=documented(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The tokens of a text or of a conversation."""
    asked = await read_body(request, TokenizeRequest)
    model = _model(request, asked.model)
    return await offload(request, lambda: json_response(_tokenized(asked, model)))


@router.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of tokens, with special tokens spelt."""
    asked = await read_body(request, DetokenizeRequest)
    model = _model(request, asked.model)
    with blame("tokens"):
        check_size(len(asked.tokens))
    size = model.lm.config.vocab_size
    for number, token in enumerate(asked.tokens):
        if token >= size:
            message = f"token id {token} is out of range: this model has ids 0 to {size - 1}"
            raise ApiError(400, message, f"tokens[{number}]", "invalid_value")
    # the form for many texts: the one for a single text holds Python's lock
    decode = model.lm.tokenizer.decode_batch
    texts = await offload(request, lambda: decode([asked.tokens], skip_special_tokens=False))
    return json_response({"prompt": texts[0]})


def _model(request: Request, name: str | None) -> ServedModel:
    models = server_of(request).models
    if name is None:
        if len(models) > 1:
            message = f"This server has several models, name one: {', '.join(models)}"
            raise ApiError(400, message, "model", "missing_required_parameter")
        (name,) = models
    model: ServedModel | None = models.get(name)
    if model is None:
        raise unknown_model(name)
    request.state.model = name
    return model


def _tokenized(asked: TokenizeRequest, model: ServedModel) -> dict[str, Any]:
    lm, names = model.lm, None
    ids = _of_messages(asked, model) if asked.prompt is None else _of_prompt(asked, model)
    if asked.return_token_strs:
        names = [lm.tokenizer.id_to_token(token) or "" for token in ids]
    longest: int | None = lm.config.max_position_embeddings
    if isinstance(lm, LanguageModel):
        longest = lm.max_length  # None where nothing limits it
    return {"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": names}


def _of_prompt(asked: TokenizeRequest, model: ServedModel) -> list[int]:
    text, lm = asked.prompt or "", model.lm
    with blame("prompt"):
        check_size(len(text))
    if not text or asked.add_special_tokens is False:
        return list(encoding_of(lm.tokenizer, text).ids)
    with blame("prompt"):
        return lm.prompt_ids(text) if isinstance(lm, LanguageModel) else lm.text_ids(text)


def _of_messages(asked: TokenizeRequest, model: ServedModel) -> list[int]:
    if model.kind != "language":
        message = f"model {model.name!r} is an encoder, which knows no conversations"
        raise ApiError(400, message, "messages", "model_not_supported")
    with blame("tools"):
        plan = ToolPlan(asked.tools, source=model.source)
    with blame("messages"):
        rendered = plan.rendered(
            model,
            [plain_message(part) for part in asked.messages or ()],
            asked.chat_template_kwargs,
            asked.add_generation_prompt is not False,
        )
        return list(rendered.ids)
