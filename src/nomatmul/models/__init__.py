"""The torch model: drop-in layers, the block with its three dials, and the language model."""

import nomatmul.models._needs  # noqa: F401  # before anything that imports torch
from nomatmul.models.block import Block
from nomatmul.models.causal_lm import CausalLM
from nomatmul.models.channels.fff import FFF
from nomatmul.models.channels.ffn import FFN
from nomatmul.models.channels.glu import GLU
from nomatmul.models.channels.trees import FFFTraining, auxiliary_loss, set_fff_training
from nomatmul.models.classifiers import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)
from nomatmul.models.encoder import Encoder
from nomatmul.models.hf.auto import register
from nomatmul.models.hf.cache import RecurrentCache, StateCache
from nomatmul.models.hf.config import CausalLMConfig, EncoderConfig
from nomatmul.models.layers import BitLinear, DenseLinear, LayerNorm, RMSNorm, TernaryLinear
from nomatmul.models.masked_lm import MaskedLM
from nomatmul.models.mixers.attention import Attention
from nomatmul.models.mixers.mlgru import MLGRU
from nomatmul.models.stored import StoredLinear

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
    "StateCache",
    "StoredLinear",
    "TernaryLinear",
    "auxiliary_loss",
    "set_fff_training",
]
