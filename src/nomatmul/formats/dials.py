"""Three dials and the sizes: the short way to say the common models, checked."""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.formats.checks import check_dial, check_int, check_positive
from nomatmul.formats.linear_dials import LINEARS, LinearDials
from nomatmul.formats.rotary import RopeScaling
from nomatmul.formats.tree_dials import TreeDials

NORMS = ("rms", "layer")
POSITIONS = ("rotary", "sinusoidal", "none")
ACTIVATIONS = ("gelu", "silu", "relu", "relu2")

# An accumulator sums `in_features` products of magnitude <= 128. At this limit it still is an
# integer that float32 holds exactly (128 * 131072 = 2^24), which docs/numerics.md promises.
MAX_FEATURES = 131_072
MAX_VOCAB = 1 << 24
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 31

_EPS_FIELDS = ("norm_eps", "linear_norm_eps", "gate_norm_eps")
_BOOL_FIELDS = (
    "causal",
    "use_lower_bound",
    "tie_embeddings",
    "embedding_norm",
    "fff_bias",
    "qk_norm",
    "split_gate",
)
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def default_intermediate_size(hidden_size: int, hidden_ratio: float = 4) -> int:
    """Return 2/3 * hidden_ratio * hidden_size rounded up to a multiple of 256.

    Source: the published `hgrn_bit` model (arXiv 2406.02528); hidden_ratio 4 gives 8/3.
    """
    return 256 * ((int(hidden_size * hidden_ratio * 2 / 3) + 255) // 256)


@dataclass(frozen=True)
class Dials(LinearDials, TreeDials):
    """Dials, sizes and epsilons of a model; every field is checked when it is made.

    token_mixer is "mlgru" or "attention"; channel_mixer "glu", "ffn", "fff" or "none"; linear
    "ternary" (BitLinear) or "dense". `intermediate_size=None` becomes the published default and
    is an int ever after. `norm_eps` belongs to the block norms and the final norm,
    `linear_norm_eps` to the norm inside each BitLinear, `gate_norm_eps` to MLGRU's g_norm.
    `num_heads` are attention heads; MLGRU is element-wise, so there it only has to divide
    `hidden_size`. `eos_token_id` may be a list: each of its tokens ends a text (`end_token_ids`),
    and the first is the one that stands behind a document. A list of one is kept as its id.

    norm is "rms" or "layer" (with bias) for block norms, final norm and, if `embedding_norm`, the
    norm behind the embedding. positions belong to attention: "rotary", "sinusoidal" (crammed
    BERT's, with one learned scale, added to the embedding) or "none". activation is that of
    "ffn" and "fff": "gelu" (the exact form), "silu", "relu" or, of "ffn", "relu2" (the square of
    relu); glu_activation that of the gate of a "glu".

    "fff" walks `fff_trees` trees (arXiv 2311.10770); `fff_depth` counts decisions, so a tree has
    depth + 1 levels and 2^(depth+1) - 1 nodes. `fff_bias`: the nodes have a bias (dense only).
    `fff_master_width`: an ffn of this width beside the trees, active for every token
    (arXiv 2405.16836). `fff_layers`: the layers that hold an fff, the others an ffn of
    `intermediate_size`; None for all.

    Of attention: `num_kv_heads` (None: `num_heads`) heads of keys and values, `head_dim` (None:
    hidden_size / num_heads) elements of a head, `rope_scaling` of its rotary frequencies, `qk_norm`
    an RMSNorm on each head of queries and keys.

    Of ternary decoders with attention: `linear_norm` says which linears have an RMSNorm inside:
    "all", "sub" (o_proj and down_proj: the sub-norms of BitNet) or "none"; `rounding` where ties of
    the int8 activations go: "away" from zero, to "even" or "up"; `split_gate`: gate and up have a
    scale each; `scale_group` > 0: only the weights are quantised, and each row has a scale for each
    group of so many inputs; `head_linear` (None: `linear`) is the kind of the head;
    `embedding_linear` "ternary": the embedding has ternary rows with group scales.

    Raises ValueError naming the value and the limit.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    token_mixer: str = "mlgru"
    channel_mixer: str = "glu"
    linear: str = "ternary"
    causal: bool = True
    intermediate_size: int | None = None
    num_heads: int = 1
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    linear_norm_eps: float = 1e-6
    gate_norm_eps: float = 1e-5
    use_lower_bound: bool = True
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    fff_trees: int | None = None
    fff_depth: int | None = None
    norm: str = "rms"
    positions: str = "rotary"
    embedding_norm: bool = False
    activation: str = "gelu"
    glu_activation: str = "silu"
    fff_bias: bool = False
    fff_master_width: int = 0
    fff_layers: tuple[int, ...] | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    linear_norm: str = "all"
    rounding: str = "away"
    split_gate: bool = False
    scale_group: int = 0
    head_linear: str | None = None
    embedding_linear: str = "dense"

    def __post_init__(self) -> None:
        check_dial("linear", self.linear, LINEARS)
        check_dial("norm", self.norm, NORMS)
        check_dial("positions", self.positions, POSITIONS)
        check_dial("activation", self.activation, ACTIVATIONS)
        check_dial("glu_activation", self.glu_activation, ACTIVATIONS)
        for name in _BOOL_FIELDS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        check_int("vocab_size", self.vocab_size, 1, MAX_VOCAB)
        check_int("hidden_size", self.hidden_size, 1, MAX_FEATURES)
        check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        check_int("max_position_embeddings", self.max_position_embeddings, 1, MAX_POSITIONS)
        if self.intermediate_size is None:
            object.__setattr__(
                self, "intermediate_size", default_intermediate_size(self.hidden_size)
            )
        check_int("intermediate_size", self.intermediate_size, 1, MAX_FEATURES)
        for name in (*_EPS_FIELDS, "rope_theta", "initializer_range"):
            check_positive(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        self._check_tokens()
        if not isinstance(self.rope_scaling, RopeScaling | None):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        self.check_attention(MAX_FEATURES)
        self._check_glu()
        self.check_linears()
        self.check_trees(MAX_FEATURES)

    def _check_tokens(self) -> None:
        ends = self.eos_token_id
        if isinstance(ends, list | tuple):
            for token in ends:
                check_int("a token in eos_token_id:", token, 0, self.vocab_size - 1)
            ends = tuple(dict.fromkeys(ends))
            # one id as older versions of nomatmul wrote and read it
            object.__setattr__(
                self, "eos_token_id", ends if len(ends) > 1 else next(iter(ends), None)
            )
        for name in _TOKEN_FIELDS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                check_int(name, value, 0, self.vocab_size - 1)

    def _check_glu(self) -> None:
        legal = ACTIVATIONS if self.linear == "dense" else ("silu", "relu2")
        used = self.glu_activation == "silu" or self.channel_mixer == "glu"
        if self.glu_activation not in legal or not used:
            raise ValueError(
                f'glu_activation {self.glu_activation!r} belongs to channel_mixer "glu" of a dense'
                ' model; ternary ones have "silu" or "relu2", others "silu"'
            )

    def channel_of(self, layer: int) -> str:
        """The channel mixer of one layer: the dial, or "ffn" where `fff_layers` leaves it out."""
        if self.fff_layers is not None and layer not in self.fff_layers:
            return "ffn"
        return self.channel_mixer

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; empty for a model without one."""
        if isinstance(self.eos_token_id, tuple):
            return self.eos_token_id
        return () if self.eos_token_id is None else (self.eos_token_id,)
