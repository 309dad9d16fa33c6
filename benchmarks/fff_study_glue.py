"""Fine-tune the study's encoders on SST-2 and CoLA: one process a model, all tasks and seeds.

The work is `nomatmul finetune`'s (its batches, recorded steps, schedule and scores), with fewer
epochs and a higher rate than the published ones, because the encoders are small and briefly
trained: no search, the same for all. Trees are computed in the masked form, as in the study.
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_common import ROOT

from nomatmul.evaluate.rows import append_row, read_rows

# task of nomatmul.finetune -> (name in tables, epochs, metric)
TASKS = {"sst2": ("SST-2", 1, "accuracy"), "cola": ("CoLA", 5, "matthews")}
LENGTH, BATCH, RATE = 64, 64, 1e-4


def fine_tune(args: argparse.Namespace) -> None:
    """All kept models, args.jobs at a time on each GPU, pre-training seed 1 first."""
    root = args.work / "models"
    names = args.glue_models.split(",")
    wanted = [root / f"encoder-{name}-{seed}" for seed in (1, 2) for name in names]
    waiting = [path for path in wanted if path.is_dir()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    deadline = args.began + args.seconds
    print(f"fine-tuning: {', '.join(path.name for path in waiting) or 'no model'}", flush=True)
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


def unpack(source: Path, target: Path) -> None:
    """The tasks' files, plain or as FILE.bz2, as plain files in `target`."""
    for folder, _, _ in TASKS.values():
        for part in ("train.tsv", "dev.tsv"):
            plain, packed = source / folder / part, source / folder / f"{part}.bz2"
            data = plain.read_bytes() if plain.exists() else bz2.decompress(packed.read_bytes())
            (target / folder).mkdir(parents=True, exist_ok=True)
            (target / folder / part).write_bytes(data)


def _start(args: argparse.Namespace, model: Path, device: str, log: Any) -> subprocess.Popen[bytes]:
    job = {
        "model": str(model), "data": str(args.work / "glue"),
        "rows": str(args.out / "fff-study-glue.jsonl"),
        "seeds": args.glue_seeds, "deadline": args.began + args.seconds, "commit": args.commit,
        "device": "cpu" if device == "cpu" else "cuda", "limit": 64 if args.tiny else 0,
    }  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")]),
        "CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:").replace("cpu", ""),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, str(Path(__file__)), json.dumps(job)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


class Tuner:
    """One pre-trained model, and both tasks' rows on its device."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from nomatmul.finetune.data import encode
        from nomatmul.finetune.sources import load_rows
        from nomatmul.finetune.tasks import TASKS as KNOWN
        from nomatmul.train.tokenizer import load_tokenizer

        self.job, self.device = job, torch.device(job["device"])
        self.tasks = {name: KNOWN[name] for name in TASKS}
        tokenizer = load_tokenizer(Path(job["model"]))
        self.data = {}
        for name, task in self.tasks.items():
            rows, _ = load_rows(task, job["data"], None)
            if job["limit"]:
                rows = {k: part.part(list(range(job["limit"]))) for k, part in rows.items()}
            self.data[name] = {
                k: encode(part, tokenizer, self._length(), False, self.device)
                for k, part in rows.items()
            }

    def _length(self) -> int:
        config = json.loads((Path(self.job["model"]) / "config.json").read_text("utf-8"))
        return min(LENGTH, int(config["max_position_embeddings"]))

    def run(self, name: str, seed: int) -> tuple[dict[str, float], float]:
        """Scores on the development set after the last epoch, and seconds."""
        import torch

        from nomatmul.evaluate.compare_cell import choose_implementation
        from nomatmul.finetune.loop import Settings, train_seed
        from nomatmul.models.classifiers import EncoderForSequenceClassification

        torch.manual_seed(seed)
        kind = EncoderForSequenceClassification
        model: Any = kind.from_pretrained(self.job["model"], num_labels=2).to(self.device)
        choose_implementation(model, "masked")
        settings = Settings(
            learning_rate=RATE, batch_size=BATCH, epochs=TASKS[name][1], weight_decay=0.01,
            bfloat16=self.device.type == "cuda",
        )  # fmt: skip
        data = self.data[name]
        held = {k: part for k, part in data.items() if k != "train"}
        result = train_seed(model, self.tasks[name], data["train"], held, settings, seed)
        return next(iter(result.scores.values())), result.seconds


def run(job: dict[str, Any]) -> None:
    """Both tasks, all seeds, of one model; a row each."""
    model = Path(job["model"])
    variant, pretrained = model.name.removeprefix("encoder-").rsplit("-", 1)
    tuner = Tuner(job)
    have = {
        (r["variant"], r["pretrained"], r["task"], r["seed"])
        for r in read_rows(Path(job["rows"]))
        if r.get("of") == "encoder"
    }
    for seed in range(1, 1 + job["seeds"]):
        for name, (task, epochs, metric) in TASKS.items():
            late = time.time() > job["deadline"] - 8
            if late or (variant, int(pretrained), task, seed) in have:
                continue
            scores, seconds = tuner.run(name, seed)
            row = {
                "section": "glue", "of": "encoder", "variant": variant,
                "pretrained": int(pretrained), "task": task, "seed": seed,
                "metric": metric, "score": scores[metric], **scores,
                "epochs": epochs, "learning_rate": RATE, "batch": BATCH,
                "seconds": round(seconds, 1), "commit": job["commit"],
            }  # fmt: skip
            append_row(Path(job["rows"]), row)
            print(f"[glue {model.name}] {task} seed {seed}: {scores}", flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
