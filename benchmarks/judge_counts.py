"""What can be counted in a model's answers: repetition, variety, novelty, grammar.

A library of judge.py.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

REPEATED, NOVEL = 4, 8  # words of the n-grams
SENTENCES = 300  # that a parser reads at most
WORDS = range(3, 26)  # words of a sentence that it is given
PARSER = "link-parser"  # Link Grammar; Debian: link-grammar, link-grammar-dictionaries-en

_WORD = re.compile(r"[A-Za-z0-9]+(?:'[a-z]+)?")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')]*\s+|\n+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def ngrams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def repeated(texts: Iterable[str], n: int = REPEATED) -> float:
    """Share of n-grams that the same text had before; 0 where there are none."""
    total = again = 0
    for text in texts:
        found = ngrams(words(text), n)
        total += len(found)
        again += len(found) - len(set(found))
    return again / max(total, 1)


def distinct(texts: Iterable[str], n: int) -> float:
    """Share of different ones among the n-grams of all texts together."""
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(found)) / max(len(found), 1)


def copied(texts: Iterable[str], training: Iterable[str], n: int = NOVEL) -> float:
    """Share of the texts' n-grams that the training texts hold; 0 where there are none."""
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    wanted, seen = set(found), set[tuple[str, ...]]()
    for text in training:
        seen.update(wanted.intersection(ngrams(words(text), n)))
    return sum(gram in seen for gram in found) / max(len(found), 1)


def sentences(texts: Iterable[str], seed: int = 0) -> list[str]:
    """At most SENTENCES of the texts' sentences, drawn by seed, that begin with a letter."""
    found = [
        " ".join(part.replace('"', " ").split()) for text in texts for part in _SENTENCE.split(text)
    ]
    fit = [part for part in found if part[:1].isalpha() and len(words(part)) in WORDS]
    return fit if len(fit) <= SENTENCES else random.Random(seed).sample(fit, SENTENCES)


def parsed(found: list[str]) -> float | None:
    """Share of sentences that Link Grammar parses without leaving a word out.

    None where the parser is not installed. It reads 2 seconds at a sentence at most; one that takes
    longer counts as not parsed.
    """
    if shutil.which(PARSER) is None or not found:
        return None
    command = [PARSER, "en", "-batch=1", "-timeout=2", "-limit=100", "-null=0", "-verbosity=1"]
    given = "".join(f"{part}\n" for part in found)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return 1 - len(re.findall(r"^\+\+\+\+\+ error", done.stdout, re.MULTILINE)) / len(found)


def counts(texts: Sequence[str], training: Iterable[str] | None = None) -> dict[str, Any]:
    """All that is counted of answers. training: the texts in which copies are looked for."""
    said = sentences(texts)
    return {
        "answers": len(texts),
        "words": sum(len(words(text)) for text in texts) / max(len(texts), 1),
        "repeated_4_grams": repeated(texts),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "copied_8_grams": None if training is None else copied(texts, training),
        "sentences": len(said),
        "parsed": parsed(said),
    }
