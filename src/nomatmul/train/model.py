"""The torch model of a config, as training wants it."""

from __future__ import annotations

from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM, CausalLMConfig


def build_model(config: ModelConfig) -> CausalLM:
    """A fresh model on the CPU in float32, its weights drawn from torch's global random state.

    Drawn on the CPU, so that one seed gives one model on every device.
    """
    return CausalLM(CausalLMConfig.from_model_config(config)).float().train()
