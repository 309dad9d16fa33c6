"""BitLinear: RMSNorm, int8 activations, ternary weights, one exact product."""

from nomatmul.ops.bitlinear.cache import TernaryCache, new_slot, ternary_cache, ternary_weights
from nomatmul.ops.bitlinear.naive import (
    absmax_quantize,
    absmean_ternarize,
    bit_linear,
    bit_linear_accumulators,
    root_mean_square,
    round_half_away,
)

__all__ = [
    "TernaryCache",
    "absmax_quantize",
    "absmean_ternarize",
    "bit_linear",
    "bit_linear_accumulators",
    "new_slot",
    "root_mean_square",
    "round_half_away",
    "ternary_cache",
    "ternary_weights",
]
