"""tokenizer_config.json, in which other programs look for the names of the special tokens.

This package reads the ids in config.json instead and never this file. It is written so that what
others make of a text agrees with what the package does:

- bos, eos and pad are the tokens of the ids in the model's config (a decoder's start and end may be
  one token; of several end tokens the one that the source's file names); unk, mask, cls and sep
  are found by their customary names.
- Text that spells a special token is ordinary text (`split_special_tokens`), except where the
  tokenizer has a mask or the directory a chat template: both put special tokens in as text.
- `padding_side` is "right", as in training rows. Batched generation of a decoder needs "left".
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.special_tokens import (
    CLS_NAMES,
    MASK_NAMES,
    PAD_NAMES,
    SEP_NAMES,
    first_name,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"  # names that older tools wrote apart
_BY_NAME = {
    "pad_token": PAD_NAMES,
    "mask_token": MASK_NAMES,
    "cls_token": CLS_NAMES,
    "sep_token": SEP_NAMES,
}
_NO_LIMIT = int(1e30)  # what transformers writes for a model that reads texts of any length


def tokenizer_config(
    tokenizer: Tokenizer, config: ModelConfig, source: Path | None = None
) -> JsonObject:
    """The contents of tokenizer_config.json for a model.

    source: a directory whose own tokenizer_config.json names tokens that have no customary name,
    and may hold a chat template; both are kept.
    """
    given = _read(source) if source is not None else {}
    names = {
        key: found
        for key, customary in _BY_NAME.items()
        if (found := _given_name(tokenizer, given.get(key)) or first_name(tokenizer, customary))
    }
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.token_to_id(unknown) is not None:
        names["unk_token"] = unknown
    for key in ("bos", "eos", "pad"):
        ids = getattr(config, f"{key}_token_id")
        token = _given_name(tokenizer, given.get(f"{key}_token"))
        if token is None or not (ids is None or tokenizer.token_to_id(token) in _as_ids(ids)):
            token = _token_of(tokenizer, ids)
        if token is not None:
            names[f"{key}_token"] = token
    template = {"chat_template": given["chat_template"]} if given.get("chat_template") else {}
    has_template = template or (source is not None and (source / "chat_template.jinja").is_file())
    limited = not architecture_of(config).recurrent
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(sorted(names.items())),
        "model_max_length": config.max_position_embeddings if limited else _NO_LIMIT,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not has_template and "mask_token" not in names,
        **template,
    }


def tokenizer_config_bytes(
    tokenizer: Tokenizer, config: ModelConfig, source: Path | None = None
) -> bytes:
    """`tokenizer_config` as the bytes of the file."""
    document = tokenizer_config(tokenizer, config, source)
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def special_names(directory: Path) -> dict[str, str]:
    """{"bos_token": "<s>", ...} of a model directory: what a chat template may put in by name."""
    found = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in _read(directory).items()
        if key.endswith("_token")
    }
    return {key: name for key, name in found.items() if isinstance(name, str)}


def _read(directory: Path) -> JsonObject:
    """Both files in which a directory names special tokens, the newer one's words first."""
    found: JsonObject = {}
    for name in (SPECIAL_FILE, CONFIG_FILE):
        # optional: what they would name has customary names as a rule
        with contextlib.suppress(OSError, ValueError):
            values = json.loads((directory / name).read_text("utf-8"))
            if isinstance(values, dict):
                found |= {key: value for key, value in values.items() if value is not None}
    return found


def _given_name(tokenizer: Tokenizer, value: Any) -> str | None:
    """The token that another tokenizer_config.json names: a string, or a dict that holds it."""
    name = value.get("content") if isinstance(value, dict) else value
    known = isinstance(name, str) and tokenizer.token_to_id(name) is not None
    return name if known else None


def _as_ids(ids: Any) -> tuple[int, ...]:
    """An id, several or none, as a tuple."""
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def _token_of(tokenizer: Tokenizer, ids: Any) -> str | None:
    """The token of an id, or of the first of several."""
    first = next(iter(_as_ids(ids)), None)
    return None if first is None else tokenizer.id_to_token(first)
