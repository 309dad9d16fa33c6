"""The torch model of a config, as training wants it."""

from __future__ import annotations

from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM


def model_class(config: ModelConfig) -> Any:
    """CausalLM, or MaskedLM for an encoder."""
    if config.causal:
        return CausalLM
    from nomatmul.models.masked_lm import MaskedLM

    return MaskedLM


def build_model(config: ModelConfig) -> Any:
    """A fresh model on the CPU in float32, its weights drawn from torch's global random state.

    Drawn on the CPU, so that one seed gives one model on every device.
    """
    kind = model_class(config)
    return kind(kind.config_class.from_model_config(config)).float().train()
