"""The torch model: drop-in layers, the block with its three dials, and the language model."""

import nomatmul.models._needs  # noqa: F401  # before anything that imports torch
from nomatmul.models.attention import Attention
from nomatmul.models.auto import register
from nomatmul.models.block import Block
from nomatmul.models.cache import RecurrentCache
from nomatmul.models.causal_lm import CausalLM
from nomatmul.models.classifiers import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)
from nomatmul.models.config import CausalLMConfig, EncoderConfig
from nomatmul.models.encoder import Encoder
from nomatmul.models.fff import FFF, FFFTraining, auxiliary_loss, set_fff_training
from nomatmul.models.layers import FFN, GLU, BitLinear, DenseLinear, LayerNorm, RMSNorm
from nomatmul.models.masked_lm import MaskedLM
from nomatmul.models.mlgru import MLGRU

register()

__all__ = [
    "FFF",
    "FFN",
    "GLU",
    "MLGRU",
    "Attention",
    "BitLinear",
    "Block",
    "CausalLM",
    "CausalLMConfig",
    "DenseLinear",
    "Encoder",
    "EncoderConfig",
    "EncoderForSequenceClassification",
    "EncoderForTokenClassification",
    "FFFTraining",
    "LayerNorm",
    "MaskedLM",
    "RMSNorm",
    "RecurrentCache",
    "auxiliary_loss",
    "set_fff_training",
]
