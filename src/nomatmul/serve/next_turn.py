"""What is done behind an answer of a chat: it is read as the next turn will hold it.

A model may write a text in other tokens than its tokenizer cuts it into; the next turn's ids are
the tokenizer's, so no state that was made while writing serves them. Rendering and tokenising go to
the threads of `offload`, reading to the engine's idle time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request

from nomatmul.serve.job import Busy, Closing
from nomatmul.serve.prepare import server_of

if TYPE_CHECKING:
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.rendered import Rendered
    from nomatmul.serve.tools import ToolPlan

_log = logging.getLogger("nomatmul.serve")

PENDING = 8  # requests of which answers are rendered; of more at a time they are not
CHOICES = 4  # of one request, the first ones
_CLIENT = "\0"  # nobody's: what is done here takes no client's turn

Message = dict[str, Any]


def _sent_back(answer: Message) -> Message:
    """A message of ours as `plain_message` would make it of what a client sends."""
    return {name: value for name, value in answer.items() if value is not None}


class NextTurns:
    """What is being rendered; of one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def expect(
        self,
        request: Request,
        model: ServedModel,
        plan: ToolPlan,
        asked: Sequence[Message],
        answers: Sequence[Message],
        options: Mapping[str, Any] | None,
    ) -> None:
        """Have a conversation read with each of its answers; returns at once.

        asked: the messages that were answered. options: the request's, for the template.
        """
        if server_of(request).cache is None or len(self._tasks) >= PENDING:
            return

        def render() -> list[Rendered]:
            return [
                plan.rendered(
                    model, [*asked, _sent_back(answer)], options, add_generation_prompt=False
                )
                for answer in answers[:CHOICES]
            ]

        async def read() -> None:
            app: FastAPI = request.app
            try:
                for rendered in await app.state.workers.run(render, _CLIENT):
                    server_of(request).scheduler.read_again(
                        model.name, rendered.ids, rendered.boundaries
                    )
            except (Busy, Closing):
                return  # there is no time for it
            except ValueError as error:  # the template refuses it, or it has become too long
                _log.debug("an answer is not read again: %s", error)

        task = asyncio.get_running_loop().create_task(read())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Give up what is not rendered yet."""
        for task in self._tasks:
            task.cancel()
