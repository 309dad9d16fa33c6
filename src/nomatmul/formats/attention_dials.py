"""The dials of attention, checked."""

from __future__ import annotations

from nomatmul.formats.checks import check_int
from nomatmul.formats.rotary import RopeScaling


class AttentionDials:
    """Checks of heads and positions; `Dials` has these fields."""

    hidden_size: int
    token_mixer: str
    positions: str
    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None
    qk_norm: bool

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: each serves num_heads / kv_heads heads of queries."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def check_attention(self, max_features: int) -> None:
        """Raise ValueError for heads and positions that do not go together."""
        attention = self.token_mixer == "attention"
        for name in ("num_kv_heads", "head_dim", "rope_scaling", "qk_norm"):
            value = getattr(self, name)
            if value is not None and value is not False and not attention:
                raise ValueError(
                    f"{name} belongs to token_mixer 'attention', got {self.token_mixer!r}"
                )
        self._check_heads(max_features)
        if not attention and self.positions == "sinusoidal":
            raise ValueError(
                "positions 'sinusoidal' belong to token_mixer 'attention', "
                f"got {self.token_mixer!r}"
            )
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"sinusoidal positions need an even hidden_size, got {self.hidden_size}"
            )
        if attention and self.positions == "rotary":
            self._check_rotary()
        elif self.rope_scaling is not None:
            raise ValueError(f"rope_scaling belongs to positions 'rotary', got {self.positions!r}")

    def _check_heads(self, max_features: int) -> None:
        if self.head_dim is None:
            check_int("num_heads", self.num_heads, 1, self.hidden_size)
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
                )
        else:
            check_int("num_heads", self.num_heads, 1, max_features)
            check_int("head_dim", self.head_dim, 1, max_features)
            inner = self.num_heads * self.head_dim
            check_int("num_heads * head_dim", inner, 1, max_features)
        if self.num_kv_heads is not None:
            check_int("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
                )

    def _check_rotary(self) -> None:
        if self.head_size % 2:
            told = (
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} = {self.head_size}"
                if self.head_dim is None
                else f"head_dim {self.head_dim}"
            )
            raise ValueError(f"rotary positions need an even head size, got {told}")
        if self.rope_scaling is None or self.rope_scaling.kind != "yarn":
            return
        if self.rope_theta <= 1:
            raise ValueError(
                f"rope_scaling 'yarn' needs a rope_theta above 1, got {self.rope_theta}"
            )
