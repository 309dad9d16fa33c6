"""One cell of the scaling study: all runs of one architecture at one size, in one process.

Started by scaling.py. The model is compiled once; every run draws new weights into it. The parts
are the trainer's own (model, optimiser, batches, schedule), without its checkpoints and reports.
Tunes the learning rate on a short budget, then trains the final runs at the best rate. A run that
would not end before the deadline is not started; one that is overtaken by it is reported as cut.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scaling_plan import best_rate, beyond, find_run, step_count
from torch import Tensor, nn

from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.formats.config import ModelConfig
from nomatmul.ops import choose
from nomatmul.ops.bitlinear import TernaryCache, ternary_cache
from nomatmul.train.batches import Batches, WindowOrder, held_out_batches, held_out_length
from nomatmul.train.config import TrainConfig
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_loss, build_optimizer, clip_gradients, runs_fused
from nomatmul.train.schedule import learning_rate
from nomatmul.train.tokens import TokenStream, open_stream

LOOK = 25  # steps between looks at the loss and the clock
COMPILE = ("graph", "blocks", "whole", "off")
GIVE_UP = 0.5  # a run is cut if it cannot end in time even at twice its speed


@dataclasses.dataclass(frozen=True)
class Cell:
    """What scaling.py asks for; see its `plan`."""

    arch: str
    size: str
    model: dict[str, Any]
    rates: list[float]
    tune_tokens: int
    final_tokens: int
    seeds: list[int]
    sequence_length: int
    batch_size: int
    warmup_steps: int
    eval_tokens: int  # of each held-out text
    tune: bool  # False: the best rate is read from earlier rows
    stage: str  # of the runs after tuning: final, or check (one again, with other kernels)
    commit: str
    work: str
    rows: str
    device: str
    compile: str
    deadline: float  # seconds since the epoch


def say(cell: Cell, text: str) -> None:
    print(f"[{cell.arch} {cell.size}] {text}", flush=True)


class Bench:
    """A compiled model of the cell's shape and the token streams on its device."""

    def __init__(self, cell: Cell, ternary: TernaryCache) -> None:
        self.cell, self.device, self.ternary = cell, torch.device(cell.device), ternary
        self.train = open_stream(Path(cell.work) / "train")
        held = sorted(Path(cell.work).glob("valid-*"))
        self.held = {path.name.removeprefix("valid-"): open_stream(path) for path in held}
        self.text_bytes = {
            name: stream.bytes_of(0, held_out_length(stream, cell.eval_tokens))
            for name, stream in self.held.items()
        }
        self.config = TrainConfig(
            recipe=f"scaling-{cell.arch}-{cell.size}",
            model=ModelConfig.from_dict(cell.model),
            sequence_length=cell.sequence_length,
            batch_size=cell.batch_size,
            micro_batch_size=cell.batch_size,
            schedule="cosine",
            warmup_steps=cell.warmup_steps,
            deterministic=False,
            compile="off",
        )
        self.speed = 0.0  # tokens a second of the last run
        self._start(cell, cell.compile)

    def _new_model(self) -> Any:
        model: Any = build_model(self.config.model)
        return model.to(self.device)

    def _start(self, cell: Cell, mode: str) -> None:
        """Build and compile; a mode that fails here gives way to the next one.

        auto: CUDA graphs of fused blocks, which need no compiler; else compiled blocks.
        """
        self.model = self._new_model()
        if mode == "auto":
            mode = "graph" if runs_fused(self.config, self.device) else "blocks"
        for choice in COMPILE[COMPILE.index(mode) :]:
            began = time.monotonic()
            try:
                self._prepare(choice)
            except Exception as error:  # whatever a compiler raises; the last choice has none
                if choice == COMPILE[-1]:
                    raise
                say(cell, f"compile={choice} failed: {type(error).__name__}: {error}"[:600])
                torch._dynamo.reset()
                self.model = self._new_model()
                continue
            say(cell, f"compiled: {self.compiled}, {time.monotonic() - began:.0f} s")
            return

    def _prepare(self, choice: str) -> None:
        config = self.config
        if choice == "blocks":
            compile_blocks(self.model)
        else:
            name = {"graph": "graph", "whole": "on", "off": "off"}[choice]
            config = dataclasses.replace(config, compile=name)
        self.loss = build_loss(self.model, config, self.device)
        self.micro = build_micro_step(self.loss, config, self.device, 1, self.ternary.clear)
        self.one = torch.ones((), device=self.device)
        self.compiled = choice
        optimizer = build_optimizer(self.model, config)
        batches = self._batches(0)
        for _ in range(2):
            x_BT, y_BT = next(batches)
            loss = float(self.micro(x_BT, y_BT, self.one, True))
            self.micro.end(optimizer)
            self.ternary.clear()
        if choice == "graph":
            self._check_graph(*next(batches))
        elif not math.isfinite(loss):
            raise RuntimeError(f"the first loss is {loss}")

    def _check_graph(self, x_BT: Tensor, y_BT: Tensor) -> None:
        """A replay must follow weights that changed since the recording."""
        if reason := choose.fallback_reason():
            raise RuntimeError(f"the kernels fell back: {reason}")
        if getattr(self.micro, "failed", None) is not None:
            self.compiled = "off"
            return
        self._new_weights(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.1)
        self.ternary.clear()
        plain = float(self.loss(x_BT, y_BT)[0].detach())
        self.ternary.clear()
        replayed = float(self.micro(x_BT, y_BT, self.one, True))
        self.ternary.clear()
        if not abs(plain - replayed) < 1e-3 * abs(plain):
            raise RuntimeError(f"a replayed step has loss {replayed}, a launched one {plain}")

    def _batches(self, seed: int) -> Any:
        order = WindowOrder(len(self.train), self.cell.sequence_length, seed)
        return Batches(self.train, order, self.cell.batch_size, self.device).run(0)

    @torch.no_grad()
    def _new_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = build_model(self.config.model).state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(fresh[name])

    def run(self, stage: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
        """Train from new weights on `tokens` tokens (one epoch at most), then score; a row.

        The seed draws the weights and the order of the tokens, alike for both architectures.
        """
        step_tokens = self.cell.batch_size * self.cell.sequence_length
        steps = self.steps(tokens)
        config = dataclasses.replace(self.config, learning_rate=rate, steps=steps, seed=seed)
        self._new_weights(seed)
        optimizer = build_optimizer(self.model, config)
        batches = self._batches(seed)
        began, curve, status = time.monotonic(), [], "ok"
        recent: list[Tensor] = []
        step = 0
        self.ternary.clear()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, step / steps)
            x_BT, y_BT = next(batches)
            loss = self.micro(x_BT, y_BT, self.one, True)
            recent.append(loss.clone())
            clip_gradients(self.model, config.clip_norm)
            optimizer.step()
            self.micro.end(optimizer)
            self.ternary.clear()
            if (step + 1) % LOOK == 0 or step + 1 == steps:
                mean = float(torch.stack(recent).mean())
                recent.clear()
                curve.append([step + 1, round(mean, 4)])
                if not math.isfinite(mean):
                    status = "diverged"
                elif step + 1 < steps and self._too_late(step + 1, steps, began):
                    status = "cut"
                if status != "ok":
                    break
        seconds = time.monotonic() - began
        self.speed = (step + 1) * step_tokens / seconds
        scores = self.score() if status == "ok" else {}
        return self._row(stage, rate, seed, step + 1, seconds, status, curve, scores)

    def steps(self, tokens: int) -> int:
        return step_count(vars(self.cell), tokens, len(self.train))

    def _too_late(self, done: int, steps: int, began: float) -> bool:
        rest = (time.monotonic() - began) / done * (steps - done)
        return time.time() + GIVE_UP * rest > self.cell.deadline

    def _row(
        self,
        stage: str,
        rate: float,
        seed: int,
        steps: int,
        seconds: float,
        status: str,
        curve: list[Any],
        scores: dict[str, Any],
    ) -> dict[str, Any]:
        counts = count_parameters(self.model)
        tokens = steps * self.cell.batch_size * self.cell.sequence_length
        return {
            "arch": self.cell.arch,
            "size": self.cell.size,
            "stage": stage,
            "status": status,
            "learning_rate": rate,
            "seed": seed,
            "steps": steps,
            "tokens": tokens,
            **counts,
            "flops": training_flops(self.config.model, counts, self.cell.sequence_length) * tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(self.speed),
            "compiled": self.compiled,
            "ops": os.environ.get("NOMATMUL_OPS", ""),
            "fallback": choose.fallback_reason(),
            "fused": runs_fused(self.config, self.device),
            "commit": self.cell.commit,
            "curve": curve[:: max(len(curve) // 25, 1)],
            **scores,
        }

    def score(self) -> dict[str, Any]:
        """Held-out bits per byte of each text and of both together.

        With gradients on: the graphs that training compiled serve here too.
        """
        scores: dict[str, Any] = {}
        bits = text_bytes = 0.0
        for name, stream in self.held.items():
            nats, size = self._nats(stream), self.text_bytes[name]
            scores[f"bpb_{name}"] = nats / math.log(2) / size
            bits, text_bytes = bits + nats / math.log(2), text_bytes + size
        scores["bpb"] = bits / text_bytes
        return scores

    def _nats(self, stream: TokenStream) -> float:
        cell, total = self.cell, torch.zeros((), dtype=torch.float64, device=self.device)
        length, rows = cell.sequence_length, cell.batch_size
        limit = cell.eval_tokens
        for x_BT, y_BT, count in held_out_batches(stream, length, rows, limit, self.device):
            total += self.loss(x_BT, y_BT)[0].detach().double() * count
        return total.item()


def compile_blocks(model: Any) -> None:
    """Compile one block, one norm and the loss: all blocks have one shape and share the code."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        block.compile(dynamic=False)
    model.final_norm.compile(dynamic=False)
    model.loss_of_hidden = torch.compile(model.loss_of_hidden, dynamic=False)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in all, and without embedding and head (what the plot's axis shows)."""
    total = sum(p.numel() for p in model.parameters())
    outer = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("embed", "head")))
    return {"parameters": total, "non_embedding": total - outer}


