"""Speed and memory against llama.cpp's ternary kernels, paired in one run: `make bench`.

Both sides run models of equal shape with random ternary weights: ours packed at 2 bits against
TQ2_0, and at 1.6 bits against TQ1_0. A transformer (BitNet-2B-4T, Qwen3-1.7B, Qwen3-8B) is decoded
behind contexts of two lengths, against two heads of llama.cpp's: Q4_0, which it is run with, and
the form whose bytes are nearest to ours. One process a side (ours: one for every instruction set)
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
import report
from dry_run import add_tiny, shrink, temporary
from processes import Side

from nomatmul.engine import cpu_report
from nomatmul.evaluate.speed import SIZES

FORMS = {"2bit": "TQ2_0", "1.6bit": "TQ1_0"}
BATCH = 16
TRANSFORMERS = {name: size for name, size in SIZES.items() if "token_mixer" in size}
# rows of 256, as llama.cpp needs
TINY = {"vocab_size": 256, "hidden_size": 256, "num_layers": 1, "intermediate_size": 256}
SHAPES = {
    **SIZES,
    "tiny": TINY,
    "tiny-qwen3": {**TRANSFORMERS["Qwen3-1.7B"], **TINY, "num_heads": 2, "num_kv_heads": 1},
}


@dataclass
class Samples:
    """Everything measured of one side of one pairing: lists of tokens/s by (what, threads), and
    seconds of the parts of a step by (context, threads)."""

    label: str
    packing: str
    load: dict[str, Any] = field(default_factory=dict)
    head: str = ""  # of llama.cpp: "" as its linears
    memory: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

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
        text = report.markdown(document)
        _write(arguments, document, text)  # after every pairing: a run cut short leaves its results
    print(text)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="some of " + ",".join(SIZES))
    parser.add_argument("--layers", type=int, default=0, help="of each model (default: its own)")
    parser.add_argument("--contexts", default="512,3968", help="tokens before decoding begins")
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
            arguments, parser, sizes="tiny,tiny-qwen3", packings="2bit", threads="1", prefill=8,
            tokens=2, rounds=1, prefill_rounds=1, contexts="2,4",
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
    for name in (names := arguments.sizes.split(",")):
        if name not in SHAPES:
            parser.error(f"{name} is no size; {', '.join(SIZES)} are")
    arguments.sizes = [name for name in names if name != "union-370M"]  # llama.cpp has no trees
    arguments.contexts = [int(part) for part in arguments.contexts.split(",")]
    arguments.threads = [int(part) for part in arguments.threads.split(",")]
    arguments.isas = [part for part in arguments.isa.split(",") if part] or _available_isas()
    return arguments


def _available_isas() -> list[str]:
    """Our instruction sets on this CPU, best first, without the scalar one."""
    return [isa for isa in cpu_report()["isas"] if isa != "scalar"] or ["scalar"]


def _plan(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for packing in arguments.packings.split(","):
        for size in arguments.sizes:
            if packing == "1.6bit" and (
                size in TRANSFORMERS or (arguments.quick and size != "2.7B")
            ):
                continue
            yield size, packing


def _shape(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    shape = dict(SHAPES[size])
    if arguments.layers:
        shape["num_layers"] = min(arguments.layers, shape["num_layers"])
    return shape


def _their_heads(shape: dict[str, Any]) -> list[str]:
    """The forms of llama.cpp's head: what it is run with, and one of our head's bytes."""
    if "token_mixer" not in shape:
        return [""]
    return ["Q4_0", "Q8_0" if shape.get("head_linear") == "dense" else ""]


def _pairing(size: str, packing: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one size in one form on all sides; returns what goes into the JSON file."""
    # The denser form is there for memory: the best instruction set alone is enough.
    isas = arguments.isas if packing == "2bit" else arguments.isas[:1]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        shape = _shape(size, arguments)
        sides = _start(shape, packing, isas, Path(scratch), arguments)
        try:
            bandwidth = _measure(sides, arguments, "token_mixer" in shape)
        finally:
            for side, _ in sides:
                side.close()
    return {
        "size": size,
        "packing": packing,
        "shape": shape,
        "prefill_tokens": arguments.prefill,
        "bandwidth": bandwidth,
        "sides": [vars(samples) for _, samples in sides],
    }


def _start(
    shape: dict[str, Any],
    packing: str,
    isas: list[str],
    scratch: Path,
    arguments: argparse.Namespace,
) -> list[tuple[Side, Samples]]:
    """Start and load every side; ours first, best instruction set first."""
    sides: list[tuple[Side, Samples]] = []
    for isa in isas:
        side, samples = Side("our_side.py"), Samples(f"nomatmul {isa}", packing)
        sides.append((side, samples))
        samples.load = side.ask("load", shape=shape, packing=packing, isa=isa)
    for head in [] if arguments.ours_only else _their_heads(shape):
        from llama_gguf import write_gguf

        path, form = scratch / "theirs.gguf", FORMS[packing]
        written = write_gguf(path, form=form, shape=shape, head=head or None, context=8192)
        # glibc then asks for huge pages for the large blocks that llama.cpp allocates.
        side = Side("llama_side.py", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
        named = f", {head} head" if head else ""
        samples = Samples(f"llama.cpp {form}{named}", packing, head=head)
        sides.append((side, samples))
        samples.load = {
            **side.ask("load", path=str(path)),
            "packed_bytes_per_token": written["read"],
            "head_form": head or form,
            "head_bytes": written["head"],
        }
        path.unlink()
    return sides


def _measure(
    sides: list[tuple[Side, Samples]], arguments: argparse.Namespace, long: bool
) -> dict[str, list[float]]:
    """All turns; returns the read bandwidth (bytes/s) measured between them, by threads.

    long: decode behind contexts, the longest first, whose keys and values are filled once.
    """
    bandwidth: dict[str, list[float]] = {}
    meter = Side("our_side.py")
    contexts = sorted(arguments.contexts, reverse=True) if long else [0]
    if long:
        for side, _ in sides:
            side.ask("fill", threads=max(arguments.threads), count=contexts[0])
    for context in contexts:
        what, ask = (f"decode {context}", "long") if long else ("decode", "decode")
        # a model of another number of threads has a copy of some weights: the largest number first,
        # and memory is looked at before there is one
        for threads in sorted(arguments.threads, reverse=long):
            for _ in range(arguments.rounds):
                found = meter.ask("bandwidth", threads=threads, gib=0.01 if arguments.tiny else 1.0)
                bandwidth.setdefault(str(threads), []).append(found["bytes_per_second"])
                for side, samples in sides:
                    request = {"threads": threads, "count": arguments.tokens, "context": context}
                    answer = side.ask(ask, **request)
                    samples.add(what, threads, answer["tokens_per_second"])
            for side, samples in sides if long else []:
                samples.memory = samples.memory or side.ask("memory")
            if long:  # where a step's time goes, best instruction set
                request = {"threads": threads, "count": arguments.tokens, "context": context}
                found = sides[0][0].ask("parts", **request)
                sides[0][1].parts[f"{context}@{threads}"] = found["seconds"]
    meter.close()
    for side, samples in sides:  # while decoding: before batches and prompts take their buffers
        samples.memory = samples.memory or side.ask("memory")
    prompts = [("prefill", arguments.prefill), *([] if long else [("batch", BATCH)])]
    for threads in arguments.threads:
        for side, _ in sides:  # warms buffers
            side.ask("prefill", threads=threads, count=32)
        for _ in range(arguments.prefill_rounds):
            for what, size in prompts:
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
