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


class Diagnostics:
    """Looks at the ternary layers of `model`; keeps one byte a weight to count flips."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sizes = {name: layer.weight.numel() for name, layer in bit_linears(model)}
        self._flips = FlipCounter(model)

    @torch.no_grad()
    def report(self, x_BT: Tensor) -> dict[str, Any]:
        """One row. x_BT: token ids to measure activations on; one sequence is enough."""
        if not self._sizes:
            return {}
        shares, flips = ternary_shares(self._model), self._flips.update()
        with ActivationMaxima(self._model) as maxima:
            self._model(input_ids=x_BT)
        total = sum(self._sizes.values())

        def mean(values: dict[str, float]) -> float:
            return sum(values[name] * size for name, size in self._sizes.items()) / total

        row: dict[str, Any] = {
            f"ternary_{what}": mean({name: share[i] for name, share in shares.items()})
            for i, what in enumerate(("minus", "zero", "plus"))
        }
        row["flip_rate"] = mean(flips)
        row["activation_max"] = max(maxima.inputs.values())
        row["layers"] = {
            name: {
                "minus": share[0],
                "zero": share[1],
                "plus": share[2],
                "flip_rate": flips[name],
                "activation_max": maxima.inputs[name],
            }
            for name, share in shares.items()
        }
        return row
