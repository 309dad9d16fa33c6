"""/v1/embeddings: vectors of texts, by encoders and by language models.

An encoder's vector is the mean of its hidden states; a language model's is the hidden state behind
the last token, as models made for embedding are read. Nothing in a model's files says whether it
was made for it, so every language model answers. All vectors have length 1.

Legend: B inputs, D hidden size.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from nomatmul.engine.embeddings import Reading
from nomatmul.engine.encoder_model import EncoderModel
from nomatmul.engine.language_model import LanguageModel
from nomatmul.serve.answers import GONE, encode, too_late
from nomatmul.serve.body import read_body
from nomatmul.serve.documents import documented
from nomatmul.serve.errors import ApiError, unknown_model
from nomatmul.serve.fields import Fields
from nomatmul.serve.limits import MAX_EMBEDDED_TOKENS, MAX_EMBEDDINGS, check_size
from nomatmul.serve.offload import offload
from nomatmul.serve.policy import Pace
from nomatmul.serve.prepare import blame, client_of, server_of
from nomatmul.serve.schema import Ignored, Name, TokenIds

if TYPE_CHECKING:
    from nomatmul.engine.state import Float
    from nomatmul.serve.models import ServedModel

router = APIRouter(prefix="/v1", tags=["embeddings"])

_SLICE_SECONDS = 0.05  # how long a slice of the work may hold up streams
_Text = Annotated[str, Field(min_length=1)]
_Many = Field(min_length=1, max_length=MAX_EMBEDDINGS, fail_fast=True)


class EmbeddingRequest(Fields):
    """POST /v1/embeddings. input: a text, texts, token ids, or lists of token ids."""

    model: Name
    input: _Text | TokenIds | Annotated[list[_Text], _Many] | Annotated[list[TokenIds], _Many]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Ignored = None


@router.post("/embeddings", openapi_extra=documented(EmbeddingRequest))
async def create(request: Request) -> Response:
    """Turn texts into vectors."""
    asked = await read_body(request, EmbeddingRequest)
    model = server_of(request).models.get(asked.model)
    if model is None:
        raise unknown_model(asked.model)
    request.state.model = model.name
    size = model.lm.config.hidden_size
    if asked.dimensions not in (None, size):
        message = f"This model's vectors have {size} dimensions; they cannot be shortened"
        raise ApiError(400, message, "dimensions", "invalid_value")
    ids = await offload(request, lambda: _token_ids(asked, model))
    timeout = server_of(request).options.timeout
    try:
        vectors_BD = await asyncio.wait_for(_embedded(request, model, ids), timeout)
    except asyncio.TimeoutError:
        raise too_late(timeout) from None
    count = sum(map(len, ids))
    usage = encode({"prompt_tokens": count, "total_tokens": count})
    rows = await offload(request, lambda: _rows(vectors_BD, asked.encoding_format))
    return Response(
        f'{{"object":"list","data":[{rows}],"model":{encode(model.name)},"usage":{usage}}}',
        media_type="application/json",
    )


def _token_ids(asked: EmbeddingRequest, model: ServedModel) -> list[list[int]]:
    """Token ids of each input; raises ApiError naming the one at fault."""
    given = asked.input
    several = not isinstance(given, str) and not isinstance(given[0], int)
    inputs: Sequence[Any] = given if several else [given]
    with blame("input"):
        check_size(sum(map(len, inputs)))
    found, total = [], 0
    for number, text in enumerate(inputs):
        with blame(f"input[{number}]" if several else "input"):
            found.append(_ids_of(model.lm, text))
        total += len(found[-1])
        if total > MAX_EMBEDDED_TOKENS:
            message = f"the inputs have more than {MAX_EMBEDDED_TOKENS:,} tokens in all"
            raise ApiError(400, message, "input", "too_many_tokens")
    return found


def _ids_of(lm: LanguageModel | EncoderModel, text: str | list[int]) -> list[int]:
    if isinstance(lm, LanguageModel):
        return lm.whole_ids(text)
    return lm.text_ids(text) if isinstance(text, str) else lm.checked_ids(text)


class _Work(Protocol):
    """Inputs on their way to vectors. left: tokens that are not read yet."""

    @property
    def left(self) -> int: ...

    def advance(self, tokens: int) -> int:
        """Read about so many tokens more; return how many it were."""

    def vectors(self) -> Float:
        """float32 [B, D], when nothing is left."""


class _Encoding:
    """The inputs of an encoder, which reads each of them whole."""

    def __init__(self, lm: EncoderModel, ids: Sequence[list[int]]) -> None:
        self._lm, self._ids, self._next = lm, ids, 0
        self._parts: list[Float] = []

    @property
    def left(self) -> int:
        return sum(map(len, self._ids[self._next :]))

    def advance(self, tokens: int) -> int:
        first, read = self._next, 0
        while self._next < len(self._ids) and (
            not read or read + len(self._ids[self._next]) <= tokens
        ):
            read += len(self._ids[self._next])
            self._next += 1
        part = self._ids[first : self._next]
        self._parts.append(self._lm.embed_ids(part, normalize=True))
        return read

    def vectors(self) -> Float:
        return np.concatenate(self._parts)


async def _embedded(request: Request, model: ServedModel, ids: list[list[int]]) -> Float:
    """float32 [B, D], computed on the engine thread in short slices between the streams' steps."""
    work = _work(model.lm, ids)
    scheduler, pace, client = server_of(request).scheduler, Pace(_SLICE_SECONDS), client_of(request)
    while work.left:
        if await request.is_disconnected():
            raise ApiError(GONE, "The client went away", code="cancelled")
        await asyncio.wrap_future(scheduler.call(_slice(work, pace), client))
    return work.vectors()


def _work(lm: LanguageModel | EncoderModel, ids: list[list[int]]) -> _Work:
    if isinstance(lm, LanguageModel):
        return Reading(lm.backend, [lm.checked_ids(text) for text in ids])
    return _Encoding(lm, ids)


def _slice(work: _Work, pace: Pace) -> Callable[[], None]:
    def run() -> None:
        start = time.perf_counter()
        read = work.advance(pace.chunk(0))
        pace.measured(0, read, False, time.perf_counter() - start)

    return run


def _rows(vectors_BD: Float, form: str | None) -> str:
    """The objects of `data`, encoded one by one, so that other threads get their turns."""
    rows = []
    for number, vector in enumerate(vectors_BD):
        if form == "base64":
            value = f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'
        else:
            value = encode(vector.tolist())
        rows.append(f'{{"object":"embedding","index":{number},"embedding":{value}}}')
    return ",".join(rows)
