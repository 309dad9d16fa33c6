"""How likely continuations of contexts are: each context is read once, for all that follow it.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nomatmul.engine.ids import log_probabilities

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

_ROWS = 256  # positions whose logits are in memory at once


@dataclass
class _Continuation:
    """One that is being read: `read` of its tokens have been scored."""

    number: int
    ids: list[int]
    session: Session
    read: int = 0
    logprob: float = 0.0
    greedy: bool = True

    def score(self, logits_TV: Float) -> None:
        """Take the logits in front of the next T tokens."""
        targets = np.array(self.ids[self.read : self.read + len(logits_TV)])
        self.logprob += float(log_probabilities(logits_TV, targets).sum())
        self.greedy &= bool((logits_TV.argmax(axis=1) == targets).all())
        self.read += len(targets)


def score_continuations(
    lm: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, lanes: int = 16
) -> list[tuple[float, bool]]:
    """Return, for each (context, continuation) of token ids, the natural log of the
    continuation's probability behind the context, and whether greedy decoding would write it.

    lanes: contexts that are read side by side; results do not depend on it. A context has at least
    one token. Raises ValueError for an empty one and as `LanguageModel.step`.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(number)
    contexts = sorted(groups, key=len)  # of like lengths, so that they end together
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for start in range(0, len(contexts), lanes):
        part = contexts[start : start + lanes]
        sessions = [lm.session() for _ in part]
        rows = lm.step(sessions, part)
        waiting = []
        for context, session, logits_V in zip(part, sessions, rows, strict=True):
            for number in groups[context]:
                ids = list(pairs[number][1])
                one = _Continuation(number, ids, session.fork() if len(ids) > 1 else session)
                if ids:
                    one.score(logits_V[None])
                waiting.append(one)
        _read(lm, [one for one in waiting if one.read < len(one.ids)])
        for one in waiting:
            found[one.number] = (one.logprob, one.greedy)
    return found


def _read(lm: LanguageModel, waiting: list[_Continuation]) -> None:
    """Score what is left of continuations, some rows of logits at a time."""
    while waiting:
        taken: list[tuple[_Continuation, list[int]]] = []
        room = _ROWS
        for one in waiting:
            ids = one.ids[one.read - 1 : min(one.read - 1 + room, len(one.ids) - 1)]
            taken.append((one, ids))
            room -= len(ids)
            if not room:
                break
        rows = lm.step([one.session for one, _ in taken], [ids for _, ids in taken], "all")
        for (one, _), logits_TV in zip(taken, rows, strict=True):
            one.score(logits_TV)
        waiting = [one for one in waiting if one.read < len(one.ids)]
