"""What `embed`, `fill-mask` and `classify` share: opening the encoder, and reading texts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nomatmul.cli.sampling import checked_text

if TYPE_CHECKING:
    from nomatmul.engine.encoder_model import EncoderModel


def load_encoder(options: Any) -> EncoderModel:
    """The encoder that the options name; raises ValueError for a language model."""
    import nomatmul

    return nomatmul.load(options.model, kind="encoder", threads=options.threads)


def read_texts(texts: tuple[str, ...], file: str | None) -> list[str]:
    """Texts of the command line, and of --file (one a line; - is standard input; no empty lines).

    Raises ValueError when there is none, or for bytes that are no UTF-8.
    """
    found = [checked_text(text) for text in texts]
    if file == "-":
        found += [checked_text(line) for line in _lines(sys.stdin.read())]
    elif file is not None:
        from nomatmul.formats.files.texts import read_text

        found += _lines(read_text(file))
    if not found:
        raise ValueError("there is no text; give TEXT, or --file FILE (- is standard input)")
    return found


def _lines(text: str) -> list[str]:
    """Lines that hold more than spaces. Only line feeds end one: texts may hold U+2028 or U+0085,
    at which `splitlines` cuts, and then answers would belong to other lines of the file."""
    lines = (line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n"))
    return [line for line in lines if line.strip()]


def as_pairs(texts: list[str]) -> list[str | tuple[str, str]]:
    """Each text cut in two at its tab; raises ValueError, naming the text, where there is none."""
    pairs: list[str | tuple[str, str]] = []
    for number, text in enumerate(texts, 1):
        parts = text.split("\t")
        if len(parts) != 2:
            raise ValueError(f"text {number} must be two texts with one tab between, got {text!r}")
        pairs.append((parts[0], parts[1]))
    return pairs
