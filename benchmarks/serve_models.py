"""Models of random weights that two servers load: a packed directory, and a GGUF of equal widths.

Both have one vocabulary of invented words, of which each is a token wherever it stands in a text,
so that both make the same number of tokens of a text. There is no end token: an answer is as long
as it was asked for.

A library of serve_load.py.
"""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path
from typing import Any

from nomatmul.engine.random_weights import random_weights
from nomatmul.engine.text import byte_alphabet
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import Forms, PackedWriter

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"
SPACE = "\u0120"  # how a byte-level vocabulary writes a space


@functools.cache
def vocabulary(size: int) -> list[str]:
    """Tokens by their ids: all bytes, then words with a space in front; at least 256."""
    found = list(byte_alphabet())
    syllables = [a + b for a, b in itertools.product(_CONSONANTS, _VOWELS)]
    for length in itertools.count(2):
        for parts in itertools.product(syllables, repeat=length):
            if len(found) == size:
                return found
            found.append(SPACE + "".join(parts))
    raise AssertionError  # itertools.count does not end


def words(count: int, size: int, seed: int) -> str:
    """A text of so many tokens of a vocabulary of so many, each of them a word."""
    choose, tokens = random.Random(seed), vocabulary(size)[256:]
    return "".join(choose.choices(tokens, k=count)).replace(SPACE, " ")


def token_ids(count: int, size: int, seed: int) -> list[int]:
    """So many ids of words."""
    choose = random.Random(seed)
    return [choose.randrange(256, size) for _ in range(count)]


def write_packed(path: Path, shape: dict[str, Any]) -> None:
    """A packed directory of this shape, two bits a weight, with a tokenizer."""
    config = ModelConfig(**shape)
    table = "2bit" if config.embedding_linear == "ternary" else "int8"
    forms = Forms.of(config, ternary="2bit", embedding=table, head=table)
    tokenizer = path.with_name(f"{path.name}-tokenizer") / "tokenizer.json"
    tokenizer.parent.mkdir()
    _tokenizer(shape["vocab_size"]).save(str(tokenizer))
    weights = random_weights(config, forms, seed=0).arrays
    with PackedWriter(path, config, forms, tokenizer_path=tokenizer) as writer:
        for name in writer.names:
            writer.add(name, weights[name])


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: number for number, token in enumerate(vocabulary(size))}
    tokenizer = Tokenizer(models.BPE(ids, [], ignore_merges=True))  # words are taken whole
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def their_shape(shape: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The shape of llama.cpp's model and a note.

    Its ternary form has rows of a multiple of 256; the model in the box is narrower than that, and
    is compared with one of as many weights: 7 layers of 768 by 1536 for 9 of 640 by 1600.
    """
    if shape["hidden_size"] % 256 == 0 and shape["intermediate_size"] % 256 == 0:
        return shape, ""
    theirs = {**shape, "hidden_size": 768, "intermediate_size": 1536, "num_layers": 7}
    ours, others = (_weights(one) / 1e6 for one in (shape, theirs))
    return theirs, (
        f"llama.cpp's ternary rows are multiples of 256, so its model has {theirs['num_layers']}"
        f" layers of 768 by 1536: {others:.1f}M weights a token beside ours' {ours:.1f}M"
    )


def _weights(shape: dict[str, Any]) -> int:
    """Weights of the matrices that a token reads, of a model without grouped heads."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    layer = 4 * hidden * hidden + 3 * hidden * inner
    return int(shape["num_layers"] * layer + shape["vocab_size"] * hidden)


def write_theirs(path: Path, shape: dict[str, Any], context: int) -> None:
    """Their GGUF: linears TQ2_0, the head of a transformer Q4_0 as it is run with."""
    from llama_gguf import write_gguf

    head = "Q4_0" if "token_mixer" in shape else None
    tokens = vocabulary(shape["vocab_size"])
    write_gguf(path, form="TQ2_0", shape=shape, head=head, context=context, tokens=tokens)
