"""Small encoders on disk: checkpoints of every task, a WordPiece tokenizer, and packed forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from model_files import Arrays, write_json
from safetensors.numpy import save_file

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderHead, EncoderReading, with_classifier

WORDS = (
    *("the", "a", "river", "sea", "town", "flows", "to", "into"),
    *("old", "quiet", "green", "stone", "of", "and", "is", "was"),
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLASSES = {
    "masked": "MaskedLM",
    "sequence": "EncoderForSequenceClassification",
    "token": "EncoderForTokenClassification",
}

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "num_layers": 2,
    "token_mixer": "attention",
    "linear": "dense",
    "causal": False,
    "num_heads": 3,
    "max_position_embeddings": 20,
    "intermediate_size": 40,
    "norm": "layer",
    "norm_eps": 1e-12,
    "positions": "sinusoidal",
    "embedding_norm": True,
    "tie_embeddings": True,
}
TREES: dict[str, Any] = {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 2, "fff_bias": True}
# Together they touch every dial that an encoder may turn.
DIALS: dict[str, dict[str, Any]] = {
    "trees": TREES,
    "bert": {"channel_mixer": "ffn"},
    "glu, rotary, rms, head": {
        "channel_mixer": "glu",
        "positions": "rotary",
        "norm": "rms",
        "norm_eps": 1e-6,
        "embedding_norm": False,
        "tie_embeddings": False,
    },
    "gelu glu": {"channel_mixer": "glu", "glu_activation": "gelu"},
    "no positions, no channel mixer": {"channel_mixer": "none", "positions": "none"},
    "master, some layers, relu": {
        **TREES,
        "fff_bias": False,
        "fff_master_width": 5,
        "fff_layers": (1,),
        "activation": "relu",
    },
    "silu, root only": {**TREES, "fff_depth": 0, "activation": "silu"},
}


def tolerance(values: np.ndarray, size: int, layers: int = 2) -> float:
    """The largest error to expect of two float32 encoders (docs/numerics.md, "Encoders").

    Every product of D terms is off by about sqrt(D) * 2^-24 of its result on either side, the
    stages of a model (eight a block, and four) add up as a root of squares, and the largest of
    many errors is some four deviations.
    """
    return 4 * 2 * np.sqrt((4 + 8 * layers) * size) * 2.0**-24 * float(values.std())


def encoder_config(**dials: Any) -> ModelConfig:
    """A small encoder's config."""
    return ModelConfig(**{**SIZES, **dials})


def encoder_tensors_of(config: ModelConfig, reading: EncoderReading, seed: int = 5) -> Arrays:
    """Weights by our names: float32, of the size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    tensors: Arrays = {}
    for name, shape in with_classifier(architecture_of(config).tensors(), config, reading).items():
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = 0.2 * values + (1 if name.endswith("weight") else 0)
        elif len(shape) == 2 and not name.startswith("embedding"):
            values /= np.sqrt(shape[1])
        tensors[name] = values.astype(np.float32)
    return tensors


def write_encoder(
    directory: Path,
    config: ModelConfig,
    task: str = "masked",
    labels: tuple[str, ...] = (),
    head: EncoderHead | None = None,
    seed: int = 5,
) -> Arrays:
    """Write a training checkpoint of an encoder; return its tensors."""
    head = head or EncoderHead(pooler_size=7)
    tensors = encoder_tensors_of(config, EncoderReading(task, head, labels), seed)
    values: dict[str, Any] = {
        "model_type": "nomatmul-encoder",
        "architectures": [CLASSES[task]],
        **dataclasses.asdict(config),  # to_dict leaves out a decoder's defaults
        **vars(head),
    }
    if labels:
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", values)
    save_file(tensors, directory / "model.safetensors")
    return tensors


def write_word_piece(directory: Path) -> None:
    """Write a tokenizer.json of BERT's kind with the words above."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate((*SPECIAL, *WORDS, "##s", "##ing"))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
