"""From a packed directory, or from nothing, to a CudaBackend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nomatmul.engine.backends.cuda.backend import (
    CudaBackend,
    chunk_tokens,
    scratch_bytes,
    token_bytes,
)
from nomatmul.engine.backends.cuda.device import check_memory, describe
from nomatmul.engine.backends.cuda.weights import bytes_needed, random_weights, read_weights

if TYPE_CHECKING:
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.packed.reader import PackedReader


def open_packed(reader: PackedReader, device: Any, verify: bool) -> CudaBackend:
    """The model of a directory. Raises FormatError for a damaged one, ValueError for too little
    device memory."""
    _check(reader.config, reader.embedding_form, device)
    return _guarded(
        device, lambda: CudaBackend(reader.config, read_weights(reader, device, verify))
    )


def open_random(config: ModelConfig, embedding: str, seed: int, device: Any) -> CudaBackend:
    """A model of random weights. Raises ValueError for too little device memory."""
    _check(config, embedding, device)
    return _guarded(
        device, lambda: CudaBackend(config, random_weights(config, embedding, seed, device))
    )


def _check(config: ModelConfig, embedding_form: str, device: Any) -> None:
    parts = bytes_needed(config, embedding_form)
    work = scratch_bytes(config) + token_bytes(config) * chunk_tokens(config)
    check_memory(device, sum(parts.values()) + work, embedding_form, parts["embedding"])


def _guarded(device: Any, make: Callable[[], CudaBackend]) -> CudaBackend:
    try:
        return make()
    except torch.OutOfMemoryError as error:  # another process took it meanwhile
        raise ValueError(
            f"{device} ran out of memory while the model was loaded: {describe(error)}"
        ) from None
