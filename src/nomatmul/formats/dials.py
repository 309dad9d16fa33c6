"""Three dials and the sizes: the short way to say the common models, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

LINEARS = ("ternary", "dense")
NORMS = ("rms", "layer")
POSITIONS = ("rotary", "sinusoidal", "none")
ACTIVATIONS = ("gelu", "silu", "relu")

# An accumulator sums `in_features` products of magnitude <= 128. At this limit it still is an
# integer that float32 holds exactly (128 * 131072 = 2^24), which docs/numerics.md promises.
MAX_FEATURES = 131_072
MAX_VOCAB = 1 << 24
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 31
MAX_TREE_DEPTH = 24
MAX_TREE_ROWS = (1 << 31) - 1  # rows of all trees of a layer are numbered by int32

_EPS_FIELDS = ("norm_eps", "linear_norm_eps", "gate_norm_eps")
_BOOL_FIELDS = (
    "causal",
    "use_lower_bound",
    "tie_embeddings",
    "embedding_norm",
    "fff_bias",
)
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def default_intermediate_size(hidden_size: int, hidden_ratio: float = 4) -> int:
    """Return 2/3 * hidden_ratio * hidden_size rounded up to a multiple of 256.

    Source: the published `hgrn_bit` model (arXiv 2406.02528); hidden_ratio 4 gives 8/3.
    """
    return 256 * ((int(hidden_size * hidden_ratio * 2 / 3) + 255) // 256)


@dataclass(frozen=True)
class Dials:
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
    "ffn" and "fff": "gelu" (the exact form), "silu" or "relu"; glu_activation that of the gate of a
    "glu", which is "silu" but in some published dense encoders.

    "fff" walks `fff_trees` trees (arXiv 2311.10770); `fff_depth` counts decisions, so a tree has
    depth + 1 levels and 2^(depth+1) - 1 nodes. `fff_bias`: the nodes have a bias (dense only).
    `fff_master_width`: an ffn of this width beside the trees, active for every token
    (arXiv 2405.16836). `fff_layers`: the layers that hold an fff, the others an ffn of
    `intermediate_size`; None for all.

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

    def __post_init__(self) -> None:
        check_dial("linear", self.linear, LINEARS)
        check_dial("norm", self.norm, NORMS)
        check_dial("positions", self.positions, POSITIONS)
        check_dial("activation", self.activation, ACTIVATIONS)
        check_dial("glu_activation", self.glu_activation, ACTIVATIONS)
        for name in _BOOL_FIELDS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _check_int("vocab_size", self.vocab_size, 1, MAX_VOCAB)
        _check_int("hidden_size", self.hidden_size, 1, MAX_FEATURES)
        _check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        _check_int("num_heads", self.num_heads, 1, self.hidden_size)
        _check_int("max_position_embeddings", self.max_position_embeddings, 1, MAX_POSITIONS)
        if self.intermediate_size is None:
            object.__setattr__(
                self, "intermediate_size", default_intermediate_size(self.hidden_size)
            )
        _check_int("intermediate_size", self.intermediate_size, 1, MAX_FEATURES)
        for name in (*_EPS_FIELDS, "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        self._check_tokens()
        self._check_heads()
        self._check_glu()
        self._check_trees()

    def _check_tokens(self) -> None:
        ends = self.eos_token_id
        if isinstance(ends, list | tuple):
            for token in ends:
                _check_int("a token in eos_token_id:", token, 0, self.vocab_size - 1)
            ends = tuple(dict.fromkeys(ends))
            # one id as older versions of nomatmul wrote and read it
            object.__setattr__(
                self, "eos_token_id", ends if len(ends) > 1 else next(iter(ends), None)
            )
        for name in _TOKEN_FIELDS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                _check_int(name, value, 0, self.vocab_size - 1)

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        head_size = self.hidden_size // self.num_heads
        attention = self.token_mixer == "attention"
        if attention and self.positions == "rotary" and head_size % 2:
            raise ValueError(
                f"rotary positions need an even head size, got hidden_size {self.hidden_size}"
                f" / num_heads {self.num_heads} = {head_size}"
            )
        if not attention and self.positions == "sinusoidal":
            raise ValueError(
                "positions 'sinusoidal' belong to token_mixer 'attention', "
                f"got {self.token_mixer!r}"
            )
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"sinusoidal positions need an even hidden_size, got {self.hidden_size}"
            )

    def _check_glu(self) -> None:
        encoder = self.channel_mixer == "glu" and self.linear == "dense" and not self.causal
        if self.glu_activation != "silu" and not encoder:
            raise ValueError(
                f'glu_activation {self.glu_activation!r} belongs to channel_mixer "glu" of a dense'
                ' encoder; others have "silu"'
            )

    def _check_trees(self) -> None:
        if self.channel_mixer != "fff":
            self._check_no_trees()
            return
        _check_int("fff_trees", self.fff_trees, 1, MAX_FEATURES)
        _check_int("fff_depth", self.fff_depth, 0, MAX_TREE_DEPTH)
        _check_int("fff_master_width", self.fff_master_width, 0, MAX_FEATURES)
        if self.fff_bias and self.linear == "ternary":
            raise ValueError("fff_bias belongs to linear 'dense'; ternary layers have no bias")
        assert self.fff_trees is not None
        assert self.fff_depth is not None
        if self.fff_trees * (2 << self.fff_depth) > MAX_TREE_ROWS:
            raise ValueError(
                f"{self.fff_trees} trees of depth {self.fff_depth} have more rows than int32 can"
                f" number ({MAX_TREE_ROWS})"
            )
        active = self.fff_trees * (self.fff_depth + 1)
        _check_int("active neurons of fff_trees and fff_depth:", active, 1, MAX_FEATURES)
        self._check_tree_layers()

    def _check_no_trees(self) -> None:
        if self.fff_trees is not None or self.fff_depth is not None:
            raise ValueError(
                'fff_trees and fff_depth belong to channel_mixer "fff",'
                f" got channel_mixer {self.channel_mixer!r}"
            )
        for name in ("fff_bias", "fff_master_width", "fff_layers"):
            if getattr(self, name):
                raise ValueError(
                    f'{name} belongs to channel_mixer "fff", got channel_mixer '
                    f"{self.channel_mixer!r}"
                )

    def _check_tree_layers(self) -> None:
        if self.fff_layers is None:
            return
        if not isinstance(self.fff_layers, (list, tuple)):
            raise ValueError(f"fff_layers must be a list of layers, got {self.fff_layers!r}")
        for layer in self.fff_layers:
            _check_int("a layer in fff_layers:", layer, 0, self.num_layers - 1)
        layers = tuple(sorted(set(self.fff_layers)))
        if not layers or len(layers) != len(self.fff_layers):
            raise ValueError(f"fff_layers {self.fff_layers!r} must name layers, each of them once")
        object.__setattr__(self, "fff_layers", layers)

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

    @property
    def mlp_size(self) -> int:
        """`intermediate_size` as the int that it always is after construction."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads


def check_dial(name: str, value: object, legal: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in legal:
        choices = ", ".join(map(repr, legal))
        raise ValueError(f"{name} {value!r} is unknown; legal values are {choices}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is out of range; it must lie in {low}..{high}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value} must be finite and above 0")
