"""What ternary training needs watched: weight shares, flips, activation sizes.

Rows of metrics.jsonl: ternary_minus, ternary_zero, ternary_plus (shares over the model),
flip_rate (share of ternary weights that differ from the last report, None at the first),
activation_max (largest absolute input of any ternary layer on one batch), and "layers": the same
by layer name. Dense models have activation_max only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nomatmul.models import BitLinear
from nomatmul.ops.bitlinear import absmean_ternarize


class Diagnostics:
    """Keeps the last ternary values, one byte a weight on the host, to count flips."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def report(self, x_BT: Tensor) -> dict[str, Any]:
        """Look at every layer. x_BT: token ids to measure activations on; one row is enough."""
        shares: dict[str, dict[str, float | None]] = {}
        totals = torch.zeros(3, dtype=torch.float64)
        flips, compared = 0, 0
        for name, module in self.model.named_modules():
            if not isinstance(module, BitLinear):
                continue
            ternary = absmean_ternarize(module.weight)[0].to(torch.int8)
            counts = torch.stack([(ternary == value).sum() for value in (-1, 0, 1)]).cpu().double()
            totals += counts
            now = ternary.cpu()
            layer = dict(
                zip(("minus", "zero", "plus"), (counts / counts.sum()).tolist(), strict=True)
            )
            shares[name] = {key: round(value, 6) for key, value in layer.items()}
            if name in self._last:
                changed = int((now != self._last[name]).sum())
                flips, compared = flips + changed, compared + now.numel()
                shares[name]["flip_rate"] = changed / now.numel()
            self._last[name] = now
        row: dict[str, Any] = {}
        if shares:
            names = ("ternary_minus", "ternary_zero", "ternary_plus")
            row |= dict(zip(names, (totals / totals.sum()).tolist(), strict=True))
            row["flip_rate"] = flips / compared if compared else None
        maxima = self._activation_maxima(x_BT)
        row["activation_max"] = max(maxima.values(), default=0.0)
        for name, value in maxima.items():
            shares.setdefault(name, {})["activation_max"] = value
        row["layers"] = shares
        return row

    def _activation_maxima(self, x_BT: Tensor) -> dict[str, float]:
        """Largest |input| of every linear layer, from one forward pass with hooks."""
        seen: dict[str, Tensor] = {}
        hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, BitLinear | nn.Linear):

                def look(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    seen[name] = inputs[0].detach().abs().amax().float()

                hooks.append(module.register_forward_pre_hook(look))
        was_training = self.model.training
        self.model.eval()
        try:
            self.model(input_ids=x_BT)
        finally:
            self.model.train(was_training)
            for hook in hooks:
                hook.remove()
        if not seen:
            return {}
        values = torch.stack(list(seen.values())).tolist()
        return dict(zip(seen, values, strict=True))
