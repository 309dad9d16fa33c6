"""Inference on one GPU at batch 1: packed MatMul-free models against Transformer++ in bfloat16.

    PYTHONPATH=src python benchmarks/inference_gpu.py --out DIR --seconds 100

Random weights, a prompt of 2048 tokens, decoding behind it; both sides of all sizes in one run. The
baseline (dense_inference.py) has flash attention, a static cache, compiled blocks and its decode
step in a CUDA graph. Each model is a process of its own: all load and compile together, then
measure one after the other while the others wait idle. Peaks are of the tensors that are alive
while prompt and decoding run. The bandwidth limit is the device-to-device copy, bytes read and
written counted, of the same run. Rows go to inference-rows.jsonl as they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import report_gpu
from dry_run import add_tiny, shrink, temporary
from gpu_children import Child, run, run_wave, start, wait_for_go
from gpu_common import (
    copy_bandwidth,
    environment,
    median,
    peak_memory,
    synchronize,
    time_each,
)

from nomatmul.evaluate.rows import append_row
from nomatmul.evaluate.speed import bytes_read_per_token

# layers, width, intermediate, heads of the twin
SHAPES = {
    "370M": (24, 1024, 2816, 16),
    "1.3B": (24, 2048, 5632, 16),
    "2.7B": (32, 2560, 6912, 20),
    "7B": (32, 4096, 11008, 32),
    "13B": (40, 5120, 13824, 40),
}
TINY = {"370M": (2, 64, 192, 2)}
SIDES = ("packed", "dense")


# -- our side -------------------------------------------------------------------------------------


class Packed:
    """nomatmul's engine with random two-bit weights."""

    def __init__(self, job: dict[str, Any]) -> None:
        from nomatmul.engine import random_model
        from nomatmul.formats.config import ModelConfig

        layers, width, inner, _ = job["shape"]
        self.job, self.prompt = job, job["prompt"]
        config = ModelConfig(
            vocab_size=job["vocabulary"], hidden_size=width, num_layers=layers,
            intermediate_size=inner,
        )  # fmt: skip
        self.lm = random_model(config, device=job["device"])
        self.ids = [(7919 * n) % job["vocabulary"] for n in range(self.prompt)]

    def warm_up(self) -> None:
        self.prefill()
        self.session = self.lm.session()
        self.session.append(self.ids)
        for token in self.ids[:4]:
            self.session.append([token])
        self.lm.generate_ids(self.ids[:16], max_tokens=4)

    def prefill(self) -> None:
        self.lm.session().append(self.ids)

    def measure(self) -> dict[str, Any]:
        job = self.job
        prefill = time_each(self.prefill, job["device"], repeats=7, seconds=3)
        tokens = iter(self.ids * 100)
        steps = time_each(
            lambda: self.session.append([next(tokens)]), job["device"],
            repeats=job["steps"], seconds=4,
        )  # fmt: skip
        queued = self.queued()
        rate = max(queued or 0.0, 1 / median(steps))
        return {
            "prefill_seconds": median(prefill),
            "decode_call_tokens_per_second": 1 / median(steps),
            "decode_queued_tokens_per_second": queued,
            "decode_tokens_per_second": rate,
            "generate_tokens_per_second": self.generate(),
            "bytes_per_token": bytes_read_per_token(self.lm),
            "backend": self.lm.backend.isa,
        }

    def generate(self) -> float:
        """Tokens/s of lm.generate_ids: the difference of a long and a short text."""
        short, long = 8, 8 + self.job["steps"]
        seconds = []
        for count in (short, long):
            began = time.perf_counter()
            self.lm.generate_ids(self.ids[:16], max_tokens=count)
            seconds.append(time.perf_counter() - began)
        return (long - short) / max(seconds[1] - seconds[0], 1e-9)

    def queued(self) -> float | None:
        """Tokens/s of launches that feed each other on the device, None without that kernel."""
        decoder = getattr(self.lm.backend, "decoder", None)
        if decoder is None:
            return None
        import torch

        device, steps = self.job["device"], self.job["steps"]
        with torch.inference_mode():
            before = torch.zeros(self.lm.backend.shape, device=device)
            states = [before, torch.zeros_like(before)]
            made = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]

            def many() -> None:
                for n in range(steps):
                    decoder.launch(made[n % 2], states[n % 2], states[1 - n % 2], made[1 - n % 2])

            try:
                many()
            except (TypeError, AttributeError, RuntimeError) as error:
                print(f"no queued decoding: {type(error).__name__}: {error}")
                return None
            return steps / median(time_each(many, device, repeats=5, seconds=3))


# -- the baseline ---------------------------------------------------------------------------------


