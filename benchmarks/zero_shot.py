"""Zero-shot tasks of lm-evaluation-harness on local files, and texts, with a packed model: the
scores of a card.

    python benchmarks/zero_shot.py --data DIR              # the model in the box, all rows
    python benchmarks/zero_shot.py --data DIR --limit 500  # the first rows of each task
    python benchmarks/zero_shot.py --data DIR --texts wikitext-2/wiki.test.raw.bz2 --model PACKED

The tasks are in tasks/, local_data.py there says which files of DIR they read. Needs the extra
`eval`. Writes a table and every figure to benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import report
from dry_run import add_tiny, shrink, temporary
from zero_shot_rows import TASKS, write_local_data

from nomatmul.evaluate import score_text
from nomatmul.formats.files.texts import read_text

NAMES = (
    "arc_easy", "arc_challenge", "hellaswag", "lambada_openai", "openbook_qa", "piqa",
    "winogrande",
)  # fmt: skip
METRICS = ("acc", "acc_norm", "perplexity")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """{task: figures}, {text: figures} and the seconds that all took, loading left out."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from nomatmul.evaluate.harness import HarnessModel

    model = HarnessModel(
        options.model, threads=options.threads, add_bos_token=options.bos, batch_size=64
    )
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data": str(options.data)}
    )
    start = time.monotonic()
    tasks = [f"local_{name}" for name in options.tasks]
    found = simple_evaluate(
        model, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=100
    )
    assert found is not None
    texts = {Path(file).name: _score(model.lm, file, options) for file in options.texts}
    seconds = time.monotonic() - start
    figures = {}
    for name, task in zip(options.tasks, tasks, strict=True):
        values, samples = found["results"][task], found["samples"][task]
        figures[name] = {
            "rows": len(samples),
            "all_rows": found["n-samples"][task]["original"],
            "chance": sum(_chance(sample) for sample in samples) / len(samples),
            **{metric: _with_error(values, metric) for metric in METRICS
               if f"{metric},none" in values},
        }  # fmt: skip
    return {
        "seconds": seconds,
        "threads": model.lm.backend.threads,
        "bos": options.bos,
        "tasks": figures,
        "texts": texts,
    }


def _score(model: Any, file: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte, and perplexity a word: words are what white space divides, as the harness's
    wikitext counts them (of a part of the text: in proportion to its bytes)."""
    text = read_text(file)
    score = score_text(model, text, max_tokens=options.max_tokens)
    words = len(text.split()) * score.bytes / len(text.encode("utf-8"))
    nats = score.bits_per_byte * math.log(2) * score.bytes
    return {
        **dataclasses.asdict(score),
        "words": round(words),
        "word_perplexity": math.exp(min(nats / words, 700.0)),
    }


def _chance(sample: dict[str, Any]) -> float:
    """How often a guess among the choices is right; 0 where words are open."""
    return 1 / len(sample["arguments"]) if len(sample["arguments"]) > 1 else 0.0


def _with_error(values: dict[str, Any], metric: str) -> list[float | None]:
    error = values.get(f"{metric}_stderr,none")
    return [values[f"{metric},none"], error if isinstance(error, float) else None]


def markdown(document: dict[str, Any]) -> str:
    """The page of a measurement."""
    found, machine = document["found"], document["machine"]
    bos = "a bos token before each text" if found["bos"] else "no bos token before texts"
    lines = [
        f"# Zero-shot tasks, {document['name']}, {machine['date']}",
        "",
        f"{machine['cpu']}, {found['threads']} threads, commit {machine['commit']};"
        f" lm-eval {document['lm_eval']}, no examples in the prompt, {bos};"
        f" {found['seconds']:.0f} s for all.",
        "",
        "| task | rows | accuracy, % | by length, % | chance, % | perplexity |",
        "|---|---|---|---|---|---|",
        *(_row(name, values) for name, values in found["tasks"].items()),
    ]
    if found["texts"]:
        lines += ["", "| text | tokens | bytes | bits per byte | perplexity a word |"]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {name} | {score['tokens']:,} | {score['bytes']:,} | {score['bits_per_byte']:.4f}"
            f" | {score['word_perplexity']:.1f} |"
            for name, score in found["texts"].items()
        ]
    return "\n".join(lines) + "\n"


def _row(name: str, values: dict[str, Any]) -> str:
    share = [_percent(values.get(metric)) for metric in ("acc", "acc_norm")]
    chance = f"{100 * values['chance']:.0f}" if values["chance"] else ""
    perplexity = f"{values['perplexity'][0]:.0f}" if "perplexity" in values else ""
    rows = f"{values['rows']:,}"
    if values["rows"] < values["all_rows"]:
        rows += f" of {values['all_rows']:,}"
    return f"| {name} | {rows} | {share[0]} | {share[1]} | {chance} | {perplexity} |"


def _percent(value: list[float | None] | None) -> str:
    if value is None or value[0] is None:
        return ""
    error = "" if value[1] is None else f" ± {100 * value[1]:.1f}"
    return f"{100 * value[0]:.1f}{error}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory of the tasks' files")
    parser.add_argument("--model", help="a packed directory; default: the model in the box")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=list(NAMES), metavar="TASK")
    parser.add_argument("--limit", type=int, help="rows of each task; default: all")
    parser.add_argument("--texts", nargs="+", default=[], help="files of text, .bz2 too")
    parser.add_argument("--max-tokens", type=int, help="of each text; default: all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bos", action="store_true", help="a bos token before each text")
    parser.add_argument("--name", default="box", help="of the model, in the results' name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    add_tiny(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        shrink(options, parser, threads=1, tasks=["piqa", "lambada_openai"], out=temporary())
        options.out.mkdir(parents=True, exist_ok=True)
        options.data = options.data or write_local_data(options.out)
        if not options.texts:
            (options.out / "words.txt").write_text("The king was old. The queen was young.\n")
            options.texts = [str(options.out / "words.txt")]
    if options.data is None:
        parser.error("--data is needed: the directory of the tasks' files")
    machine = report.machine("")
    import lm_eval

    document = {
        "name": options.name,
        "machine": machine,
        "lm_eval": lm_eval.__version__,
        "found": measure(options),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{machine['date']}-zero-shot-{options.name}"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(document))
    print(markdown(document))
    print(f"{stem}.md, {document['found']['seconds']:.0f} s")


if __name__ == "__main__":  # settings of this process, which whoever imports the script keeps
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, nothing is asked for
    logging.disable(logging.WARNING)
    main()
