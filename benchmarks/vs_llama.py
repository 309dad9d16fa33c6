"""Speed and memory against llama.cpp's ternary kernels, paired in one run: `make bench`.

Both sides run models of equal shape with random ternary weights: ours packed at 2 bits against
TQ2_0, and at 1.6 bits against TQ1_0. One process a side (ours: one for every instruction set)
takes turns with the others, A B C A B C, while the rest is stopped; every figure is a median. Both
keep their weights in anonymous memory of huge pages. Writes benchmarks/results/DATE-cpu-NAME.md
and .json.

    python benchmarks/vs_llama.py                        all sizes, about half an hour on two cores
    python benchmarks/vs_llama.py --quick                2.7B and 370M, about eight minutes
    taskset -c 0,1 python benchmarks/vs_llama.py --quick --name xeon --scratch /dev/shm

Needs: pip install "nomatmul[bench]".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llama_side
import our_side
import report
from dry_run import add_tiny, shrink, temporary
from processes import Side

from nomatmul.engine import cpu_report
from nomatmul.evaluate.speed import SIZES

FORMS = {"2bit": "TQ2_0", "1.6bit": "TQ1_0"}
BATCH = 16
SHAPES = {**SIZES, "tiny": {**our_side.TINY, "hidden_size": 256}}  # rows of 256, as llama.cpp needs


@dataclass
class Samples:
    """Everything measured of one side of one pairing: lists of tokens/s by (what, threads)."""

    label: str
    packing: str
    load: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, threads: int, rate: float) -> None:
        self.rates.setdefault(f"{what}@{threads}", []).append(rate)

    def median(self, what: str, threads: int) -> float | None:
        values = self.rates.get(f"{what}@{threads}")
        return statistics.median(values) if values else None


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    started = time.perf_counter()
    document: dict[str, Any] = {"machine": report.machine(arguments.name), "pairings": []}
    for size, packing in _plan(arguments):
        if time.perf_counter() - started > 60 * arguments.minutes:
            _log(f"no time left for {size} {packing}")
            continue
        _log(f"{size} {packing} against {FORMS[packing]}")
        document["pairings"].append(_pairing(size, packing, arguments))
        document["seconds"] = time.perf_counter() - started
        text = report.markdown(document, FORMS)
        _write(arguments, document, text)  # after every pairing: a run cut short leaves its results
    print(text)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="370M,1.3B,2.7B", help="370M,1.3B,2.7B")
    parser.add_argument("--packings", default="2bit,1.6bit", help="2bit,1.6bit")
    parser.add_argument("--threads", default="1,2", help="thread counts")
    parser.add_argument("--isa", default="", help="our instruction sets (default: all but scalar)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="steps a turn of decoding")
    parser.add_argument("--rounds", type=int, default=5, help="turns of decoding a side")
    parser.add_argument("--prefill-rounds", type=int, default=3, help="turns of prefill a side")
    parser.add_argument("--quick", action="store_true", help="2.7B and 370M, fewer turns")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after so long")
    parser.add_argument("--name", default="", help="name of the machine in the result's name")
    parser.add_argument("--out", default=None, help="folder (default: benchmarks/results)")
    parser.add_argument("--scratch", default=None, help="directory for the model files")
    parser.add_argument("--ours-only", action="store_true", help="leave llama.cpp out")
    add_tiny(parser)
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        shrink(
            arguments, parser, sizes="tiny", packings="2bit", threads="1", prefill=8, tokens=2,
            rounds=1, prefill_rounds=1,
        )  # fmt: skip
        arguments.isa = arguments.isa or _available_isas()[0]
        arguments.out = arguments.out or temporary()
    arguments.out = arguments.out or str(Path(__file__).with_name("results"))
    if not arguments.ours_only and (names := llama_side.missing()):
        words = f"{' and '.join(names)} not installed: pip install 'nomatmul[bench]'"
        if not arguments.tiny:
            parser.error(f"{words}, or --ours-only")
        _log(f"llama.cpp is left out: {words}")
        arguments.ours_only = True
    if arguments.quick:
        arguments.sizes, arguments.rounds, arguments.prefill_rounds = "2.7B,370M", 3, 1
    arguments.threads = [int(part) for part in arguments.threads.split(",")]
    arguments.isas = [part for part in arguments.isa.split(",") if part] or _available_isas()
    return arguments


def _available_isas() -> list[str]:
    """Our instruction sets on this CPU, best first, without the scalar one."""
    return [isa for isa in cpu_report()["isas"] if isa != "scalar"] or ["scalar"]


def _plan(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for packing in arguments.packings.split(","):
        for size in arguments.sizes.split(","):
            if not (arguments.quick and packing == "1.6bit" and size != "2.7B"):
                yield size, packing


def _pairing(size: str, packing: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one size in one form on all sides; returns what goes into the JSON file."""
    # The denser form is there for memory: the best instruction set alone is enough.
    isas = arguments.isas if packing == "2bit" else arguments.isas[:1]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        sides = _start(size, packing, isas, Path(scratch), arguments)
        try:
            bandwidth = _measure(sides, arguments)
        finally:
            for side, _ in sides:
                side.close()
    return {
        "size": size,
        "packing": packing,
        "shape": SHAPES[size],
        "prefill_tokens": arguments.prefill,
        "bandwidth": bandwidth,
        "sides": [vars(samples) for _, samples in sides],
    }


