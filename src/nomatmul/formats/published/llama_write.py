"""Our decoders of Llama's shape under published names: the reverse of `llama_like` and
`llama_source`.

A model has that shape if it is the one that transformers computes as `llama` or `qwen3` from its
weights as floats. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nomatmul.formats.architecture import GLU, Architecture, Attention, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.published.llama_names import Names

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class PublishedTensor:
    """One published tensor: its name, its shape, and our tensor whose rows `rows` it is (None: of
    all)."""

    name: str
    shape: tuple[int, ...]
    ours: str
    rows: slice | None = None


def family_of(config: ModelConfig) -> str:
    """The model_type, "llama" or "qwen3", whose forward pass a model has.

    Raises FormatError naming the part that has no form there.
    """
    if (why := _foreign(config, architecture_of(config))) is not None:
        raise FormatError(f"the model has no form as a Llama or Qwen3: {why}")
    return "qwen3" if config.qk_norm else "llama"


def _foreign(config: ModelConfig, model: Architecture) -> str | None:
    for layer, block in enumerate(model.blocks):
        if not isinstance(block.mixer, Attention):
            return f"layer {layer} has token_mixer {block.mixer.kind!r}, not 'attention'"
        if not isinstance(block.channel, GLU):
            kind = "none" if block.channel is None else block.channel.kind
            return f"layer {layer} has channel_mixer {kind!r}, not 'glu'"
        if block.channel.activation not in ("silu", "relu2"):
            return f"glu_activation is {block.channel.activation!r}, not 'silu' or 'relu2'"
    if not config.causal:
        return "it is an encoder (causal is false)"
    if config.positions != "rotary":
        return f"positions are {config.positions!r}, not 'rotary'"
    if config.norm != "rms" or config.embedding_norm:
        return "its norms are not the RMSNorms of these families"
    inner = [name for name, linear in model.linears().items() if linear.norm_eps is not None]
    if inner:
        what = "sub-norms" if config.linear_norm == "sub" else "a norm inside each ternary layer"
        return f"it has {what} (linear_norm {config.linear_norm!r}: {inner[0]}.norm)"
    return None


def has_own_head(config: ModelConfig) -> bool:
    """Whether the published model has a head beside its embedding: also where ours are tied, but
    one of them is ternarised and the other is not."""
    model = architecture_of(config)
    return not model.head.tied or model.head.kind != model.embedding.kind


def published_tensors(config: ModelConfig) -> Iterator[PublishedTensor]:
    """All tensors of a model for which `family_of` has an answer, block after block."""
    model, names = architecture_of(config), Names()
    shapes = {**model.tensors()}
    if has_own_head(config):
        shapes.setdefault("head.weight", shapes["embedding.weight"])
    linears = model.linears()
    for name, shape in shapes.items():
        linear = name.removesuffix(".weight")
        if linear not in linears:
            yield PublishedTensor(names.vector(name, {}, sub_norms=False), shape, name)
            continue
        parts = names.parts(linear)
        count = shape[0] // len(parts)
        for i, part in enumerate(parts):
            rows = slice(i * count, (i + 1) * count) if len(parts) > 1 else None
            yield PublishedTensor(f"{part}.weight", (count, *shape[1:]), name, rows)


def published_config(config: ModelConfig, dtype: str) -> JsonObject:
    """The config.json of transformers' class for a model; dtype: in which it loads by itself.

    Rotary numbers are written as `rope_theta` and `rope_scaling`, which every transformers reads.
    Raises FormatError as `family_of` does.
    """
    family = family_of(config)
    glu = architecture_of(config).blocks[0].channel
    assert isinstance(glu, GLU)
    ends: JsonObject = {"eos_token_id": config.eos_token_id}
    if isinstance(config.eos_token_id, tuple):
        ends = {"eos_token_id": list(config.eos_token_id)}
    biases = ("attention_bias", "mlp_bias") if family == "llama" else ("attention_bias",)
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_act": glu.activation,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else config.rope_scaling.to_dict(),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": not has_own_head(config),
        "initializer_range": config.initializer_range,
        **dict.fromkeys(biases, False),
        "bos_token_id": config.bos_token_id,
        **ends,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
    }
