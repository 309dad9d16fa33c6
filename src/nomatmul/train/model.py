"""The torch model of a config, as training wants it and writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.tokenizer import JSON_FILE, save_tokenizer
from nomatmul.models import CausalLM, MaskedLM
from nomatmul.models.base import TextModel
from nomatmul.train.conversations import write_chat

TrainedModel: TypeAlias = CausalLM | MaskedLM
"""What is pretrained: a `TextModel` with a `loss` of (input ids, targets)."""


def _model_class(config: ModelConfig) -> Any:
    return CausalLM if config.causal else MaskedLM


def build_model(config: ModelConfig) -> TrainedModel:
    """A fresh model on the CPU in float32, its weights drawn from torch's global random state.

    Drawn on the CPU, so that one seed gives one model on every device.
    """
    kind = _model_class(config)
    return kind(kind.config_class.from_model_config(config)).float().train()


def write_model(
    model: TextModel,
    tokenizer: Tokenizer,
    directory: Path,
    weights: dict[str, Tensor] | None = None,
    template: str | None = None,
) -> None:
    """The model alone, in the layout that `from_pretrained` and `pack` read.

    weights: all of them, where the model's own are sharded. template: of a model that was trained
    on conversations.
    """
    config: Any = model.config
    with no_progress_bars():
        if weights is None:
            model.save_pretrained(directory)
        else:
            with torch.device("meta"):  # holds nothing: it only knows how to be written
                shell = _model_class(config.model_config)(config)
            shell.save_pretrained(directory, state_dict=weights)
    if template is not None:
        write_file(directory / JSON_FILE, tokenizer.to_str().encode("utf-8"))
        write_chat(directory, tokenizer, template)
    # What save_pretrained may have written names the source's own tokens.
    save_tokenizer(tokenizer, directory, config.model_config, source=directory)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars out of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
