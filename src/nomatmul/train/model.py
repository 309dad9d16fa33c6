"""The torch model of a config, as training wants it."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint

from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM, CausalLMConfig


def build_model(config: ModelConfig) -> CausalLM:
    """A fresh model on the CPU in float32, its weights drawn from torch's global random state.

    Drawn on the CPU, so that one seed gives one model on every device.
    """
    return CausalLM(CausalLMConfig.from_model_config(config)).float().train()


def enable_activation_checkpointing(model: CausalLM) -> None:
    """Recompute each block in the backward pass: memory for about a third more work.

    transformers has one method for this, under two names in its versions; this is what they do.
    """
    model._gradient_checkpointing_func = functools.partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False
    )
    model.gradient_checkpointing = True
