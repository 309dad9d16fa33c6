"""Speed and memory of the Pareto models: MatMul-free, packed, beside the Transformer++ twin.

The recipe study scored these models (three sizes, equal tokens) and counted their files. Here the
same shapes run with random weights on one thread: ours packed at two bits and at 1.6, the twin in
16 bits, int8 and 4 bits, each in every form of our engine and of llama.cpp. The forms of a size
take turns, one process each, the others stopped; figures are medians over all turns. Decoding is
timed behind two contexts, by one copy whose weights stay in the cache if they fit, and by so many
copies in turn that no weight is there when it is asked for. pareto_page.py joins speed, memory,
bits per byte, file bytes and an estimate of energy.

Seconds are of CPU time. The size `box` is the study's largest pair, whose tokens are others.

    python benchmarks/pareto.py                       # 10 minutes; benchmarks/results/DATE-pareto
    python benchmarks/pareto.py --page --out FOLDER   # table and plot of FOLDER again

Needs: pip install "nomatmul[bench,train]".
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_side
import pareto_page
import report
from dry_run import add_tiny, shrink, temporary
from processes import Side

from nomatmul.convert.packing import pack
from nomatmul.evaluate.rows import append_row, read_rows
from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM, CausalLMConfig

Shape = tuple[int, int, int, int | None]
# layers, width, vocabulary, inner width (None: the model's own): those of studies/recipes
SIZES: dict[str, Shape] = {
    "S": (5, 256, 8192, None),
    "M": (7, 384, 8192, None),
    "L": (8, 512, 8192, None),
    "box": (9, 640, 4096, 1600),
}
TINY: dict[str, Shape] = {"S": (1, 256, 8192, None)}
OUT_OF_CACHE = 160e6  # bytes of weights in rotation: five times the largest cache that was seen
MEMORY_AT = 960  # tokens behind which memory is looked at; llama.cpp's context then has 1,024


@dataclass(frozen=True)
class Contender:
    """A model in a form of one engine. forms: of `random_model`, or of `write_gguf`."""

    model: str  # mlgru or transformer
    form: str
    engine: str
    forms: dict[str, str] = field(default_factory=dict)


def _dense(form: str) -> dict[str, str]:
    return {"dense": form, "head": form, "embedding": form}


CONTENDERS = (
    Contender("mlgru", "2bit", "nomatmul", {"packing": "2bit", "embedding": "int8"}),
    Contender("mlgru", "1.6bit", "nomatmul", {"packing": "1.6bit", "embedding": "int8"}),
    *(Contender("transformer", form, "nomatmul", _dense(form))
      for form in ("bf16", "f16", "int8", "int8-32")),
    *(Contender("transformer", form, "llama.cpp", {"form": form, "table": table})
      for form, table in (("BF16", "BF16"), ("F16", "F16"), ("Q8_0", "Q8_0"), ("Q4_0", "Q8_0"))),
)  # fmt: skip


def config_of(model: str, shape: Shape) -> ModelConfig:
    """MatMul-free LM of this shape, or its Transformer++ twin."""
    layers, width, vocabulary, inner = shape
    values: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": width, "num_layers": layers,
        "intermediate_size": inner, "max_position_embeddings": 1024,
    }  # fmt: skip
    if model == "mlgru":
        return ModelConfig(**values, num_heads=1)
    twin = {"token_mixer": "attention", "linear": "dense", "num_heads": width // 64}
    return ModelConfig(**values, **twin)


def packed_bytes(config: ModelConfig, packing: str, scratch: Path) -> int:
    """Bytes of the weights' file of a packed model of this shape."""
    source, target = scratch / "fresh", scratch / "packed"
    CausalLM(CausalLMConfig.from_model_config(config)).save_pretrained(str(source))
    pack(source, target, packing=packing, embedding="int8", check=False)
    return (target / "model.safetensors").stat().st_size


