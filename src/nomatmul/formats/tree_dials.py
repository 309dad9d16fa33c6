"""The dials of trees, checked."""

from __future__ import annotations

from nomatmul.formats.checks import check_dial, check_int

TREE_ACTIVATIONS = ("gelu", "silu", "relu")

MAX_TREE_DEPTH = 24
MAX_TREE_ROWS = (1 << 31) - 1  # rows of all trees of a layer are numbered by int32


class TreeDials:
    """Checks of the fields `fff_*`; `Dials` has them all."""

    channel_mixer: str
    linear: str
    activation: str
    num_layers: int
    fff_trees: int | None
    fff_depth: int | None
    fff_bias: bool
    fff_master_width: int
    fff_layers: tuple[int, ...] | None

    def check_trees(self, max_features: int) -> None:
        """Raise ValueError for trees that do not go together, or belong to no "fff"."""
        if self.channel_mixer != "fff":
            self._check_no_trees()
            return
        check_dial("activation of trees", self.activation, TREE_ACTIVATIONS)
        check_int("fff_trees", self.fff_trees, 1, max_features)
        check_int("fff_depth", self.fff_depth, 0, MAX_TREE_DEPTH)
        check_int("fff_master_width", self.fff_master_width, 0, max_features)
        if self.fff_bias and self.linear == "ternary":
            raise ValueError("fff_bias belongs to linear 'dense'; ternary layers have no bias")
        assert self.fff_trees is not None
        assert self.fff_depth is not None
        if self.fff_trees * (2 << self.fff_depth) > MAX_TREE_ROWS:
            raise ValueError(
                f"{self.fff_trees} trees of depth {self.fff_depth} have more rows than int32 can"
                f" number ({MAX_TREE_ROWS})"
            )
        active = self.fff_trees * (self.fff_depth + 1)
        check_int("active neurons of fff_trees and fff_depth:", active, 1, max_features)
        self._check_tree_layers()

    def _check_no_trees(self) -> None:
        if self.fff_trees is not None or self.fff_depth is not None:
            raise ValueError(
                'fff_trees and fff_depth belong to channel_mixer "fff",'
                f" got channel_mixer {self.channel_mixer!r}"
            )
        for name in ("fff_bias", "fff_master_width", "fff_layers"):
            if getattr(self, name):
                raise ValueError(
                    f'{name} belongs to channel_mixer "fff", got channel_mixer '
                    f"{self.channel_mixer!r}"
                )

    def _check_tree_layers(self) -> None:
        if self.fff_layers is None:
            return
        if not isinstance(self.fff_layers, (list, tuple)):
            raise ValueError(f"fff_layers must be a list of layers, got {self.fff_layers!r}")
        for layer in self.fff_layers:
            check_int("a layer in fff_layers:", layer, 0, self.num_layers - 1)
        layers = tuple(sorted(set(self.fff_layers)))
        if not layers or len(layers) != len(self.fff_layers):
            raise ValueError(f"fff_layers {self.fff_layers!r} must name layers, each of them once")
        object.__setattr__(self, "fff_layers", layers)
