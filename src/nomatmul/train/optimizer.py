"""AdamW as the published model was trained with it, and the loss that it minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nomatmul.models.channels.trees import set_fff_training
from nomatmul.ops.choose import triton_wanted
from nomatmul.train.config import TrainConfig
from nomatmul.train.fff_training import auxiliary_loss, plan, wants_auxiliary
from nomatmul.train.parallelize import compile_parts, is_sharded, local

Loss = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class ShardedAdamW(torch.optim.AdamW):
    """AdamW that computes on this process's shards; its states stay DTensors, for checkpoints.

    Every operation on a DTensor passes through Python: with hundreds of parameters that is most of
    a step's time on the host.
    """

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Torch's lists of parameters, gradients and states, each DTensor replaced by its part."""
        result = super()._init_group(group, *args, **kwargs)
        for tensors in (*args, *kwargs.values()):
            if isinstance(tensors, list):
                tensors[:] = [local(tensor) for tensor in tensors]
        return result


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of trained parameters, with weight decay on matrices only; an empty one is left out.

    Norm weights, biases and the lower bounds (a table of gates, not a matrix) are not decayed.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and not name.endswith(("lower_bounds", "bias"))
            (decayed if matrix else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `decay_groups`, fused on CUDA."""
    device = next(model.parameters()).device
    kind = ShardedAdamW if is_sharded(model) else torch.optim.AdamW
    return kind(
        decay_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type == "cuda",
    )


def build_loss(model: nn.Module, config: TrainConfig, device: torch.device) -> Loss:
    """The function (x_BT, y_BT) -> (mean of -ln p(y), mean squared log-partition), float32 scalars.

    Targets of -100 do not count. It is compiled, runs under autocast and splits the head and the
    cross-entropy as the config says. An encoder's head sees the hidden tokens only. If the config
    asks for an auxiliary loss of its trees, that is a third scalar, already weighted.
    """
    chunk = config.targets // config.loss_chunks if config.loss_chunks > 1 else 0
    options: dict[str, Any] = {"chunk": chunk}
    if not config.model.causal:
        options["predicted"] = config.targets
    autocast = uses_bfloat16(config, device)
    auxiliary = wants_auxiliary(config)
    set_fff_training(model, plan(config))

    def loss(x_BT: Tensor, y_BT: Tensor) -> tuple[Tensor, ...]:
        result = model.loss(x_BT, y_BT, **options)  # type: ignore[operator]
        more = auxiliary_loss(model) if auxiliary else None  # none without gradients
        return result if more is None else (*result, more)

    if _compiles(config, device):
        mode = config.compile if config.compile not in ("auto", "on") else None
        if is_sharded(model):
            compile_parts(model, mode)
        else:
            loss = torch.compile(loss, dynamic=False, mode=mode)

    def run(x_BT: Tensor, y_BT: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return loss(x_BT, y_BT)

    return run


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """auto: on CUDA devices that have it. A CPU trains in float32 unless told otherwise."""
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16"


def runs_fused(config: TrainConfig, device: torch.device) -> bool:
    """Do this model's blocks run as the fused operations, which torch.compile cannot improve?"""
    model = config.model
    return _fused_mixer(config, device) and model.channel_mixer in ("glu", "none")


def recorded_by_default(config: TrainConfig, device: torch.device) -> bool:
    """Is this a model that "auto" records as a CUDA graph on one GPU?

    One whose token mixer is fused. Trees behind it are operations of their own and follow.
    """
    trees = config.model.channel_mixer == "fff"
    return runs_fused(config, device) or (trees and _fused_mixer(config, device))


def _fused_mixer(config: TrainConfig, device: torch.device) -> bool:
    ternary = config.model.token_mixer == "mlgru" and config.model.linear == "ternary"
    return ternary and triton_wanted(device.type)


def _compiles(config: TrainConfig, device: torch.device) -> bool:
    if config.compile == "auto":
        return device.type == "cuda" and not recorded_by_default(config, device)
    return config.compile not in ("off", "graph")


def set_deterministic(config: TrainConfig, device: torch.device) -> None:
    """Same inputs, same bits: also for torch.compile, whose kernels else may add atomically."""
    import os

    if not config.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode would fill fresh memory; nothing here reads what it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda" and _compiles(config, device):
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):
            inductor.deterministic = True


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Gradient norm over all of all tensors before clipping, left on the device.

    limit 0: measure only. Sharded gradients count whole, and every process gets the same norm.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if is_sharded(model):
        return _clip_shards([local(p.grad) for p in parameters if p.grad is not None], limit)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit > 0:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _clip_shards(shards: list[Tensor], limit: float) -> Tensor:
    """The same on this process's parts; torch's own functions reduce tensor by tensor.

    Every element lies in one shard only, so the squares of the parts' norms add up.
    """
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    if limit > 0:
        torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
