"""The encoder of the box on a GPU: tokens, training beside its dense twin, packing, scores, SST-2.

    python studies/recipes/encoder.py prepare --documents runs/recipes/all-clean \\
        --tokenizer src/nomatmul/box-encoder/tokenizer.json --work runs/encoder
    python studies/recipes/encoder.py train --work runs/encoder --out $OUT --seconds 560
    python studies/recipes/encoder.py score --work runs/encoder --out $OUT --glue TEXTS/glue
    python studies/recipes/encoder.py packed --work runs/encoder --out FOLDER
    python studies/recipes/encoder.py --tiny

`prepare` makes token shards of folders of JSONL documents (files with "-valid" in their names are
held out; each name is taken once), and on a GPU takes some steps of each variant, so that what
cannot be compiled is known and what can is in the cache. `train` runs the recipes of --variants
side by side, packs both and measures masked accuracy; it ends --seconds after its start. `score`
fine-tunes each on --tasks with several seeds, at a rate that held-out training rows have chosen;
the same command goes on where one was cut. `packed` scores what came back, where there is the
native core. OUT gets archives: encoder-VARIANT and encoder-VARIANT-TASK (packed),
encoder-VARIANT-bf16 (what training leaves, halved); and scores: encoder.json, encoder-TASK.json,
encoder-packed.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks import dry_run
from benchmarks.documents import write_documents
from benchmarks.gpu_common import environment, git_commit
from nomatmul.evaluate.rows import read_rows
from nomatmul.formats.cpus import usable_cpus
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.runs import find_checkpoint
from studies.recipes.encoder_jobs import start, tails, wait
from studies.recipes.encoder_scores import TEXTS, packed_scores, trained_scores
from studies.recipes.encoder_tasks import packed_accuracy, task_scores
from studies.recipes.run import half, write_archive

RECIPES = {"trees": "best_encoder_8_minutes", "dense": "bert_8_minutes"}
FORMS = ["--rows", "int8", "--dense", "int8", "--embedding", "int8", "--no-check"]
AFTER = 90.0  # seconds of `train` behind the training loop: evaluation, export, packing, scores
TOY = ["model.num_layers=2", "model.hidden_size=64", "model.num_heads=2", "batch_size=8",
       "micro_batch_size=8", "steps=4", "eval_tokens=2000",
       "model.vocab_size=400"]  # fmt: skip


def prepare(args: argparse.Namespace) -> None:
    """WORK/train and WORK/valid-TEXT: tokens of the documents."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import build_shards, read_index
    from nomatmul.train.tokenizer import load_tokenizer

    files = {file.name: file for folder in args.documents for file in folder.glob("*.jsonl")}
    train = sorted(name for name in files if "-valid" not in name)
    missing = [text for text in TEXTS if f"{text}-valid.jsonl" not in files]
    if missing or not train:
        names = ", ".join(map(str, args.documents))
        raise SystemExit(f"{names}: no {missing[0]}-valid.jsonl" if missing else f"{names}: empty")
    tokenizer, began = load_tokenizer(args.tokenizer), time.monotonic()
    sources = find_sources([str(files[name]) for name in train])
    build_shards(sources, tokenizer, args.work / "train", workers=usable_cpus())
    for text in TEXTS:
        held = find_sources([str(files[f"{text}-valid.jsonl"])])
        build_shards(held, tokenizer, args.work / f"valid-{text}", workers=1)
    count = read_index(args.work / "train")["tokens"]
    print(f"{len(train)} files, {count:,} tokens, {time.monotonic() - began:.0f} s", flush=True)
    if args.device != "cpu":
        for name in args.variants:
            write_json(args.work / f"compile-{name}.json", {"compile": compiles(args, name)})
        print(f"compiled: {time.monotonic() - began:.0f} s", flush=True)


def compiles(args: argparse.Namespace, name: str) -> str:
    """The first way to run the training step that works."""
    for mode in ("on", "graph"):
        out = args.work / f"warm-{name}-{mode}"
        steps = [f"compile={mode}", "eval_interval=0", "steps=30"]
        try:
            job = training(args, name, 0, [*steps], out)
            wait({name: job}, args.began + args.seconds)
        except SystemExit as error:
            print(f"compile={mode}: {error}", flush=True)
            continue
        speeds = [row.get("tokens_per_second") for row in read_rows(out / "metrics.jsonl")]
        print(f"{name}: compile={mode}, tokens/s {[s and round(s) for s in speeds]}", flush=True)
        return mode
    return "off"


