"""A server that speaks the chat API's streams and says what a test tells it to: for the page alone.

It serves the real page; a test sets `script`, a function from the request's body to an answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from nomatmul.serve import page


@dataclass
class Answer:
    """pieces: of the text, in chunks of their own; a number among them is a pause in seconds.

    status: another one than 200 answers with `message` instead. wait: the answer stays open behind
    its pieces until the client goes. broken: it ends without its last events. error: the message of
    an error behind the pieces.
    """

    pieces: tuple[str | float, ...] = ()
    finish: str = "stop"
    cached: int = 0
    computed: int = 4
    status: int = 200
    message: str = ""
    retry_after: float | None = None
    wait: bool = False
    broken: bool = False
    error: str | None = None


def echo(body: dict[str, Any]) -> Answer:
    """Says what it was told."""
    return Answer(pieces=("You said: ", body["messages"][-1]["content"]))


@dataclass
class FakeChat:
    """requests: bodies of all that were asked; keys: their Authorization headers."""

    script: Callable[[dict[str, Any]], Answer] = echo
    models: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def refused(self, request: Request) -> Response | None:
        """An error where the key is missing."""
        given = request.headers.get("authorization")
        self.keys.append(given)
        if self.key is None or given == f"Bearer {self.key}":
            return None
        return _error(401, "Incorrect API key provided")

    async def stream(self, answer: Answer) -> AsyncIterator[str]:
        """The events of an answer; `left` is set when its client goes before its end."""
        made = 0
        try:
            for piece in answer.pieces:
                if isinstance(piece, str):
                    made += 1
                    yield _chunk({"content": piece})
                else:
                    await anyio.sleep(piece)
            if answer.wait:
                await anyio.sleep_forever()
            if answer.error is not None:
                error = {"error": {"message": answer.error, "type": "server_error"}}
                yield f"event: error\ndata: {json.dumps(error)}\n\n"
            elif not answer.broken:
                yield _chunk({}, answer.finish)
                yield _last(answer, made)
            if not answer.broken:
                yield "data: [DONE]\n\n"
        except BaseException:
            self.left.set()
            raise


def _chunk(delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n"


def _last(answer: Answer, made: int) -> str:
    cached, computed = answer.cached, answer.computed
    usage = {
        "prompt_tokens": cached + computed,
        "completion_tokens": made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    timing = {"queue_s": 0.0, "first_token_s": 0.02, "total_s": 0.52}
    counts = {"cached_tokens": cached, "computed_tokens": computed}
    return f"data: {json.dumps({'choices': [], 'usage': usage, 'nomatmul': counts | timing})}\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers=headers)


def create_app(fake: FakeChat) -> FastAPI:
    """The page and the two routes that it uses."""
    app = FastAPI()
    app.include_router(page.router)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return fake.refused(request) or JSONResponse({"object": "list", "data": fake.models})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if refused := fake.refused(request):
            return refused
        body = await request.json()
        fake.requests.append(body)
        answer = fake.script(body)
        if answer.status != 200:
            after = answer.retry_after
            headers = None if after is None else {"Retry-After": str(after)}
            return _error(answer.status, answer.message, headers)
        return StreamingResponse(fake.stream(answer), media_type="text/event-stream")

    return app


class Running:
    """A uvicorn server in a thread of its own on a free port; `port` takes that one again."""

    def __init__(self, fake: FakeChat, port: int = 0) -> None:
        config = uvicorn.Config(
            create_app(fake), port=port, log_level="warning", timeout_graceful_shutdown=1
        )
        self._server, self._ready = uvicorn.Server(config), threading.Event()
        startup = self._server.startup

        async def told(*args: Any, **names: Any) -> None:
            await startup(*args, **names)
            self._ready.set()

        self._server.startup = told  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        fake.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End the server and wait for its thread."""
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
