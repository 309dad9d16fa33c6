"""Channel mixers to compare: one model, and what takes its feed-forward layer's place.

A variant is named by a short word that a command line takes:

    dense               the whole layer: the recipe's own `ffn` or `glu`, or one of equal size
    dense-112           an `ffn` of 112 neurons (the control for 112 active ones)
    glu-112             a `glu` of 112 gated neurons (the control for 112 active gated ones)
    none                no channel mixer at all
    fff-16x6            16 trees of depth 6: 16 * (2^7 - 1) neurons, 16 * 7 active
    fff-16x6-balanced   as fff-16x6, trained with a load-balancing loss
    fff-16x6-master64   the same beside a small layer of 64 neurons that is always active
    fff-16x6-every2     the same in every second layer; the others keep the dense layer

Depth counts decisions, as in `fff_depth` and the papers: a path has depth + 1 neurons. Nothing
here needs torch.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import FFF_FIELDS, TrainConfig

BALANCE = 0.01  # weight of the load-balancing loss of "-balanced"
_FFF = re.compile(r"fff-(\d+)x(\d+)((?:-balanced|-master\d+|-every\d+)*)")
_DENSE = re.compile(r"(dense|glu)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that differs from its siblings in the channel mixer only.

    train: training options (fields of TrainConfig) that belong to it. neurons and active: of one
    layer with the mixer, all and on a token's path; a GLU's row counts as 1.5 neurons, which is
    what its weights would make.
    """

    name: str
    label: str
    model: ModelConfig
    train: dict[str, Any]
    neurons: int
    active: int


def rows_of(model: ModelConfig) -> int:
    """Neurons (a row in and a row out each) that the weights of a layer's channel mixer make."""
    if model.channel_mixer == "fff":
        assert model.fff_trees is not None
        assert model.fff_depth is not None
        return model.fff_trees * (2 ** (model.fff_depth + 1) - 1)
    if model.channel_mixer == "none":
        raise ValueError(
            "channel_mixer 'none' has no size to compare at: take a recipe with a channel mixer, "
            "or --set model.channel_mixer=ffn"
        )
    return model.mlp_size * 3 // 2 if model.channel_mixer == "glu" else model.mlp_size


def tree_shapes(rows: int) -> list[tuple[int, int]]:
    """(trees, depth) of at most `rows` neurons: one deep tree, some, many shallow ones."""
    top = max((rows + 1).bit_length() - 2, 0)
    depths = sorted({top, min(6, (top + 3) // 2, top), min(3, top)}, reverse=True)
    return [(max(rows // (2 ** (depth + 1) - 1), 1), depth) for depth in depths]


def default_names(model: ModelConfig) -> list[str]:
    """The controls: whole layer, none, trees, their active widths, one with balancing."""
    shapes = tree_shapes(rows_of(model))
    trees = [f"fff-{count}x{depth}" for count, depth in shapes]
    active = [f"dense-{count * (depth + 1)}" for count, depth in shapes]
    middle = trees[len(trees) // 2]
    return list(dict.fromkeys(["dense", "none", *trees, *active, f"{middle}-balanced"]))


def make_variant(base: ModelConfig, name: str) -> Variant:
    """The model of `base` with the channel mixer that `name` says.

    Raises ValueError for a name of another form and for sizes that are no legal model.
    """
    rows = rows_of(base)
    if name == "dense":
        return _whole(base, rows)
    if name == "none":
        return Variant(name, "none", _with(base, channel_mixer="none"), {}, 0, 0)
    if found := _DENSE.fullmatch(name):
        width = int(found[2])
        gated = found[1] == "glu"
        mixer = "glu" if gated else "ffn"
        model = _with(base, channel_mixer=mixer, intermediate_size=width)
        size = rows_of(model)
        return Variant(name, _plain_label(mixer, width), model, {}, size, size)
    if found := _FFF.fullmatch(name):
        return _trees(base, name, int(found[1]), int(found[2]), found[3].split("-")[1:], rows)
    raise ValueError(
        f"variant {name!r} is not known: use dense, none, dense-WIDTH, glu-WIDTH or "
        "fff-TREESxDEPTH, the last with -balanced, -masterWIDTH or -everyN behind it"
    )


def _whole(base: ModelConfig, rows: int) -> Variant:
    glu = base.channel_mixer == "glu" or base.token_mixer == "mlgru"
    size = base.mlp_size
    if base.channel_mixer == "fff":
        size = rows * 2 // 3 if glu else rows
    mixer = "glu" if glu else "ffn"
    model = _with(base, channel_mixer=mixer, intermediate_size=size)
    return Variant("dense", _plain_label(mixer, size), model, {}, rows, rows)


def _plain_label(mixer: str, width: int) -> str:
    """By what the layer is: gated neurons are not the neurons that its weights would make."""
    return f"GLU, {width} gated" if mixer == "glu" else f"dense {width}"


def _trees(
    base: ModelConfig, name: str, trees: int, depth: int, options: list[str], rows: int
) -> Variant:
    if trees < 1:
        raise ValueError(f"variant {name!r}: trees must be at least 1")
    values: dict[str, Any] = {"fff_trees": trees, "fff_depth": depth}
    train: dict[str, Any] = {}
    neurons, active = trees * (2 ** (depth + 1) - 1), trees * (depth + 1)
    label = f"FFF {trees}x{depth}"
    for kind, number in re.findall(r"(balanced|master|every)(\d*)", "-".join(options)):
        size = int(number or 0)
        if kind == "balanced":
            train["fff_balance"] = BALANCE
            label += ", balanced"
        elif kind == "master":
            values["fff_master_width"] = size
            neurons, active, label = neurons + size, active + size, f"{label} + {size}"
        else:
            if size < 2:
                raise ValueError(f"variant {name!r}: every{size} must be at least every2")
            values["fff_layers"] = tuple(range(size - 1, base.num_layers, size))
            values["intermediate_size"] = rows
            label += ", every second layer" if size == 2 else f", one layer in {size}"
    model = _with(base, channel_mixer="fff", **values)
    return Variant(name, label, model, train, neurons, active)


def _with(base: ModelConfig, **values: Any) -> ModelConfig:
    """`base` with another channel mixer; what belongs to trees only is dropped with the trees."""
    plain = {k: v for k, v in base.to_dict().items() if not k.startswith("fff_")}
    if values["channel_mixer"] == "fff" and base.fff_bias:
        plain["fff_bias"] = True
    if base.linear == "ternary" and values["channel_mixer"] in ("fff", "ffn"):
        # The engine's exponential is equal on every machine; an erf is not.
        plain["activation"] = "silu"
    return ModelConfig.from_dict({**plain, **values})


def variant_config(base: TrainConfig, variant: Variant) -> TrainConfig:
    """`base` with the variant's model and its own training options."""
    options = {} if variant.model.channel_mixer == "fff" else _without_trees()
    return dataclasses.replace(base, model=variant.model, **{**options, **variant.train})


def _without_trees() -> dict[str, Any]:
    """Training options of trees at their defaults: a model without trees refuses others."""
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return {name: fields[name] for name in FFF_FIELDS}
