"""From a packed directory, or from nothing, to a CudaBackend.

Torch is imported only when a device that can be used was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nomatmul.engine.backends.cuda.device import check_memory, describe, torch_device
from nomatmul.engine.backends.cuda.plan import Plan

if TYPE_CHECKING:
    import torch

    from nomatmul.engine.backend import Options
    from nomatmul.engine.backends.cuda.backend import CudaBackend
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.packed.layout import Forms
    from nomatmul.formats.packed.reader import PackedReader


def open_packed(reader: PackedReader, options: Options) -> CudaBackend:
    """See Opener. Raises ValueError for too little device memory."""
    device = _device(options)
    from nomatmul.engine.backends.cuda.backend import CudaBackend
    from nomatmul.engine.backends.cuda.weights import read_weights

    _check(Plan.of(reader.config), reader.embedding_form, device)
    return _guarded(
        device,
        lambda: CudaBackend(reader.config, read_weights(reader, device, options.verify)),
    )


def open_random(config: ModelConfig, forms: Forms, seed: int, options: Options) -> CudaBackend:
    """See Opener; the packing is that of device memory. Raises ValueError for too little of it."""
    return random_backend(config, forms.embedding, seed, _device(options))


def random_backend(
    config: ModelConfig, embedding: str, seed: int, device: torch.device
) -> CudaBackend:
    """A model of random weights on a torch.device."""
    from nomatmul.engine.backends.cuda.backend import CudaBackend
    from nomatmul.engine.backends.cuda.weights import random_weights

    plan = Plan.of(config)
    _check(plan, embedding, device)
    return _guarded(
        device, lambda: CudaBackend(config, random_weights(plan, embedding, seed, device))
    )


def _device(options: Options) -> Any:
    """The torch.device. Raises ValueError for one that cannot be used, or an option that is about
    the CPU."""
    cpu_only = {"threads": options.threads, "isa": options.isa, "mmap": options.mmap or None}
    for name, value in cpu_only.items():
        if value is not None and options.device.startswith("cuda"):
            raise ValueError(
                f"{name} is about the CPU; with device {options.device!r} leave it out"
            )
    return torch_device(options.device)


def _check(plan: Plan, embedding_form: str, device: torch.device) -> None:
    from nomatmul.engine.backends.cuda.weights import bytes_needed

    parts = bytes_needed(plan, embedding_form)
    check_memory(device, sum(parts.values()) + plan.work_bytes, embedding_form, parts["embedding"])


def _guarded(device: torch.device, make: Callable[[], CudaBackend]) -> CudaBackend:
    import torch

    try:
        return make()
    except torch.OutOfMemoryError as error:  # another process took it meanwhile
        raise ValueError(
            f"{device} ran out of memory while the model was loaded: {describe(error)}"
        ) from None
