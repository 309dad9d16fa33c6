"""FFN, the channel mixer of BERT."""

from __future__ import annotations

from torch import Tensor

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import make_linear
from nomatmul.models.mixer import Mixer
from nomatmul.ops.activations import activate, check_activation


class FFN(Mixer):
    """down(activation(up(x))), BERT's feed-forward layer; [..., D] -> [..., out_size].

    activation: "gelu" (the exact form), "silu" or "relu". out_size: None for D.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        linear: str = "ternary",
        eps: float = 1e-6,
        activation: str = "gelu",
        out_size: int | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.up_proj = make_linear(hidden_size, intermediate_size, linear, eps)
        self.down_proj = make_linear(intermediate_size, out_size or hidden_size, linear, eps)

    @classmethod
    def of(cls, part: parts.FFN, layer: int) -> FFN:
        up, down = part.up_proj, part.down_proj
        return cls(
            up.inputs,
            up.outputs,
            linear=up.kind,
            eps=up.norm_eps or 1e-6,
            activation=part.activation,
            out_size=down.outputs,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.up_proj(x)
        return self.down_proj(activate(y, self.activation)).to(y.dtype)
