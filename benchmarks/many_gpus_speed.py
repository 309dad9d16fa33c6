"""Speed and memory of training steps on one GPU or, under torchrun, on several: a row a size.

Started by many_gpus.py. The step is the trainer's own (loss, clipping, AdamW, ternary cache), on
random tokens: 8 x 2048 a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from dry_run import add_tiny, shrink

from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.train import TrainConfig, apply_overrides, recipe
from nomatmul.train.loop import Loop
from nomatmul.train.micro_step import MicroStep
from nomatmul.train.model import build_model
from nomatmul.train.optimizer import build_loss, build_optimizer
from nomatmul.train.parallelize import shard_model
from nomatmul.train.plan import plan_training
from nomatmul.train.ranks import Ranks, open_ranks


def measure(config: TrainConfig, ranks: Ranks, device: torch.device, mode: str, steps: int) -> dict:
    """tokens/s of all ranks together, the median step, and the peak of the fullest device."""
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    with device:  # drawing the weights of 1.3B on the host takes longer than the steps
        model = build_model(config.model)
    model.set_recompute(mode)
    if ranks.many:
        shard_model(model, device, ranks.size)
    plan = plan_training(config, device, ranks.many)
    optimizer = build_optimizer(model, config, plan)
    micro_step = MicroStep(build_loss(model, config, plan))
    shape = (config.micro_batch_size, config.sequence_length)
    torch.manual_seed(1 + ranks.rank)
    x_BT = torch.randint(config.model.vocab_size, shape, device=device)
    y_BT = torch.randint(config.model.vocab_size, shape, device=device)
    times: list[float] = []
    one = torch.ones((), device=device)
    with ternary_cache() as cache:
        loop = Loop(
            model, optimizer, micro_step, cache,
            rate=lambda step, share: config.learning_rate, clip_norm=1.0,
        )  # fmt: skip
        for step in range(3 + steps):
            if step == 3 and cuda:
                torch.cuda.reset_peak_memory_stats()
            _wait(device)
            ranks.begin(f"step {step}")
            ranks.most(0.0)
            began = time.perf_counter()
            loss = loop.take_step([(x_BT, y_BT, one)], 0.0).loss
            _wait(device)
            times.append(time.perf_counter() - began)
    seconds = ranks.most(sorted(times[3:])[steps // 2])[0]
    tokens = ranks.size * shape[0] * shape[1]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "size": config.recipe,
        "ranks": ranks.size,
        "recompute": mode,
        "tokens_per_second": round(tokens / seconds, 1),
        "step_ms": round(1e3 * seconds, 2),
        "first_step_s": round(times[0], 1),
        "peak_bytes": int(ranks.most(peak)[0]),
        "loss": round(loss.item(), 4),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=[], help="RECIPE:RECOMPUTE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    add_tiny(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        small = ["model.vocab_size=64", "model.num_layers=1", "sequence_length=16"]
        shrink(
            args, parser, sizes=["cpu_minute:mlp"], device="cpu", compile="off", steps=1, set=small
        )
    if not args.sizes:
        parser.error("a size is needed, as RECIPE:RECOMPUTE")
    ranks, name = open_ranks(args.device, 120)
    device = torch.device(name)
    for size in args.sizes:
        which, _, mode = size.partition(":")
        ranks.begin(f"making {which}")
        overrides = ["batch_size=512", "micro_batch_size=8", f"compile={args.compile}", *args.set]
        row: dict[str, Any]
        try:
            config = apply_overrides(recipe(which), overrides)
            row = measure(config, ranks, device, mode, args.steps)
        except torch.OutOfMemoryError as error:
            row = {"size": which, "ranks": ranks.size, "recompute": mode, "error": str(error)[:90]}
        if ranks.first:
            print(json.dumps(row), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ranks.close()


if __name__ == "__main__":
    main()
