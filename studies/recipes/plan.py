"""What the recipe study trains: cells in the order of their value (plan.md says why).

Every cell is today's recipe of the model in the box (`nomatmul train box`), or its Transformer++
twin, with other sizes and one thing changed.

A library of run.py.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from nomatmul.evaluate.compare_plan import Cell
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from nomatmul.train.recipes import recipe
from studies.recipes.texts import CLEAN, HELD_OUT, RAW, SMALL, Kind
from studies.scaling.plan import HEAD, LAYER

# layers, width; 64 elements a head of the twin. Rates: the best of the scaling study (docs/gpu.md).
SIZES = {"S": (5, 256), "M": (7, 384), "L": (8, 512)}
RATES = {
    "box": {"S": 9.5e-3, "M": 3.9e-3, "L": 3.4e-3},
    "transformer_box": {"S": 3.2e-3, "M": 1.3e-3, "L": 1.1e-3},
}
SMALL_TOKENS = 1.107  # of the small vocabulary for a token of the box's, counted on these texts
OURS, THEIRS = RATES["box"]["S"], RATES["transformer_box"]["S"]
TOY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": None}


@dataclasses.dataclass(frozen=True)
class Amount:
    """Tokens of a run in each part, seeds where a part has several, looks, device."""

    pareto: float = 80e6
    recipe: float = 40e6
    box12: float = 60e6
    seeds: tuple[int, ...] = (1, 2)
    eval_tokens: int = 700_000  # of a held-out text: all of each
    lanes: int = 3
    tiny: bool = False


def make(
    section: str,
    variant: str,
    label: str,
    tokens: float,
    seeds: tuple[int, ...],
    *,
    base: str = "box",
    shape: tuple[int, int] = SIZES["S"],
    kind: Kind = CLEAN,
    model: dict[str, Any] | None = None,
    **train: Any,
) -> dict[str, Any]:
    """A cell without the places of its files: the recipe `base` with another shape and options."""
    config = recipe(base)
    layers, width = shape
    values = {
        "num_layers": layers,
        "hidden_size": width,
        "intermediate_size": None,
        **(model or {}),
    }
    if values.get("token_mixer", config.model.token_mixer) == "attention":
        values["num_heads"] = width // 64
    if kind.small:
        values["vocab_size"] = 4096
    changed = dataclasses.replace(config.model, **values)
    config = dataclasses.replace(config, model=changed, **train)
    steps = max(int(tokens) // config.tokens_per_step, 1)
    return {
        "section": section,
        "variant": variant,
        "label": label,
        "config": dataclasses.replace(config, recipe=f"{section}-{variant}", steps=steps),
        "seeds": seeds,
        "kind": kind,
    }


def pareto(amount: Amount) -> list[dict[str, Any]]:
    """Packed MatMul-free models and the twins, to be rounded afterwards, at equal tokens."""
    names = {"box": "mlgru", "transformer_box": "transformer"}
    return [
        make("pareto", f"{names[base]}-{size}", f"{names[base]} {size}", amount.pareto, (1,),
             base=base, shape=shape, learning_rate=RATES[base][size])
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
        return make("box12", variant, label, tokens, (1,), shape=shape, model=model, **values)

    return [
        one("10x512", "10 x 512, vocabulary 8192", (10, 512), 1408),
        one("9x640-small", "9 x 640, vocabulary 4096", (9, 640), 1600, kind=SMALL),
        one("12x480", "12 x 480, vocabulary 8192", (12, 480), 1280),
    ]


PARTS = {"pareto": pareto, "frame": frame, "box12": box12, "knobs": knobs}
KEPT = ("pareto", "box12")  # parts whose models are kept, rounded or packed


def plan(amount: Amount, work: Path, rows: Path, parts: list[str], **values: Any) -> list[Cell]:
    """All cells of these parts, in order. values: further fields of every cell."""
    out = []
    for name in parts:
        for entry in PARTS[name](amount):
            kind, config = entry.pop("kind"), entry.pop("config")
            if amount.tiny:
                config = _tiny(config)
            names = {
                f"{text}{'' if cleaned else '-raw'}": Kind(cleaned, kind.small).name + f"-{text}"
                for cleaned in (True, False)
                for text in HELD_OUT
            }
            cell = Cell(
                **entry,
                config=config.to_dict(),
                neurons=0,
                active=0,
                train=(str(work / f"train-{kind.name}"),),
                valid={text: str(work / f"valid-{place}") for text, place in names.items()},
                rows=str(rows),
                eval_tokens=amount.eval_tokens,
                eval_points=4,
                expected_speed=0.0 if amount.tiny else guess(config) / amount.lanes,
                ops="" if _fused(config.model) else "naive",  # else torch.compile's kernels
                keep=str(work / "models") if name in KEPT else "",
                **values,
            )
            out.append(cell)
    return out


def guess(config: TrainConfig) -> float:
    """Tokens/s of one H200 that a run has for itself, from the scaling study."""
    return 1 / (HEAD + LAYER * config.model.num_layers * config.model.hidden_size)


def _fused(model: ModelConfig) -> bool:
    return model.token_mixer == "mlgru" and model.linear == "ternary"


def _tiny(config: TrainConfig) -> TrainConfig:
    values = {**TOY, "max_position_embeddings": 32}
    values["num_heads"] = 1
    model = dataclasses.replace(config.model, **values)
    return dataclasses.replace(
        config, model=model, sequence_length=32, batch_size=4, micro_batch_size=4, loss_chunks=1,
        warmup_steps=2, steps=6,
    )  # fmt: skip
