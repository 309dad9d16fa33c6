"""GLU, the channel mixer of MatMul-free LM and Llama (arXiv 2002.05202).

Shape suffixes: B sequences, T steps, D hidden, M intermediate.
"""

from __future__ import annotations

from torch import Tensor

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import LayerNorm, RMSNorm, is_ternary, make_linear
from nomatmul.models.mixer import Inputs, Mixer, bit_linears_of, own_layers
from nomatmul.ops import fused
from nomatmul.ops.activations import activate, check_activation


class GLU(Mixer):
    """down(activation(gate) * up) with gate and up from one projection; [..., D] -> [..., D].

    gate_proj.weight is [2M, D]: the gate's rows first. The product is taken in float32.
    activation: "silu", or as of `FFN`.
    """

    has_fused = True

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        linear: str = "ternary",
        eps: float = 1e-6,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.gate_proj = make_linear(hidden_size, 2 * intermediate_size, linear, eps)
        self.down_proj = make_linear(intermediate_size, hidden_size, linear, eps)

    @classmethod
    def of(cls, part: parts.GLU, layer: int) -> GLU:
        gate, down = part.gate_proj, part.down_proj
        return cls(
            gate.inputs,
            down.inputs,
            linear=gate.kind,
            eps=gate.norm_eps or 1e-6,
            activation=part.activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate_proj(x)
        gate, up = y.chunk(2, dim=-1)
        product = activate(gate.float(), self.activation) * up.float()
        # A ternary layer norms and rounds in float32 itself; a dense one wants x's own type.
        if not is_ternary(self.down_proj):
            product = product.to(y.dtype)
        return self.down_proj(product).to(y.dtype)

    def fuses(self, inputs: Inputs = ()) -> bool:
        return self.activation == "silu" and own_layers(self)

    def fused(
        self, x: Tensor, norm: RMSNorm | LayerNorm, inputs: Inputs = (), *, keep: bool
    ) -> Tensor:
        gate, down = bit_linears_of(self.gate_proj, self.down_proj)
        return fused.channel(
            x,
            norm.weight,
            (gate.weight, down.weight),
            (gate.norm.weight, down.norm.weight),
            eps=(norm.eps, gate.norm.eps),
            slots=(gate.slot, down.slot),
            keep=keep,
        )