class DenseSide:
    """Transformer++ of the same layers, width and intermediate size."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from dense_inference import Dense

        self.job, self.prompt = job, job["prompt"]
        torch.manual_seed(0)
        with torch.inference_mode():
            self.model = Dense(job["shape"], job["vocabulary"], self.prompt + 256, job["device"])
            self.ids_T = torch.arange(self.prompt, device=job["device"]) * 7919 % job["vocabulary"]

    def warm_up(self) -> None:
        import torch
        from dense_inference import prepared

        with torch.inference_mode():
            self.step, self.compile_seconds = prepared(self.model, self.ids_T, self.prompt)

    def measure(self) -> dict[str, Any]:
        import torch

        job, steps = self.job, self.job["steps"]

        def prefill() -> None:
            self.model.forward(self.ids_T, 0).cpu()

        def many() -> None:
            for _ in range(steps):
                self.step()

        with torch.inference_mode():
            prefills = time_each(prefill, job["device"], repeats=7, seconds=3)
            one = time_each(self.step, job["device"], repeats=steps, seconds=2)
            rate = steps / median(time_each(many, job["device"], repeats=5, seconds=3))
        read = self.model.weight_bytes + self.model.cache_bytes(self.prompt)
        return {
            "prefill_seconds": median(prefills),
            "decode_call_tokens_per_second": 1 / median(one),
            "decode_queued_tokens_per_second": rate,
            "decode_tokens_per_second": rate,
            "bytes_per_token": read,
            "backend": "compiled" if self.model.compiled else "eager blocks",
            "compile_seconds": round(self.compile_seconds, 1),
        }


# -- processes ------------------------------------------------------------------------------------


def child(job: dict[str, Any]) -> None:
    import torch

    cuda = job["device"] == "cuda"
    if cuda:
        torch.cuda.init()
    began = time.perf_counter()
    side: Any = (Packed if job["side"] == "packed" else DenseSide)(job)
    loaded = peak_memory(job["device"])["peak_bytes"]
    side.warm_up()
    warm = time.perf_counter() - began
    if cuda:
        torch.cuda.empty_cache()
    if not wait_for_go():
        return
    synchronize(job["device"])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = side.measure()
    memory = peak_memory(job["device"])
    bandwidth = copy_bandwidth(job["device"], job["copy_gigabytes"])
    row = {
        "size": job["size"],
        "side": job["side"],
        "shape": job["shape"],
        "prompt": job["prompt"],
        **found,
        **memory,
        "load_peak_bytes": loaded,
        "copy_bandwidth": bandwidth,
        "bandwidth_share": found["decode_tokens_per_second"] * found["bytes_per_token"] / bandwidth,
        "warm_seconds": round(warm, 1),
    }
    append_row(Path(job["out"]) / "inference-rows.jsonl", row)
    print(
        f"prefill {1e3 * row['prefill_seconds']:.1f} ms, decode "
        f"{row['decode_tokens_per_second']:,.0f} tokens/s ({row['bandwidth_share']:.0%} of the "
        f"limit), peak {row['peak_bytes'] / 1e9:.2f} GB"
    )
    print("done", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=100, help="for all models")
    parser.add_argument("--warm-seconds", type=float, default=60, help="to load and compile")
    parser.add_argument("--model-seconds", type=float, default=20, help="to measure one")
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=128, help="decoded tokens a measurement")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--table", action="store_true", help="only print the table of the rows")
    add_tiny(parser)
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    args = parser.parse_args(argv)
    if args.tiny:
        shrink(
            args, parser, device="cpu", prompt=32, steps=4, vocabulary=64, seconds=600,
            warm_seconds=300, model_seconds=100,
        )  # fmt: skip
        args.out = args.out or temporary()
    if args.out is None and not args.child:
        parser.error("--out is needed")
    return args


def measure_all(args: argparse.Namespace) -> None:
    """All models together; one that failed beside others is tried again alone."""
    deadline = time.monotonic() + args.seconds
    shapes = TINY if args.tiny else SHAPES
    rows = args.out / "inference-rows.jsonl"

    def launch(job: tuple[str, str]) -> Child:
        size, side = job
        values = {
            "size": size, "side": side, "shape": shapes[size], "prompt": args.prompt,
            "steps": args.steps, "vocabulary": args.vocabulary, "device": args.device,
            "out": str(args.out), "copy_gigabytes": 0.01 if args.device == "cpu" else 4.0,
        }  # fmt: skip
        label = {"size": size, "side": side}
        return start(
            __file__, label, values, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="2",
            TORCH_COMPILE_DISABLE="1" if args.tiny else "0",
        )  # fmt: skip

    append_row(rows, {"machine": environment(args.commit)})
    jobs = [(size, side) for side in args.sides for size in args.sizes if size in shapes]
    with contextlib.suppress(KeyboardInterrupt):
        again = run_wave(
            jobs, launch, rows, warm_seconds=args.warm_seconds,
            measure_seconds=args.model_seconds, deadline=deadline,
        )  # fmt: skip
        for job in again:
            if time.monotonic() + 15 < deadline:
                run_wave(
                    [job], launch, rows, warm_seconds=args.warm_seconds,
                    measure_seconds=args.model_seconds, deadline=deadline,
                )  # fmt: skip
    print(f"{deadline - time.monotonic():.0f} s left", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run(args, child, measure_all, report_gpu.inference)


if __name__ == "__main__":
    main()
