"""The runs of one cell: one variant of a model, trained from new weights with each of its seeds.

`python -m studies.compare.cell` reads a cell as JSON from its first line of input, builds
and compiles, and waits for a second line before it trains, so that a pool of processes can compile
on the host while another trains. The parts are the trainer's own (model, optimiser, loop,
batches, masking, schedule), without its checkpoints and reports.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nomatmul.evaluate.flops import training_flops
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.ops import choose
from nomatmul.ops.bitlinear import TernaryCache, ternary_cache
from nomatmul.train.config import TrainConfig
from nomatmul.train.fff_training import choose_implementation, training_options
from nomatmul.train.loop import Hook, Loop, MicroBatch, every
from nomatmul.train.micro_step import build_micro_step
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_loss, build_optimizer
from nomatmul.train.parallelize import compile_parts
from nomatmul.train.plan import DevicePlan, fused_mixer, plan_training
from nomatmul.train.schedule import learning_rate
from studies.compare.curve import Curve, Log
from studies.compare.plan import Cell, find_row, identity
from studies.compare.texts import Texts

LOOK = 25  # steps between looks at the loss and the clock
COMPILE = ("graph", "blocks", "off")


class CellTrainer:
    """A compiled model of the cell's shape: every run draws new weights into it."""

    def __init__(self, cell: Cell, ternary: TernaryCache, log: Log) -> None:
        self.cell, self.log, self.ternary = cell, log, ternary
        self.device = torch.device(cell.device)
        self.config = dataclasses.replace(cell.train_config, deterministic=False, compile="off")
        assert not self.config.full_precision, "phases are of studies.recipes.trainer"
        self.plan = plan_training(self.config, self.device)
        self.texts = Texts(cell, self.config, self.plan)
        self.one = torch.ones((), device=self.device)
        self.speed = 0.0  # tokens a second of the last run
        self._start(cell.compile)

    def _new_model(self) -> Any:
        model: Any = build_model(self.config.model)
        model.to(self.device)
        choose_implementation(model, self.cell.implementation)
        model.set_fff_training(training_options(self.config))
        return model

    def _start(self, mode: str) -> None:
        """Build and compile; a mode that fails gives way to the next one, with its reason."""
        if mode == "auto":
            mode = pick_mode(self.config, self.plan)
        for choice in COMPILE[COMPILE.index(mode) :]:
            began = time.monotonic()
            self.model = self._new_model()
            try:
                self._prepare(choice)
            except Exception as error:  # whatever a compiler raises; the last choice has none
                if choice == COMPILE[-1]:
                    raise
                self.log(f"compile={choice} failed: {type(error).__name__}: {error}"[:600])
                torch._dynamo.reset()
                continue
            self.log(f"compiled: {self.compiled}, {time.monotonic() - began:.0f} s")
            return

    def _prepare(self, choice: str) -> None:
        """Compile, and take two steps that nobody counts."""
        plan = dataclasses.replace(self.plan, graph=choice == "graph")
        if choice == "blocks":
            torch._dynamo.config.recompile_limit = 64
            compile_parts(self.model, "default")
        self.loss = build_loss(self.model, self.config, plan)
        self.micro = build_micro_step(self.loss, self.config.z_loss, plan, self.ternary.clear)
        self.compiled = choice
        optimizer = build_optimizer(self.model, self.config, plan)
        batches = self.texts.batches(0)
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
        if self.micro.failed is not None:
            raise RuntimeError(f"no graph: {self.micro.failed}")
        self._new_weights(1)
        with torch.no_grad():
            for parameter in self.model.parameters():  # enough to move the loss by percents
                parameter.mul_(4 * torch.rand_like(parameter))
        self.ternary.clear()
        plain = float(self.loss(x_BT, y_BT)[0].detach())
        self.ternary.clear()
        replayed = float(self.micro(x_BT, y_BT, self.one, True))
        self.ternary.clear()
        if not abs(plain - replayed) < 2e-3 * abs(plain):
            raise RuntimeError(f"a replayed step has loss {replayed}, a launched one {plain}")

    @torch.no_grad()
    def _new_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = build_model(self.config.model).state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(fresh[name])

    def run(self, seed: int) -> dict[str, Any]:
        """Train with this seed and score at the end; the run's row."""
        config = dataclasses.replace(self.config, seed=seed)
        curve = self.train(config)
        scores = self.score(self.cell.eval_tokens) if curve.status == "ok" else {}
        return self._row(config, curve, scores)

    def train(self, config: TrainConfig) -> Curve:
        """Train from new weights, look at the held-out text now and then; how it went.

        config: the cell's, with a seed, rate and steps of its own. The seed draws the weights, and
        the order of the tokens alike for all variants.
        """
        self._new_weights(config.seed)
        loop, batches = self._loop(config), self.texts.batches(config.seed)
        curve = Curve(self.cell, config)
        self.ternary.clear()
        loop.run(
            lambda: loop.step / config.steps,
            lambda step, share: self._batch(loop, batches),
            self._hooks(loop, curve),
            stop=lambda: curve.status != "ok",
        )
        self.speed = curve.ended()
        return curve

    def _loop(self, config: TrainConfig) -> Loop:
        return Loop(
            self.model,
            build_optimizer(self.model, config, self.plan),
            self.micro,
            self.ternary,
            rate=lambda step, share: learning_rate(config, step, share),
            clip_norm=config.clip_norm,
        )

    def _batch(self, loop: Loop, batches: Iterator[tuple[Tensor, Tensor]]) -> list[MicroBatch]:
        """One of the loop's next step."""
        return [(*next(batches), self.one)]

    def _hooks(self, loop: Loop, curve: Curve) -> list[Hook]:
        last = curve.config.steps
        return [
            Hook(every(1), lambda result: curve.losses.append(result.loss)),
            Hook(
                lambda step: step % LOOK == 0 or step == last,
                lambda result: curve.look(loop.step, self.log),
            ),
            Hook(
                lambda step: curve.status == "ok" and curve.due(step),
                lambda result: self._evaluate(loop.step, curve),
            ),
        ]

    def _evaluate(self, step: int, curve: Curve) -> None:
        curve.held_out(step, lambda: self.score(self.cell.eval_tokens // 4)["loss"])

    def _row(self, config: TrainConfig, curve: Curve, scores: dict[str, Any]) -> dict[str, Any]:
        cell, model = self.cell, config.model
        predicted = 1.0 if model.causal else config.masked_tokens / config.sequence_length
        flops = {
            key: training_flops(model, config.sequence_length, predicted=predicted, masked=masked)
            for key, masked in (("flops", False), ("flops_masked", True))
        }
        total = sum(p.numel() for p in self.model.parameters())
        return {
            "section": cell.section,
            "variant": cell.variant,
            "label": cell.label,
            "stage": cell.stage,
            "status": curve.status,
            "seed": config.seed,
            "identity": identity(cell),
            "learning_rate": config.learning_rate,
            "steps": curve.step,
            "steps_planned": config.steps,
            "tokens": curve.step * config.tokens_per_step,
            "tokens_per_step": config.tokens_per_step,
            "parameters": total,
            "neurons": cell.neurons,
            "active": cell.active,
            "flops_per_token": flops["flops"],
            "flops_masked_per_token": flops["flops_masked"],
            "seconds": round(curve.took, 2),
            "tokens_per_second": round(self.speed),
            "lanes": cell.lanes,
            "compiled": self.compiled,
            "implementation": cell.implementation or "auto",
            "ops": os.environ.get("NOMATMUL_OPS", ""),
            "fallback": choose.fallback_reason(),
            "commit": cell.commit,
            "curve": curve.curve,
            "held_out_curve": curve.held,
            **scores,
        }

    def score(self, limit: int) -> dict[str, Any]:
        """Held-out loss (nats a predicted token), and bits per byte for a causal model.

        With gradients on: the graphs that training compiled serve here too.
        """
        scores: dict[str, Any] = {}
        nats = count = size = 0.0
        for name in self.texts.held:
            one, predicted = self._nats(name, limit)
            nats, count = nats + one, count + predicted
            scores[f"loss_{name}"] = one / max(predicted, 1)
            if self.config.model.causal and limit >= self.cell.eval_tokens:
                scores[f"bpb_{name}"] = one / math.log(2) / self.texts.bytes[name]
                size += self.texts.bytes[name]
        scores["loss"] = nats / max(count, 1)
        if size:
            scores["bpb"] = nats / math.log(2) / size
        return scores

    def _nats(self, name: str, limit: int) -> tuple[float, int]:
        total, predicted = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for x_BT, y_BT, count in self.texts.held_out(name, limit):
            total += self.loss(x_BT, y_BT)[0].detach().double() * count
            predicted += count
        return total.item(), predicted


def pick_mode(config: TrainConfig, plan: DevicePlan) -> str:
    """graph: CUDA graphs of fused ternary blocks; blocks: torch.compile; off: on a CPU."""
    if plan.memory != "device":
        return "off"
    return "graph" if fused_mixer(config.model, plan) else "blocks"


def run_cell(
    cell: Cell,
    wait: Callable[[], object] = lambda: None,
    trainer_type: type[CellTrainer] = CellTrainer,
) -> list[dict[str, Any]]:
    """Every seed in turn; each run is a row of the file as soon as it ends. Returns the rows.

    wait: called once all is compiled, before the first run. trainer_type: what trains it.
    """

    def log(text: str) -> None:
        print(f"[{cell.section} {cell.variant}] {text}", file=sys.stderr, flush=True)

    file, rows = Path(cell.rows), []
    with ExitStack() as stack:
        cache = stack.enter_context(ternary_cache())
        trainer = trainer_type(cell, cache, log)
        wait()
        for seed in cell.seeds:
            if find_row(read_rows(file), cell, seed) is not None:
                continue
            tokens = cell.config["steps"] * trainer.config.tokens_per_step
            speed = trainer.speed or cell.expected_speed
            expected = tokens / speed if speed else 0.0
            if cell.deadline and time.time() + 1.05 * expected > cell.deadline:
                log(f"seed {seed}: no time left, not started")
                continue
            row = trainer.run(seed)
            append_row(file, row)
            rows.append(row)
            log(_summary(row))
            if cell.keep and row["status"] == "ok":
                save_model(trainer, Path(cell.keep) / f"{cell.section}-{cell.variant}-{seed}")
    return rows


def _summary(row: dict[str, Any]) -> str:
    score = row["status"]
    if "loss" in row:
        score = f"held-out loss {row['loss']:.4f}"
        if "bpb" in row:
            score += f", {row['bpb']:.4f} bits per byte"
    return (
        f"seed {row['seed']}: {score}, {row['tokens'] / 1e6:.2f}M tokens, {row['seconds']:.1f} s, "
        f"{row['tokens_per_second']:,} tokens/s"
    )


def save_model(trainer: CellTrainer, directory: Path) -> None:
    """The trained model as a directory that `nomatmul` commands and transformers read."""
    from nomatmul.formats.files.directory import new_directory
    from nomatmul.train.model import write_model

    with new_directory(directory) as temporary:
        write_model(trainer.model, trainer.texts.train.tokenizer, temporary)


def main(cell_type: type[Cell] = Cell, trainer_type: type[CellTrainer] = CellTrainer) -> None:
    """A process of the pool. A study's own module calls it with types of its own."""
    cell = cell_type.from_json(sys.stdin.readline())
    # Whole numbers of a ternary layer stay exact in TF32; other products are bfloat16 anyway.
    torch.set_float32_matmul_precision("high")
    if cell.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run_cell(cell, sys.stdin.readline, trainer_type)


if __name__ == "__main__":
    main()
