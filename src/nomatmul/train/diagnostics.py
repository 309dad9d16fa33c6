"""What ternary training needs watched: weight shares, flips, activation sizes.

Rows of metrics.jsonl: ternary_minus, ternary_zero, ternary_plus (shares over the model),
flip_rate (share of ternary weights that changed since the last such row, or since the start of
this process), activation_max (largest absolute input of a ternary layer on one sequence), and
"layers": the same by layer name. Empty for models without ternary layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nomatmul.models.diagnostics import (
    ActivationMaxima,
    FlipCounter,
    bit_linears,
    ternary_shares,
)
from nomatmul.ops.bitlinear.naive import SCALE_FLOOR
from nomatmul.train.model import TrainedModel
from nomatmul.train.parallelize import eager, local
from nomatmul.train.ranks import Ranks


class Diagnostics:
    """Looks at the ternary layers of `model`; keeps one byte a weight to count flips.

    With many ranks each looks at its own part of the weights and at its own sequence.
    """

    def __init__(self, model: TrainedModel, ranks: Ranks | None = None) -> None:
        self._model = model
        self._ranks = ranks if ranks is not None else Ranks.alone()
        self._sizes = {name: layer.weight.numel() for name, layer in bit_linears(model)}
        self._flips = FlipCounter(model) if not self._ranks.many else None
        self._last = _ternary_parts(model, self._ranks) if self._ranks.many else {}

    @torch.no_grad()
    def report(self, x_BT: Tensor) -> dict[str, Any]:
        """One row. x_BT: token ids to measure activations on; one sequence is enough."""
        if not self._sizes:
            return {}
        if self._flips is not None:
            shares, flips = ternary_shares(self._model), self._flips.update()
        else:
            shares, flips = self._count_parts()
        with eager(self._model), ActivationMaxima(self._model) as maxima:
            self._model(input_ids=x_BT)
        tops = self._ranks.most(*maxima.inputs.values())
        inputs = dict(zip(maxima.inputs, tops, strict=True))
        total = sum(self._sizes.values())

        def mean(values: dict[str, float]) -> float:
            return sum(values[name] * size for name, size in self._sizes.items()) / total

        row: dict[str, Any] = {
            f"ternary_{what}": mean({name: share[i] for name, share in shares.items()})
            for i, what in enumerate(("minus", "zero", "plus"))
        }
        row["flip_rate"] = mean(flips)
        row["activation_max"] = max(inputs.values())
        row["layers"] = {
            name: {
                "minus": share[0],
                "zero": share[1],
                "plus": share[2],
                "flip_rate": flips[name],
                "activation_max": inputs[name],
            }
            for name, share in shares.items()
        }
        return row

    def _count_parts(self) -> tuple[dict[str, tuple[float, float, float]], dict[str, float]]:
        """Shares and flips of the whole tensors from every rank's part."""
        now = _ternary_parts(self._model, self._ranks)
        counts = [
            torch.stack([(t < 0).sum(), (t > 0).sum(), (t != self._last[name]).sum()])
            for name, t in now.items()
        ]
        self._last = now
        table = self._ranks.sum(torch.stack(counts)).tolist()
        shares, flips = {}, {}
        for name, (minus, plus, flipped) in zip(now, table, strict=True):
            size = self._sizes[name]
            shares[name] = (minus / size, (size - minus - plus) / size, plus / size)
            flips[name] = flipped / size
        return shares, flips


@torch.no_grad()
def _ternary_parts(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of each layer's ternary weights, int8, by the scale of the whole tensor."""
    layers = dict(bit_linears(model))
    if not layers:
        return {}
    parts = {name: local(layer.weight).float() for name, layer in layers.items()}
    sums = ranks.sum(torch.stack([part.double().abs().sum() for part in parts.values()]))
    ternary = {}
    for (name, part), total in zip(parts.items(), sums.tolist(), strict=True):
        w_scale = torch.tensor(
            max(total / layers[name].weight.numel(), SCALE_FLOOR), dtype=torch.float32
        )
        ternary[name] = (
            torch.round(part * w_scale.reciprocal().to(part.device)).clamp(-1, 1).to(torch.int8)
        )
    return ternary
