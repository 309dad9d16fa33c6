"""Multiply-adds of a token, counted from a model's sizes: what a path needs, and what is run.

Weights of a product count once for each token; a ternary product counts like a dense one of its
size; norms, activations and gates are left out. Nothing here needs torch.
"""

from __future__ import annotations

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig

TRAINING = 6.0  # FLOPs of a training step for each multiply-add of the forward pass


def mixer_products(model: ModelConfig, length: int) -> float:
    """Multiply-adds of all token mixers for a token of a sequence of `length`."""
    mixers = [block.mixer for block in architecture_of(model).blocks]
    return sum(mixer.active_products() + mixer.attention_products(length) for mixer in mixers)


def channel_products(model: ModelConfig, *, masked: bool = False) -> float:
    """Multiply-adds of all channel mixers for a token. masked: of the form that runs every node."""
    channels = [block.channel for block in architecture_of(model).blocks]
    return sum(part.active_products(masked=masked) for part in channels if part is not None)


def training_flops(
    model: ModelConfig, length: int, *, predicted: float = 1.0, masked: bool = False
) -> float:
    """FLOPs of a training step for each token of its batch.

    predicted: share of the tokens that the head reads (1 for a causal model, the masking share
    for masked language modelling).
    """
    head = predicted * model.vocab_size * model.hidden_size
    body = mixer_products(model, length) + channel_products(model, masked=masked)
    return TRAINING * (body + head)
