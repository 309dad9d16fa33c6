"""A server whose scheduler says what a test tells it: for what an engine does only now and then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx

from nomatmul.serve.app import create_app
from nomatmul.serve.job import Job, Ticket
from nomatmul.serve.models import model_paths, open_models
from nomatmul.serve.options import ServeOptions

Play = Callable[[Ticket], None]


class ScriptedScheduler:
    """Takes jobs, and plays for each ticket what `play` does; jobs, cancelled: what it was told."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.jobs: list[Job] = []
        self.cancelled: list[Ticket] = []

    def submit(self, job: Job) -> Ticket:
        self.jobs.append(job)
        ticket = Ticket(job)
        self.play(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket)


def says(*texts: str, finish: str = "end", count: int = 1) -> Play:
    """Every choice says a text and ends."""

    def play(ticket: Ticket) -> None:
        for index in range(ticket.job.choices):
            text = texts[index % len(texts)]
            ticket.put(index, text, count)
            ticket.put(index, finish=finish)

    return play


def scripted_server(play: Play, options: ServeOptions | None = None, models: Any = None) -> Any:
    """What `create_app` needs of a server: the box model, and a scheduler that plays."""
    options = options or ServeOptions()
    models = open_models(model_paths(()), threads=1) if models is None else models
    scheduler = ScriptedScheduler(play)
    return SimpleNamespace(options=options, models=models, scheduler=scheduler, cache=None)


@contextlib.asynccontextmanager
async def client_of(server: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server's application, without a network."""
    app = create_app(server)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    app.state.workers.close()


def ask(server: Any, method: str, path: str, **arguments: Any) -> httpx.Response:
    """One request to the server's application."""

    async def asked() -> httpx.Response:
        async with client_of(server) as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(asked())
