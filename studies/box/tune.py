"""Tune the base of the box on conversations: several rates and lengths, each packed.

    python studies/box/tune.py --base MODEL --chat runs/box --work runs/tune --out $OUT

MODEL is the base (a run or a model directory), --chat the folder with chat-train.jsonl.bz2,
chat-valid.jsonl.bz2 and, where the base has none of its own, tokenizer.json (`texts.py`). A cell is
`nomatmul train` with `--start MODEL`: one rate, one or two epochs. WORK keeps runs; OUT gets
NAME.tar.gz (packed, 1.6 bits a weight, int8 embedding) of each cell, and tune.json. A cell that
WORK/tune.json has is not run again; none is begun behind --seconds. Nothing is read from outside,
and no native core is needed: benchmarks/judge.py counts where there is one.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.dry_run import add_tiny, shrink, temporary, write_conversations
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.runs import find_checkpoint
from nomatmul.train import TrainConfig, recipe
from nomatmul.train.metrics import read_metrics
from nomatmul.train.shards import build_shards, read_index
from studies.recipes.run import write_archive

LENGTH, ROWS = 1024, 16  # tokens of a sequence, sequences of a step


@dataclasses.dataclass(frozen=True)
class Cell:
    rate: float
    epochs: int

    @property
    def name(self) -> str:
        return f"talk-{self.rate:g}-{self.epochs}"


def base_config(args: argparse.Namespace) -> Any:
    """The base's dials; positions for a sequence at least."""
    config = open_checkpoint(find_checkpoint(args.base)).config
    positions = max(config.max_position_embeddings, args.length)
    return dataclasses.replace(config, max_position_embeddings=positions)


