"""Tiny teachers of transformers' own families, with random weights, written to disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from nomatmul.train.model import no_progress_bars

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 4, "max_position_embeddings": 64}

# family: (config, model, sizes)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SIZES | {"final_logit_softcapping": 1.5}),
    "cohere": ("CohereConfig", "CohereForCausalLM", SIZES | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", SIZES | {"logits_scaling": 8.0}),
    "bert": ("BertConfig", "BertForMaskedLM", BERT),
    "headless": ("BertConfig", "BertLMHeadModel", BERT),  # sees later tokens, says otherwise
}


def write_teacher(
    family: str,
    directory: Path,
    tokenizer: Path,
    *,
    rows: int,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """A model of `rows` tokens with that tokenizer.json; weights large enough to differ."""
    kind, model, sizes = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, kind)(
        vocab_size=rows, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        **(sizes | {"initializer_range": 0.2} | changes),
    )  # fmt: skip
    with no_progress_bars():
        getattr(transformers, model)(config).to(dtype).save_pretrained(directory)
    shutil.copy(tokenizer, directory / "tokenizer.json")
    return directory


def change_config(directory: Path, **values: Any) -> None:
    """Replace keys of a config.json; None removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8")) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")
