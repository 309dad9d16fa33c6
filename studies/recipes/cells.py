"""Cells of the recipe study: today's recipe of the model in the box, or its Transformer++ twin,
with other sizes, one thing changed, or a change while it trains.

A library of plan.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from nomatmul.train.recipes import recipe
from studies.recipes.change import Change, ChangedCell
from studies.recipes.texts import CLEAN, HELD_OUT, Kind
from studies.scaling.plan import HEAD, LAYER

# layers, width; 64 elements a head of the twin. Rates: the best of studies/scaling.
SIZES = {"S": (5, 256), "M": (7, 384), "L": (8, 512)}
RATES = {
    "box": {"S": 9.5e-3, "M": 3.9e-3, "L": 3.4e-3},
    "transformer_box": {"S": 3.2e-3, "M": 1.3e-3, "L": 1.1e-3},
}
SMALL_TOKENS = 1.107  # of the small vocabulary for a token of the box's, counted on these texts
OURS, THEIRS = RATES["box"]["S"], RATES["transformer_box"]["S"]
SLOWER = 4.0  # times the seconds of MLGRU that other mixers are planned for
TOY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": None}


@dataclasses.dataclass(frozen=True)
class Amount:
    """Tokens of a run in each part, seeds where a part has several, looks, device."""

    pareto: float = 80e6
    recipe: float = 40e6
    box12: float = 60e6
    largest: float = 330e6
    box: float = 300e6
    seeds: tuple[int, ...] = (1, 2)
    eval_tokens: int = 700_000  # of a held-out text: all of each
    lanes: int = 3
    tiny: bool = False


def today(name: str) -> TrainConfig:
    """The recipe of the box, or its twin, as it was when the study began; `GAINS` came of it."""
    config = recipe(name)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=8192), batch_size=32,
        micro_batch_size=32, schedule="cosine", weight_decay=0.01, full_precision=0.0,
    )  # fmt: skip


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
    change: Change | None = None,
    keep: bool = False,
    **train: Any,
) -> dict[str, Any]:
    """A cell without the places of its files: the recipe `base` with another shape and options.

    keep: the model is kept for the cells after it.
    """
    config = today(base)
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
        "change": change or Change(),
        "keep": keep,
    }


def build(
    entry: dict[str, Any], amount: Amount, work: Path, rows: Path, **values: Any
) -> ChangedCell:
    """The cell that `make` described, with its files under `work`. values: further fields."""
    kind, config, change = entry["kind"], entry["config"], entry["change"]
    if amount.tiny:
        config = _tiny(config)
    names = {
        f"{text}{'' if cleaned else '-raw'}": f"{held_out(kind, cleaned).name}-{text}"
        for cleaned in (True, False)
        for text in HELD_OUT
    }
    extra = {"change": change.to_dict()} if change != Change() else {}
    return ChangedCell(
        **{name: entry[name] for name in ("section", "variant", "label", "seeds")},
        config=config.to_dict() | extra,
        neurons=0,
        active=0,
        train=tuple(str(work / name) for name in kind.train),
        valid={text: str(work / f"valid-{place}") for text, place in names.items()},
        rows=str(rows),
        eval_tokens=amount.eval_tokens,
        eval_points=4,
        expected_speed=0.0 if amount.tiny else guess(config, change) / amount.lanes,
        ops="" if _fused(config.model) else "naive",  # else torch.compile's kernels
        keep=str(work / "models") if entry["keep"] else "",
        **values,
    )


def held_out(kind: Kind, cleaned: bool) -> Kind:
    """The held-out texts that go with training texts of this kind."""
    return Kind(cleaned, kind.small, every=kind.every)


def guess(config: TrainConfig, change: Change) -> float:
    """Tokens/s of one H200 that a run has for itself, from the scaling study.

    Of mixers in plain PyTorch nothing is known beforehand: SLOWER is a guess.
    """
    layers, width = SIZES["L"]
    taught = (HEAD + LAYER * layers * width) / 3 if change.teacher else 0.0  # a forward pass
    whole = HEAD + LAYER * config.model.num_layers * config.model.hidden_size + taught
    return 1 / (whole * SLOWER if change.mixer else whole)


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
