"""Fine-tune the study's encoders on SST-2 and CoLA: one process a model, task and seed.

The work is `nomatmul finetune`'s (its batches, recorded steps, schedule and scores), with fewer
epochs and a higher rate than the published ones, because the encoders are small and briefly
trained: no search, the same for all. Trees are computed in the masked form, as in the study.

    python studies/fff/glue.py --model runs/fff/models/encoder-dense-1 --data DIR \\
        --task cola --seed 1 --out runs/out       # one run; its row goes to fff-study-glue.jsonl

run.py starts one such process after the other (`fine_tune`). A model's folder is named
encoder-VARIANT-SEED, as the study keeps it; DIR has GLUE's own folders (CoLA, SST-2).
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.dry_run import add_tiny, temporary, write_glue
from benchmarks.gpu_common import git_commit, python_path
from benchmarks.with_parent import with_parent
from nomatmul.evaluate.rows import append_row, read_rows

# task of nomatmul.finetune -> (name in tables, epochs, metric)
TASKS = {"sst2": ("SST-2", 1, "accuracy"), "cola": ("CoLA", 5, "matthews")}
ORDER = ("cola", "sst2")  # of each seed's runs: the shorter task first
LENGTH, BATCH, RATE = 64, 64, 1e-4


def fine_tune(args: argparse.Namespace) -> None:
    """What has no row yet of all kept models, args.jobs runs at a time on each GPU, by seeds."""
    names = args.glue_models.split(",")
    found = {path.name: path for path in (args.work / "models").glob("encoder-*")}
    kept = [f"encoder-{name}-{seed}" for seed in range(1, 10) for name in names]
    have = _done(args.out / "fff-study-glue.jsonl")
    waiting = [
        (found[name], task, seed)
        for seed in range(1, 1 + args.glue_seeds)
        for task in ORDER
        for name in kept
        if name in found and (*_parts(name), TASKS[task][0], seed) not in have
    ]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    deadline = args.began + args.seconds
    print(f"fine-tuning: {len(waiting)} runs of {len(found)} models", flush=True)
    unpack(args.data / "glue", args.work / "glue")
    with open(args.out / "fff-study.log", "ab") as log:
        while waiting or running:
            running = [(device, p) for device, p in running if p.poll() is None]
            for device in args.devices:
                busy = sum(d == device for d, _ in running)
                while waiting and busy < args.jobs and time.time() < deadline - 20:
                    running.append((device, _start(args, waiting.pop(0), device, log)))
                    busy += 1
            if time.time() > deadline:
                for _, process in running:
                    process.kill()
                    process.wait()
            if not running:
                return
            time.sleep(0.2)


def _parts(name: str) -> tuple[str, int]:
    """Variant and seed of pre-training, of a kept model's name."""
    variant, seed = name.removeprefix("encoder-").rsplit("-", 1)
    return variant, int(seed)


def name_of(variant: str) -> str:
    """The short name of a command line as it stands in the tables."""
    if found := re.fullmatch(r"(fff|gated)-(\d+x\d+)(.*)", variant):
        rest = found[3].replace("-balanced", ", balanced").replace("-master", " + ")
        return f"{'FFF' if found[1] == 'fff' else 'gated FFF'} {found[2]}{rest}"
    return variant.replace("-", " ")


def _done(file: Path) -> set[tuple[str, int, str, int]]:
    """(variant, pre-training seed, task, seed) of the rows in `file`."""
    return {
        (r["variant"], r["pretrained"], r["task"], r["seed"])
        for r in read_rows(file)
        if r.get("of") == "encoder"
    }


def unpack(source: Path, target: Path) -> None:
    """The tasks' files, plain or as FILE.bz2, as plain files in `target`."""
    for folder, _, _ in TASKS.values():
        for part in ("train.tsv", "dev.tsv"):
            plain, packed = source / folder / part, source / folder / f"{part}.bz2"
            data = plain.read_bytes() if plain.exists() else bz2.decompress(packed.read_bytes())
            (target / folder).mkdir(parents=True, exist_ok=True)
            (target / folder / part).write_bytes(data)


def _start(
    args: argparse.Namespace, run: tuple[Path, str, int], device: str, log: Any
) -> subprocess.Popen[bytes]:
    model, task, seed = run
    options = {
        "model": model, "data": args.work / "glue", "out": args.out, "task": task, "seed": seed,
        "commit": args.commit, "device": "cpu" if device == "cpu" else "cuda",
        "limit": 64 if args.tiny else 0,
    }  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:").replace("cpu", ""),
        "OMP_NUM_THREADS": "2",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), *words],
        env=environment, stdout=log, stderr=log, preexec_fn=with_parent(),
    )  # fmt: skip


