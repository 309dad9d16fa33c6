"""What the study of fast feedforward layers trains: sections, variants, seeds, order.

Three sections share widths (8 layers x 512) and texts; in each only the channel mixer differs:

- causal: attention, dense weights, next-token prediction;
- mlm: an encoder in the form of crammed BERT, 25 % of the tokens hidden;
- union: MLGRU with ternary weights, the MatMul-free LM, whose GLU gives way to ternary trees.

Names of variants: nomatmul/evaluate/compare_variants.py. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from nomatmul.evaluate.compare_plan import Cell, make_cell
from nomatmul.evaluate.compare_variants import make_variant
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig

VOCABULARY = 8192
CRAMMED: dict[str, Any] = {
    "causal": False, "norm": "layer", "norm_eps": 1e-12, "positions": "sinusoidal",
    "embedding_norm": True, "tie_embeddings": True,
}  # fmt: skip
# Per section: the first names have two seeds and come first; `more` has one seed each.
MAIN = {
    "causal": [
        "dense", "fff-16x7", "dense-112", "none", "fff-128x4", "fff-1x11", "dense-512", "dense-11",
        "fff-16x7-balanced",
    ],
    "mlm": [
        "dense", "none", "fff-1x12", "fff-16x7", "fff-128x4", "dense-112", "dense-12",
        "fff-16x7-balanced",
    ],
    "union": ["dense", "fff-64x5", "fff-16x7", "dense-112", "none", "dense-320", "fff-128x4"],
}  # fmt: skip
MORE = {
    "causal": [
        "fff-16x7-master64", "fff-16x7-every2", "fff-1x11-master64", "fff-1x6-leaf64",
        "fff-1x11-balanced", "dense-64", "fff-128x4-every2",
    ],
    "mlm": ["fff-1x12-balanced", "dense-512", "fff-16x7-master64", "fff-1x12-master64"],
    "union": [
        "fff-16x9", "fff-32x7", "fff-16x7-balanced", "fff-64x5-every2",
        "fff-16x7-master64", "fff-64x5-balanced", "dense-512",
    ],
}  # fmt: skip
# Rates that short runs try, to see whether the one rate of a section is unfair to trees.
RATES = {"causal": 1.5e-3, "mlm": 1e-3, "union": 3.4e-3}
CHECKED = ("dense", "fff-16x7")
FINE_TUNED = tuple(MAIN["mlm"])


def base_config(section: str, args: argparse.Namespace) -> TrainConfig:
    """The section's whole model and its training settings, alike for all variants."""
    layers, width, heads = (2, 32, 2) if args.tiny else (8, 512, 8)
    rows = 2048 if not args.tiny else 60
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_layers": layers, "hidden_size": width,
        "intermediate_size": rows, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
        "max_position_embeddings": args.length,
    }  # fmt: skip
    length, batch = args.length, args.batch
    extra: dict[str, Any] = {}
    if section == "union":
        values |= {"intermediate_size": 1360 if not args.tiny else 40}  # 2040 rows of a neuron
    else:
        values |= {
            "token_mixer": "attention", "linear": "dense", "num_heads": heads,
            "channel_mixer": "ffn",
        }  # fmt: skip
    if section == "mlm":
        length, batch = args.length // 4, args.batch * 4
        values |= {**CRAMMED, "max_position_embeddings": length}
        values |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        extra = {"beta2": 0.98, "epsilon": 1e-12}
    return TrainConfig(
        recipe=f"fff-study-{section}",
        model=ModelConfig.from_dict(values),
        sequence_length=length,
        batch_size=batch,
        micro_batch_size=batch,
        schedule="cosine",
        warmup_steps=args.warmup,
        learning_rate=RATES[section],
        deterministic=False,
        **extra,
    )


def tokens_of(section: str, args: argparse.Namespace) -> int:
    return int(args.mlm_tokens if section == "mlm" else args.tokens)


def study_cell(
    section: str, name: str, seeds: tuple[int, ...], args: argparse.Namespace, **values: Any
) -> Cell:
    """One cell. values: tokens, rate and stage where they are not the study's own."""
    base = base_config(section, args)
    model = base.model
    if name.startswith("fff") and section == "mlm" and "leaf" not in name:
        model = _with_bias(model, name)
    tokens = values.pop("tokens", tokens_of(section, args))
    steps = max(tokens // base.tokens_per_step, 1)
    rate = values.pop("rate", base.learning_rate)
    base = dataclasses.replace(
        base, steps=steps, learning_rate=rate, warmup_steps=min(base.warmup_steps, steps // 8 + 1)
    )
    variant = make_variant(model, name)
    words = "pieces" if section == "mlm" else "bytes"
    return make_cell(
        base,
        variant,
        **{
            "section": section,
            "seeds": seeds,
            "train": (str(args.work / f"train-{words}"),),
            "valid": {n: str(args.work / f"valid-{words}-{n}") for n in ("wikipedia", "novels")},
            "rows": str((args.out / "fff-study-rows.jsonl").resolve()),
            "eval_tokens": int(args.eval_tokens),
            "eval_points": args.points,
            "compile": args.compile,
            "implementation": args.implementation,
            # Of a dense model only the head's loss has a kernel of ours: torch.compile makes one.
            "ops": "" if section == "union" else "naive",
            "commit": args.commit,
            **values,
        },
    )


def _with_bias(model: ModelConfig, name: str) -> ModelConfig:
    """UltraFastBERT's nodes have a bias, the dense layers of its encoder none."""
    shape = make_variant(model, name).model
    return dataclasses.replace(
        model,
        channel_mixer="fff",
        fff_trees=shape.fff_trees,
        fff_depth=shape.fff_depth,
        fff_bias=True,
        intermediate_size=model.mlp_size,
    )


def plan(args: argparse.Namespace) -> list[Cell]:
    """All cells, what matters most first, so that a run that is cut keeps the main question."""
    cells: list[Cell] = []
    seeds = tuple(range(1, 1 + args.seeds))
    keep = str((args.work / "models").resolve())
    cells += _in_turn(
        [
            [
                study_cell(section, name, seeds, args, keep=keep if section == "mlm" else "")
                for name in MAIN[section]
            ]
            for section in args.sections
        ]
    )
    cells += _in_turn(
        [
            [study_cell(section, name, (1,), args) for name in MORE[section]]
            for section in args.sections
        ]
    )
    for section in args.sections:
        for name in CHECKED:
            for factor in (0.5, 1.0, 2.0):
                rate = RATES[section] * factor
                extra = {"tokens": int(args.rate_tokens), "rate": rate, "stage": "rate"}
                cells.append(study_cell(section, name, (1,), args, eval_points=0, **extra))
    further = tuple(range(1 + args.seeds, 1 + args.seeds + args.more_seeds))
    if further:
        cells += [
            study_cell(section, name, further, args)
            for section in args.sections
            for name in MAIN[section][:5]
        ]
    return cells


def _in_turn(lists: list[list[Cell]]) -> list[Cell]:
    """The first of each, then the second of each, and so on."""
    return [cell for row in itertools.zip_longest(*lists) for cell in row if cell is not None]