def training_flops(model: ModelConfig, counts: dict[str, int], length: int) -> float:
    """A token's: 6 for each weight of a product (the head too), and attention's own products.

    A ternary product is counted like a dense one of its size.
    """
    products = counts["non_embedding"] + model.vocab_size * model.hidden_size
    scores = model.num_layers * model.hidden_size * length  # causal: half of 2 L D T
    return 6.0 * (products + (scores if model.token_mixer == "attention" else 0))


def run_cell(cell: Cell) -> None:
    """Tune, then the final runs, with ternary weights made once a step as the trainer does."""
    file = Path(cell.rows)
    with ternary_cache() as cache:
        bench = Bench(cell, cache)
        # Ready: scaling.py says when it is this cell's turn.
        sys.stdin.readline()
        run_stages(cell, bench, file)


def run_stages(cell: Cell, bench: Bench, file: Path) -> None:
    """Every run is a row of the file as soon as it ends."""

    plan = vars(cell)

    def attempt(stage: str, rate: float, seed: int, tokens: int) -> dict[str, Any] | None:
        earlier = find_run(read_rows(file), plan, stage, rate, seed, bench.steps(tokens))
        if earlier is not None:
            return earlier
        expected = tokens / bench.speed if bench.speed else 0.0
        if time.time() + 1.05 * expected > cell.deadline:
            say(cell, f"{stage} at {rate:g}, seed {seed}: no time left, not started")
            return None
        row = bench.run(stage, rate, seed, tokens)
        append_row(file, row)
        shown = f"{row['bpb']:.4f} bits per byte" if "bpb" in row else row["status"]
        say(
            cell,
            f"{stage} rate {rate:g} seed {seed}: {shown}, {row['tokens'] / 1e6:.1f}M tokens, "
            f"{row['tokens_per_second']:,} tokens/s, {cell.deadline - time.time():.0f} s left",
        )
        return row

    if cell.tune:
        tried = list(cell.rates)
        for rate in tried:
            attempt("tune", rate, 0, cell.tune_tokens)
        further = beyond(plan, best_rate(read_rows(file), plan, bench.steps(cell.tune_tokens)))
        if further is not None:
            attempt("tune", further, 0, cell.tune_tokens)
    best = best_rate(read_rows(file), plan, bench.steps(cell.tune_tokens))
    if best is None:
        say(cell, "no tuning run ended: no final run")
        return
    for seed in cell.seeds:
        attempt(cell.stage, best, seed, cell.final_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cell", help="the cell as JSON")
    cell = Cell(**json.loads(parser.parse_args().cell))
    if cell.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run_cell(cell)


if __name__ == "__main__":
    main()
