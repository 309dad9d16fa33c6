"""A pretrained decoder made ternary: its shape, its weights as the start, itself as the teacher.

The teacher is Llama- or Qwen3-shaped (transformers' form, on disk or on the Hub), or a
Transformer++ that was trained here. The student keeps its attention, norms and sizes, and its embedding and head
stay floats; every linear of its blocks becomes ternary.
"""

from __future__ import annotations

import dataclasses

from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.hub import local_path
from nomatmul.formats.linear_dials import SCALE_GROUPS
from nomatmul.formats.runs import find_checkpoint

SCALE_GROUP = 128
"""Inputs that share a scale where nothing else is said: what the formats of others store."""


def open_teacher(path: str) -> Checkpoint:
    """The model that is made ternary: a directory of transformers' form, a run, or hf:owner/name.

    Raises ValueError or OSError, by name, for what is no model, is packed or a GGUF file, lacks a
    tokenizer.json, or has parts that have no place here (biases, experts, sliding windows, ...).
    """
    directory = find_checkpoint(local_path(path))
    if directory.is_file():
        raise ValueError(f"{path} is a GGUF file: give the model's directory of safetensors")
    checkpoint = open_checkpoint(directory)
    if checkpoint.kind == "packed":
        raise ValueError(f"{path} is packed: give the model that it was packed from")
    if checkpoint.tokenizer_path is None:
        raise ValueError(f"{path} has no tokenizer.json, with which its texts are read")
    return checkpoint


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
    _check_group(teacher, scale_group)
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


def _check_group(teacher: ModelConfig, group: int) -> None:
    """Raise ValueError for a group that does not divide all inputs, with those that do."""
    legal = (0, *SCALE_GROUPS)
    if group not in legal:
        raise ValueError(f"scale-group {group} is unknown: choose {', '.join(map(str, legal))}")
    widths = sorted({teacher.hidden_size, teacher.num_heads * teacher.head_size, teacher.mlp_size})
    fitting = [g for g in legal if not g or all(width % g == 0 for width in widths)]
    if group not in fitting:
        raise ValueError(
            f"scale-group {group} does not divide the model's widths"
            f" {', '.join(map(str, widths))}: choose {' or '.join(map(str, fitting))}"
        )
