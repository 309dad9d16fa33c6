"""GLU, the channel mixer of MatMul-free LM and Llama (arXiv 2002.05202).

Shape suffixes: B sequences, T steps, D hidden, M intermediate.
"""

from __future__ import annotations

from torch import Tensor, nn

from nomatmul.models.layers import is_ternary, make_linear
from nomatmul.ops.activations import activate, check_activation


class GLU(nn.Module):
    """down(activation(gate) * up) with gate and up from one projection; [..., D] -> [..., D].

    gate_proj.weight is [2M, D]: the gate's rows first. The product is taken in float32.
    activation: "silu", or as of `FFN`.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate_proj(x)
        gate, up = y.chunk(2, dim=-1)
        product = activate(gate.float(), self.activation) * up.float()
        # A ternary layer norms and rounds in float32 itself; a dense one wants x's own type.
        if not is_ternary(self.down_proj):
            product = product.to(y.dtype)
        return self.down_proj(product).to(y.dtype)
