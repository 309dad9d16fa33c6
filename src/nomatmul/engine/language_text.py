"""The text side of a language model: prompts to token ids, and which tokens may be chosen.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.ids import checked_ids
from nomatmul.engine.text import encoding_of, named_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nomatmul.formats.config import ModelConfig

Prompt = str | Sequence[int] | NDArray[Any]


class LanguageText:
    """A model's tokenizer, loaded when first used, and what prompts must be."""

    def __init__(self, path: Path | None, config: ModelConfig) -> None:
        self.path, self._config = path, config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The `tokenizers.Tokenizer`, or None for a model without one."""
        if self.path is None:
            return None
        from nomatmul.formats.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    def need_tokenizer(self) -> None:
        """Raise ValueError for a model without tokenizer."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer.json, so it makes no text; use generate_ids"
            )

    @functools.cached_property
    def legal(self) -> NDArray[np.int64] | None:
        """The ids that may be chosen: those with a token, and end tokens; None for all of them."""
        if self.tokenizer is None:
            return None
        legal = named_ids(self.tokenizer, self._config.vocab_size)
        legal[list(self._config.end_token_ids)] = True
        return None if legal.all() else np.flatnonzero(legal)

    def prompt_ids(self, prompt: Prompt, fresh: bool) -> list[int]:
        """Token ids of a prompt; a fresh sequence's text gets the config's bos token.

        Raises ValueError for an empty prompt, or a text where the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            return self._checked(prompt)
        ids = self._encoded(prompt, special=False)
        if fresh and self._config.bos_token_id is not None:
            ids = [self._config.bos_token_id, *ids]
        return self._checked(ids)

    def whole_ids(self, text: Prompt) -> list[int]:
        """Token ids of a text that stands alone, with the special tokens that the tokenizer puts
        around it; errors as of `prompt_ids`."""
        if not isinstance(text, str):
            return self._checked(text)
        return self._checked(self._encoded(text, special=True))

    def _encoded(self, text: str, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json; give the prompt as token ids")
        if not text:
            raise ValueError("the prompt is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no text: half a character at {error.start}") from None
        return list(encoding_of(self.tokenizer, text, special=special).ids)

    def _checked(self, ids: Sequence[int] | NDArray[Any]) -> list[int]:
        found: list[int] = checked_ids(ids, self._config.vocab_size).tolist()
        return found


def prompts_of(prompt: Prompt | Sequence[Prompt]) -> list[Prompt] | None:
    """The prompts of a list of texts or of lists of token ids; None where it is a single prompt."""
    if isinstance(prompt, np.ndarray):
        return list(prompt) if prompt.ndim == 2 else None
    if isinstance(prompt, list | tuple) and any(
        isinstance(part, str | list | tuple | np.ndarray) for part in prompt
    ):
        return list(prompt)
    return None
