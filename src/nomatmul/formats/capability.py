"""Can this backend run this model? The only place that answers, by name of the part.

A backend is "packed" (the packed directory and what reads it), "numpy" (the oracle), "native" (the
CPU engine), "cuda" (the GPU engine), "persistent" (its one-kernel decoder) or "hardware" (the
accelerator, and integer inference, which says what it computes). PyTorch runs every model.
"""

from __future__ import annotations

from collections.abc import Iterator

from nomatmul.formats.architecture import (
    FFF,
    FFN,
    GLU,
    MLGRU,
    Architecture,
    Attention,
    ChannelMixer,
    TokenMixer,
    architecture_of,
)
from nomatmul.formats.config import ModelConfig

_NAMES = {
    "packed": "a packed model",
    "numpy": "the numpy oracle",
    "native": "the CPU engine",
    "cuda": "the GPU engine",
    "persistent": "the persistent decoding kernel",
    "hardware": "the accelerator",
}
_ENGINES = ("native", "cuda", "persistent")
_GPU = ("cuda", "persistent")

# Backends that do not keep keys and values.
_NO_ATTENTION = _GPU


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
    if backend == "hardware":
        yield from _hardware(model) if config.causal else ("models that are not causal",)
    else:
        yield from _decoder(model, backend) if config.causal else _encoder(model, backend)


def _decoder(model: Architecture, backend: str) -> Iterator[str]:
    if model.final_norm.kind != "rms":
        yield f"norm {model.final_norm.kind!r} in a causal model"
    if model.embedding_norm is not None:
        yield "norm behind the embedding in a causal model (embedding_norm)"
    for layer, block in enumerate(model.blocks):
        if backend in _GPU and not isinstance(block.mixer, MLGRU | Attention):
            yield f"token_mixer {block.mixer.kind!r} (layer {layer})"
        for part in (block.mixer, block.channel):
            yield from (f"{what} (layer {layer})" for what in _causal(part, backend))
    if backend in _ENGINES and len({type(block.channel) for block in model.blocks}) > 1:
        yield "channel mixers that differ from layer to layer"
    attends = all(isinstance(block.mixer, Attention) for block in model.blocks)
    kinds = {linear.kind for linear in model.linears().values()}
    if backend != "numpy" and "dense" in kinds and not attends:
        yield "linear 'dense' in a causal model without attention"


def _causal(part: TokenMixer | ChannelMixer | None, backend: str) -> Iterator[str]:
    """What `backend` lacks of a mixer in a causal model."""
    engine = backend in _ENGINES
    if isinstance(part, Attention):
        if backend in _NO_ATTENTION:
            yield "token_mixer 'attention' in a causal model"
        elif part.theta is None:
            yield "causal attention without rotary positions"
    if isinstance(part, GLU):
        yield from _gate(part, backend)
    if isinstance(part, FFN) and engine:
        yield "channel_mixer 'ffn' in a causal model"
    if isinstance(part, FFF):
        if part.linear != "ternary":
            yield "trees of dense rows in a causal model"
        elif part.activation != "silu":
            yield f"ternary trees with activation {part.activation!r}"
        if backend == "persistent":
            yield "channel_mixer 'fff'"
        if part.master is not None and engine:
            yield "master leaf beside trees in a causal model (fff_master_width)"


def _gate(part: GLU, backend: str) -> Iterator[str]:
    """Activations of a gate: the engines promise equal bits, for which they have their own."""
    if part.up_proj is not None and backend in _GPU:
        yield "norms of their own inside gate and up"
    known = {"native": ("silu", "relu", "relu2"), "cuda": ("silu",), "persistent": ("silu",)}
    if part.activation not in known.get(backend, (part.activation,)):
        yield f"glu_activation {part.activation!r} in a causal model"


def _encoder(model: Architecture, backend: str) -> Iterator[str]:
    if backend in _GPU:
        yield "models that are not causal"
    if model.head.kind != "dense":
        yield f"linear {model.head.kind!r} in an encoder"
    for layer, block in enumerate(model.blocks):
        mixer, channel = block.mixer, block.channel
        if mixer.state():
            yield f"token_mixer {mixer.kind!r} in an encoder (layer {layer})"
        if backend == "numpy":
            continue
        if isinstance(mixer, Attention) and not _plain(mixer):
            yield (f"num_kv_heads, head_dim, qk_norm or rope_scaling in an encoder (layer {layer})")
        if isinstance(channel, GLU | FFN) and channel.activation == "relu2":
            yield f"activation 'relu2' in an encoder (layer {layer})"


def _plain(part: Attention) -> bool:
    """Whether heads cut the hidden size into equal parts, which are only turned."""
    own = part.kv_heads != part.heads or part.q_norm is not None or part.scaling is not None
    return not own and part.q_proj.outputs == part.q_proj.inputs


def _hardware(model: Architecture) -> Iterator[str]:
    """What the accelerator lacks: it runs MLGRU with GLU or ternary trees, all linears BitLinear
    with one scale a matrix."""
    if model.final_norm.kind != "rms":
        yield f"norm {model.final_norm.kind!r}"
    if model.embedding_norm is not None:
        yield "norm behind the embedding (embedding_norm)"
    if model.embedding.kind != "dense":
        yield f"embedding of kind {model.embedding.kind!r} (embedding_linear)"
    for layer, block in enumerate(model.blocks):
        if not isinstance(block.mixer, MLGRU):
            yield f"token_mixer {block.mixer.kind!r} (layer {layer})"
        yield from (f"{what} (layer {layer})" for what in _hardware_channel(block.channel))
    for name, linear in model.linears().items():
        if linear.kind != "ternary":
            yield f"linear {linear.kind!r} ({name})"
        elif linear.norm_eps is None:
            yield f"ternary linear without a norm inside ({name})"
        elif linear.scale_group:
            yield f"ternary linear with a scale a group of inputs ({name})"


def _hardware_channel(part: ChannelMixer | None) -> Iterator[str]:
    """Of a channel mixer, its linears aside."""
    if isinstance(part, FFN):
        yield "channel_mixer 'ffn'"
    elif isinstance(part, GLU) and part.activation != "silu":
        yield f"glu_activation {part.activation!r}"
    elif isinstance(part, FFF):
        if part.linear != "ternary":
            yield "trees of dense rows"
        if part.activation != "silu":
            yield f"trees with activation {part.activation!r}"
        if part.bias:
            yield "trees with a bias (fff_bias)"
        if part.master is not None:
            yield "master leaf beside trees (fff_master_width)"
