"""What a block asks of its mixers, and what a forward pass gives them.

A new mixer is a subclass in a file of mixers/ or channels/, and a line in block.py.

Shape suffixes: B sequences, T new steps, S steps seen so far and now, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nomatmul.models.layers import BitLinear, DenseLinear, LayerNorm, RMSNorm, TernaryLinear

T = TypeVar("T")
Inputs = tuple[Tensor | None, ...]
"""What a token mixer reads beside x."""


class Pass:
    """What the token mixers of one forward pass share: which positions are real, where they stand.

    mask_BS: 1 for real positions, 0 for padding, anywhere in a row; of the new steps or of the past
    too; None: all are real. lower_bounds: floors of forget gates, [D] or None a layer.

    Raises ValueError for a mask of another shape.
    """

    def __init__(
        self,
        x_BTD: Tensor,
        mask_BS: Tensor | None = None,
        *,
        past: int = 0,
        position_ids: Tensor | None = None,
        lower_bounds: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.batch, self.steps = x_BTD.shape[:2]
        self.past, self.device = past, x_BTD.device
        shapes = (self.batch, past + self.steps), (self.batch, self.steps)
        if mask_BS is not None and mask_BS.shape not in shapes:
            raise ValueError(
                f"attention_mask has shape {tuple(mask_BS.shape)}, expected {shapes[0]}"
            )
        self._mask_BS, self._positions, self._bounds = mask_BS, position_ids, lower_bounds
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), or what it gave to the first mixer that asked with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def new_mask(self) -> Tensor | None:
        """[B, T]: the mask of the new steps."""
        return None if self._mask_BS is None else self._mask_BS[:, -self.steps :]

    def whole_mask(self) -> Tensor | None:
        """[B, past + T]; a past that the mask does not cover is real. None if there is nothing to
        tell: no mask and no past."""
        mask, total = self._mask_BS, self.past + self.steps
        if mask is None:
            return torch.ones(self.batch, total, device=self.device) if self.past else None
        if mask.shape[1] != total:
            mask = torch.cat([mask.new_ones(self.batch, self.past), mask], dim=1)
        return mask

    def positions(self) -> Tensor:
        """[B or 1, T]: where each new step stands; padding takes no position."""
        if self._positions is not None:
            return self._positions
        if self._mask_BS is None:
            return torch.arange(self.past, self.past + self.steps, device=self.device).unsqueeze(0)
        mask = self.whole_mask()
        assert mask is not None
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -self.steps :]

    def lower_bound(self, layer: int) -> Tensor | None:
        """[D]: what the forget gate of this layer cannot fall below; None for zero."""
        return None if self._bounds is None else self._bounds[layer]


class Mixer(nn.Module):
    """A token mixer or a channel mixer, as its block and its model see it.

    `of` makes it from its part of `nomatmul.formats.architecture`. `fused` computes norm, mixer and
    residual in one operation, where `fuses` allows it.
    """

    @classmethod
    def has_fused(cls, part: Any) -> bool:
        """Is there a fused form of this part, if its linears are BitLinears?"""
        return False

    @classmethod
    def of(cls, part: Any, layer: int) -> Mixer:
        """The mixer of a description, for the block of this number."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the first values of parameters that belong to no layer inside."""

    def plan_weights(self, std: float, residual_std: float) -> None:
        """Tell the linear layers their first standard deviation; what adds to the residual stream
        has its own."""
        for name, linear in self.named_children():
            if isinstance(linear, TernaryLinear | DenseLinear):
                scaled = name in ("o_proj", "down_proj")
                linear.initial_std = residual_std if scaled else std

    def fuses(self, inputs: Inputs = ()) -> bool:
        """Can `fused` compute this?"""
        return False

    def fused(
        self, x: Tensor, norm: RMSNorm | LayerNorm, inputs: Inputs = (), *, keep: bool
    ) -> Tensor:
        """x + mixer(norm(x)). keep: remember products for the backward pass."""
        raise NotImplementedError


class TokenMixer(Mixer):
    """A mixer of positions. `layer`: its place in the model; `dropout`: of what is inside."""

    layer: int = 0
    dropout: float = 0.0

    @classmethod
    def of(cls, part: Any, layer: int) -> TokenMixer:
        raise NotImplementedError

    def inputs(self, tokens: Pass) -> Inputs:
        """What `mix` takes beside x; asked for before the first block runs."""
        raise NotImplementedError

    def mix(self, x: Tensor, inputs: Inputs, cache: Any = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; cache: from `nomatmul.models.hf.cache`, changed in place."""
        raise NotImplementedError


def own_layers(module: nn.Module) -> bool:
    """Are its layers of the form that fused operations serve, and ours? An adapter's wrapper
    computes more."""
    return all(isinstance(layer, BitLinear | RMSNorm) for layer in module.children())


def bit_linears_of(*layers: nn.Module) -> list[BitLinear]:
    """The layers, of which `own_layers` has found that they are BitLinears."""
    return [layer for layer in layers if isinstance(layer, BitLinear)]
