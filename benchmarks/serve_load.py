"""The server under load, paired with llama.cpp's own on the same cores.

Both serve models of equal shape with random ternary weights (ours also the model in the box):
16 clients at once, prompts of 256 tokens that have nothing in common, answers of 64. The servers
take turns, A B A B, while the others are stopped; the client runs on the same cores and says what
it took. Of ours alone: one stream beside `lm.generate` in a process, the first token of a second
turn (also after a restart), what is computed while a conversation is edited and branched, and the
longest gap that a long prompt tears into a running stream. Writes
benchmarks/results/DATE-serve-NAME.md and .json; parts measured before, of the same name, stay.

    python benchmarks/serve_load.py --llama-server PATH/llama-server --name xeon
    python benchmarks/serve_load.py --sizes 370M --only load --llama-server PATH/llama-server
    python benchmarks/serve_load.py --sizes box --only one,second,edits,gap

llama-server is llama.cpp's, built for the machine; without it a loop of llama_decode stands in.
Needs: pip install "nomatmul[serve,bench]".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llama_side
import report
import serve_page
from dry_run import add_tiny, shrink, temporary
from serve_models import their_shape, write_packed, write_theirs
from serve_parts import Setting, edits, gap, one, second
from serve_sides import DecodeLoop, Served, ours, theirs
from serve_traffic import measure

from nomatmul.engine import cpu_report
from nomatmul.evaluate.speed import SIZES

TINY = {"vocab_size": 512, "hidden_size": 256, "num_layers": 1, "intermediate_size": 256}
BOX = {"vocab_size": 8192, "hidden_size": 640, "num_layers": 9, "intermediate_size": 1600}
SHAPES: dict[str, dict[str, Any]] = {
    "box": BOX, "370M": SIZES["370M"], "BitNet-2B-4T": SIZES["BitNet-2B-4T"], "tiny": TINY,
}  # fmt: skip
ONE: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "one": one,
    "second": second,
    "edits": edits,
    "gap": gap,
}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    document = _document(arguments)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            setting = Setting(size, SHAPES[size], Path(scratch), arguments)
            if size != "box":
                write_packed(Path(scratch) / "model", SHAPES[size])
            for part in arguments.only:
                _log(f"{size}: {part}")
                start = time.perf_counter()
                found = load(setting) if part == "load" else ONE[part](setting)
                found |= {"seconds": time.perf_counter() - start, "asked": _asked(arguments)}
                document["sizes"].setdefault(size, {})[part] = found
                _write(arguments, document)  # after every part: a run cut short leaves its results
    print(serve_page.markdown(document))
    return 0


def load(setting: Setting) -> dict[str, Any]:
    """All servers under load."""
    arguments = setting.arguments
    sides: list[Served | DecodeLoop] = []
    shape, note = their_shape(setting.shape)
    try:
        for isa in arguments.isas:
            server = ours(f"nomatmul {isa}", setting.models, arguments.threads, isa=isa)
            server.pause()
            sides.append(server)
        if not arguments.ours_only:
            sides.append(_their_side(setting, shape))
        return {"note": note, "sides": measure(setting, sides)}
    finally:
        for side in sides:
            side.close()


def _their_side(setting: Setting, shape: dict[str, Any]) -> Served | DecodeLoop:
    arguments, path = setting.arguments, setting.scratch / "theirs.gguf"
    context = -(-(arguments.prompt + arguments.answer + 1) // 256) * 256
    write_theirs(path, shape, context)
    if arguments.llama_server:
        side: Served | DecodeLoop = theirs(arguments.llama_server, path, arguments.threads, context)
        side.pause()
    else:
        side = DecodeLoop(path, arguments.threads)
    path.unlink()
    return side


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="box,370M,BitNet-2B-4T", help="some of these")
    parser.add_argument("--only", default="load,one,second,edits,gap", help="some of these parts")
    parser.add_argument("--llama-server", default="", metavar="PATH", help="llama.cpp's server")
    parser.add_argument("--their-build", default="", help="what the page says of llama-server")
    parser.add_argument("--ours-only", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--isa", default="", help="our instruction sets (default: all but scalar)")
    parser.add_argument("--threads", type=int, default=2, help="of either server")
    parser.add_argument("--streams", type=int, default=16, help="clients at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=2, help="of a client in a turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of a server")
    parser.add_argument("--history", type=int, default=2000, help="tokens before a second turn")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a second turn")
    parser.add_argument("--long", type=int, default=4000, help="tokens of the prompt that disturbs")
    parser.add_argument("--tokens", type=int, default=256, help="of the answer of a single stream")
    parser.add_argument("--repeats", type=int, default=5, help="of single streams, second turns")
    parser.add_argument("--name", default="", help="name of the machine in the result's name")
    parser.add_argument("--out", default=None, help="folder (default: benchmarks/results)")
    parser.add_argument("--scratch", default=None, help="directory for the model files")
    add_tiny(parser)
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        shrink(
            arguments, parser, sizes="tiny", threads=1, streams=3, prompt=8, answer=4, requests=1,
            rounds=1, history=40, new=4, long=60, tokens=8, repeats=1,
        )  # fmt: skip
        arguments.isa = arguments.isa or _available_isas()[0]
        arguments.out = arguments.out or temporary()
    arguments.out = Path(arguments.out or Path(__file__).with_name("results"))
    if not arguments.ours_only and (names := llama_side.missing()):
        words = f"{' and '.join(names)} not installed: pip install 'nomatmul[bench]'"
        if not arguments.tiny:
            parser.error(f"{words}, or --ours-only")
        _log(f"llama.cpp is left out: {words}")
        arguments.ours_only = True
    arguments.sizes = _chosen(parser, arguments.sizes, SHAPES)
    arguments.only = _chosen(parser, arguments.only, ["load", *ONE])
    arguments.isas = [part for part in arguments.isa.split(",") if part] or _available_isas()
    return arguments


def _chosen(parser: argparse.ArgumentParser, given: str, known: Any) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{name} is none of {', '.join(known)}")
    return names


def _available_isas() -> list[str]:
    """Our instruction sets on this CPU, best first, without the scalar one."""
    return [isa for isa in cpu_report()["isas"] if isa != "scalar"] or ["scalar"]


def _stem(arguments: argparse.Namespace) -> Path:
    machine = report.machine(arguments.name)
    return Path(arguments.out) / f"{machine['date']}-serve-{machine['name']}"


def _document(arguments: argparse.Namespace) -> dict[str, Any]:
    """What parts measured before left, of the same day and name; else an empty one."""
    path = _stem(arguments).with_suffix(".json")
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"sizes": {}}
    document["machine"] = report.machine(arguments.name)
    document["threads"] = arguments.threads
    document["their_build"] = arguments.their_build or document.get("their_build", "")
    return document


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("streams", "prompt", "answer", "requests", "history", "new", "long", "tokens")
    return {name: getattr(arguments, name) for name in names}


def _write(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    stem = _stem(arguments)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(serve_page.markdown(document))


def _log(text: str) -> None:
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
