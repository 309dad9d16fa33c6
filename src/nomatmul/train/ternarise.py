"""A pretrained decoder made ternary: its own shape, its weights as the start, itself as the teacher.

The teacher is Llama- or Qwen3-shaped (transformers' form, on disk or on the Hub), or a Transformer++
that was trained here. The student keeps its attention, norms and sizes, and its embedding and head
stay floats; every linear of its blocks becomes ternary.
"""

from __future__ import annotations

import dataclasses

from nomatmul.formats.config import ModelConfig

SCALE_GROUP = 128
"""Inputs that share a scale where nothing else is said: what the formats of others store."""


def student_of(teacher: ModelConfig, scale_group: int = SCALE_GROUP) -> ModelConfig:
    """The ternary model of a teacher's shape, whose tensors have the teacher's names and shapes.

    scale_group: inputs of a row that share a scale (32, 64, 128, 256; activations stay floats), or
    0: one scale a matrix and int8 activations, as BitNet has them. Raises ValueError, by name, for
    a teacher that is no causal model of attention and gated layers, or whose weights are ternary
    already, and for groups that do not divide its sizes.
    """
    wanted = {
        "causal": True,
        "token_mixer": "attention",
        "channel_mixer": "glu",
        "norm": "rms",
        "positions": "rotary",
        "embedding_norm": False,
    }
    for name, value in wanted.items():
        if (found := getattr(teacher, name)) != value:
            raise ValueError(
                f"only decoders of Llama's shape are made ternary: the model has {name} {found!r},"
                f" not {value!r}"
            )
    if teacher.linear != "dense":
        raise ValueError("the model's linear layers are ternary already: `nomatmul pack` takes it")
    return dataclasses.replace(
        teacher,
        linear="ternary",
        linear_norm="none",
        rounding="even",
        split_gate=scale_group == 0,
        scale_group=scale_group,
        head_linear="dense",
        embedding_linear="dense",
    )
