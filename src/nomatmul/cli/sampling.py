"""What `generate` and `chat` share: opening the model, and options of sampling."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.sampling import Sampling


# The fields of Sampling that have an option; the others are for Python and the server.
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def unescape(text: str) -> str:
    r"""\n, \t and \\ as a shell user writes them; everything else stays as it is."""
    out, rest = "", text
    while rest:
        pair = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}.get(rest[:2])
        out += pair if pair is not None else rest[0]
        rest = rest[2 if pair is not None else 1 :]
    return out


def checked_text(text: str) -> str:
    """A prompt's text; raises ValueError for bytes that are no UTF-8 (Python keeps such apart).

    Where the locale's encoding is ASCII Python keeps all others apart, too: they are joined here.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        first = next(at for at, c in enumerate(text) if "\ud800" <= c <= "\udfff")
        raise ValueError(f"the prompt is not UTF-8 text (character {first})") from None


def before_numpy() -> None:
    """Keep numpy's OpenBLAS from starting a thread a core when it is imported, a quarter of its
    import's time; the native core has threads of its own and never calls it."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def load_model(options: Any, *, talking: bool = False) -> LanguageModel:
    """The model that the options name, as soon as possible: its first token is waited for.

    talking: without a name it is the box's talking model, not its base.
    """
    before_numpy()
    import nomatmul

    return nomatmul.load(
        _talking_directory() if talking and options.model is None else options.model,
        kind="language",
        threads=options.threads,
        device=options.device,
        kv=options.kv,
    )


def _talking_directory() -> Path:
    """Of the box's talking model; of its base where nothing could read the other's template."""
    from nomatmul.engine.loading import BOX, TALKING_BOX, talking_directory

    found = talking_directory()
    if found == TALKING_BOX and importlib.util.find_spec("jinja2") is None:
        how = 'to talk with the other one: pip install "nomatmul[chat]"'
        print(f"note: the base of the box goes on from your words; {how}", file=sys.stderr)
        return BOX
    return found


def sampling_of(options: Any) -> Sampling:
    """How tokens are chosen, from those options of a command that say so."""
    from nomatmul.engine.sampling import Sampling

    return Sampling(**{name: getattr(options, name) for name in SAMPLING_OPTIONS})


def tokens_per_second(tokens: int, times: Sequence[float]) -> float | None:
    """The rate after the first piece of text, which waited for the prompt; None if unknown.

    times: when each piece came, in seconds.
    """
    if tokens < 2 or len(times) < 2 or times[-1] <= times[0]:
        return None
    return (tokens - 1) / (times[-1] - times[0])


def show_speed(tokens: int, times: Sequence[float]) -> None:
    """One line on standard error about what was written, where a person reads it."""
    if sys.stderr.isatty():
        rate = tokens_per_second(tokens, times)
        speed = f", {rate:.1f} tokens/s" if rate is not None else ""
        print(f"[{tokens} token{'' if tokens == 1 else 's'}{speed}]", file=sys.stderr)
