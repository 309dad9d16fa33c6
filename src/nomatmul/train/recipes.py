"""Recipes: functions that return a `TrainConfig`. Sizes from a CPU minute to the published ones.

Published settings (arXiv 2406.02528 and its code): 370M = 24 layers of width 1024 on 15B tokens,
1.3B = 24 x 2048 and 2.7B = 32 x 2560 on 100B tokens; sequences of 2048; a vocabulary of 32,000;
peak rates 4e-3, 2.5e-3 and 1.5e-3 (Transformer++ 3e-4), cosine, halved midway. The published batch
size is not stated in the code; 0.5M tokens a step is assumed here.

Encoders follow crammed BERT (arXiv 2212.14034) and UltraFastBERT (2311.10770): 16 layers of width
768 with 12 heads, sequences of 128, 32,768 WordPieces, a tied head, LayerNorm, scaled sinusoidal
positions; a day of training, the batch growing to 8192 over 60 % of it, AdamW (0.9, 0.98, 1e-12)
with rate 1e-3 in a triangle, decay 0.01, clipping at 0.5, no dropout, 25 % of the tokens hidden.
The authors' day is of one A6000; the clock of this recipe counts a day of whatever it runs on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig

_VOCABULARY = 32_000
_TOKENS_A_STEP = 524_288
_UNION: dict[str, Any] = {"channel_mixer": "fff", "activation": "silu"}
_CRAMMED: dict[str, Any] = {
    "token_mixer": "attention", "linear": "dense", "causal": False, "norm": "layer",
    "norm_eps": 1e-12, "positions": "sinusoidal", "embedding_norm": True, "tie_embeddings": True,
}  # fmt: skip
_CRAMMED_TRAINING: dict[str, Any] = {
    "schedule": "triangle", "warmup_steps": 0, "beta2": 0.98, "epsilon": 1e-12,
    "weight_decay": 0.01, "clip_norm": 0.5, "mask_share": 0.25, "sample_interval": 0,
}  # fmt: skip


def cpu_minute() -> TrainConfig:
    """A model of about a million parameters for about a minute on two CPU cores (1 MB of text)."""
    return TrainConfig(
        recipe="cpu_minute",
        model=ModelConfig(vocab_size=1024, hidden_size=128, num_layers=4, num_heads=1,
                          max_position_embeddings=256),
        sequence_length=128, batch_size=16, micro_batch_size=16, steps=200,
        learning_rate=4e-3, schedule="cosine_halved", warmup_steps=20, valid_fraction=0.05,
        eval_interval=100, eval_tokens=20_000, sample_interval=100, sample_tokens=60,
        diagnostics_interval=100, checkpoint_interval=100,
    )  # fmt: skip


def transformer_cpu_minute() -> TrainConfig:
    """The Transformer++ twin of `cpu_minute`: same sizes, tokens and steps."""
    return _twin(cpu_minute(), num_heads=4, learning_rate=1e-3)


def best_cpu_minute() -> TrainConfig:
    """`cpu_minute` with half the tokens a step, twice the steps, and the rest of `box`'s recipe.

    After as many tokens 8 % fewer bits per byte (docs/log/recipes.md).
    """
    return dataclasses.replace(
        cpu_minute(), recipe="best_cpu_minute", batch_size=8, micro_batch_size=8, steps=400,
        schedule="linear", weight_decay=0.1, full_precision=0.3,
        eval_interval=200, sample_interval=200, diagnostics_interval=200, checkpoint_interval=200,
    )  # fmt: skip


def transformer_best_cpu_minute() -> TrainConfig:
    """The Transformer++ twin of `best_cpu_minute`: same sizes, tokens, steps and schedule."""
    return _twin(best_cpu_minute(), num_heads=4, learning_rate=1e-3)


def box() -> TrainConfig:
    """The best small MatMul-free LM that we know to train: packs to 12 MB in the 1.6-bit form.

    About 6 minutes on one H200. Widths are multiples of 160, so no packed row is padded. What the
    recipe study found (studies/recipes/findings.md, 3 to 8, 15, 18): 30 % of the run in full
    precision, half the tokens a step, a rate that falls in a line, more decay. The rate is between
    the best ones of the scaling study at 27M and 71M parameters.
    """
    return TrainConfig(
        recipe="box",
        model=ModelConfig(vocab_size=4096, hidden_size=640, num_layers=9, num_heads=1,
                          intermediate_size=1600, max_position_embeddings=1024),
        sequence_length=1024, batch_size=16, micro_batch_size=16, loss_chunks=2, steps=20_141,
        learning_rate=3e-3, schedule="linear", warmup_steps=200, weight_decay=0.1,
        full_precision=0.3, deterministic=False,
        eval_interval=5000, eval_tokens=500_000, sample_interval=10_000,
        diagnostics_interval=5000, checkpoint_interval=10_000,
    )  # fmt: skip


def transformer_box() -> TrainConfig:
    """The Transformer++ control of `box`: same sizes, tokens, steps, schedule and decay."""
    return _twin(box(), num_heads=10, learning_rate=1e-3)


def union() -> TrainConfig:
    """`box` with trees in place of the GLU: the union of MatMul-free LM and UltraFastBERT.

    A token visits 320 of each layer's 1984 rows; the layer has 0.83 of the GLU's parameters.
    """
    return _with_trees(box(), "union", fff_trees=64, fff_depth=4)


def union_cpu_minute() -> TrainConfig:
    """`cpu_minute` with trees in place of the GLU: 120 of 744 rows active in each layer."""
    return _with_trees(cpu_minute(), "union_cpu_minute", fff_trees=24, fff_depth=4)


def mmfree_370m() -> TrainConfig:
    """MatMul-free LM 370M: 24 x 1024, 15B tokens, peak rate 4e-3."""
    return _published("mmfree_370m", 24, 1024, tokens=15e9, learning_rate=4e-3, micro_batch=16)


def mmfree_1_3b() -> TrainConfig:
    """MatMul-free LM 1.3B: 24 x 2048, 100B tokens, peak rate 2.5e-3."""
    return _published("mmfree_1_3b", 24, 2048, tokens=100e9, learning_rate=2.5e-3, micro_batch=8)


def mmfree_2_7b() -> TrainConfig:
    """MatMul-free LM 2.7B: 32 x 2560, 100B tokens, peak rate 1.5e-3."""
    return _published("mmfree_2_7b", 32, 2560, tokens=100e9, learning_rate=1.5e-3, micro_batch=4)


def transformer_370m() -> TrainConfig:
    """Transformer++ of 370M's sizes on the same tokens, peak rate 3e-4."""
    return _twin(mmfree_370m(), num_heads=16, learning_rate=3e-4)


