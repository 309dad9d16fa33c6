"""What `generate` and `chat` share: options of sampling, and their way into the engine."""

from __future__ import annotations

from typing import Any


def unescape(text: str) -> str:
    r"""\n, \t and \\ as a shell user writes them; everything else stays as it is."""
    out, rest = "", text
    while rest:
        pair = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}.get(rest[:2])
        out += pair if pair is not None else rest[0]
        rest = rest[2 if pair is not None else 1 :]
    return out


def sampling_arguments(options: Any) -> dict[str, Any]:
    """Keyword arguments of `LanguageModel.stream` from the options of a command."""
    return {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "stop": [unescape(text) for text in options.stop],
    }
