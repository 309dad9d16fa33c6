"""Fine-tune the study's encoders on SST-2 and CoLA: one process a model, all tasks and seeds.

A step of these small models is a few hundred short kernels, so a step (forward, backward, clipping,
AdamW) is recorded once as a CUDA graph and replayed for both tasks and all seeds. Otherwise as
`nomatmul finetune` does it: fresh pooler and classifier, linear warm-up and decay, scores on the
development set (accuracy for SST-2, Matthews correlation for CoLA).

Shapes: N examples, B rows of a batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import ROOT, append_row, read_rows

from nomatmul.formats.textfiles import read_text

# task -> (epochs, metric, has a header line, column of the text, column of the label)
TASKS: dict[str, tuple[int, str, bool, int, int]] = {
    "SST-2": (1, "accuracy", True, 0, 1),
    "CoLA": (5, "matthews", False, 3, 1),
}
LENGTH, BATCH, RATE, WARMUP, DECAY, CLIP = 64, 32, 1e-4, 0.1, 0.01, 1.0


def fine_tune(args: argparse.Namespace) -> None:
    """All kept models, args.jobs at a time on each GPU, pre-training seed 1 first."""
    root = args.work / "models"
    names = args.glue_models.split(",")
    wanted = [root / f"mlm-{name}-{seed}" for seed in (1, 2) for name in names]
    waiting = [path for path in wanted if path.is_dir()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    deadline = args.began + args.seconds
    print(f"fine-tuning: {', '.join(path.name for path in waiting) or 'no model'}", flush=True)
    with open(args.out / "fff-study.log", "ab") as log:
        while waiting or running:
            running = [(device, p) for device, p in running if p.poll() is None]
            for device in args.devices:
                busy = sum(d == device for d, _ in running)
                while waiting and busy < args.jobs and time.time() < deadline - 25:
                    running.append((device, _start(args, waiting.pop(0), device, log)))
                    busy += 1
            if time.time() > deadline:
                for _, process in running:
                    process.kill()
                    process.wait()
                return
            if not running:
                return
            time.sleep(0.2)


def _start(args: argparse.Namespace, model: Path, device: str, log: Any) -> subprocess.Popen[bytes]:
    job = {
        "model": str(model), "data": str(args.data), "rows": str(args.out / "fff-study-glue.jsonl"),
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


def read_task(data: Path, task: str, part: str) -> tuple[list[str], list[int]]:
    """Sentences and labels of DATA/glue/TASK/PART.tsv[.bz2].

    Raises ValueError naming a row that does not fit.
    """
    _, _, header, text, label = TASKS[task]
    plain = data / "glue" / task / f"{part}.tsv"
    file = plain if plain.exists() else plain.with_name(plain.name + ".bz2")
    sentences, labels = [], []
    for number, line in enumerate(read_text(file, None).splitlines(), 1):
        if header and number == 1:
            continue
        cells = line.split("\t")
        if len(cells) <= max(text, label) or cells[label] not in ("0", "1"):
            raise ValueError(f"{file}, line {number}: no text and label 0 or 1 in {line!r}")
        sentences.append(cells[text].strip())
        labels.append(int(cells[label]))
    return sentences, labels


def encode(tokenizer: Any, sentences: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) int64 [N, length]: [CLS] sentence [SEP], cut and padded."""
    pad = tokenizer.token_to_id("[PAD]")
    ids_NT = np.full((len(sentences), length), pad, dtype=np.int64)
    mask_NT = np.zeros_like(ids_NT)
    end = tokenizer.token_to_id("[SEP]")
    for row, encoding in enumerate(tokenizer.encode_batch(sentences)):
        ids = encoding.ids[:length]
        ids[-1] = end
        ids_NT[row, : len(ids)] = ids
        mask_NT[row, : len(ids)] = 1
    return ids_NT, mask_NT


