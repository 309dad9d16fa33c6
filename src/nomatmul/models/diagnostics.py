"""What a trainer wants to know of ternary layers: shares, flips, largest activations.

All functions work on the plain (not compiled) module; a model wrapped by torch.compile is
unwrapped first.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch
from torch import Tensor, nn

from nomatmul.models.layers import TernaryLinear


def bit_linears(model: nn.Module) -> Iterator[tuple[str, TernaryLinear]]:
    """The ternary layers of a model that train, by name, e.g. "layers.0.mixer.i_proj"."""
    model = getattr(model, "_orig_mod", model)
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            yield name.replace("_orig_mod.", ""), module


@torch.no_grad()
def _ternary(module: TernaryLinear) -> Tensor:
    t, _ = module.quantised()
    return t.to(torch.int8)


@torch.no_grad()
def ternary_shares(model: nn.Module) -> dict[str, tuple[float, float, float]]:
    """Shares of -1, 0 and +1 among each ternary layer's weights; each triple sums to one."""
    names, counts = [], []
    for name, module in bit_linears(model):
        t = _ternary(module)
        minus, plus = (t < 0).sum(), (t > 0).sum()
        names.append((name, t.numel()))
        counts.append(torch.stack([minus, t.numel() - minus - plus, plus]))
    if not counts:
        return {}
    table = torch.stack(counts).cpu().tolist()  # one wait for the device, not one a layer
    return {
        name: (row[0] / size, row[1] / size, row[2] / size)
        for (name, size), row in zip(names, table, strict=True)
    }


class FlipCounter:
    """Share of ternary weights that changed between two calls; keeps int8 copies of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last = {name: _ternary(module) for name, module in bit_linears(model)}

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """Changed share of each ternary layer since the last call (or the construction)."""
        changed = {}
        for name, module in bit_linears(self._model):
            now = _ternary(module)
            changed[name] = (now != self._last[name]).float().mean()
            self._last[name] = now
        if not changed:
            return {}
        return dict(zip(changed, torch.stack(list(changed.values())).tolist(), strict=True))


class ActivationMaxima:
    """Largest |input| and |output| of each ternary layer while the context is open.

    with ActivationMaxima(model) as maxima:
        model(input_ids)
    maxima.inputs["layers.0.mixer.i_proj"], maxima.outputs[...]: floats, read on leaving.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}
        self.inputs: dict[str, float] = {}
        self.outputs: dict[str, float] = {}

    def __enter__(self) -> ActivationMaxima:
        for name, module in bit_linears(self._model):

            def record(_: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                top = torch.stack([args[0].detach().abs().amax(), output.detach().abs().amax()])
                top = top.float()
                old = self._seen.get(name)
                self._seen[name] = top if old is None else torch.maximum(old, top)

            self._handles.append(module.register_forward_hook(record))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._seen:
            table = torch.stack(list(self._seen.values())).cpu().tolist()
            self.inputs = {name: row[0] for name, row in zip(self._seen, table, strict=True)}
            self.outputs = {name: row[1] for name, row in zip(self._seen, table, strict=True)}
