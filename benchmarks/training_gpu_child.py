"""One variant of a training step, measured in a process of its own.

A library of training_gpu.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpu_children import wait_for_go
from gpu_common import count_parameters, median, peak_memory, synchronize

from nomatmul.evaluate.flops import training_flops
from nomatmul.evaluate.rows import append_row
from nomatmul.train.parallelize import compile_parts

PEAK_FLOPS = 989e12  # dense bf16 of an H200 by its datasheet
SHAPES = {"370m": (24, 1024, 16), "1.3b": (24, 2048, 16), "tiny": (2, 64, 2)}


class Step:
    """Model, optimiser, one batch of random tokens and the step over them."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from nomatmul.formats.config import ModelConfig
        from nomatmul.models import CausalLM, CausalLMConfig
        from nomatmul.train.config import TrainConfig
        from nomatmul.train.optimizer import build_optimizer
        from nomatmul.train.plan import plan_device

        layers, width, heads = SHAPES[job["size"]]
        dials: dict[str, Any] = {}
        if job["arch"] == "transformer":
            dials = {"token_mixer": "attention", "linear": "dense", "num_heads": heads}
        self.config = ModelConfig(
            vocab_size=job["vocabulary"], hidden_size=width, num_layers=layers,
            max_position_embeddings=job["length"], **dials,
        )  # fmt: skip
        torch.manual_seed(0)
        self.job, self.device = job, job["device"]
        with torch.device(self.device):
            model = CausalLM(CausalLMConfig.from_model_config(self.config))
        self.model = model.to(self.device).float().train()
        train = TrainConfig(
            recipe="benchmark", model=self.config, sequence_length=job["length"],
            learning_rate=1e-4,
        )  # fmt: skip
        self.optimizer = build_optimizer(self.model, train, plan_device(torch.device(self.device)))
        shape = (job["batch"], job["length"] + 1)
        ids_BT = torch.randint(0, job["vocabulary"], shape, device=self.device)
        self.x_BT, self.y_BT = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()
        self.weight = torch.ones((), device=self.device)
        self.loss = self._compiled()

    def _compiled(self) -> Any:
        import torch

        def loss(x_BT: Any, y_BT: Any) -> Any:
            return self.model.loss(x_BT, y_BT, chunk=self.job["chunk"])

        kind = self.job["compile"]
        if kind == "blocks":
            compile_parts(self.model, "default")
        elif kind in ("whole", "autotune"):
            mode = "max-autotune-no-cudagraphs" if kind == "autotune" else None
            return torch.compile(loss, dynamic=False, mode=mode)
        return loss

    def begin(self, mode: str) -> None:
        """Another recompute mode: the graph of the last one does not serve it."""
        import torch

        from nomatmul.train.micro_step import GraphedMicroStep, MicroStep

        def loss(x_BT: Any, y_BT: Any) -> Any:
            with torch.autocast(self.device, dtype=torch.bfloat16):
                return self.loss(x_BT, y_BT)

        self.optimizer.zero_grad(set_to_none=True)
        self.model.set_recompute(mode)
        self.micro: MicroStep = MicroStep(loss)
        if self.job["graph"] and self.device == "cuda":
            self.micro = GraphedMicroStep(loss, 0.0, self.cache.clear)

    def __call__(self) -> Any:
        loss = self.micro(self.x_BT, self.y_BT, self.weight, True)
        self.optimizer.step()
        self.cache.clear()
        self.micro.end(self.optimizer)
        return loss

    def caching(self) -> Any:
        """Ternary weights are made once a step, as the trainer does; keeps the open cache."""
        from nomatmul.ops.bitlinear import ternary_cache

        self.cache = ternary_cache()
        return self.cache


def child(job: dict[str, Any]) -> None:
    step = Step(job)
    began = time.perf_counter()
    with step.caching():
        for mode in job["modes"]:
            step.begin(mode)
            step(), step()
        step.begin(job["modes"][0])
        synchronize(step.device)
        warm = time.perf_counter() - began
        forget(step.device)
        if not wait_for_go():
            return
        for mode in job["modes"]:
            step.begin(mode)
            times, loss = measure(step)
            row = summary(step, mode, times, float(loss)) | {"warm_seconds": round(warm, 1)}
            append_row(Path(job["out"]) / "training-rows.jsonl", row)
            speed, peak = row["tokens_per_second"], row["peak_bytes"] / 1e9
            print(f"recompute {mode}: {speed:,} tokens/s, peak {peak:.2f} GB")
        if job["profile"]:
            step.begin(job["modes"][0])
            step(), step()
            profile(step, Path(job["out"]) / "training-profile.txt")
    print("done", flush=True)


def forget(device: str) -> None:
    """Give cached memory back and begin a new peak."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(step: Step) -> tuple[list[float], Any]:
    """Seconds of each step: two to settle, then at least 10 (5 where one takes seconds)."""
    job = step.job
    times: list[float] = []
    forget(step.device)
    for _ in range(2):
        loss = step()
    began = time.perf_counter()
    while len(times) < job["steps"]:
        if len(times) >= 5 and time.perf_counter() - began > job["measure_seconds"]:
            break
        synchronize(step.device)
        start = time.perf_counter()
        loss = step()
        synchronize(step.device)
        times.append(time.perf_counter() - start)
    return times, loss


def summary(step: Step, mode: str, times: list[float], loss: float) -> dict[str, Any]:
    from nomatmul.ops import choose

    job, counts = step.job, count_parameters(step.model)
    tokens = job["batch"] * job["length"]
    flops = training_flops(step.config, job["length"]) * tokens
    seconds = median(times)
    return {
        "size": job["size"],
        "variant": job["name"] + ("" if mode == "none" else f"-{mode}"),
        "arch": job["arch"],
        "compile": job["compile"],
        "recompute": mode,
        "chunk": job["chunk"],
        "fallback": choose.fallback_reason(),
        "graph": bool(getattr(step.micro, "graphs", None)),
        "graph_failed": getattr(step.micro, "failed", None),
        **counts,
        "tokens": tokens,
        "steps": len(times),
        "seconds": seconds,
        "seconds_all": [round(t, 5) for t in times],
        "tokens_per_second": round(tokens / seconds),
        "model_flops_per_second": flops / seconds,
        "utilisation": flops / seconds / PEAK_FLOPS,
        "loss": loss,
        **peak_memory(step.device),
    }


def profile(step: Step, path: Path) -> None:
    """The 20 longest operations of two steps, as text."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = step.device == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with record(activities=kinds) as found:
        step(), step()
        synchronize(step.device)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    text = found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70)
    path.write_text(f"Two steps of {step.job['size']} {step.job['name']}\n{text}\n")