def matthews(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Matthews correlation of two classes; 0 where one of the sides is constant."""
    tp = float(np.sum((predicted_N == 1) & (label_N == 1)))
    tn = float(np.sum((predicted_N == 0) & (label_N == 0)))
    fp = float(np.sum((predicted_N == 1) & (label_N == 0)))
    fn = float(np.sum((predicted_N == 0) & (label_N == 1)))
    below = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return (tp * tn - fp * fn) / below if below else 0.0


class Tuner:
    """A classifier of one checkpoint, whose training step is recorded once."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from nomatmul.evaluate.compare_cell import choose_implementation
        from nomatmul.models.classifiers import EncoderForSequenceClassification

        self.torch, self.device = torch, torch.device(job["device"])
        kind = EncoderForSequenceClassification
        torch.manual_seed(0)
        self.model: Any = kind.from_pretrained(job["model"], num_labels=2).to(self.device)
        choose_implementation(self.model, "masked")
        self.body = {
            name: tensor.clone()
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(("pooler", "classifier"))
        }
        limit = self.model.config.max_position_embeddings
        self.length = min(LENGTH, limit)
        zeros = torch.zeros(BATCH, self.length, dtype=torch.long, device=self.device)
        self.ids_BT, self.mask_BT = zeros.clone(), zeros + 1
        self.label_B = torch.zeros(BATCH, dtype=torch.long, device=self.device)
        self.rate = torch.tensor(RATE, device=self.device)
        self.graph: Any = None

    def _reset(self, seed: int) -> None:
        """The checkpoint's body, a fresh head, an optimiser at its start."""
        torch = self.torch
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if name in self.body:
                    tensor.copy_(self.body[name])
                elif name.endswith("weight"):
                    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, 0.02))
                else:
                    tensor.zero_()
        if self.graph is None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=self.rate, weight_decay=DECAY, fused=self.cuda,
                capturable=self.cuda,
            )  # fmt: skip
        else:  # the recording holds the addresses of the moments
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    @property
    def cuda(self) -> bool:
        return bool(self.device.type == "cuda")

    def _step(self) -> None:
        torch = self.torch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            loss = self.model(self.ids_BT, self.mask_BT, labels=self.label_B).loss
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True)
        self.optimizer.step()

    def record(self) -> None:
        """Record the step; what cannot be recorded is launched kernel by kernel."""
        torch = self.torch
        self._reset(0)
        self.model.train()
        if not self.cuda:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            print(f"not recorded: {error}"[:400], flush=True)
            torch.cuda.synchronize()
            return
        self.graph = graph

    def train(self, data: Any, epochs: int, seed: int) -> None:
        torch = self.torch
        ids_NT, mask_NT, label_N = data
        self._reset(seed)
        self.model.train()
        steps_epoch = len(ids_NT) // BATCH
        steps, step = epochs * steps_epoch, 0
        for epoch in range(epochs):
            random = np.random.Generator(np.random.PCG64([seed, epoch]))
            order = torch.from_numpy(random.permutation(len(ids_NT))).to(self.device)
            for number in range(steps_epoch):
                rows = order[number * BATCH : (number + 1) * BATCH]
                self.ids_BT.copy_(ids_NT[rows])
                self.mask_BT.copy_(mask_NT[rows])
                self.label_B.copy_(label_N[rows])
                share = step / steps
                self.rate.fill_(RATE * min(share / WARMUP, (1 - share) / (1 - WARMUP), 1.0))
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
                step += 1

    def predict(self, data: Any) -> np.ndarray:
        torch = self.torch
        ids_NT, mask_NT, _ = data
        self.model.eval()
        parts = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            for first in range(0, len(ids_NT), 128):
                rows = slice(first, first + 128)
                parts.append(self.model(ids_NT[rows], mask_NT[rows]).logits.argmax(-1))
        return np.asarray(torch.cat(parts).cpu())

    def place(self, ids_NT: np.ndarray, mask_NT: np.ndarray, labels: list[int]) -> Any:
        torch = self.torch
        arrays = (ids_NT, mask_NT, np.asarray(labels, dtype=np.int64))
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)


def run(job: dict[str, Any]) -> None:
    """Both tasks, all seeds, of one model; a row each."""
    from nomatmul.train.tokenizer import load_tokenizer

    model = Path(job["model"])
    _, rest = model.name.split("-", 1)
    variant, pretrained = rest.rsplit("-", 1)
    tokenizer = load_tokenizer(model)
    tuner = Tuner(job)
    tuner.record()
    print(f"[glue {model.name}] recorded: {tuner.graph is not None}", flush=True)
    have = {
        (r["variant"], r["pretrained"], r["task"], r["seed"]) for r in read_rows(Path(job["rows"]))
    }
    data = {}
    for task in TASKS:
        for part in ("train", "dev"):
            sentences, labels = read_task(Path(job["data"]), task, part)
            if job["limit"]:
                sentences, labels = sentences[: job["limit"]], labels[: job["limit"]]
            data[task, part] = tuner.place(*encode(tokenizer, sentences, tuner.length), labels)
    for seed in range(1, 1 + job["seeds"]):
        for task, (epochs, metric, *_) in TASKS.items():
            if (variant, int(pretrained), task, seed) in have or time.time() > job["deadline"] - 8:
                continue
            began = time.monotonic()
            tuner.train(data[task, "train"], epochs, seed)
            predicted_N, label_N = tuner.predict(data[task, "dev"]), data[task, "dev"][2].cpu()
            right = float(np.mean(predicted_N == np.asarray(label_N)))
            score = right if metric == "accuracy" else matthews(predicted_N, np.asarray(label_N))
            row = {
                "section": "glue", "variant": variant, "pretrained": int(pretrained), "task": task,
                "seed": seed, "metric": metric, "score": score, "accuracy": right,
                "epochs": epochs, "learning_rate": RATE, "batch": BATCH,
                "seconds": round(time.monotonic() - began, 1), "commit": job["commit"],
            }  # fmt: skip
            append_row(Path(job["rows"]), row)
            print(f"[glue {model.name}] {task} seed {seed}: {score:.4f}", flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