def _tune(args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Scores on the development set after the last epoch, and seconds."""
    import torch

    from nomatmul.finetune.data import encode
    from nomatmul.finetune.loop import Settings, train_seed
    from nomatmul.finetune.sources import load_rows
    from nomatmul.finetune.tasks import TASKS as KNOWN
    from nomatmul.models.classifiers import EncoderForSequenceClassification
    from nomatmul.train.fff_training import choose_implementation
    from nomatmul.train.plan import plan_device
    from nomatmul.train.tokenizer import load_tokenizer

    device, task = torch.device(args.device), KNOWN[args.task]
    config = json.loads((args.model / "config.json").read_text("utf-8"))
    length = min(LENGTH, int(config["max_position_embeddings"]))
    tokenizer = load_tokenizer(args.model)
    rows, _ = load_rows(task, str(args.data), None)
    if args.limit:
        rows = {k: part.part(list(range(min(args.limit, len(part))))) for k, part in rows.items()}
    data = {k: encode(part, tokenizer, length, False, device) for k, part in rows.items()}
    torch.manual_seed(args.seed)
    kind = EncoderForSequenceClassification
    model: Any = kind.from_pretrained(str(args.model), num_labels=2).to(device)
    choose_implementation(model, "masked")
    settings = Settings(
        learning_rate=RATE, batch_size=BATCH, epochs=TASKS[args.task][1], weight_decay=0.01
    )
    held = {k: part for k, part in data.items() if k != "train"}
    result = train_seed(model, task, data["train"], held, settings, args.seed, plan_device(device))
    return next(iter(result.scores.values())), result.seconds


def run(args: argparse.Namespace) -> None:
    """One task with one seed of one model; a row."""
    name = args.model.name
    variant, pretrained = _parts(name)
    task, epochs, metric = TASKS[args.task]
    scores, seconds = _tune(args)
    row = {
        "section": "glue", "of": "encoder", "variant": variant, "label": name_of(variant),
        "pretrained": pretrained, "task": task, "seed": args.seed,
        "metric": metric, "score": scores[metric], **scores,
        "epochs": epochs, "learning_rate": RATE, "batch": BATCH,
        "seconds": round(seconds, 1), "commit": args.commit,
    }  # fmt: skip
    append_row(args.out / "fff-study-glue.jsonl", row)
    print(f"[glue {name}] {task} seed {args.seed}: {scores}", flush=True)


def toy_model(folder: Path) -> Path:
    """A small encoder with random weights, kept as the study keeps one."""
    from nomatmul.formats.config import ModelConfig
    from nomatmul.models import EncoderConfig, MaskedLM
    from nomatmul.train.tokenizer import word_piece

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    names += [f"##{name}" for name in names[5:]]
    config = ModelConfig(
        vocab_size=len(names), hidden_size=32, num_layers=1, intermediate_size=64, num_heads=2,
        max_position_embeddings=32, token_mixer="attention", linear="dense", channel_mixer="ffn",
        causal=False, norm="layer", positions="rotary", embedding_norm=True, tie_embeddings=True,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    path = folder / "encoder-dense-1"
    MaskedLM(EncoderConfig.from_model_config(config)).save_pretrained(path)
    word_piece({name: place for place, name in enumerate(names)}).save(str(path / "tokenizer.json"))
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder encoder-VARIANT-SEED")
    parser.add_argument("--data", type=Path, help="folder of CoLA and SST-2")
    parser.add_argument("--out", type=Path, help="folder of fff-study-glue.jsonl")
    parser.add_argument("--task", choices=ORDER, default=ORDER[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, default=0, help="rows of each part; 0: all")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    add_tiny(parser)
    args = parser.parse_args(argv)
    args.commit = args.commit or git_commit()
    if args.tiny:
        args.device, args.out = "cpu", args.out or temporary()
        args.model = args.model or toy_model(args.out)
        if args.data is None:
            args.data = args.out / "glue"
            write_glue(args.data)
    if None in (args.model, args.data, args.out):
        parser.error("--model, --data and --out are needed")
    run(args)


if __name__ == "__main__":
    main()
