"""FFN, the channel mixer of BERT (arXiv 1810.04805).

Shape suffix: D hidden.
"""

from __future__ import annotations

from torch import Tensor

from nomatmul.formats import architecture as parts
from nomatmul.models.layers import linear_of
from nomatmul.models.mixer import Mixer
from nomatmul.ops.activations import activate, check_activation


class FFN(Mixer):
    """down(activation(up(x))), BERT's feed-forward layer; [..., D] -> [..., out_size].

    activation: "gelu" (the exact form), "silu", "relu" or "relu2". out_size: None for D. part: a
    description that says more of the linears than `linear` and `eps`.
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
        part: parts.FFN | None = None,
    ) -> None:
        super().__init__()
        if part is None:
            up = parts.Linear(linear, intermediate_size, hidden_size, eps)
            down = parts.Linear(linear, out_size or hidden_size, intermediate_size, eps)
            part = parts.FFN(up, down, activation)
        check_activation(part.activation)
        self.activation = part.activation
        self.up_proj = linear_of(part.up_proj)
        self.down_proj = linear_of(part.down_proj)

    @classmethod
    def of(cls, part: parts.FFN, layer: int) -> FFN:
        """The layer of a description; `layer` is ignored."""
        return cls(part.up_proj.inputs, part.neurons, part=part)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., out_size], in the type that the projections give."""
        y = self.up_proj(x)
        return self.down_proj(activate(y, self.activation)).to(y.dtype)
