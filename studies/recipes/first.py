"""The first stay: Pareto, what lies between the architectures, training options, sizes of files."""

from __future__ import annotations

from functools import partial
from typing import Any

from studies.recipes.cells import OURS, RATES, SIZES, SMALL_TOKENS, THEIRS, Amount, make
from studies.recipes.texts import RAW, SMALL


def pareto(amount: Amount) -> list[dict[str, Any]]:
    """Packed MatMul-free models and the twins, to be rounded afterwards, at equal tokens."""
    names = {"box": "mlgru", "transformer_box": "transformer"}
    return [
        make("pareto", f"{names[base]}-{size}", f"{names[base]} {size}", amount.pareto, (1,),
             base=base, shape=shape, learning_rate=RATES[base][size], keep=True)
        for size, shape in SIZES.items()
        for base in reversed(names)
    ]  # fmt: skip


def recipe_cell(amount: Amount, variant: str, label: str, **values: Any) -> dict[str, Any]:
    """One change of today's recipe at size S."""
    values.setdefault("learning_rate", OURS)
    return make("recipe", variant, label, amount.recipe, amount.seeds, **values)


def frame(amount: Amount) -> list[dict[str, Any]]:
    """Today's recipe, raw texts, the twin, and what lies between both architectures."""
    one = partial(recipe_cell, amount)
    return [
        one("base", "today's recipe"),
        one("raw", "raw texts in place of cleaned ones", kind=RAW),
        one("twin", "Transformer++", base="transformer_box", learning_rate=THEIRS),
        one("dense-mlgru", "MLGRU with dense linear layers", model={"linear": "dense"},
            learning_rate=THEIRS),
        one("ternary-attention", "attention with ternary linear layers", learning_rate=OURS,
            model={"token_mixer": "attention"}),
    ]  # fmt: skip


def knobs(amount: Amount) -> list[dict[str, Any]]:
    """One training option or shape changed."""
    one = partial(recipe_cell, amount)
    two = {"batch_size": 64, "micro_batch_size": 64}
    half = {"batch_size": 16, "micro_batch_size": 16}
    return [
        one("rate-half", "half the rate", learning_rate=OURS / 2),
        one("halved", "cosine, halved midway", schedule="cosine_halved"),
        one("linear", "rate in a line to zero", schedule="linear"),
        one("batch-half", "half the tokens a step", **half),
        one("batch-double", "twice the tokens a step", **two),
        one("decay-0.1", "weight decay 0.1", weight_decay=0.1),
        one("decay-0", "no weight decay", weight_decay=0.0),
        one("beta2-0.98", "beta2 0.98", beta2=0.98),
        one("deep", "9 x 192: deeper, as many weights in the blocks", shape=(9, 192)),
        one("free-gates", "no lower bound of the forget gates", model={"use_lower_bound": False}),
        one("ternary-attention-low", "attention with ternary layers, a third of the rate",
            model={"token_mixer": "attention"}, learning_rate=THEIRS),
        one("dense-mlgru-high", "MLGRU with dense layers, twice the rate",
            model={"linear": "dense"}, learning_rate=2 * THEIRS),
    ]  # fmt: skip


def box12(amount: Amount) -> list[dict[str, Any]]:
    """Shapes that pack to at most 12 MB with today's recipe: width, depth, vocabulary."""

    def one(variant: str, label: str, shape: tuple[int, int], inner: int, **values: Any) -> Any:
        model = {"intermediate_size": inner}
        tokens = amount.box12 * (SMALL_TOKENS if values.get("kind") == SMALL else 1)
        return make(
            "box12", variant, label, tokens, (1,), shape=shape, model=model, keep=True, **values
        )

    return [
        one("10x512", "10 x 512, vocabulary 8192", (10, 512), 1408),
        one("9x640-small", "9 x 640, vocabulary 4096", (9, 640), 1600, kind=SMALL),
        one("12x480", "12 x 480, vocabulary 8192", (12, 480), 1280),
    ]


PARTS = {"pareto": pareto, "frame": frame, "box12": box12, "knobs": knobs}
# sections whose models are packed or rounded and come back
FINISHED = ("pareto", "box12", "largest")