def train(args: argparse.Namespace) -> None:
    """The variants side by side; then each is packed and scored. OUT/encoder.json."""
    limit = args.seconds - AFTER - (time.time() - args.began)
    jobs = {}
    for name in args.variants:
        known = args.work / f"compile-{name}.json"
        mode = json.loads(known.read_text())["compile"] if known.exists() else "auto"
        out = args.work / name
        jobs[name] = training(args, name, 0 if args.tiny else limit, [f"compile={mode}"], out)
    wait(jobs, args.began + args.seconds - 10)
    found: dict[str, Any] = {"machine": environment(args.commit), "models": {}}
    for name in jobs:  # one after the other: transformers loads no two models at a time
        found["models"][name] = finish(args, name)
        write_json(args.out / "encoder.json", found)
    show(found["models"])


def training(
    args: argparse.Namespace, name: str, limit: float, settings: list[str], out: Path
) -> subprocess.Popen[bytes]:
    words = ["train", RECIPES[name], "--data", args.work / "train", "--valid",
             args.work / "valid-wikipedia", "--out", out, "--device", args.device,
             "--quiet", "--time-limit", f"{limit:.0f}"]  # fmt: skip
    settings = [*settings, *args.set, *(TOY if args.tiny else [])]
    words += [word for setting in settings for word in ("--set", setting)]
    # as in studies/fff: of a dense model only the head's loss has a kernel, torch.compile makes one
    return start(args, f"train-{name}", words, {"NOMATMUL_OPS": "naive"})