def transformer_1_3b() -> TrainConfig:
    """Transformer++ of 1.3B's sizes on the same tokens, peak rate 3e-4."""
    return _twin(mmfree_1_3b(), num_heads=16, learning_rate=3e-4)


def transformer_2_7b() -> TrainConfig:
    """Transformer++ of 2.7B's sizes on the same tokens, peak rate 3e-4."""
    return _twin(mmfree_2_7b(), num_heads=20, learning_rate=3e-4)


def encoder_cpu_minute() -> TrainConfig:
    """UltraFastBERT in small, with eight trees of depth 5: about a minute on two CPU cores."""
    return TrainConfig(
        recipe="encoder_cpu_minute",
        model=ModelConfig(
            vocab_size=2048, hidden_size=128, num_layers=4, num_heads=4,
            max_position_embeddings=64, intermediate_size=504,
            channel_mixer="fff", fff_trees=8, fff_depth=5, fff_bias=True, **_CRAMMED,
        ),
        sequence_length=64, batch_size=32, micro_batch_size=16, batch_ramp=0.3, steps=250,
        learning_rate=2e-3, valid_fraction=0.05, **_CRAMMED_TRAINING,
        eval_interval=100, eval_tokens=20_000, diagnostics_interval=100, checkpoint_interval=100,
    )  # fmt: skip


