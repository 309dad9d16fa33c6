"""Speed and memory of the engine: decode, prefill, batches, peak memory, share of the bandwidth.

A size runs with random weights, since neither speed nor memory depends on them: 370M, 1.3B and 2.7B
are MatMul-free LM's published shapes, union-370M has trees in place of the GLU, BitNet-2B-4T,
Qwen3-1.7B and Qwen3-8B are ternary transformers. A packed directory runs as it is.
Every model is measured in a process of its own, warmed, figures are medians. Decoding one token
must read all packed weights once, of trees the visited rows: "of limit" is those bytes times
tokens/s, over the read bandwidth measured in the same run.
benchmarks/vs_llama.py compares with llama.cpp.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomatmul.cli.options import integers, json_option, kv_option, option
from nomatmul.cli.show import print_json, print_table, size

if TYPE_CHECKING:
    from nomatmul.evaluate.speed import SpeedResult

EXAMPLES = """
examples:
  nomatmul bench                                      370M on all cores
  nomatmul bench --size 2.7B --threads 1,2 --json
  nomatmul bench --size 2.7B --packing 1.6bit --isa avx2
  nomatmul bench --size packed/mine --batch 1,16 --prefill 128
  nomatmul bench --size 2.7B --device cuda --prefill 2048
"""

# What is asked for is held in memory: beyond these a slip of the keyboard fills the machine.
MAX_TOKENS = 1 << 20
MAX_BATCH = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Options:
    size: str = option("370M", metavar="SIZE", help="one of the sizes above, or a packed directory")
    threads: tuple[int, ...] | None = option(
        None, metavar="N,N", type=integers, help="thread counts (default: one a core)"
    )
    packing: str = option("2bit", choices=("2bit", "1.6bit"), help="form of random weights")
    embedding: str = option(
        "int8", choices=("int8", "bf16", "f32"), help="form of a random embedding"
    )
    isa: str | None = option(
        None, metavar="NAME", help="instruction set, see doctor (default: the best)"
    )
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    kv: str = kv_option()
    batch: tuple[int, ...] = option(
        (1, 16),
        metavar="N,N",
        type=integers,
        help="numbers of sequences decoded together; 1 is the decode speed itself",
    )
    prefill: int = option(512, metavar="N", help="tokens of the prompt")
    steps: int = option(32, metavar="N", help="decoding steps to take the median of")
    gib: float = option(1.0, metavar="GIB", help="memory to read while measuring the bandwidth")
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.engine import cpu_report
    from nomatmul.evaluate.speed import SpeedRequest, measure_in_subprocess

    for name, value in (("prefill", options.prefill), ("steps", options.steps)):
        if not 1 <= value <= MAX_TOKENS:
            raise ValueError(f"--{name} is {value}, it must lie in 1..{MAX_TOKENS}")
    if max(options.batch) > MAX_BATCH:
        raise ValueError(f"--batch is {max(options.batch)}, it must be at most {MAX_BATCH}")
    if options.device != "cpu":
        for name, given in (("threads", options.threads), ("isa", options.isa)):
            if given is not None:
                raise ValueError(f"--{name} is about the CPU; with --device leave it out")
    report = cpu_report()
    request = SpeedRequest(
        size=options.size,
        threads=options.threads or (report["threads"],),
        packing=options.packing,
        embedding=options.embedding,
        isa=options.isa,
        steps=options.steps,
        prefill=options.prefill,
        batches=options.batch,
        bandwidth_gib=options.gib,
        device=options.device,
        kv=options.kv,
    )
    results = measure_in_subprocess(request)
    if options.json:
        print_json({"cpu": report["cpu"], "results": [dataclasses.asdict(r) for r in results]})
    else:
        _show(results[0].device_name or report["cpu"], results)
    return 0


def _show(cpu: str, results: list[SpeedResult]) -> None:
    first = results[0]
    print(
        f"{first.size}, {first.packing} weights, {first.embedding} embedding, {first.isa}, on {cpu}"
    )
    on_cpu = not first.device_name
    header = ["", *(f"{r.threads} thread{'s' if r.threads > 1 else ''}" for r in results)]
    rows = [
        [
            "decode of one sequence, tokens/s",
            *(f"{r.decode_tokens_per_second:.1f}" for r in results),
        ]
    ]
    rate = [f"{r.prefill_tokens_per_second:.1f}" for r in results]
    rows.append([f"prefill of {first.prefill_tokens}, tokens/s", *rate])
    for count in first.batch_tokens_per_second:
        if count == 1:  # that is decoding
            continue
        total = [f"{r.batch_tokens_per_second[count]:.1f}" for r in results]
        rows.append([f"{count} sequences together, tokens/s", *total])
    bandwidth = [size(r.read_bandwidth_bytes_per_second) + "/s" for r in results]
    rows.append(["read bandwidth", *bandwidth])
    rows.append(["read for a token", *(size(r.bytes_read_per_token) for r in results)])
    share = [f"{100 * r.fraction_of_bandwidth_limit:.0f} %" for r in results]
    rows.append(["decode, of limit", *share])
    rows.append(["peak memory, decoding", *(size(r.peak_resident_bytes) for r in results)])
    rows.append(["peak memory, prefill", *(size(r.peak_with_prefill_bytes) for r in results)])
    print_table(rows, header if on_cpu else ["", "GPU"])
