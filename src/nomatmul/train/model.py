"""The torch model of a config, as training wants it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM, CausalLMConfig


def build_model(config: ModelConfig) -> CausalLM:
    """A fresh model on the CPU in float32, its weights drawn from torch's global random state.

    Drawn on the CPU, so that one seed gives one model on every device.
    """
    return CausalLM(CausalLMConfig.from_model_config(config)).float().train()


def set_recompute(model: CausalLM, mode: str) -> None:
    """Choose what the backward pass computes again: "none", "mlp" or "block"."""
    if hasattr(model, "set_recompute"):
        model.set_recompute(mode)
    elif mode == "block":
        # transformers has one method for this, under two names in its versions; this is what
        # they do.
        model._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
        model.gradient_checkpointing = True


@contextlib.contextmanager
def ternary_cache() -> Iterator[Any]:
    """Keeps ternary weights between the passes of one optimiser step; `clear()` after each step."""
    from nomatmul.ops import bitlinear

    if not hasattr(bitlinear, "ternary_cache"):
        yield _NoCache()
        return
    with bitlinear.ternary_cache() as cache:
        yield cache


class _NoCache:
    def clear(self) -> None: ...
