"""How much of a teacher's lead does a ternary model keep? Bits, and texts that are counted.

    python -m studies.recipes.ternarise --teacher DIR --control DIR --model NAME=DIR
        --held-out FILE --trained-on FILE [FILE ...] --out scores.json

teacher and control (a ternary model trained from the beginning on as many tokens) are the ends of
the scale: a model keeps (control - model) / (control - teacher) of the lead, in bits per byte.
Each model continues the same openings of held-out documents by the same seed, and what it writes is
counted (`benchmarks/judge_counts.py`), beside the same of what people wrote there.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.judge_counts import counts
from nomatmul.evaluate import score_text
from nomatmul.evaluate.torch_scorer import TorchScorer
from nomatmul.formats.runs import find_checkpoint

OPENING, LENGTH, TEXTS = 12, 100, 40  # words that are given, tokens that follow, documents
BORDER = "<|endoftext|>"


def read(path: Path) -> str:
    data = path.read_bytes()
    return (bz2.decompress(data) if path.suffix == ".bz2" else data).decode("utf-8")


@torch.inference_mode()
def continuations(scorer: TorchScorer, openings: list[str], seed: int) -> list[str]:
    """What the model writes behind each opening, without it."""
    found = []
    for number, opening in enumerate(openings):
        torch.manual_seed(seed + number)
        ids = torch.tensor([scorer.tokenizer.encode(opening).ids], device=scorer.model.device)
        made = scorer.model.generate(
            ids, max_new_tokens=LENGTH, do_sample=True, temperature=0.8, top_k=0, top_p=0.95,
            pad_token_id=0,
        )  # fmt: skip
        found.append(scorer.tokenizer.decode(made[0, ids.shape[1] :].tolist()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--control", type=Path, help="without one no lead is computed")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--trained-on", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--window", type=int, help="tokens at once (default: what each model reads)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    held_out = read(args.held_out)
    known = [part for path in args.trained_on for part in read(path).split(BORDER)]
    documents = [part.strip() for part in held_out.split(BORDER)]
    documents = [part for part in documents if len(part.split()) > 2 * OPENING][:TEXTS]
    openings = [" ".join(part.split()[:OPENING]) for part in documents]
    people = [" ".join(part.split()[OPENING : OPENING + LENGTH]) for part in documents]
    rows: dict[str, Any] = {"people": counts(people, known)}
    models = {"teacher": args.teacher} | ({"control": args.control} if args.control else {})
    models |= {name: Path(place) for name, _, place in (text.partition("=") for text in args.model)}
    for name, place in models.items():
        scorer = TorchScorer.from_directory(find_checkpoint(place))
        if args.window:  # trained on less than their limit, models say little of what lies beyond
            scorer.config = dataclasses.replace(scorer.config, max_position_embeddings=args.window)
        bits = score_text(scorer, held_out.replace(BORDER, "\n")).bits_per_byte
        made = continuations(scorer, openings, args.seed)
        rows[name] = {"bits_per_byte": bits, **counts(made, known), "texts": made[:5]}
    for name in models:
        if args.control:
            low, high = (rows[end]["bits_per_byte"] for end in ("teacher", "control"))
            rows[name]["lead_kept"] = (high - rows[name]["bits_per_byte"]) / (high - low)
        print(name, {key: value for key, value in rows[name].items() if key != "texts"})
    print("people", rows["people"])
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
