"""What the scheduler runs: prompts that are read, and choices that are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.serve.grammar import Grammars


class Served(Protocol):
    """What the scheduler needs of a `ServedModel` that writes text."""

    @property
    def lm(self) -> LanguageModel: ...
    @property
    def grammars(self) -> Grammars: ...
    @property
    def end_tokens(self) -> frozenset[int]: ...
