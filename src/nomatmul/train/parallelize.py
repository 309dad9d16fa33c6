"""Spread a single-device model over many: FSDP2 (`fully_shard`) over a device mesh.

The model's code knows nothing of this. Each block is a group, or several small ones together, and
what is left (embedding, lower bounds, final norm, head) is the root's group. Every parameter is
sharded by rows; a group is gathered before it computes and freed after, the next one being fetched
meanwhile.

Parameters are gathered in float32 as they are: a ternary decision and its absmean scale are then
those of the whole tensor, on any number of devices. Autocast lowers the arithmetic, not the
parameters. Gradients are averaged in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from nomatmul.train.model import TrainedModel

_GROUP_BYTES = 256 << 20  # joining blocks up to this spares the host collectives and hooks


def blocks_in_group(parameters: int) -> int:
    """How many blocks of so many parameters are gathered together."""
    return max(1, _GROUP_BYTES // (4 * parameters))


def shard_model(model: TrainedModel, device: torch.device, size: int) -> None:
    """Shard the parameters of `model` in place over `size` devices.

    The model may still lie on the CPU: one group after the other is moved and cut, so a device
    never holds more than one whole group. Every process must hold the same weights. Optimisers are
    made after this, for the parameters are others then.
    """
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(
        param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = list(model.layers)
    count = blocks_in_group(sum(p.numel() for p in blocks[0].parameters()))
    for start in range(0, len(blocks), count):
        fully_shard(blocks[start : start + count], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # The trainer calls `loss`, not the module: without this nothing would be gathered for it.
    register_fsdp_forward_method(model, "loss")


def is_sharded(model: nn.Module) -> bool:
    """Do several ranks hold its parameters, each a part?"""
    return isinstance(model, FSDPModule)


def compile_parts(model: TrainedModel, mode: str) -> None:
    """Compile each block's forward and the head with the loss, leaving FSDP's hooks outside.

    Gathering and freeing parameters happens between the compiled parts; blocks are alike, so that
    they share one or two compilations.
    """
    for part, name in _parts(model):
        part.__dict__[name] = torch.compile(getattr(part, name), dynamic=False, mode=mode)


@contextlib.contextmanager
def eager(model: TrainedModel) -> Iterator[None]:
    """Without the compiled parts: for hooks inside blocks, and for sequences of any length."""
    kept = [(part, name, part.__dict__.pop(name, None)) for part, name in _parts(model)]
    try:
        yield
    finally:
        for part, name, compiled in kept:
            if compiled is not None:
                part.__dict__[name] = compiled


def _parts(model: TrainedModel) -> list[tuple[nn.Module, str]]:
    return [*((block, "forward") for block in model.layers), (model, "loss_of_hidden")]


def free_gathered(model: nn.Module) -> None:
    """Forget the parameters that a forward pass without a backward pass has left gathered."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; the tensor itself when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor, at every process; all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
