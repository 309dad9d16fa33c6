"""Small models of every kind of vocabulary, and grammars with texts that they allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from chat_models import with_tokenizer
from sentencepiece_files import vocabulary as sentencepiece_vocabulary

from nomatmul.convert.sentencepiece import convert_tokenizer
from nomatmul.engine import LanguageModel
from nomatmul.formats.config import ModelConfig
from nomatmul.serve.grammar import Grammars, GrammarSpec, Matcher
from nomatmul.serve.response_format import response_grammar

PADDED = 20  # ids of a model beyond those of its tokenizer


def byte_fallback_model(directory: Path) -> LanguageModel:
    """A SentencePiece vocabulary with a token a byte; end tokens </s> and one that is padding."""
    file = directory / "tokenizer.model"
    file.write_bytes(sentencepiece_vocabulary())
    tokenizer = convert_tokenizer(file)
    tokenizer.save(str(directory / "tokenizer.json"))
    size = tokenizer.get_vocab_size(with_added_tokens=True) + PADDED
    config = ModelConfig(
        vocab_size=size,
        hidden_size=32,
        num_layers=2,
        intermediate_size=40,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=(tokenizer.token_to_id("</s>"), size - 1),
    )
    return with_tokenizer(config, directory)


def grammars_of(lm: LanguageModel) -> Grammars:
    return Grammars(lm.tokenizer, lm.config.vocab_size, lm.config.end_token_ids)


def wander(
    matcher: Matcher, seed: int, ends: tuple[int, ...], steps: int = 500
) -> list[int] | None:
    """Tokens drawn among the allowed ones, each as likely; None where that does not end."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(steps):
        if matcher.done:
            return made
        token = int(rng.choice(np.flatnonzero(matcher.allowed())))
        matcher.accept(token)
        if token in ends:
            return made
        made.append(token)
    return None


def spec_of(schema: Any) -> GrammarSpec:
    """The grammar of a response that is to follow a schema."""
    spec = response_grammar(
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    )
    assert spec is not None
    return spec
