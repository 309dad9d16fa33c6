"""Names of the tensors of published decoders of Llama's shape, and where ours lie in them."""

from __future__ import annotations

from nomatmul.formats.files.source import TensorSource

# Of a block: our linears, and the published ones whose rows they hold, one above the other.
BLOCK_LINEARS = {
    "mixer.q_proj": ("self_attn.q_proj",),
    "mixer.k_proj": ("self_attn.k_proj",),
    "mixer.v_proj": ("self_attn.v_proj",),
    "mixer.o_proj": ("self_attn.o_proj",),
    "channel.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "channel.down_proj": ("mlp.down_proj",),
}
# Where gate and up have a norm each.
APART = {"channel.gate_proj": ("mlp.gate_proj",), "channel.up_proj": ("mlp.up_proj",)}
# Of each the newer name (2B-4T), and that of the first BitNet b1.58 (1bitLLM).
SUB_NORMS = {
    "mixer.o_proj": ("self_attn.attn_sub_norm.weight", "self_attn.inner_attn_ln.weight"),
    "channel.down_proj": ("mlp.ffn_sub_norm.weight", "mlp.ffn_layernorm.weight"),
}
INNER_NORMS = ("rms_norm.weight", "norm.weight")
_BLOCK_NORMS = {
    "mixer_norm.weight": "input_layernorm.weight",
    "channel_norm.weight": "post_attention_layernorm.weight",
    "mixer.q_norm.weight": "self_attn.q_norm.weight",
    "mixer.k_norm.weight": "self_attn.k_norm.weight",
}
_OUTER = {"embedding.weight": "embed_tokens.weight", "final_norm.weight": "norm.weight"}
HEAD = "lm_head"
ANCHORS = ("model.embed_tokens.weight", "embed_tokens.weight")


class Names:
    """Published names of a source, whose bare models (AutoModel) have no "model." before them;
    without a source those that we write."""

    def __init__(self, source: TensorSource | None = None) -> None:
        bare = source is not None and ANCHORS[1] in source.shapes()
        self._prefix = "" if bare else "model."

    def linears(self, layers: int) -> list[str]:
        """Published names of all linears of the blocks, in the order of use."""
        parts = [part for parts in BLOCK_LINEARS.values() for part in parts]
        return [self._block(layer, part) for layer in range(layers) for part in parts]

    def embedding(self) -> str:
        return f"{self._prefix}embed_tokens.weight"

    def parts(self, name: str, *, apart: bool = False) -> list[str]:
        """Published linears (without ".weight") of ours; apart: do gate and up lie apart?"""
        if name == "head":
            return [HEAD]
        _, layer, part = name.split(".", 2)
        table = {**BLOCK_LINEARS, **APART} if apart else BLOCK_LINEARS
        return [self._block(int(layer), stored) for stored in table[part]]

    def vector(self, name: str, shapes: dict[str, tuple[int, ...]], *, sub_norms: bool) -> str:
        """The published name of our embedding or norm `name`."""
        if name in _OUTER:
            return self._prefix + _OUTER[name]
        _, layer, part = name.split(".", 2)
        if part in _BLOCK_NORMS:
            return self._block(int(layer), _BLOCK_NORMS[part])
        linear = part.removesuffix(".norm.weight")
        assert linear != part, f"no published name for {name!r}"
        if sub_norms:
            choices: tuple[str, ...] = SUB_NORMS[linear]
        else:
            (stored,) = {**BLOCK_LINEARS, **APART}[linear]
            choices = tuple(f"{stored}.{norm}" for norm in INNER_NORMS)
        found = [self._block(int(layer), choice) for choice in choices]
        return next((other for other in found if other in shapes), found[0])

    def has_sub_norms(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether the first block has any."""
        choices = [name for names in SUB_NORMS.values() for name in names]
        return any(self._block(0, choice) in shapes for choice in choices)

    def _block(self, layer: int, rest: str) -> str:
        return f"{self._prefix}layers.{layer}.{rest}"