def bert_cpu_minute() -> TrainConfig:
    """The dense twin of `encoder_cpu_minute`: as many neurons in each layer, all of them active."""
    return _dense_twin(encoder_cpu_minute(), "bert_cpu_minute")


def ultrafastbert_1x11() -> TrainConfig:
    """UltraFastBERT-1x11: one tree of depth 11, 12 of 4095 neurons active."""
    return _ultrafastbert("ultrafastbert_1x11", trees=1, depth=11)


def ultrafastbert_128x4() -> TrainConfig:
    """UltraFastBERT with 128 trees of depth 4: 640 of 3968 neurons active."""
    return _ultrafastbert("ultrafastbert_128x4", trees=128, depth=4)


def crammedbert() -> TrainConfig:
    """Crammed BERT, the dense twin of the UltraFastBERTs: 3072 neurons in each layer."""
    return _dense_twin(ultrafastbert_1x11(), "crammedbert")


def best_encoder_8_minutes() -> TrainConfig:
    """An encoder with trees that packs to less than 6 MB as int8; 8 minutes of one H200.

    A token computes 208 of 648 neurons of each layer: 40 trees of depth 3 and 48 that are always
    active. Positions are rotary and the rate falls in a line, unlike crammed BERT's: an encoder
    with sinusoids stays at guessing by frequency for most of so short a run (studies/fff).
    """
    return TrainConfig(
        recipe="best_encoder_8_minutes",
        model=ModelConfig(
            vocab_size=8192, hidden_size=256, num_layers=6, num_heads=4,
            max_position_embeddings=128, intermediate_size=656, channel_mixer="fff",
            fff_trees=40, fff_depth=3, fff_bias=True, fff_master_width=48,
            **{**_CRAMMED, "positions": "rotary"},
        ),
        sequence_length=128, batch_size=512, micro_batch_size=512, steps=1_000_000,
        time_limit=480.0, learning_rate=2e-3, schedule="linear", warmup_steps=500,
        beta2=0.98, epsilon=1e-12, weight_decay=0.1, mask_share=0.2, sample_interval=0,
        deterministic=False, fff_implementation="masked",
        eval_interval=5000, eval_tokens=400_000, diagnostics_interval=0, checkpoint_interval=0,
    )  # fmt: skip


def bert_8_minutes() -> TrainConfig:
    """The dense twin of `best_encoder_8_minutes`: 656 neurons a layer, as many packed bytes."""
    config = _dense_twin(best_encoder_8_minutes(), "bert_8_minutes")
    return dataclasses.replace(config, fff_implementation="")


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    function.__name__: function
    for function in (
        cpu_minute, transformer_cpu_minute, union_cpu_minute,
        best_cpu_minute, transformer_best_cpu_minute, box, transformer_box, union,
        mmfree_370m, mmfree_1_3b, mmfree_2_7b,
        transformer_370m, transformer_1_3b, transformer_2_7b,
        encoder_cpu_minute, bert_cpu_minute,
        ultrafastbert_1x11, ultrafastbert_128x4, crammedbert,
        best_encoder_8_minutes, bert_8_minutes,
    )
}  # fmt: skip


