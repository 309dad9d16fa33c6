"""Small models that can chat: a byte-level tokenizer with control tokens, and a template."""

from __future__ import annotations

import json
from pathlib import Path

from nomatmul.engine import LanguageModel, random_model
from nomatmul.formats.config import ModelConfig

SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>")
BEGIN, START, END, EOT = range(256, 260)
SIZES = {"vocab_size": 270, "hidden_size": 32, "num_layers": 2, "bos_token_id": BEGIN}
RECURRENT = ModelConfig(**SIZES, intermediate_size=40, eos_token_id=EOT)
ATTENTION = ModelConfig(
    **SIZES,
    intermediate_size=64,
    eos_token_id=EOT,
    token_mixer="attention",
    positions="rotary",
    num_heads=4,
    max_position_embeddings=512,
)


def write_chat_files(directory: Path, template: str, **generation: object) -> Path:
    """Write tokenizer.json, tokenizer_config.json, the template and generation_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[3], "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def chat_model(directory: Path, config: ModelConfig, template: str) -> LanguageModel:
    """A model of random weights whose files lie in a directory."""
    write_chat_files(directory, template)
    return with_tokenizer(config, directory)


def with_tokenizer(config: ModelConfig, directory: Path, seed: int = 3) -> LanguageModel:
    """A model of random weights and the tokenizer.json that lies in a directory."""
    lm = random_model(config, seed=seed, threads=1)
    return LanguageModel(
        lm.backend,
        config,
        fingerprint=lm.fingerprint,
        packing=lm.packing,
        embedding_form=lm.embedding_form,
        path=directory,
        tokenizer_path=directory / "tokenizer.json",
    )