def measure(size: str, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size: every contender, paired."""
    rows, sides = [], []
    for contender in CONTENDERS:
        if contender.engine == "llama.cpp" and options.ours_only:
            continue
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            row, side = _start(contender, size, shape, Path(scratch), options)
        rows.append(row)
        sides.append(side)
    try:
        _decode(rows, sides, options)
        for turn in range(options.prefill_rounds + 1):
            for row, side in zip(rows, sides, strict=True):
                found = side.ask("prefill", count=options.prefill)["seconds"]
                row["prefill"] += [options.prefill / found] if turn else []  # the first one warms
    finally:
        for side in sides:
            side.close()
    return rows


def _start(
    contender: Contender, size: str, shape: Shape, scratch: Path, options: Any
) -> tuple[dict[str, Any], Side]:
    """Load one copy, look at its memory, then load the others."""
    config = config_of(contender.model, shape)
    request: dict[str, Any] = {"engine": contender.engine, "forms": contender.forms}
    request["shape"] = config.to_dict()
    row: dict[str, Any] = {
        "size": size, "model": contender.model, "form": contender.form, "engine": contender.engine,
        "prefill": [],
    }  # fmt: skip
    if contender.engine == "llama.cpp":
        from llama_gguf import write_gguf

        path = scratch / "theirs.gguf"
        request["path"] = str(path)
        row["read_bytes"] = write_gguf(path, shape=vars(config), **contender.forms)["read"]
        row["file_bytes"] = path.stat().st_size
    elif contender.model == "mlgru":
        row["file_bytes"] = packed_bytes(config, contender.form, scratch)
    # glibc then asks for huge pages for the large blocks that llama.cpp allocates
    side = Side("pareto_side.py", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    loaded = side.ask("load", **request)
    about = loaded["about"]
    if contender.engine == "nomatmul":
        weights = about["weights"]
        row.setdefault("file_bytes", weights)
        row["read_bytes"] = weights - about["embedding"]
        row["isa"] = about["isa"]
    row["layers"], row["width"] = shape[:2]
    side.ask("fill", count=options.memory_at)
    side.ask("steps", context=options.memory_at, count=8, rotate=False)
    found = side.ask("memory")
    row |= {"resident_added": found["resident"] - loaded["resident_before"], **found}
    row["copies"] = max(2, -(-int(options.rotated) // row["read_bytes"]))
    side.ask("more", copies=row["copies"])
    side.ask("fill", count=max(options.contexts) + 1)
    return row, side


def _decode(rows: list[dict[str, Any]], sides: list[Side], options: argparse.Namespace) -> None:
    """Median seconds of a step in each turn, behind each context, in and out of the cache."""
    for context in sorted(options.contexts, reverse=True):
        for rotate in (False, True):
            key = f"{'rotated' if rotate else 'alone'}@{context}"
            for _ in range(options.rounds):
                for row, side in zip(rows, sides, strict=True):
                    count = max(row["copies"], 8) if rotate else options.tokens
                    request = {"context": context, "count": count, "rotate": rotate}
                    seconds = side.ask("steps", **request)["seconds"]
                    row.setdefault(key, []).append(1 / statistics.median(seconds))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--contexts", default="0,512", help="tokens before decoding begins")
    parser.add_argument("--rounds", type=int, default=15, help="turns of decoding a form")
    parser.add_argument("--tokens", type=int, default=64, help="steps a turn, in the cache")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--prefill-rounds", type=int, default=7)
    parser.add_argument("--rotated", type=float, default=OUT_OF_CACHE, help="bytes in rotation")
    parser.add_argument("--memory-at", type=int, default=MEMORY_AT)
    parser.add_argument("--scratch", default=None, help="directory for the model files")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/DATE-pareto)")
    parser.add_argument("--scores", type=Path, nargs="+", default=pareto_page.SCORES,
                        help="rows of the study")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="only make the page again")
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(options, parser, sizes="S", contexts="0,2", rounds=1, tokens=2, prefill=4,
               prefill_rounds=1, rotated=1.0, memory_at=3, out=temporary())  # fmt: skip
    names = llama_side.missing()
    if names and not options.tiny:
        parser.error(f"{' and '.join(names)} not installed: pip install 'nomatmul[bench]'")
    options.ours_only = bool(names)
    options.contexts = [int(part) for part in options.contexts.split(",")]
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    folder = options.out or Path(__file__).parent / f"results/{datetime.date.today()}-pareto"
    rows, about = folder / "rows.jsonl", folder / "machine.json"
    if not options.page:
        folder.mkdir(parents=True, exist_ok=True)
        rows.unlink(missing_ok=True)
        machine, began = report.machine(""), time.monotonic()
        loads = [machine.pop("load_average")]
        for size in options.sizes.split(","):
            for row in measure(size, (TINY if options.tiny else SIZES)[size], options):
                append_row(rows, row)
            loads.append(os.getloadavg()[0])
        machine |= {
            "load_averages": loads, "seconds": time.monotonic() - began, "threads": 1,
            "contexts": options.contexts, "prefill": options.prefill,
            "memory_at": options.memory_at, "rotated_bytes": options.rotated,
        }  # fmt: skip
        about.write_text(json.dumps(machine, indent=1) + "\n")
    scores = [row for file in options.scores for row in read_rows(file)]
    print(pareto_page.write(folder, read_rows(rows), scores, json.loads(about.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
