"""The machine in words, and the measured pairings as Markdown tables.

A library of the CPU benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def machine(name: str) -> dict[str, Any]:
    """Date, CPU, kernel, commit and versions that a table must carry."""
    model = "unknown CPU"
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    slug = re.sub(r"[^a-z0-9]+", "-", (name or model).lower()).strip("-")
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "name": slug[:40].strip("-"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "nomatmul": _version("nomatmul"),
        "llama_cpp_python": _version("llama-cpp-python"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
    }


def markdown(document: dict[str, Any]) -> str:
    """The whole result as a page."""
    about = document["machine"]
    lines = [
        f"# CPU speed and memory, {about['date']}, {about['cpu']}",
        "",
        f"{about['cores']} cores usable, load average {about['load_average']:.1f} at the start,"
        f" {about['system']}, Python {about['python']}, commit {about['commit']},"
        f" llama-cpp-python {about['llama_cpp_python']}; {document['seconds'] / 60:.0f} minutes.",
        "",
        "[How it was measured](README.md#speed-and-memory-against-llamacpp-make-bench)",
    ]
    for pairing in document["pairings"]:
        lines += ["", *_pairing(pairing)]
    return "\n".join(lines) + "\n"


def _pairing(pairing: dict[str, Any]) -> list[str]:
    sides = pairing["sides"]
    threads = _threads(pairing)
    kinds = sorted({key.split("@")[0] for key in sides[0]["rates"]}, key=_order)
    columns = [(what, t) for what in kinds for t in threads]
    names = {"prefill": f"prefill {pairing['prefill_tokens']}", "batch": "batch 16"}
    header = [f"{names.get(what, what)}, {t} thr" for what, t in columns]
    lines = [f"## {pairing['size']}, {pairing['packing']}", ""]
    if "token_mixer" in pairing["shape"]:
        lines[1:1] = ["", f"Layers: {pairing['shape']['num_layers']}."]
    lines += [_row(["", *header, "head", "head MB", "peak MB", "huge pages MB"])]
    lines += [_row(["---"] + ["--:"] * (len(header) + 4))]
    for side in sides:
        cells = [_rate(side, what, t) for what, t in columns]
        load, memory = side["load"], side["memory"]
        head = [load["head_form"], f"{load['head_bytes'] / 1e6:.0f}"]
        sizes = [f"{memory[k] / 1e6:.0f}" for k in ("peak_resident", "huge_pages")]
        lines.append(_row([side["label"], *cells, *head, *sizes]))
    for theirs in (side for side in sides if _is_theirs(side)):
        for side in (side for side in sides if not _is_theirs(side)):
            cells = [_ratio(side, theirs, what, t) for what, t in columns]
            share = side["memory"]["peak_resident"] / theirs["memory"]["peak_resident"]
            label = f"{side['label']} : {theirs['label']}"
            lines.append(_row([label, *cells, "", "", f"{share:.2f}x", ""]))
    return [*lines, "", *_limits(pairing, sides[0], threads), *_parts(pairing, sides[0])]


def _order(what: str) -> tuple[int, int]:
    """Decoding, by the length of its context, before prompts and batches."""
    word, _, length = what.partition(" ")
    return ("decode", "prefill", "batch").index(word), int(length or 0)


def _is_theirs(side: dict[str, Any]) -> bool:
    return bool(side["label"].startswith("llama"))


def _threads(pairing: dict[str, Any]) -> list[int]:
    return sorted({int(key.split("@")[1]) for side in pairing["sides"] for key in side["rates"]})


def _limits(pairing: dict[str, Any], best: dict[str, Any], threads: list[int]) -> list[str]:
    """Bandwidth, how much of it decoding uses, and what a batch gains."""
    packed = best["load"]["packed_bytes_per_token"]
    first = min((key.split("@")[0] for key in best["rates"]), key=_order)
    batches = any(key.startswith("batch") for key in best["rates"])
    more = ["batch : one"] if batches else []
    head = ["threads", "read GB/s", f"of it, {best['label']}, {first}", "MB of weights a token"]
    lines = [_row([*head, *more])]
    lines.append(_row(["--:"] * (4 + len(more))))
    for t in threads:
        bandwidth = statistics.median(pairing["bandwidth"][str(t)])
        decode = _median(best, first, t)
        cells = [
            f"{bandwidth / 1e9:.1f}",
            f"{decode * packed / bandwidth:.0%}",
            f"{packed / 1e6:.0f}",
        ]
        cells += [f"{_median(best, 'batch', t) / decode:.1f}x"] if batches else []
        lines.append(_row([str(t), *cells]))
    return lines


def _parts(pairing: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """Milliseconds of the parts of a step, and what a second reads in each, of the bandwidth."""
    if not best.get("parts"):
        return []
    load, shape = best["load"], pairing["shape"]
    names = ("projections", "channel mixer", "attention core", "head", "norms")
    rates = ("linears", "head", "cache")
    header = [f"{name}, ms" for name in names] + [f"{name} GB/s (share)" for name in rates]
    lines = ["", _row(["a step behind context, threads", *header])]
    lines.append(_row(["---"] + ["--:"] * (len(names) + 3)))
    linears = load["packed_bytes_per_token"] - load["head_bytes"]
    width = 4 * shape["num_kv_heads"] * shape.get("head_dim", 0)  # keys and values, float16
    width = width or 4 * shape["num_kv_heads"] * shape["hidden_size"] // shape["num_heads"]
    for key, seconds in best["parts"].items():
        context, threads = key.split("@")
        bandwidth = statistics.median(pairing["bandwidth"][threads])
        cache = int(context) * width * shape["num_layers"]
        spent = {name: seconds.get(name, 0.0) for name in names}
        read = [
            linears / (spent["projections"] + spent["channel mixer"]),
            load["head_bytes"] / spent["head"],
            cache / spent["attention core"],
        ]
        cells = [f"{1e3 * spent[name]:.2f}" for name in names]
        cells += [f"{rate / 1e9:.1f} ({rate / bandwidth:.0%})" for rate in read]
        lines.append(_row([f"{context}, {threads}", *cells]))
    return lines


def _median(side: dict[str, Any], what: str, threads: int) -> float:
    return statistics.median(side["rates"][f"{what}@{threads}"])


def _rate(side: dict[str, Any], what: str, threads: int) -> str:
    value = _median(side, what, threads)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(ours: dict[str, Any], theirs: dict[str, Any], what: str, threads: int) -> str:
    return f"{_median(ours, what, threads) / _median(theirs, what, threads):.1f}x"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
