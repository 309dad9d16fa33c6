"""The texts of the box's base: all of them, in three parts, because 64 MiB travel at a time.

    python studies/box/base.py gather  --data ../shared/data --work runs/recipes
    python studies/box/base.py prepare --work runs/recipes --part a     then b and c

`gather` runs where the texts are and writes WORK/box-a, -b and -c; `prepare` makes cleaned
documents (WORK/all-clean) and tokens (WORK/train-all-a, WORK/valid-all-TEXT) on the GPU machine.
--tokenizer is what texts.py made. The cells are the part `box` of studies/recipes/run.py:

    python studies/recipes/run.py train --parts box --work runs/recipes --out $OUT --lanes 1
"""

from __future__ import annotations

import argparse
import bz2
import itertools
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.documents import write_documents
from benchmarks.dry_run import add_tiny, temporary, write_texts
from benchmarks.gpu_common import ROOT
from nomatmul.formats.cpus import usable_cpus
from nomatmul.formats.files.atomic import write_file
from nomatmul.train.documents import find_sources
from nomatmul.train.shards import build_shards
from nomatmul.train.tokenizer import load_tokenizer
from studies.compare.plan import BYTE_PAIRS
from studies.recipes.clean import clean
from studies.recipes.texts import ALL, HELD_OUT, STORIES, Kind

PARTS = {  # at most 43 MB each, beside a checkout of 18
    "a": [f"wikipedia-en-2015/train-0{number}" for number in range(3)]
    + ["wikipedia-en-2015/valid", "english-novels-98/valid"],
    "b": [f"wikipedia-en-2015/train-0{number}" for number in range(3, 6)],
    "c": ["english-novels-98/train", "eltec-eng/train"],
}
_NEXT = "\n<|endoftext|>\n"
_NAMES = {"wikipedia-en-2015": "wikipedia", "english-novels-98": "novels", "eltec-eng": "eltec"}


def gather(args: argparse.Namespace) -> None:
    """The compressed texts of each part, one folder each; stories as one text."""
    for name_of_part, names in PARTS.items():
        folder = args.work / f"box-{name_of_part}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            source, part = name.split("/")
            data = (args.data / f"{name}.txt.bz2").read_bytes()
            write_file(folder / f"{_NAMES[source]}-{part}.txt.bz2", data)
    for place, part in (("a", "valid"), ("b", "train")):
        files = [args.data / f"stories-open/{name}/{part}.txt.bz2" for name in STORIES]
        text = _NEXT.join(
            bz2.decompress(file.read_bytes()).decode("utf-8").strip() for file in files
        )
        write_file(
            args.work / f"box-{place}/stories-{part}.txt.bz2", bz2.compress(text.encode("utf-8"), 9)
        )


def prepare(args: argparse.Namespace) -> None:
    """Documents and tokens of the part that is here."""
    began = time.monotonic()
    for cleaned in (True, False):
        _documents(args.work, args.part, cleaned)
    tokenizer = load_tokenizer(args.tokenizer)
    names = sorted(path.name.split(".")[0] for path in (args.work / f"box-{args.part}").iterdir())
    clean_names = [name for name in names if not name.endswith("-valid")]
    files = [str(args.work / f"all-clean/{name}.jsonl") for name in clean_names]
    jobs = [(files, f"train-{ALL.name}-{args.part}", min(2 * len(files), usable_cpus()))]
    for kind in (ALL, Kind(False, small=True, every=True)):
        folder = args.work / ("all-clean" if kind.cleaned else "all-raw")
        for text in HELD_OUT:
            if f"{text}-valid" in names:
                target = f"valid-{kind.name}-{text}"
                jobs.append(([str(folder / f"{text}-valid.jsonl")], target, 1))

    def tokens(job: tuple[list[str], str, int]) -> None:
        build_shards(find_sources(job[0]), tokenizer, args.work / job[1], workers=job[2])

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(tokens, jobs))
    print(f"part {args.part}: {time.monotonic() - began:.0f} s", flush=True)


def _documents(work: Path, part: str, cleaned: bool) -> None:
    """JSONL of every text of the part (raw: of held-out ones only) that is not there yet."""
    folder = work / ("all-clean" if cleaned else "all-raw")
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((work / f"box-{part}").glob("*.txt.bz2"))
    if not sources:
        raise ValueError(f"{work / f'box-{part}'} holds no .txt.bz2: run `gather` first")
    jobs = [(path, folder / f"{path.name.removesuffix('.txt.bz2')}.jsonl") for path in sources]
    jobs = [job for job in jobs if not job[1].exists() and (cleaned or "-valid" in job[1].name)]
    edit = clean if cleaned else str
    with ProcessPoolExecutor(min(len(jobs) or 1, usable_cpus())) as pool:
        list(pool.map(partial(write_documents, edit=edit), jobs))


def rehearse(args: argparse.Namespace) -> None:
    """The dry run: both steps with invented texts and today's tokenizer of the box."""
    args.work = args.out or temporary()
    args.data = args.work / "texts"
    stories = [f"stories-open/{name}/{part}" for name in STORIES for part in ("train", "valid")]
    write_texts(args.data, [*itertools.chain(*PARTS.values()), *stories], articles=4)
    gather(args)
    args.tokenizer = BYTE_PAIRS
    for args.part in PARTS:
        prepare(args)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"gather": gather, "prepare": prepare}
    parser.add_argument("step", choices=steps, nargs="?", help="not needed with --tiny: both")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="texts, tokens")
    parser.add_argument("--out", type=Path, help="of the dry run")
    parser.add_argument("--part", choices=PARTS, default="a")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/box/tokenizer.json"))
    add_tiny(parser)
    args = parser.parse_args(words)
    if args.tiny:
        rehearse(args)
    elif args.step is None:
        parser.error("name a step: gather or prepare")
    else:
        steps[args.step](args)


if __name__ == "__main__":
    main()
