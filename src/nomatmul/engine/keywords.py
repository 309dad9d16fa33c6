"""Unknown keywords are refused with the name that is right here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class OptionError(ValueError, TypeError):
    """An option that a method does not have: a TypeError to Python, a user's fault to us."""


# What other libraries call an option of ours.
_ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "do_sample": "temperature (0 takes the likeliest token)",
    "repeat_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "random_seed": "seed",
    # of servers, and rarely of a program: `generate` has enough keywords of its own
    "presence_penalty": "sampling=Sampling(presence_penalty=...)",
    "frequency_penalty": "sampling=Sampling(frequency_penalty=...)",
    "logit_bias": "sampling=Sampling(logit_bias={id: ...})",
}


def explains_options(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method refuse an unknown keyword in its own name, with the name that is right here."""
    legal = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        for name in options:
            if name not in legal:
                right = _ELSEWHERE.get(name, f"one of {', '.join(legal)}")
                raise OptionError(f"{method.__name__} has no option {name!r}; use {right}")
        return method(*args, **options)

    return call
