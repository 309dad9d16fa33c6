"""The page of a measured server: tables, and what reaches its goal. A library of serve_load.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

# Of llama.cpp's tokens/s with the same streams, by instruction set.
GOALS = {"amx": 4.0, "avx512vnni": 2.5, "avx2": 1.5}
FIRST = 0.5  # of llama.cpp's time to the first token, 95th percentile
WHOLE = 0.95  # of lm.generate
STREAMED = {"box": 0.8}  # else as WHOLE
SECOND = 1.3  # times computing the new tokens alone


def markdown(document: dict[str, Any]) -> str:
    """The whole result."""
    about = document["machine"]
    theirs = f" llama-server: {document['their_build']}." if document["their_build"] else ""
    lines = [
        f"# The server under load, {about['date']}, {about['cpu']}",
        "",
        f"{about['cores']} cores usable, {document['threads']} threads a server, load average"
        f" {about['load_average']:.1f} at the start, {about['system']}, Python {about['python']},"
        f" commit {about['commit']}, huge pages {about['huge_pages']}.{theirs}",
        "",
        "[How it was measured](README.md#the-server-under-load-serve_loadpy)",
    ]
    for size, parts in document["sizes"].items():
        lines += ["", f"## {size}"]
        for part, words in _PARTS.items():
            if part in parts:
                lines += ["", *words(parts[part], size, parts[part]["asked"])]
    return "\n".join(lines) + "\n"


def _load(found: dict[str, Any], size: str, asked: dict[str, Any]) -> list[str]:
    head = ["", "tokens/s", "first token p50, s", "p95, s", "between tokens p95, ms"]
    head += ["longest, ms", "errors", "client, of a core", "peak MB"]
    lines = [
        f"{asked['streams']} streams, prompts of {asked['prompt']}, answers of {asked['answer']}"
        f" tokens, {asked['requests']} a client; turns of a server:"
        f" {len(found['sides'][0]['rounds'])}.",
        "",
        *_table(head),
    ]
    for side in found["sides"]:
        cells = [f"{_of(side, 'tokens_per_second'):.1f}"]
        cells += [f"{_of(side, name):.2f}" for name in ("first_p50", "first_p95")]
        cells += [f"{1e3 * _of(side, name):.1f}" for name in ("gap_p95", "gap_max")]
        cells += [str(sum(len(turn["errors"]) for turn in side["rounds"]))]
        client = "" if _is_loop(side) else f"{_of(side, 'client_cpu'):.0%}"
        lines.append(_row([side["label"], *cells, client, _megabytes(side)]))
    theirs = next((side for side in found["sides"] if side["label"].startswith("llama")), None)
    ours = [side for side in found["sides"] if side is not theirs]
    if theirs:
        lines += ["", *_ratios(ours, theirs, size)]
    return [*lines, "", found["note"]] if found["note"] else lines


def _ratios(ours: list[dict[str, Any]], theirs: dict[str, Any], size: str) -> list[str]:
    lines = _table([f"beside {theirs['label']}", "tokens/s", "goal", "", "first p95", "goal", ""])
    named = {side["label"].split()[-1]: side for side in ours}
    for isa, goal in GOALS.items():
        if isa not in named:
            command = f"`serve_load.py --sizes {size} --only load --isa {isa}`"
            lines.append(_row([isa, f"not measured (needs {isa}): {command}", *[""] * 5]))
            continue
        side = named[isa]
        rate = _of(side, "tokens_per_second") / _of(theirs, "tokens_per_second")
        first = _of(side, "first_p95") / _of(theirs, "first_p95")
        cells = [f"{rate:.2f}x", f"{goal:g}x", _met(rate >= goal)]
        cells += [f"{first:.2f}x", f"{FIRST:g}x", _met(first <= FIRST)]
        lines.append(_row([isa, *cells]))
    return lines


def _one(found: dict[str, Any], size: str, asked: dict[str, Any]) -> list[str]:
    median, share = found["median"], found["share"]
    lines = [f"One stream of {asked['tokens']} tokens behind 16, tokens/s.", ""]
    lines += _table(
        ["`lm.generate`", "not streamed", "share", "goal", "", "streamed", "share", "goal", ""]
    )
    cells = [f"{median['inside']:.1f}"]
    for what, goal in (("whole", WHOLE), ("streamed", STREAMED.get(size, WHOLE))):
        met = _met(share[what] >= goal)
        cells += [f"{median[what]:.1f}", f"{share[what]:.1%}", f"{goal:.0%}", met]
    return [*lines, _row(cells)]


def _second(found: dict[str, Any], size: str, asked: dict[str, Any]) -> list[str]:
    head = ["", "first token, ms", "computed tokens", "new tokens in the engine, ms"]
    head += ["reading the state, ms", "ratio", "goal", "", "the same tokens as a request, ms"]
    lines = [
        f"A second turn of {asked['new']} new tokens behind {asked['history']}; medians of"
        f" {len(found['turns'])}.",
        "",
        *_table(head),
    ]
    for name, what in (("turns", "in the same server"), ("restarted", "after a restart")):
        turns, again = found[name], name == "restarted"
        first, inside = _median(turns, "first"), _median(turns, "inside")
        read = _median(turns, "read") if again else 0.0
        ratio = first / (inside + read)
        computed = "/".join(sorted({str(turn["computed"]) for turn in turns}))
        cells = [f"{1e3 * first:.1f}", computed, f"{1e3 * inside:.1f}"]
        cells += [f"{1e3 * read:.1f}" if again else "", f"{ratio:.2f}x", f"{SECOND:g}x"]
        alone = "" if again else f"{1e3 * _median(turns, 'alone'):.1f}"
        lines.append(_row([what, *cells, _met(ratio <= SECOND), alone]))
    return lines


def _edits(found: dict[str, Any], size: str, asked: dict[str, Any]) -> list[str]:
    new, computed = found["new"], found["computed"]
    return [
        f"Ten turns of editing and branching, the last answer made again: {sum(computed)} tokens of"
        f" prompts computed for {sum(new)} new ones: {_met(new == computed)}.",
        f"New by turn: {', '.join(map(str, new))}. Computed: {', '.join(map(str, computed))}.",
    ]


def _gap(found: dict[str, Any], size: str, asked: dict[str, Any]) -> list[str]:
    return [
        f"While a prompt of {asked['long']} tokens is read ({found['long_first']:.1f} s), a running"
        f" stream waits for {1e3 * found['longest']:.0f} ms at the longest,"
        f" {1e3 * found['median']:.0f} ms in the median of {found['events']} events; before,"
        f" {1e3 * found['calm']:.1f} ms.",
    ]


_PARTS = {"load": _load, "one": _one, "second": _second, "edits": _edits, "gap": _gap}


def _of(side: dict[str, Any], name: str) -> float:
    values = [turn[name] for turn in side["rounds"] if name in turn]
    return statistics.median(values) if values else 0.0


def _median(turns: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(turn[name] for turn in turns)


def _is_loop(side: dict[str, Any]) -> bool:
    return bool(side["label"].endswith("loop"))


def _megabytes(side: dict[str, Any]) -> str:
    return f"{side['memory']['peak_resident'] / 1e6:.0f}"


def _met(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _table(head: Sequence[str]) -> list[str]:
    return [_row(head), _row(["---", *["--:"] * (len(head) - 1)])]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
