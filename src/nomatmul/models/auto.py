"""Makes AutoConfig and AutoModelForCausalLM know this package's models."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from nomatmul.models.causal_lm import CausalLM
from nomatmul.models.config import CausalLMConfig, PublishedConfig


def register() -> None:
    """Register model types "nomatmul" and "hgrn_bit"; doing it again changes nothing."""
    for config in (CausalLMConfig, PublishedConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        model = CausalLM if config is CausalLMConfig else _Published
        AutoModelForCausalLM.register(config, model, exist_ok=True)


class _Published(CausalLM):
    """Only a name for transformers' table: published configs are translated before use."""

    config_class = PublishedConfig  # type: ignore[assignment]
