"""What does integer inference cost? Held-out bits per byte beside the CPU engine, by width.

    python benchmarks/hardware_numerics.py --data ../shared/data
    python benchmarks/hardware_numerics.py --text mine.txt --model packed/mine

Both models read the same tokens, the state carried through the text: the packed model in float
(CPU engine) and in integers (`nomatmul.reference.integer`), at the default widths on every text and
at other widths on the first. Writes a table and every figure to benchmarks/results.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
from box_model import HELD_OUT
from dry_run import add_tiny, shrink, temporary, write_texts

import nomatmul
from nomatmul.engine.language_model import LanguageModel
from nomatmul.evaluate import score_text
from nomatmul.formats.packed import PackedReader
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.numerics import Formats
from nomatmul.reference.integer.reading import network_of

BLOCK = 256  # tokens of a pass
_HEAD = "bits per byte, float | integer | more, % | same argmax, % | mean KL, nats |"

VECTORS = ((30, 18), (28, 16), (26, 14), (24, 14), (24, 10), (22, 12), (22, 10), (20, 10), (20, 8))
VECTORS += ((18, 8), (16, 6))
STATES = ((20, 12), (24, 14), (24, 16), (32, 20))
WIDTHS: tuple[dict[str, int], ...] = (
    {},
    *(
        {
            "vector_bits": bits,
            "vector_fraction": fraction,
            "state_bits": max(bits, 20),
            "state_fraction": max(fraction, 12),
        }
        for bits, fraction in VECTORS
    ),
    *({"state_bits": bits, "state_fraction": fraction} for bits, fraction in STATES),
    *({"weight_bits": bits} for bits in (18, 14, 12, 10, 8, 6)),
    *({"table_bits": bits} for bits in (11, 8, 7, 6, 5)),
    *({"residual": fraction} for fraction in (9, 8, 7, 6, 5, 4)),
)
TINY_WIDTHS: tuple[dict[str, int], ...] = (
    {}, {"vector_bits": 16, "vector_fraction": 6}, {"residual": 6},
)  # fmt: skip


class Beside:
    """A scorer (nomatmul.evaluate): the integer model, while the engine reads the same tokens."""

    def __init__(self, engine: LanguageModel, model: IntegerModel) -> None:
        self.engine, self.model = engine, model
        self.tokenizer, self.config = engine.tokenizer, engine.config
        self.same, self.divergence, self.engine_nats = 0, 0.0, 0.0

    def token_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """float64 [T-1] of the integer model; keeps how far the engine's are."""
        session, state, found = self.engine.session(), self.model.new_state(), []
        for start in range(0, len(ids) - 1, BLOCK):
            block = list(ids[start : start + BLOCK + 1])
            real = log_softmax(session.append(block[:-1], logits="all"))
            logits, state = self.model.forward([block[:-1]], state)
            ours = self.model.logprobs(logits[0])
            self.same += int((ours.argmax(-1) == real.argmax(-1)).sum())
            self.divergence += float((np.exp(real) * (real - ours)).sum())
            at = np.arange(len(block) - 1), block[1:]
            self.engine_nats -= float(real[at].sum())
            found.append(ours[at])
        return np.concatenate(found)


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    real = logits_TV.astype(np.float64)
    real -= real.max(axis=-1, keepdims=True)
    return real - np.log(np.exp(real).sum(axis=-1, keepdims=True))


def compare(engine: LanguageModel, model: IntegerModel, text: str, tokens: int) -> dict[str, Any]:
    """Bits per byte of both, and how often and how far they differ."""
    beside = Beside(engine, model)
    score = score_text(beside, text, max_tokens=tokens)
    nats = score.loss * score.tokens
    return {
        "tokens": score.tokens,
        "float": score.bits_per_byte * beside.engine_nats / nats,
        "integer": score.bits_per_byte,
        "more": nats / beside.engine_nats - 1,
        "argmax_agreement": beside.same / score.tokens,
        "kl_nats": beside.divergence / score.tokens,
        "seconds": score.seconds,
    }


def built(reader: PackedReader, widths: dict[str, int]) -> IntegerModel:
    """A model of these widths; `residual` is a fraction. Raises ValueError where they overflow."""
    formats = Formats(**{name: bits for name, bits in widths.items() if name != "residual"})
    network = network_of(reader, formats)
    model = IntegerModel(reader.config, network, formats)
    if "residual" not in widths:
        return model
    fractions = dataclasses.replace(model.fractions, residual=widths["residual"])
    return IntegerModel(reader.config, network, formats, fractions)


