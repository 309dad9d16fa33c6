"""Requests whose answers are known: what each prompt gets from a model that has seen nothing else.

Every prompt begins with a marker of its own. Its answer, token by token with log-probabilities, is
computed here in a process without a server, batches or cache, so an answer that holds a token of
another stream, or comes from another's state, differs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nomatmul.engine.logprobs import top_logprobs
from nomatmul.engine.sampling import Sampling
from nomatmul.serve.models import ServedModel

WORDS = ("the", "old", "lamp", "river", "opens", "slowly", "under", "a", "signal", "and", "keeps")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Known:
    """A request and its answer. finish: as the API calls it."""

    path: str
    body: dict[str, Any]
    text: str
    logprobs: tuple[float, ...]
    finish: str


def known_requests(models: Mapping[str, ServedModel], count: int, seed: int) -> list[Known]:
    """So many requests, of every model in turn; half of them conversations of several turns."""
    choose = random.Random(seed)
    found: list[Known] = []
    names = [name for name, served in models.items() if served.kind == "language"]
    marker = 0
    while len(found) < count:
        served = models[names[marker % len(names)]]
        opening = f"Marker {marker}{choose.randrange(10**6):06d}. {_words(choose)}"
        marker += 1
        if marker % 4 < 2:
            found.append(_completion(served, opening, choose))
        else:
            found += _conversation(served, opening, choose)
    return found[:count]


def _words(choose: random.Random) -> str:
    return " ".join(choose.choices(WORDS, k=choose.randrange(4, 30)))


def _options(served: ServedModel, choose: random.Random) -> dict[str, Any]:
    return {
        "model": served.name,
        "max_tokens": choose.randrange(1, 40),
        "temperature": choose.choice((0.0, 0.8, 1.0)),
        "seed": choose.randrange(1 << 40),
    }


def _completion(served: ServedModel, prompt: str, choose: random.Random) -> Known:
    body = {**_options(served, choose), "prompt": prompt, "logprobs": 0}
    text, logprobs, finish = cold(served, served.prompt_ids(prompt), body, ())
    return Known(COMPLETIONS, body, text, logprobs, finish)


def _conversation(served: ServedModel, opening: str, choose: random.Random) -> list[Known]:
    """Turns of one conversation; each is a request with all that was said before."""
    messages = [{"role": "user", "content": opening}]
    found = []
    for _ in range(choose.randrange(1, 5)):
        body = {**_options(served, choose), "messages": list(messages), "logprobs": True}
        ids = served.chat_ids(messages).ids
        text, logprobs, finish = cold(served, ids, body, served.end_tokens)
        found.append(Known(CHAT, body, text, logprobs, finish))
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": _words(choose)},
        ]
    return found


def cold(
    served: ServedModel, ids: Sequence[int], body: Mapping[str, Any], ends: Any
) -> tuple[str, tuple[float, ...], str]:
    """(text, logprobs, finish reason) of a request, from a session of its own."""
    sampling = Sampling(temperature=body["temperature"], seed=body["seed"])
    lm = served.language
    writing = lm.text_generation(list(ids), body["max_tokens"], sampling, end_tokens=tuple(ends))
    session, pieces, logprobs = lm.session(), [], []
    while writing.needs:
        logits_V = session.append(writing.needs)
        pieces.append(writing.take(logits_V))
        logprobs.append(top_logprobs(logits_V, writing.token, 0)[0])
    finish = "length" if writing.finish_reason == "length" else "stop"
    return "".join(pieces), tuple(logprobs), finish
