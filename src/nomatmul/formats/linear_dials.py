"""The dials of linears, their scales and their quantisers, checked."""

from __future__ import annotations

from nomatmul.formats.attention_dials import AttentionDials
from nomatmul.formats.checks import check_dial

LINEARS = ("ternary", "dense")
LINEAR_NORMS = ("all", "sub", "none")
ROUNDINGS = ("away", "even", "up")
SCALE_GROUPS = (32, 64, 128, 256)


class LinearDials(AttentionDials):
    """Checks of the fields that say what a linear is; `Dials` has these fields."""

    channel_mixer: str
    linear: str
    causal: bool
    intermediate_size: int | None
    tie_embeddings: bool
    linear_norm: str
    rounding: str
    split_gate: bool
    scale_group: int
    head_linear: str | None
    embedding_linear: str

    @property
    def mlp_size(self) -> int:
        """`intermediate_size` as the int that it always is after construction."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def head_kind(self) -> str:
        """The kind of the head, "ternary" or "dense"."""
        return self.linear if self.head_linear is None else self.head_linear

    def check_linears(self) -> None:
        """Raise ValueError for kinds, scales and quantisers that do not go together."""
        check_dial("linear_norm", self.linear_norm, LINEAR_NORMS)
        check_dial("rounding", self.rounding, ROUNDINGS)
        check_dial("embedding_linear", self.embedding_linear, LINEARS)
        if self.head_linear is not None:
            check_dial("head_linear", self.head_linear, LINEARS)
        self._check_owner()
        if self.split_gate and self.channel_mixer != "glu":
            raise ValueError(
                f'split_gate belongs to channel_mixer "glu", got {self.channel_mixer!r}'
            )
        self._check_groups()
        self._check_table()

    def _check_owner(self) -> None:
        """The published models that have these dials are ternary decoders with attention."""
        default = {
            "linear_norm": "all",
            "rounding": "away",
            "split_gate": False,
            "scale_group": 0,
            "head_linear": None,
            "embedding_linear": "dense",
        }
        own = self.linear == "ternary" and self.token_mixer == "attention" and self.causal
        changed = [name for name, value in default.items() if getattr(self, name) != value]
        same_head = self.head_linear == self.linear
        for name in changed:
            if not own and not (name == "head_linear" and same_head):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} belongs to causal models with linear"
                    " 'ternary' and token_mixer 'attention'"
                )
        if own and changed and self.channel_mixer == "fff" and changed != ["head_linear"]:
            raise ValueError(
                f"{changed[0]} {getattr(self, changed[0])!r} does not go with channel_mixer 'fff'"
            )

    def _check_groups(self) -> None:
        if isinstance(self.scale_group, bool) or self.scale_group not in (0, *SCALE_GROUPS):
            legal = ", ".join(map(str, (0, *SCALE_GROUPS)))
            raise ValueError(f"scale_group {self.scale_group!r} is unknown; legal values: {legal}")
        if not self.scale_group:
            return
        if self.rounding == "up":
            raise ValueError(
                "rounding 'up' belongs to models with int8 activations; a model with scale_group"
                f" {self.scale_group} rounds to even"
            )
        for name, size in self._inputs().items():
            if size % self.scale_group:
                raise ValueError(
                    f"scale_group {self.scale_group} does not divide the {size} inputs of {name}"
                )

    def _inputs(self) -> dict[str, int]:
        """{names: inputs} of the ternary matrices."""
        found = {"q_proj, k_proj, v_proj": self.hidden_size}
        found["o_proj"] = self.num_heads * self.head_size
        if self.channel_mixer != "none":
            found["down_proj"] = self.mlp_size
        return found

    def _check_table(self) -> None:
        if self.embedding_linear == "ternary" and not self.scale_group:
            raise ValueError("embedding_linear 'ternary' needs a scale_group above 0")
        if not self.tie_embeddings:
            return
        if self.embedding_linear == "ternary" and self.head_kind != "ternary":
            raise ValueError("a head that is tied to a ternary embedding is ternary, not 'dense'")
        if self.scale_group and self.embedding_linear == "dense" and self.head_kind == "ternary":
            raise ValueError(
                "a ternary head with scale groups that is tied to the embedding needs"
                " embedding_linear 'ternary'"
            )