# About how long each takes ("": not measured), and what it is for.
ABOUT: dict[str, tuple[str, str]] = {
    "cpu_minute": ("1 min, 2 cores", "a first MatMul-free model of a text"),
    "transformer_cpu_minute": ("1 min, 2 cores", "its Transformer++ twin"),
    "union_cpu_minute": ("1 min, 2 cores", "the same with trees in place of the GLU"),
    "best_cpu_minute": ("1 min, 2 cores", "cpu_minute as the study found it best"),
    "transformer_best_cpu_minute": ("", "its Transformer++ twin"),
    "box": ("6 min, H200", "the best MatMul-free model of 12 MB"),
    "transformer_box": ("6 min, H200", "its Transformer++ twin"),
    "union": ("", "box with trees in place of the GLU"),
    "mmfree_370m": ("", "the published MatMul-free LM, 370M"),
    "mmfree_1_3b": ("", "the published MatMul-free LM, 1.3B"),
    "mmfree_2_7b": ("", "the published MatMul-free LM, 2.7B"),
    "transformer_370m": ("", "the Transformer++ twin of 370M"),
    "transformer_1_3b": ("", "the Transformer++ twin of 1.3B"),
    "transformer_2_7b": ("", "the Transformer++ twin of 2.7B"),
    "encoder_cpu_minute": ("1 min, 2 cores", "an encoder with trees, for fine-tuning"),
    "bert_cpu_minute": ("1 min, 2 cores", "its dense twin"),
    "ultrafastbert_1x11": ("1 day, one GPU", "UltraFastBERT, one deep tree"),
    "ultrafastbert_128x4": ("1 day, one GPU", "UltraFastBERT, many shallow trees"),
    "crammedbert": ("1 day, one GPU", "their dense twin"),
    "best_encoder_8_minutes": ("8 min, H200", "an encoder with trees of 6 MB packed"),
    "bert_8_minutes": ("8 min, H200", "its dense twin"),
}


def recipe(name: str) -> TrainConfig:
    """The config of a recipe by name; "-" and "." may stand for "_". ValueError lists the names."""
    key = name.replace("-", "_").replace(".", "_").lower()
    if key not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return RECIPES[key]()


def _published(
    name: str, layers: int, width: int, *, tokens: float, learning_rate: float, micro_batch: int
) -> TrainConfig:
    batch = _TOKENS_A_STEP // 2048
    model = ModelConfig(vocab_size=_VOCABULARY, hidden_size=width, num_layers=layers, num_heads=1)
    return TrainConfig(
        recipe=name,
        model=model,
        sequence_length=2048, batch_size=batch, micro_batch_size=micro_batch,
        steps=round(tokens / _TOKENS_A_STEP), learning_rate=learning_rate,
        schedule="cosine_halved", warmup_steps=1000,
        loss_chunks=8,
        valid_fraction=0.001, eval_interval=1000, sample_interval=1000, diagnostics_interval=1000,
    )  # fmt: skip


def _with_trees(config: TrainConfig, name: str, **trees: Any) -> TrainConfig:
    """The same run with ternary trees in place of the GLU; silu, the engine's own activation."""
    model = dataclasses.replace(config.model, **_UNION, **trees)
    return dataclasses.replace(config, recipe=name, model=model)


def _twin(config: TrainConfig, *, num_heads: int, learning_rate: float) -> TrainConfig:
    """The same run with attention and dense linear layers in place of MLGRU and ternary ones."""
    model = dataclasses.replace(
        config.model, token_mixer="attention", linear="dense", num_heads=num_heads
    )
    name = "transformer_" + config.recipe.removeprefix("mmfree_")
    return dataclasses.replace(
        config, recipe=name, model=model, learning_rate=learning_rate, full_precision=0.0
    )


def _ultrafastbert(name: str, *, trees: int, depth: int) -> TrainConfig:
    return TrainConfig(
        recipe=name,
        model=ModelConfig(
            vocab_size=32_768, hidden_size=768, num_layers=16, num_heads=12,
            max_position_embeddings=128, intermediate_size=3072,
            channel_mixer="fff", fff_trees=trees, fff_depth=depth, fff_bias=True, **_CRAMMED,
        ),
        sequence_length=128, batch_size=8192, micro_batch_size=128, batch_ramp=0.6,
        steps=900_000, time_limit=86_400.0, learning_rate=1e-3, **_CRAMMED_TRAINING,
        valid_fraction=0.001, eval_interval=1000, diagnostics_interval=1000,
    )  # fmt: skip


def _dense_twin(config: TrainConfig, name: str) -> TrainConfig:
    """The same encoder and run with dense feed-forward layers of `intermediate_size`."""
    model = dataclasses.replace(
        config.model, channel_mixer="ffn", fff_trees=None, fff_depth=None, fff_bias=False,
        fff_master_width=0,
    )  # fmt: skip
    return dataclasses.replace(config, recipe=name, model=model)