def finish(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What one variant's run left: speed, scores of both forms, files."""
    rows = read_rows(args.work / name / "metrics.jsonl")
    held = [row for row in rows if "valid_loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in rows if row.get("tokens_per_second"))
    packed = packed_model(args, args.work / name, f"encoder-{name}")
    halved = half(find_checkpoint(args.work / name))
    tokenizer = (packed / "tokenizer.json").read_bytes()
    write_file(halved / "tokenizer.json", tokenizer)
    write_archive(args.out / f"encoder-{name}-bf16.tar.gz", halved, f"encoder-{name}-bf16")
    last = max((row["step"] for row in rows), default=0)
    run = json.loads((args.work / name / "run.json").read_text())
    sizes = {file.name: file.stat().st_size for file in sorted(packed.iterdir())}
    return {
        "recipe": RECIPES[name],
        "bytes": {"all": sum(sizes.values()), **sizes},
        "steps": last,
        "tokens": last * run["config"]["batch_size"] * run["config"]["sequence_length"],
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "held_out": [{k: row[k] for k in ("step", "valid_loss", "valid_accuracy")} for row in held],
        "trained": trained_scores(args, name),
    }


def packed_model(args: argparse.Namespace, source: Path, name: str) -> Path:
    """WORK/packed/NAME from a run or model, and OUT/NAME.tar.gz of it."""
    target = args.work / "packed" / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        wait({name: start(args, f"pack-{name}", ["pack", source, target, *FORMS], {})}, 0)
    write_archive(args.out / f"{name}.tar.gz", target, name)
    return target


def packed(args: argparse.Namespace) -> None:
    """Scores of the archives in OUT by this machine's core; OUT/encoder-packed.json."""
    found: dict[str, Any] = {name: {} for name in args.variants}
    for name in args.variants:
        if place := unpacked(args, f"encoder-{name}"):
            found[name] |= packed_scores(args, place)
        for task in args.tasks:
            if place := unpacked(args, f"encoder-{name}-{task}"):
                found[name][task] = packed_accuracy(place, args.glue, task)
    write_json(args.out / "encoder-packed.json", found)
    show(found)


def unpacked(args: argparse.Namespace, name: str) -> Path | None:
    """The model of the archive OUT/NAME.tar.gz, where there is one."""
    file = args.out / f"{name}.tar.gz"
    if not file.exists():
        return None
    with tarfile.open(file) as archive:
        archive.extractall(args.work / "unpacked", filter="data")
    return args.work / "unpacked" / name


def score(args: argparse.Namespace) -> None:
    """Fine-tunings of each variant on --tasks; OUT/encoder-TASK.json, the best seed's, packed."""
    for task in args.tasks:
        found = {"machine": environment(args.commit), **task_scores(args, task)}
        for name in args.variants:
            if model := found.get(name, {}).get("model"):
                packed_model(args, Path(model), f"encoder-{name}-{task}")
        for row in (*found["search"], *(found.get(name, {}) for name in args.variants)):
            row.pop("model", None)  # a path of this machine
        write_json(args.out / f"encoder-{task}.json", found)
        show({name: found[name] for name in args.variants if name in found})


def write_json(file: Path, values: dict[str, Any]) -> None:
    write_file(file, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def show(models: dict[str, Any]) -> None:
    """The last lines of the command, for a terminal that shows only the end."""
    for name, row in models.items():
        kept = {k: v for k, v in row.items() if k not in ("held_out", "fill_mask", "recipe")}
        print(f"{name}: {json.dumps(kept)}", flush=True)


def rehearse(args: argparse.Namespace) -> None:
    """The dry run: all steps with invented texts and toy sizes."""
    from nomatmul.train.documents import find_sources
    from nomatmul.train.tokenizer import train_word_piece

    texts, documents = args.out / "texts", args.work / "documents"
    documents.mkdir(parents=True)
    names = [f"{text}-{part}" for text in TEXTS for part in ("train", "valid")]
    dry_run.write_texts(texts, names)
    for name in names:
        write_documents((texts / f"{name}.txt.bz2", documents / f"{name}.jsonl"))
    args.documents, args.tokenizer = [documents], args.work / "wordpiece.json"
    train_word_piece(find_sources([str(documents / f"{TEXTS[0]}-train.jsonl")]), 400).save(
        str(args.tokenizer)
    )
    args.glue = args.work / "glue"
    dry_run.write_glue(args.glue)
    prepare(args)
    train(args)
    score(args)
    packed(args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"prepare": prepare, "train": train, "score": score, "packed": packed}
    parser.add_argument("step", choices=steps, nargs="?", help="not needed with --tiny: all")
    parser.add_argument("--documents", type=Path, nargs="+", default=[], help="folders of JSONL")
    parser.add_argument("--tokenizer", type=Path, help="of WordPieces: tokenizer.json or vocab.txt")
    parser.add_argument("--glue", type=Path, help="folder of GLUE's tasks")
    parser.add_argument("--tasks", nargs="+", default=["sst2"], help="of GLUE, one text a row")
    parser.add_argument("--work", type=Path, help="tokens, runs (default: runs/encoder)")
    parser.add_argument("--out", type=Path, help="models, scores (default: runs/encoder-out)")
    parser.add_argument("--variants", default=",".join(RECIPES), help="trees,dense")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of training")
    parser.add_argument("--seconds", type=float, default=560, help="of the command")
    parser.add_argument("--windows", type=int, default=400, help="of each held-out text, scored")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 4e-4, 1e-4])
    parser.add_argument("--search-rows", type=int, default=16000, help="to choose the rate")
    parser.add_argument("--search-epochs", type=int, default=1, help="to choose the rate")
    parser.add_argument("--seeds", type=int, default=2, help="of fine-tuning, at each rate")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--precision", default="auto", help="of fine-tuning on all rows")
    parser.add_argument("--jobs", type=int, default=6, help="fine-tunings at a time")
    parser.add_argument("--least", type=float, default=40, help="seconds that one surely takes")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    dry_run.add_tiny(parser)
    args = parser.parse_args(argv)
    args.began = time.time()
    if args.tiny:
        args.out = args.out or dry_run.temporary()
        args.work = args.work or args.out / "work"
        dry_run.shrink(
            args, parser, device="cpu", windows=2, rates=[1e-3], seeds=1, epochs=1, jobs=1,
            least=0, variants="trees",
        )  # fmt: skip
    args.variants = args.variants.split(",")
    if unknown := set(args.variants) - set(RECIPES):
        parser.error(f"unknown variant {unknown.pop()!r}: choose of {', '.join(RECIPES)}")
    args.commit = args.commit or git_commit()
    if args.step is None and not args.tiny:
        parser.error(f"a step is needed: {', '.join(steps)}")
    args.work, args.out = args.work or Path("runs/encoder"), args.out or Path("runs/encoder-out")
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        rehearse(args) if args.tiny else steps[args.step](args)
    except SystemExit:
        print("\n".join(tails(args)), flush=True)
        raise


if __name__ == "__main__":
    main()
