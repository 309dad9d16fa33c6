"""What the study of fast feedforward layers trains: sections, variants, seeds, order.

The sections share widths (8 layers x 512) and texts; in each only the channel mixer differs:

- causal: attention, dense weights, next-token prediction;
- encoder: masked language modelling, 25 % of the tokens hidden; crammed BERT's norms and tied
  head, but rotary positions and small batches;
- mlm: the first try of it, with crammed BERT's sinusoidal positions and large batches: its short
  runs hardly left the plateau of guessing by frequency, so they say nothing about the layers;
- union: MLGRU with ternary weights, the MatMul-free LM, whose GLU gives way to ternary trees;
- ternary: attention with ternary weights, half as long: the setting where an earlier trial with few
  seeds saw ternary trees come near the whole layer.

Names of variants: nomatmul/evaluate/variants.py, and the endings of EXCHANGED (symmetric.py).
Nothing here needs torch.

A library of run.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from nomatmul.evaluate.variants import make_variant
from nomatmul.formats.config import ModelConfig
from nomatmul.train.config import TrainConfig
from studies.compare.plan import Cell, make_cell

VOCABULARY = 8192
ENCODERS = ("mlm", "encoder")
CRAMMED: dict[str, Any] = {
    "causal": False, "norm": "layer", "norm_eps": 1e-12, "positions": "sinusoidal",
    "embedding_norm": True, "tie_embeddings": True,
}  # fmt: skip
# Per section, what matters most first: FIRST with all seeds, MORE with one each.
FIRST = {
    "causal": ["dense", "fff-16x6", "dense-112", "none", "fff-128x3", "fff-1x10", "dense-11"],
    "encoder": ["dense", "fff-16x6", "fff-128x3", "none", "fff-1x11", "dense-112"],
    "union": ["dense", "fff-64x4", "fff-16x6", "dense-112", "none", "dense-320"],
    "ternary": ["fff-64x4", "dense", "none", "dense-320"],
}
MORE = {
    "causal": [
        "fff-16x6-balanced", "fff-16x6-master64", "dense-512", "fff-16x6-every2",
        "fff-64x4", "dense-320", "fff-32x5", "fff-1x10-master64", "dense-64",
        "fff-1x10-balanced",
    ],
    "encoder": [
        "dense-12", "fff-16x6-balanced", "fff-1x11-balanced", "dense-512", "fff-16x6-master64",
        "fff-1x11-master64",
    ],
    "union": [
        "glu-360", "fff-128x3", "fff-32x6", "fff-16x8", "fff-16x6-balanced",
        "fff-64x4-every2", "fff-16x6-master64", "dense-512", "fff-64x4-balanced",
    ],
    "ternary": ["fff-16x6", "dense-112", "fff-128x3"],
}  # fmt: skip
# Rates that short runs try, to see whether the one rate of a section is unfair to trees.
RATES = {"causal": 1.5e-3, "mlm": 1e-3, "encoder": 1e-3, "union": 3.4e-3, "ternary": 1.5e-3}
EVAL_LIMIT = {"encoder": 400_000}  # tokens of each held-out text, where fewer than the study's
# (section, variants, factors of the section's rate)
CHECKED = {
    "union": (("none", "dense", "fff-16x6"), (0.5, 0.25)),
    "causal": (("dense", "fff-16x6"), (0.5, 1.0, 2.0)),
    "encoder": (("dense", "fff-16x6"), (0.5, 1.0, 2.0)),
}
# Endings of variants whose layers only the study has, and their words.
EXCHANGED = {
    "after": "gelu behind the sum", "tanh": "tanh", "abs": "absolute value",
    "ternary": "ternary in a dense model",
}  # fmt: skip
# The second look, in the order of what it may tell; a dense layer of twice the active width is what
# balanced deep trees must beat. Rows of the first look are not measured again.
AGAIN = {
    "deep": [
        "causal:dense:1,2", "causal:fff-1x10:1,2", "causal:dense-22:1,2",
        "causal:fff-1x10-after:1,2", "causal:fff-1x10-tanh:1,2", "causal:fff-1x10-abs:1,2",
        "causal:fff-1x10-balanced:1,2",
    ],
    "middle": [
        "causal:fff-16x6:1,2", "causal:dense-224:1,2", "causal:fff-16x6-after:1,2",
        "causal:fff-16x6-tanh:1,2", "causal:fff-16x6-abs:1,2", "causal:fff-16x6-balanced:1,2",
    ],
    "shapes": [
        "causal:fff-64x4:1,2", "causal:fff-32x5:1,2", "causal:fff-16x6-every2:1,2",
        "causal:dense-320:1,2", "causal:dense-192:1,2", "causal:fff-64x4-every2:1,2",
        "causal:fff-16x6-master64:1,2", "causal:dense-512:1,2", "causal:none:1,2",
    ],
    "dense-ternary": [
        "causal:fff-64x4-ternary:1,2", "causal:dense-ternary:1,2", "causal:fff-128x3-ternary:1,2",
        "ternary:fff-64x4:1,2", "ternary:dense:1,2", "ternary:none:1,2", "ternary:dense-320:1,2",
    ],
    "encoder": [
        "encoder:fff-1x11-after:1,2", "encoder:fff-1x11-tanh:1,2", "encoder:fff-1x11:1,2",
        "encoder:dense-24:1,2", "encoder:fff-64x4:1,2", "encoder:dense:1,2", "encoder:none:1,2",
        "encoder:fff-16x6-tanh:1,2", "encoder:fff-16x6-after:1,2", "encoder:fff-1x11-abs:1,2",
    ],
}  # fmt: skip
FINE_TUNED = (*FIRST["encoder"], "dense-12", "fff-16x6-balanced")


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
    if section == "ternary":
        values |= {"linear": "ternary", "activation": "silu"}
    warmup = args.warmup
    if section in ENCODERS:
        length, batch = args.length // 4, args.batch * 4
        values |= {**CRAMMED, "max_position_embeddings": length}
        values |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        extra = {"beta2": 0.98, "epsilon": 1e-12}
    if section == "encoder":
        batch, warmup = args.batch, args.warmup * 2
        values |= {"positions": "rotary"}
    return TrainConfig(
        recipe=f"fff-study-{section}",
        model=ModelConfig.from_dict(values),
        sequence_length=length,
        batch_size=batch,
        micro_batch_size=batch,
        schedule="cosine",
        warmup_steps=warmup,
        learning_rate=RATES[section],
        deterministic=False,
        **extra,
    )


def tokens_of(section: str, args: argparse.Namespace) -> int:
    """Tokens of a run."""
    own = {"encoder": args.encoder_tokens, "ternary": args.ternary_tokens}
    return int(own.get(section, args.tokens))


def study_cell(
    section: str, name: str, seeds: tuple[int, ...], args: argparse.Namespace, **values: Any
) -> Cell:
    """One cell. values: tokens, rate and stage where they are not the study's own."""
    base = base_config(section, args)
    model, whole, ending = base.model, name, exchange_of(name)
    name = name.removesuffix(f"-{ending}") if ending else name
    if name.startswith("fff") and section in ENCODERS:
        model = _with_bias(model, name)
    tokens = values.pop("tokens", tokens_of(section, args))
    steps = max(tokens // base.tokens_per_step, 1)
    rate = values.pop("rate", base.learning_rate)
    base = dataclasses.replace(
        base, steps=steps, learning_rate=rate, warmup_steps=min(base.warmup_steps, steps // 8 + 1)
    )
    variant = make_variant(model, name)
    words = "pieces" if section in ENCODERS else "bytes"
    cell = make_cell(
        base,
        variant,
        **{
            "section": section,
            "seeds": seeds,
            "train": (str(args.work / f"train-{words}"),),
            "valid": {n: str(args.work / f"valid-{words}-{n}") for n in ("wikipedia", "novels")},
            "rows": str((args.out / "fff-study-rows.jsonl").resolve()),
            "eval_tokens": min(int(args.eval_tokens), EVAL_LIMIT.get(section, 1 << 40)),
            "eval_points": args.points,
            "compile": args.compile,
            "implementation": args.implementation,
            # Of a dense model only the head's loss has a kernel of ours: torch.compile makes one.
            "ops": "" if section == "union" else "naive",
            "commit": args.commit,
            **values,
        },
    )
    if not ending:
        return cell
    return dataclasses.replace(cell, variant=whole, label=f"{cell.label}, {EXCHANGED[ending]}")


def exchange_of(name: str) -> str:
    """The ending of a variant whose layers only the study has; "" for others."""
    ending = name.rpartition("-")[2]
    return ending if ending in EXCHANGED else ""


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
    """All cells, what matters most first, so that a run that is cut keeps the main question.

    With --cells those alone, in their order; with --parts the cells of these parts of AGAIN.
    """
    keep = str((args.work / "models").resolve())

    def cell(section: str, name: str, seeds: tuple[int, ...]) -> Cell:
        kept = keep if section == "encoder" and name in FINE_TUNED else ""
        return study_cell(section, name, seeds, args, keep=kept)

    if named := [*(args.cells or []), *(text for part in args.parts for text in AGAIN[part])]:
        return [cell(*named_cell(text)) for text in named]

    def round_of(names: dict[str, list[str]], seeds: tuple[int, ...]) -> list[Cell]:
        return _in_turn([[cell(s, name, seeds) for name in names[s]] for s in args.sections])

    cells = round_of(FIRST, tuple(range(1, 1 + args.seeds)))
    if args.probe_first:
        cells += rate_cells(args)
    if not args.first_only:
        cells += round_of(MORE, (1,))
    if not args.probe_first:
        cells += rate_cells(args)
    for number in range(args.more_seeds):
        cells += round_of(FIRST, (1 + args.seeds + number,))
    return cells


def named_cell(text: str) -> tuple[str, str, tuple[int, ...]]:
    """Section, variant and seeds of SECTION:VARIANT:SEED,SEED. ValueError for another form."""
    parts = text.split(":")
    if len(parts) != 3 or parts[0] not in RATES or not parts[2].replace(",", "").isdigit():
        raise ValueError(f"cell {text!r} is not known: use SECTION:VARIANT:SEED,SEED")
    return parts[0], parts[1], tuple(map(int, parts[2].split(",")))


def rate_cells(args: argparse.Namespace) -> list[Cell]:
    """Short runs at other rates, one seed."""
    extra = {"tokens": int(args.rate_tokens), "stage": "rate", "eval_points": 0}
    return [
        study_cell(section, name, (1,), args, rate=RATES[section] * factor, **extra)
        for section in args.probes
        for factor in CHECKED[section][1]
        for name in CHECKED[section][0]
    ]


def _in_turn(lists: list[list[Cell]]) -> list[Cell]:
    """The first of each, then the second of each, and so on."""
    return [cell for row in itertools.zip_longest(*lists) for cell in row if cell is not None]
