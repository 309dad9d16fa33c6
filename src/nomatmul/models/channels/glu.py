"""GLU, the channel mixer of MatMul-free LM and Llama (arXiv 2002.05202, section 2).

Shape suffixes: B sequences, T steps, D hidden, M intermediate.
"""

from __future__ import annotations

from torch import Tensor

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import LayerNorm, RMSNorm, linear_of, rounds_itself
from nomatmul.models.mixer import Inputs, Mixer, bit_linears_of, own_layers
from nomatmul.ops import fused
from nomatmul.ops.activations import activate, check_activation


class GLU(Mixer):
    """down(activation(gate) * up) with gate and up from one projection; [..., D] -> [..., D].

    gate_proj.weight is [2M, D]: the gate's rows first; where each has a norm of its own inside,
    up_proj lies apart. The product is taken in float32. activation: "silu", or as of `FFN`. part:
    a description that says more of the linears than `linear` and `eps`.
    """

    @classmethod
    def has_fused(cls, part: parts.GLU) -> bool:
        return part.activation == "silu" and part.up_proj is None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        linear: str = "ternary",
        eps: float = 1e-6,
        activation: str = "silu",
        part: parts.GLU | None = None,
    ) -> None:
        super().__init__()
        if part is None:
            gate = parts.Linear(linear, 2 * intermediate_size, hidden_size, eps)
            down = parts.Linear(linear, hidden_size, intermediate_size, eps)
            part = parts.GLU(gate, down, activation)
        check_activation(part.activation)
        self.activation = part.activation
        self.gate_proj = linear_of(part.gate_proj)
        self.up_proj = linear_of(part.up_proj) if part.up_proj is not None else None
        self.down_proj = linear_of(part.down_proj)

    @classmethod
    def of(cls, part: parts.GLU, layer: int) -> GLU:
        """The layer of a description; `layer` is ignored."""
        return cls(part.gate_proj.inputs, part.neurons, part=part)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D], in the type that the projections give."""
        gate = self.gate_proj(x)
        if self.up_proj is None:
            gate, up = gate.chunk(2, dim=-1)
        else:
            up = self.up_proj(x)
        product = activate(gate.float(), self.activation) * up.float()
        # A layer that rounds does so in float32; a dense one wants x's own type.
        if not rounds_itself(self.down_proj):
            product = product.to(gate.dtype)
        return self.down_proj(product).to(gate.dtype)

    def fuses(self, inputs: Inputs = ()) -> bool:
        plain = self.activation == "silu" and self.up_proj is None
        return plain and own_layers(self)

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
            full_precision=gate.full_precision,
        )
