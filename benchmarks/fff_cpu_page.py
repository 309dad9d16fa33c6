"""The measured conditional layers as Markdown: times and ratios to dense layers.

A library of fff_cpu.py.
"""

from __future__ import annotations

from typing import Any

Cell = dict[str, Any]

# The dense layer of the same weights.
OWN_TYPE = {
    "fff f32": "torch fp32",
    "fff bf16": "torch bf16",
    "fff int8": "torch int8",
    "fff ternary": "dense ternary",
}


def line(seconds: dict[str, dict[str, float]], batch: int) -> str:
    """One cell in one line, for the terminal: microseconds a token."""
    return ", ".join(f"{k} {v['median'] / batch * 1e6:.2f}" for k, v in seconds.items())


def markdown(document: dict[str, Any]) -> str:
    """Return the whole page."""
    about = document["machine"]
    lines = [
        f"# Conditional feed-forward layers on a CPU, {about['date']}, {about['cpu']}",
        "",
        f"{about['cores']} cores usable, instruction set {about['isa']}, load average"
        f" {about['load_average']:.1f} at the start, {about['system']}, Python {about['python']},"
        f" torch {about['torch']}, commit {about['commit']}; {document['minutes']:.1f} minutes.",
        "",
        "[How it was measured](README.md#one-conditional-layer-on-a-cpu-fff_cpupy)",
    ]
    shapes = list(dict.fromkeys(cell["shape"] for cell in document["cells"]))
    for shape in shapes:
        cells = [cell for cell in document["cells"] if cell["shape"] == shape]
        lines += ["", *_shape(shape, cells, document["promises"][shape])]
    if document["training"] is not None:
        lines += ["", *_training(document["training"])]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(cell: Cell, name: str) -> float:
    return float(cell["seconds"][name]["median"])


def _ours(cell: Cell) -> list[str]:
    names = cell["seconds"]
    return [name for name in names if name.startswith("fff") and not name.endswith("Python")]


def _dense(cell: Cell) -> list[str]:
    return [name for name in cell["seconds"] if not name.startswith("fff")]


def _best(cell: Cell, names: list[str]) -> str:
    return min(names, key=lambda name: _time(cell, name))


def _micro(seconds: float) -> str:
    micro = seconds * 1e6
    return f"{micro:.2f}" if micro < 10 else f"{micro:.1f}" if micro < 100 else f"{micro:.0f}"


def _shape(shape: str, cells: list[Cell], promise: float) -> list[str]:
    names = list(dict.fromkeys(name for cell in cells for name in cell["seconds"]))
    lines = [f"## {shape}", "", "Microseconds a token:", ""]
    lines += [_row(["batch", "threads", *names]), _row(["--:"] * (len(names) + 2))]
    for cell in cells:
        row = [str(cell["batch"]), str(cell["threads"])]
        for name in names:
            there = name in cell["seconds"]
            row.append(_micro(_time(cell, name) / cell["batch"]) if there else "")
        lines.append(_row(row))
    ours = _ours(cells[0])
    lines += [
        "",
        f"Ratios, and shares of {promise:.1f}:",
        "",
        _row(["batch", "threads", "best dense", *ours]),
        _row(["--:", "--:", "---", *["--:"] * len(ours)]),
    ]
    for cell in cells:
        best = _best(cell, _dense(cell))
        row = [str(cell["batch"]), str(cell["threads"]), best]
        for name in ours:
            full, over, own = (
                _time(cell, dense) / _time(cell, name)
                for dense in ("torch fp32", best, OWN_TYPE[name])
            )
            shares = [f"{gain:.1f} ({100 * gain / promise:.0f} %)" for gain in (over, own)]
            row.append(" / ".join([f"{full:.1f}", *shares]))
        lines.append(_row(row))
    return lines


def _training(training: dict[str, Any]) -> list[str]:
    lines = ["## Training step", ""]
    lines += [_row(["implementation", "ms, median", "quartiles"]), _row(["---", "--:", "--:"])]
    for name, found in training.items():
        low, mid, high = (f"{1e3 * found[key]:.1f}" for key in ("low", "median", "high"))
        lines.append(_row([name, mid, f"{low} - {high}"]))
    return lines