def by_width(
    reader: PackedReader, engine: LanguageModel, text: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each of WIDTHS; what is refused says why."""
    rows = []
    for widths in TINY_WIDTHS if options.tiny else WIDTHS:
        row: dict[str, Any] = {"widths": widths}
        try:
            model = built(reader, widths)
        except ValueError as error:
            row["refused"] = str(error)
        else:
            row["fractions"] = dataclasses.asdict(model.fractions)
            row |= compare(engine, model, text, options.width_tokens)
        rows.append(row)
        print(row, flush=True)
    return rows


def how_loose(model: IntegerModel, ids: Sequence[int]) -> dict[str, list[float]]:
    """{what: [bound, largest value found on these tokens]} of the last layer's residual, and of the
    products u of all layers."""
    from nomatmul.reference.integer.trace import Trace

    largest: dict[str, float] = {}
    state = model.new_state()
    for token in ids:
        trace = Trace()
        model.step(int(token), state, trace)
        for name, values in trace:
            largest[name] = max(largest.get(name, 0.0), float(np.abs(values).max()))
    fractions, last = model.fractions, f"layers.{len(model.network.layers) - 1}.channel.residual"
    found = {"residual": [float(model.bounds.residual.max()), largest[last], fractions.residual]}
    found["logits"] = [model.bounds.largest["head"], largest["logits"], fractions.logits]
    for kind, own in (("mixer", fractions.mixer), ("channel", fractions.channel)):
        for layer, fraction in enumerate(own):
            name = f"layers.{layer}.{kind}.u"
            if name in largest:
                found[name] = [model.bounds.largest[name], largest[name], fraction]
    return {name: [bound, peak * 2.0**-fraction] for name, (bound, peak, fraction) in found.items()}


def markdown(document: dict[str, Any]) -> str:
    """The page of a measurement."""
    machine = document["machine"]
    lines = [
        f"# Integer inference beside float, {document['name']}, {machine['date']}",
        "",
        f"{machine['cpu']}, commit {machine['commit']}; {document['seconds'] / 60:.0f} minutes."
        " Measured with the integer model (numpy) and the CPU engine on the same tokens, state"
        " carried through the text. The integer model is what the accelerator computes, bit for"
        " bit; its widths and roundings are those of docs/hardware-numerics.md.",
        "",
        "## At the default widths",
        "",
        f"| text | tokens | {_HEAD}",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(f"| {name} {_cells(row)}" for name, row in document["texts"].items()),
        "",
        f"## By width ({document['width_text']}, {document['width_tokens']:,} tokens)",
        "",
        "XF: fraction bits of the residual, which the bound of the weights leaves.",
        "",
        f"| widths | XF | {_HEAD}",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(_width_row(row) for row in document["widths"]),
        "",
        f"## How loose the bounds are (the largest over {document['loose_tokens']:,} tokens)",
        "",
        "| value | proved bound | largest found | ratio |",
        "|---|--:|--:|--:|",
        *(
            f"| {name} | {bound:,.1f} | {peak:,.1f} | {bound / max(peak, 1e-9):,.0f} |"
            for name, (bound, peak) in document["loose"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> str:
    return f"| {row['tokens']:,} {_figures(row)}"


def _figures(row: dict[str, Any]) -> str:
    return (
        f"| {row['float']:.4f} | {row['integer']:.4f} | {100 * row['more']:+.3f}"
        f" | {100 * row['argmax_agreement']:.2f} | {row['kl_nats']:.5f} |"
    )


def _width_row(row: dict[str, Any]) -> str:
    words = ", ".join(f"{name} {value}" for name, value in row["widths"].items()) or "default"
    if "refused" in row:
        return f"| {words} |  | refused: {row['refused']} | | | | |"
    return f"| {words} | {row['fractions']['residual']} {_figures(row)}"


def texts_of(options: argparse.Namespace) -> dict[str, str]:
    """{name: text}: --text, or the held-out texts of the model in the box in --data."""
    files = {path.name: path for path in options.text or []}
    if not files:
        files = {name: options.data / f"{name}.txt.bz2" for name in HELD_OUT}
    texts = {}
    for name, path in files.items():
        data = path.read_bytes()
        texts[name] = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode()
    return texts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the held-out texts")
    parser.add_argument("--text", type=Path, nargs="+", help="these texts instead (.txt, .txt.bz2)")
    parser.add_argument("--model", type=Path, default=Path(nomatmul.__file__).parent / "box",
                        help="a packed directory; default: the model in the box")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--width-tokens", type=int, default=2048, help="for each of the widths")
    parser.add_argument("--loose-tokens", type=int, default=256, help="for the bounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(*(options, parser), tokens=24, width_tokens=8, loose_tokens=2, out=temporary())
        options.out.mkdir(parents=True, exist_ok=True)
        write_texts(options.out, ["text"], articles=2)
        options.text = options.text or [options.out / "text.txt.bz2"]
    if not (options.data or options.text):
        parser.error("--data or --text is needed: what is scored")
    run(options)


def run(options: argparse.Namespace) -> None:
    machine, start = report.machine(""), time.monotonic()
    reader = PackedReader(options.model)
    engine = nomatmul.load(options.model, threads=options.threads)
    model = IntegerModel.from_packed(reader)
    texts = texts_of(options)
    found = {}
    for name, text in texts.items():
        found[name] = compare(engine, model, text, options.tokens)
        print(name, found[name], flush=True)
    first = next(iter(texts))
    ids = engine.tokenizer.encode(texts[first][: 32 * options.loose_tokens]).ids
    document = {
        "name": options.model.name,
        "machine": machine,
        "texts": found,
        "width_text": first,
        "width_tokens": options.width_tokens,
        "widths": by_width(reader, engine, texts[first], options),
        "loose_tokens": options.loose_tokens,
        "loose": how_loose(model, ids[: options.loose_tokens]),
    }
    document["seconds"] = time.monotonic() - start
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{machine['date']}-hardware-numerics"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(document))
    print(f"{stem}.md, {document['seconds']:.0f} s")


if __name__ == "__main__":
    main()
