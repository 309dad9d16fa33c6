"""A torch model behind the protocol of `score.Scorer`.

MLGRU models read a text of any length in one pass, their state carried from chunk to chunk.
Attention models read windows of `max_position_embeddings` tokens; consecutive windows overlap by
half, and a token is scored in the window that shows it more of what came before.
Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nomatmul.evaluate.windows import windows
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig

CHUNK = 1024  # tokens of one forward pass of a recurrent model


class TorchScorer:
    """Log-probabilities of a `nomatmul.models.CausalLM`.

    model: the module, on any device. tokenizer: a tokenizers.Tokenizer or None.
    """

    def __init__(self, model: Any, config: ModelConfig, tokenizer: Any) -> None:
        if not config.causal:
            raise ValueError("this model is an encoder (causal false): it has no next-token loss")
        self.model = model.eval()
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_directory(cls, directory: str | Path) -> TorchScorer:
        """Open a published or training checkpoint in float32.

        Raises ValueError when it is missing, damaged or not understood.
        """
        from nomatmul.convert.source import source_tokenizer, text_config
        from nomatmul.formats.checkpoint import open_checkpoint
        from nomatmul.formats.tokenizer import load_tokenizer
        from nomatmul.models import CausalLM
        from nomatmul.train.plan import pick_device

        checkpoint = open_checkpoint(directory)
        tokenizer = None
        with source_tokenizer(checkpoint, Path(directory)) as (path, kind):
            config = text_config(checkpoint, path, kind)
            if path is not None:
                tokenizer = load_tokenizer(path, config.vocab_size)
        model = CausalLM.from_pretrained(str(directory), dtype=torch.float32)
        return cls(model.to(pick_device("auto")), config, tokenizer)

    @property
    def backend(self) -> str:
        """ "torch" and the device's kind."""
        return f"torch {self.model.device.type}"

    def token_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """float64 [T-1]: ln p(ids[t] | ids[:t]), t = 1..T-1. Raises ValueError for an alien id."""
        if ids and not (min(ids) >= 0 and max(ids) < self.config.vocab_size):
            raise ValueError(f"a token id is outside 0..{self.config.vocab_size - 1}")
        ids_T = torch.tensor(list(ids), device=self.model.device)
        recurrent = architecture_of(self.config).recurrent
        parts = self._recurrent(ids_T) if recurrent else self._windows(ids_T)
        with torch.inference_mode():
            return np.concatenate([part.double().cpu().numpy() for part in parts])

    def _recurrent(self, ids_T: torch.Tensor) -> Iterator[torch.Tensor]:
        from nomatmul.models.hf.cache import cache_of

        past = None
        for start in range(0, len(ids_T) - 1, CHUNK):
            end = min(start + CHUNK, len(ids_T) - 1)
            out = self.model(ids_T[None, start:end], cache=past, use_cache=True)
            past = cache_of(out)
            yield _pick(out.logits[0], ids_T[start + 1 : end + 1])

    def _windows(self, ids_T: torch.Tensor) -> Iterator[torch.Tensor]:
        size = self.config.max_position_embeddings
        for start, end, first in windows(len(ids_T) - 1, size):
            logits_TV = self.model(ids_T[None, start:end], use_cache=False).logits[0]
            yield _pick(logits_TV[first - start :], ids_T[first + 1 : end + 1])


def _pick(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """ln softmax(logits) at the targets, [T]."""
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0]
