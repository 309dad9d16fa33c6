"""Can this backend run this model? The only place that answers, by name of the part.

A backend is "packed" (the packed directory and what reads it), "numpy" (the oracle), "native" (the
CPU engine), "cuda" (the GPU engine) or "persistent" (its one-kernel decoder). PyTorch runs every
model.
"""

from __future__ import annotations

from collections.abc import Iterator

from nomatmul.formats.architecture import (
    FFF,
    FFN,
    MLGRU,
    Architecture,
    Attention,
    Block,
    architecture_of,
)
from nomatmul.formats.config import ModelConfig

_NAMES = {
    "packed": "a packed model",
    "numpy": "the numpy oracle",
    "native": "the CPU engine",
    "cuda": "the GPU engine",
    "persistent": "the persistent decoding kernel",
}


def check(config: ModelConfig, backend: str) -> None:
    """Raise ValueError, naming the first part that `backend` cannot run."""
    for what in missing(config, backend):
        raise ValueError(f"{_NAMES[backend]} has no {what}; nomatmul.models runs it with torch")


def runs(config: ModelConfig, backend: str) -> bool:
    """Whether `backend` runs the model."""
    return next(missing(config, backend), None) is None


def missing(config: ModelConfig, backend: str) -> Iterator[str]:
    """What `backend` lacks of the parts of a model, in words; nothing where it runs it."""
    assert backend in _NAMES, backend
    model = architecture_of(config)
    yield from _everywhere(model)
    if config.causal:
        yield from _decoder(model, backend)
    else:
        yield from _encoder(model, backend)


def _everywhere(model: Architecture) -> Iterator[str]:
    """What PyTorch alone runs."""
    for name, trees in model.trees().items():
        if trees.linear == "ternary" and trees.activation != "silu":
            yield f"ternary trees with activation {trees.activation!r} ({name})"


def _decoder(model: Architecture, backend: str) -> Iterator[str]:
    if model.final_norm.kind != "rms":
        yield f"norm {model.final_norm.kind!r} in a causal model"
    if model.embedding_norm is not None:
        yield "norm behind the embedding in a causal model (embedding_norm)"
    for layer, block in enumerate(model.blocks):
        at = f"layer {layer}"
        if isinstance(block.mixer, Attention):
            yield from _causal_attention(block.mixer, backend, at)
        elif backend in ("cuda", "persistent") and not isinstance(block.mixer, MLGRU):
            yield f"token_mixer {block.mixer.kind!r} ({at})"
        if model.head.kind != "ternary" and backend != "numpy":
            yield f"linear {model.head.kind!r} in a causal model"
        yield from _decoder_channel(block, model, backend, at)


def _causal_attention(mixer: Attention, backend: str, at: str) -> Iterator[str]:
    if backend not in ("numpy", "packed"):
        yield f"token_mixer 'attention' in a causal model ({at})"
    elif mixer.theta is None:
        yield f"causal attention without rotary positions ({at})"


def _decoder_channel(block: Block, model: Architecture, backend: str, at: str) -> Iterator[str]:
    channel = block.channel
    if isinstance(channel, FFF):
        if channel.linear != "ternary":
            yield f"trees of dense rows in a causal model ({at})"
        if backend == "persistent":
            yield f"channel_mixer 'fff' ({at})"
    if backend in ("numpy", "packed"):
        return
    if isinstance(channel, FFF) and channel.master is not None:
        yield f"master leaf beside trees in a causal model (fff_master_width, {at})"
    if isinstance(channel, FFN):
        yield f"channel_mixer 'ffn' in a causal model ({at})"
    if type(channel) is not type(model.blocks[0].channel):
        yield f"channel mixers that differ from layer to layer ({at})"


def _encoder(model: Architecture, backend: str) -> Iterator[str]:
    if backend in ("cuda", "persistent"):
        yield "models that are not causal"
    if model.head.kind != "dense":
        yield f"linear {model.head.kind!r} in an encoder"
    for layer, block in enumerate(model.blocks):
        if block.mixer.state():
            yield f"token_mixer {block.mixer.kind!r} in an encoder (layer {layer})"