def _start(
    size: str, packing: str, isas: list[str], scratch: Path, arguments: argparse.Namespace
) -> list[tuple[Side, Samples]]:
    """Start and load every side; ours first, best instruction set first."""
    sides: list[tuple[Side, Samples]] = []
    for isa in isas:
        side, samples = Side("our_side.py"), Samples(f"nomatmul {isa}", packing)
        sides.append((side, samples))
        samples.load = side.ask("load", shape=SHAPES[size], packing=packing, isa=isa)
    if not arguments.ours_only:
        from llama_gguf import write_gguf

        path = scratch / "theirs.gguf"
        read = write_gguf(path, form=FORMS[packing], **SHAPES[size])
        # glibc then asks for huge pages for the large blocks that llama.cpp allocates.
        side = Side("llama_side.py", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
        samples = Samples(f"llama.cpp {FORMS[packing]}", packing)
        sides.append((side, samples))
        samples.load = {**side.ask("load", path=str(path)), "packed_bytes_per_token": read}
        path.unlink()
    return sides


def _measure(
    sides: list[tuple[Side, Samples]], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """All turns; returns the read bandwidth (bytes/s) measured between them, by threads."""
    bandwidth: dict[str, list[float]] = {}
    meter = Side("our_side.py")
    for threads in arguments.threads:
        for _ in range(arguments.rounds):
            found = meter.ask("bandwidth", threads=threads, gib=0.01 if arguments.tiny else 1.0)
            bandwidth.setdefault(str(threads), []).append(found["bytes_per_second"])
            for side, samples in sides:
                answer = side.ask("decode", threads=threads, count=arguments.tokens)
                samples.add("decode", threads, answer["tokens_per_second"])
    meter.close()
    for side, samples in sides:  # while decoding: before batches and prompts take their buffers
        samples.memory = side.ask("memory")
    for threads in arguments.threads:
        for side, _ in sides:  # warms buffers
            side.ask("prefill", threads=threads, count=32)
        for _ in range(arguments.prefill_rounds):
            for what, size in (("prefill", arguments.prefill), ("batch", BATCH)):
                for side, samples in sides:
                    answer = side.ask(what, threads=threads, count=size)
                    samples.add(what, threads, answer["tokens_per_second"])
    return bandwidth


def _write(arguments: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    machine = document["machine"]
    stem = f"{machine['date']}-cpu-{machine['name']}"
    (out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)


def _log(text: str) -> None:
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
