"""Training memory and tokens/s on one GPU: our paths against Transformer++, in one run.

    PYTHONPATH=src python benchmarks/training_gpu.py --out DIR --seconds 170
    PYTHONPATH=src python benchmarks/training_gpu.py --out DIR --table   # of the rows there are

Every variant is a process of its own, so that its peak memory is its own. A wave of processes that
fit into the device's memory together builds and compiles at the same time; then they measure one
after the other while the others wait idle. A step is forward, backward, fused AdamW (fp32 master
weights, bf16 autocast) on 8 x 2048 random tokens; tokens/s are of the median of at least 10 steps.
Rows go to training-rows.jsonl as they are measured, so a run that is cut keeps what it has; their
table is printed at the end.
training-profile.txt holds the 20 longest kernels of the fused 370M step.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import report_gpu
from dry_run import add_tiny, shrink, temporary
from gpu_children import Child, run, run_wave, start
from gpu_common import environment
from training_gpu_child import SHAPES, child

from nomatmul.evaluate.rows import append_row

# What a process may take while it builds and warms up, GB: decides who shares a wave.
WEIGHTS_GB = {"370m": 7.0, "1.3b": 24.0, "tiny": 0.1}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the step, with the recompute modes to measure in one process.

    activations_gb: expected of 370m above the weights, for the waves; 1.3b takes twice as much.
    """

    name: str
    arch: str
    ops: str
    compile: str
    modes: tuple[str, ...]
    activations_gb: float
    chunk: int = 2048  # tokens whose logits live at once
    graph: bool = False  # forward and backward replayed as a CUDA graph


VARIANTS = {
    v.name: v
    for v in (
        Variant("fused", "mlgru", "triton", "off", ("none", "mlp", "block"), 10, graph=True),
        Variant("fused-launched", "mlgru", "triton", "off", ("mlp",), 10),
        Variant("transformer", "transformer", "", "blocks", ("none", "block"), 16, graph=True),
        Variant("transformer-launched", "transformer", "", "blocks", ("none",), 16),
        Variant("transformer-logits", "transformer", "naive", "blocks", ("none",), 22, chunk=0),
        Variant("naive", "mlgru", "naive", "off", ("none",), 42),
        Variant("naive-compiled", "mlgru", "naive", "blocks", ("none",), 25),
        Variant("transformer-whole", "transformer", "", "whole", ("none",), 16, graph=True),
        Variant("transformer-autotune", "transformer", "", "autotune", ("none",), 16),
    )
}
# The order is that of importance: the end may be cut.
ORDER = [
    ("370m", "fused"), ("370m", "transformer"), ("1.3b", "fused"), ("1.3b", "transformer"),
    ("370m", "naive"), ("370m", "transformer-launched"), ("370m", "fused-launched"),
    ("370m", "transformer-whole"), ("370m", "naive-compiled"), ("370m", "transformer-logits"),
    ("1.3b", "naive-compiled"), ("1.3b", "naive"), ("370m", "transformer-autotune"),
]  # fmt: skip
TINY = [("tiny", "fused"), ("tiny", "transformer")]


def estimate_gb(size: str, variant: Variant) -> float:
    return WEIGHTS_GB[size] + variant.activations_gb * {"1.3b": 2, "tiny": 0}.get(size, 1)


def waves(jobs: list[tuple[str, str]], room_gb: float, most: int) -> list[list[tuple[str, str]]]:
    """Jobs in order, cut where the next one would not fit beside the others."""
    out: list[list[tuple[str, str]]] = [[]]
    used = 0.0
    for job in jobs:
        need = estimate_gb(job[0], VARIANTS[job[1]])
        if out[-1] and (used + need > room_gb or len(out[-1]) >= most):
            out.append([])
            used = 0.0
        out[-1].append(job)
        used += need
    return out


def launch(size: str, variant: Variant, args: argparse.Namespace) -> Child:
    job = {
        "size": size,
        **dataclasses.asdict(variant),
        "device": args.device,
        "batch": args.batch,
        "length": args.length,
        "vocabulary": args.vocabulary,
        "steps": args.steps,
        "measure_seconds": args.measure_seconds,
        "out": str(args.out),
        "profile": f"{size}:{variant.name}" == args.profile,
    }
    cpu = args.device == "cpu"
    variables = {
        "NOMATMUL_OPS": "naive" if cpu and variant.ops == "triton" else variant.ops,
        # Compiling on a CPU takes minutes and says nothing: a dry run only goes through the calls.
        "TORCH_COMPILE_DISABLE": "1" if args.tiny else "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
        "OMP_NUM_THREADS": "1" if cpu else "2",
    }
    return start(__file__, {"size": size, "variant": variant.name}, job, **variables)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=170, help="for all variants")
    parser.add_argument("--warm-seconds", type=float, default=65, help="to build and compile")
    parser.add_argument("--variant-seconds", type=float, default=25, help="to measure one")
    parser.add_argument("--measure-seconds", type=float, default=3, help="of steps, then 5 do")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--memory-gb", type=float, default=128, help="that a wave may take")
    parser.add_argument("--processes", type=int, default=6, help="of a wave at most")
    parser.add_argument("--only", nargs="+", metavar="SIZE:VARIANT", help="these, in this order")
    parser.add_argument("--profile", default="370m:fused", metavar="SIZE:VARIANT")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--table", action="store_true", help="only print the table of the rows")
    add_tiny(parser)
    parser.add_argument("--commit", help="name of the commit, where there is no .git")
    args = parser.parse_args(argv)
    args.jobs = [tuple(name.split(":")) for name in args.only] if args.only else ORDER
    if args.tiny:
        shrink(
            args, parser, device="cpu", batch=2, length=32, vocabulary=64, steps=2,
            profile="tiny:fused", processes=2, seconds=600, warm_seconds=300, variant_seconds=100,
        )  # fmt: skip
        args.jobs = args.jobs if args.only else TINY
        args.out = args.out or temporary()
    if args.out is None and not args.child:
        parser.error("--out is needed")
    for size, variant in args.jobs:
        if size not in SHAPES or variant not in VARIANTS:
            parser.error(
                f"--only {size}:{variant} is unknown: choose of {', '.join(SHAPES)} and "
                f"{', '.join(VARIANTS)}"
            )
    return args


def measure_all(args: argparse.Namespace) -> None:
    """Wave after wave; a job that failed beside others is tried again alone."""
    deadline = time.monotonic() + args.seconds
    rows = args.out / "training-rows.jsonl"
    append_row(rows, {"machine": environment(args.commit)})
    todo = waves(args.jobs, args.memory_gb, args.processes)
    for wave in todo:
        if time.monotonic() + 15 > deadline:
            print(f"no time for {wave}", flush=True)
            continue
        again = run_wave(
            wave,
            lambda job: launch(job[0], VARIANTS[job[1]], args),
            rows,
            warm_seconds=args.warm_seconds,
            measure_seconds=args.variant_seconds,
            deadline=deadline,
        )
        todo += [[job] for job in again]
        print(f"{deadline - time.monotonic():.0f} s left", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run(args, child, measure_all, report_gpu.training)


if __name__ == "__main__":
    main()
