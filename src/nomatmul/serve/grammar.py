"""What a text may be, token by token: grammars compiled by llguidance for a model's vocabulary.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar as a request asks for it.

    kind: "json_object" (value is not read), "json_schema" (value: the schema as JSON text),
    "regex" or "lark" (value: its text).
    """

    kind: Kind
    value: str = ""


class Grammars:
    """The grammars of one model: compiles specs and keeps the last ones.

    vocab_size: the model's, which may be larger than the tokenizer's. end_tokens: every token that
    ends a text of this model; they are allowed where the grammar is complete, and nowhere else.
    Raises ValueError for a tokenizer whose tokens do not spell bytes. Methods may be called from
    several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int]) -> None:
        raise NotImplementedError

    def compile(self, spec: GrammarSpec) -> Matcher:
        """Return a matcher at the beginning of a text; call it off the event loop.

        A spec that was compiled lately costs a copy. Raises ValueError, in one line, for a grammar
        that is wrong, not supported, or beyond the limits.
        """
        raise NotImplementedError


class Matcher:
    """The state of a grammar behind the tokens of one text; made by `Grammars.compile`."""

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, bool [V]; valid until the next call.

        Raises ValueError when the grammar exceeds the limits of a step.
        """
        raise NotImplementedError

    def accept(self, token: int) -> None:
        """Go on behind a token that `allowed` allowed."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        raise NotImplementedError

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        raise NotImplementedError
