"""AdamW (arXiv 1711.05101) as the published model was trained with it, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nomatmul.models.channels.trees import auxiliary_loss, set_fff_training
from nomatmul.ops.loss import Taught
from nomatmul.train.config import TrainConfig
from nomatmul.train.fff_training import training_options, wants_auxiliary
from nomatmul.train.model import TrainedModel
from nomatmul.train.parallelize import compile_parts, is_sharded, local
from nomatmul.train.plan import DevicePlan

Loss = Callable[[Tensor, Tensor], tuple[Any, ...]]


class LossParts(NamedTuple):
    """What a loss gives, scalars, the first ones at least.

    total: what is minimised, but for z (mean squared log-partition) and the auxiliary loss (of
    trees, weighted), which are added. plain: the cross-entropy of the text, where a teacher makes
    the total another. divergence: KL(teacher || student), nats a token.
    """

    total: Tensor
    z: Tensor
    auxiliary: Tensor | None = None
    plain: Tensor | None = None
    divergence: Tensor | None = None

    def beside(self) -> dict[str, Tensor]:
        """What is logged beside the text's loss, detached, by its name in metrics.jsonl."""
        named = {"auxiliary_loss": self.auxiliary, "distill_loss": self.divergence}
        return {name: value.detach() for name, value in named.items() if value is not None}


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


def build_optimizer(model: nn.Module, config: TrainConfig, plan: DevicePlan) -> torch.optim.AdamW:
    """AdamW over `decay_groups`."""
    kind = ShardedAdamW if is_sharded(model) else torch.optim.AdamW
    return kind(
        decay_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=plan.fused_adamw,
    )


def build_loss(
    model: TrainedModel, config: TrainConfig, plan: DevicePlan, taught: Taught | None = None
) -> Loss:
    """The function (x_BT, y_BT) -> (mean of -ln p(y), mean squared log-partition), float32 scalars.

    Targets of -100 do not count. It is compiled and runs under autocast as the plan says, and
    splits the head and the cross-entropy as the config does. An encoder's head sees the hidden
    tokens only. If the config asks for an auxiliary loss of its trees, that is a third scalar,
    already weighted. taught: the teacher that has looked at x_BT teaches where gradients are
    wanted, and all of `LossParts` is given; evaluation is that of the text.
    """
    chunk = config.targets // config.loss_chunks if config.loss_chunks > 1 else 0
    options: dict[str, Any] = {"chunk": chunk}
    if not config.model.causal:
        options["predicted"] = config.targets
    auxiliary = wants_auxiliary(config)
    set_fff_training(model, training_options(config))

    def loss(x_BT: Tensor, y_BT: Tensor) -> tuple[Any, ...]:
        teaching = taught is not None and torch.is_grad_enabled()
        told: dict[str, Any] = {"taught": taught} if teaching else {}
        result = model.loss(x_BT, y_BT, **options, **told)
        more = auxiliary_loss(model) if auxiliary else None  # none without gradients
        if teaching:
            total, z, plain, divergence = result
            return total, z, more, plain, divergence
        return result if more is None else (*result, more)

    if plan.compile is not None:
        if is_sharded(model):
            compile_parts(model, plan.compile)
        else:
            loss = torch.compile(loss, dynamic=False, mode=plan.compile)

    def run(x_BT: Tensor, y_BT: Tensor) -> tuple[Any, ...]:
        with plan.autocast():
            return loss(x_BT, y_BT)

    return run


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
