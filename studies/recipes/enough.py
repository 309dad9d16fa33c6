"""Each side's best recipe: scaling with enough tokens, and the Pareto models once more.

Does the distance to the twin shrink from S to M (and L)? 20 tokens a non-embedding parameter, no
teacher. A run is a cell of its own, so that three fill a command; on half of the text the same
tokens are twice as many epochs. Their vocabulary is the small one, 4,096 entries.

A library of plan.py.
"""

from __future__ import annotations

from typing import Any

from studies.recipes.cells import RATES, SIZES, Amount, make
from studies.recipes.change import Change
from studies.recipes.second import GAINS
from studies.recipes.texts import CLEAN, HALF, SMALL, Kind

TOKENS = {"S": 80e6, "M": 250e6, "L": 550e6}
SIDES: dict[str, dict[str, Any]] = {
    "mlgru": {"base": "box", "change": Change(dense=0.3)},
    "twin": {"base": "transformer_box"},
}


def run(side: str, size: str, seed: int, kind: Kind = SMALL) -> dict[str, Any]:
    """One run; kind: half of the text or all of it."""
    words = [size, side, *(["half"] if kind == HALF else []), *(["again"] if seed > 1 else [])]
    values = SIDES[side]
    name = "Transformer++" if side == "twin" else "MLGRU, 30 % full precision"
    text = ", half of the text" if kind == HALF else ""
    return make(
        "enough", "-".join(words), f"{name}, {size}{text}, seed {seed}", TOKENS[size], (seed,),
        shape=SIZES[size], kind=kind, learning_rate=RATES[values["base"]][size], **values, **GAINS,
    )  # fmt: skip


def enough(amount: Amount) -> list[dict[str, Any]]:
    """S and M, both sides; longest first, so that the lanes end together."""
    return [run(side, size, seed) for seed in amount.seeds for size in "MS" for side in SIDES]


def enough_half(amount: Amount) -> list[dict[str, Any]]:
    """The control: what repetition costs M."""
    return [run(side, "M", 1, HALF) for side in SIDES]


def enough_large(amount: Amount) -> list[dict[str, Any]]:
    """L, as far as a command goes."""
    return [run(side, "L", 1) for side in SIDES]


def pareto_best(amount: Amount) -> list[dict[str, Any]]:
    """The shapes, texts and tokens of `pareto`; benchmarks/pareto_page.py finds them by name."""
    names = {"mlgru": "mlgru", "twin": "transformer"}
    return [
        make("pareto", f"{names[side]}-{size}-best", f"{names[side]} {size}, best recipe",
             amount.pareto, (1,), shape=shape, kind=CLEAN, keep=True,
             learning_rate=RATES[SIDES[side]["base"]][size], **SIDES[side], **GAINS)
        for size, shape in SIZES.items()
        for side in reversed(names)
    ]  # fmt: skip


PARTS = {
    "enough": enough, "enough-half": enough_half, "enough-large": enough_large,
    "pareto-best": pareto_best,
}  # fmt: skip
