"""BitLinear: RMSNorm, int8 activations, ternary weights, one exact product; and other forms."""

from nomatmul.ops.bitlinear.cache import TernaryCache, new_slot, ternary_cache, ternary_weights
from nomatmul.ops.bitlinear.forms import Form, dequantize, latents, ternarize, ternary_linear
from nomatmul.ops.bitlinear.naive import (
    absmax_quantize,
    absmean_ternarize,
    bit_linear,
    bit_linear_accumulators,
    product_dtype,
    root_mean_square,
    round_half_away,
)

__all__ = [
    "Form",
    "TernaryCache",
    "absmax_quantize",
    "absmean_ternarize",
    "bit_linear",
    "bit_linear_accumulators",
    "dequantize",
    "latents",
    "new_slot",
    "product_dtype",
    "root_mean_square",
    "round_half_away",
    "ternarize",
    "ternary_cache",
    "ternary_linear",
    "ternary_weights",
]
