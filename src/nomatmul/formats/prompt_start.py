"""Whether a text begins with the start token that a published config names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.tokenizer import load_tokenizer
from nomatmul.formats.tokenizer_config import CONFIG_FILE


def with_prompt_start(config: ModelConfig, path: Path | None, kind: str) -> ModelConfig:
    """The config without its start token where its tokenizer puts none in front of a text.

    Published configs name one all the same. path: of its tokenizer.json; kind: how that came, as
    `convert.source.prepare_tokenizer` has it.
    """
    if config.bos_token_id is None or path is None:
        return config
    file = path.parent / CONFIG_FILE
    said = read_json_object(file).get("add_bos_token") if file.is_file() else None
    if not isinstance(said, bool):
        start = load_tokenizer(path).encode("a").ids[:1]
        said = kind == "converted" or start == [config.bos_token_id]
    return config if said else dataclasses.replace(config, bos_token_id=None)
