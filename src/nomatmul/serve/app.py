"""The application: every route of the server, and errors in OpenAI's form.

A router lies in the file of its subject; here they are put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI

import nomatmul
from nomatmul.serve import (
    chat,
    completions,
    embeddings,
    health,
    listing,
    page,
    states,
    tokens,
)
from nomatmul.serve.documents import add_schemas
from nomatmul.serve.errors import add_handlers
from nomatmul.serve.next_turn import NextTurns
from nomatmul.serve.offload import Workers

if TYPE_CHECKING:
    from nomatmul.serve.server import Server

ROUTERS = (
    *(health.router, listing.router, page.router),
    *(chat.router, completions.router, embeddings.router, tokens.router, states.router),
)


def create_app(server: Server) -> FastAPI:
    """The application of a server, for `run` or any other ASGI server.

    app.state.server is the server, app.state.workers the threads of `offload`, which end with the
    application's lifespan. /openapi.json describes it; pages that show it come from other hosts,
    so there are none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.next_turns.close()
        app.state.workers.close()

    app = FastAPI(
        title="nomatmul",
        version=nomatmul.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.server = server
    app.state.workers = Workers()
    app.state.next_turns = NextTurns()
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    add_schemas(app)
    return app