def train_config(args: argparse.Namespace, cell: Cell, tokens: int) -> TrainConfig:
    """The cell: a rate that warms up shortly and falls in a line to zero."""
    steps = max(cell.epochs * tokens // (args.length * args.rows), 1)
    return dataclasses.replace(
        recipe("box"),
        model=base_config(args),
        sequence_length=args.length,
        batch_size=args.rows,
        micro_batch_size=args.rows,
        steps=steps,
        learning_rate=cell.rate,
        warmup_steps=min(30, steps // 10 + 1),
        schedule="linear",
        final_rate=0.0,
        weight_decay=0.1,
        full_precision=0.0,
        eval_interval=max(steps // 2, 1),
        eval_tokens=args.eval_tokens,
        sample_interval=0,
        diagnostics_interval=0,
        checkpoint_interval=0,
        checkpoint_seconds=0.0,
        log_interval=max(steps // 20, 1),
    )


def tokens_of(args: argparse.Namespace) -> dict[str, str]:
    """Token directories of both parts, made once for all cells."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.tokenizer import load_tokenizer

    found = find_checkpoint(args.base) / "tokenizer.json"
    tokenizer = load_tokenizer(found if found.is_file() else args.chat / "tokenizer.json")
    made = {}
    for part in ("train", "valid"):
        sources = find_sources([str(args.chat / f"chat-{part}.jsonl.bz2")])
        made[part] = str(build_shards(sources, tokenizer, args.work / f"tokens-{part}", workers=4))
    return made


def train(config: TrainConfig, tokens: dict[str, str], base: str, out: str, device: str) -> None:
    """In a process of its own: what it held on the GPU goes with it."""
    from nomatmul.train import run

    tokenizer = str(Path(tokens["train"]) / "tokenizer.json")
    run(config, [tokens["train"]], out, valid=[tokens["valid"]], start=base, tokenizer=tokenizer,
        device=device, quiet=True)  # fmt: skip


def work(args: argparse.Namespace, cell: Cell, tokens: dict[str, str]) -> dict[str, Any]:
    """Train and pack one cell; its row."""
    from nomatmul.convert.packing import pack

    out = args.work / cell.name
    config = train_config(args, cell, read_index(tokens["train"])["tokens"])
    began = time.monotonic()
    given = (config, tokens, str(args.base), str(out), args.device)
    child = multiprocessing.get_context("spawn").Process(target=train, args=given)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{cell.name} ended with exit status {child.exitcode}")
    seconds = time.monotonic() - began
    packed = args.work / f"{cell.name}-packed"
    result = pack(out, packed, packing="1.6bit", embedding="int8", head="auto", check=False)
    write_archive(args.out / f"{cell.name}.tar.gz", packed, cell.name)
    held = [row for row in read_metrics(out) if "valid_loss" in row]
    return {
        "cell": cell.name,
        **dataclasses.asdict(cell),
        "steps": config.steps,
        "tokens_seen": config.steps * config.tokens_per_step,
        "conversations": read_index(tokens["train"])["conversations"],
        "seconds": seconds,
        "valid_bits_per_byte": held[-1]["valid_bits_per_byte"],
        "packed_bytes": result.packed_bytes,
    }


def tune(args: argparse.Namespace) -> None:
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = tokens_of(args)
    count = read_index(tokens["train"])["tokens"]
    print(f"{count:,} tokens an epoch, {time.monotonic() - began:.0f} s", flush=True)
    file, rows = args.out / "tune.json", list[dict[str, Any]]()
    kept = args.work / "tune.json"
    if kept.exists():
        rows = json.loads(kept.read_text("utf-8"))
        write_file(file, kept.read_bytes())
    cells = [Cell(rate, epochs) for epochs in args.epochs for rate in args.rates]
    for cell in cells:
        if any(row["cell"] == cell.name for row in rows):
            continue
        if time.monotonic() - began > args.seconds:
            print(f"no time for {cell.name}", flush=True)
            break
        rows.append(work(args, cell, tokens))
        for target in (kept, file):
            write_file(target, (json.dumps(rows, indent=1) + "\n").encode("utf-8"))
        row = rows[-1]
        print(
            f"{cell.name}: {row['seconds']:.0f} s, {row['valid_bits_per_byte']:.4f} bits a byte as"
            f" trained, {row['packed_bytes']:,} bytes",
            flush=True,
        )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path)
    parser.add_argument("--chat", type=Path, default=Path("runs/box"))
    parser.add_argument("--work", type=Path, help="default: CHAT/tune")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-4])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=ROWS, help="sequences of a step")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=400, help="no cell is begun behind them")
    parser.add_argument("--eval-tokens", type=int, default=200_000)
    add_tiny(parser)
    args = parser.parse_args(words)
    if args.tiny:
        shrink(args, parser, rates=[1e-2], epochs=[1], rows=4, length=16, device="cpu",
               eval_tokens=200)  # fmt: skip
        if args.base is None:
            args.out = args.out or temporary()
            tiny_base(args)
    if args.base is None or args.out is None:
        parser.error("name --base and --out")
    args.work = args.work or args.chat / "tune"
    return args


def tiny_base(args: argparse.Namespace) -> None:
    """Invented conversations, and a base of one step."""
    from nomatmul.formats.config import ModelConfig
    from nomatmul.train import run

    args.chat = args.out / "chat"
    for part in ("train", "valid"):
        file = write_conversations(args.chat / f"chat-{part}.jsonl", 40)
        (args.chat / f"{file.name}.bz2").write_bytes(bz2.compress(file.read_bytes()))
    model = ModelConfig(vocab_size=300, hidden_size=32, num_layers=1, intermediate_size=32)
    config = dataclasses.replace(
        recipe("box"), model=model, steps=1, warmup_steps=0, full_precision=0.0,
        sequence_length=16, batch_size=4, micro_batch_size=4, sample_interval=0,
        diagnostics_interval=0, eval_tokens=100,
    )  # fmt: skip
    args.base = args.out / "base"
    data = [str(args.chat / "chat-train.jsonl")]
    run(config, data, str(args.base), device="cpu", quiet=True, workers=1)


def main(words: list[str] | None = None) -> None:
    tune(parse(words))


if __name__ == "__main__":
    main()
