"""Arguments that callers of our models give and we do not know: passed on purpose, or refused.

transformers hands a model whatever its caller gave, and an argument that is swallowed changes
nothing without a word. So only those that cannot change the result pass.
"""

from __future__ import annotations

from typing import Any

_HARMLESS = frozenset(
    {
        "cache_position",  # follows from the cache and the mask
        "return_loss",  # the loss is returned whenever there are labels
        "special_tokens_mask",  # tokenizers and data collators; nothing here reads it
        "token_type_ids",  # our models have one type of token
    }
)


class UnknownArgument(TypeError, ValueError):
    """An argument that would change the result and that we do not honour.

    TypeError, as Python's own for a misspelt argument, and ValueError, as all our refusals.
    """


def refuse_unknown(function: str, given: dict[str, Any]) -> None:
    """Raises UnknownArgument for what is left of `given`, unless it asks for nothing.

    None and False ask for nothing: callers of all models (pipelines, adapters) give them freely.
    """
    for name, value in given.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        raise UnknownArgument(f"{function} got the argument {name!r}, which it does not know")
