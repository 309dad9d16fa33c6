"""The measured conditional layers as Markdown: times, ratios to dense layers, what was asked.

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
        "One layer, 768 wide; T x L is T trees of L levels. Every contender in one process, taking"
        " turns; 16 layers' weights in rotation, random distinct inputs; medians in microseconds a"
        " token. The dense layers have as many neurons as the trees have nodes. `dense ternary` is"
        " our own, its two products alone. Above 2,048 tokens dense layers are measured at 2,048"
        " (their time a token is flat from there on). Conditional layers are timed by the native"
        " core's clock; one column shows what a call from Python takes. `int8` rows meet inputs"
        " quantised to int8 a token, as in torch's dynamic int8. Where a CPU has no unit for"
        " bfloat16, torch's bf16 is slower than its fp32, and a share over it says little.",
    ]
    shapes = list(dict.fromkeys(cell["shape"] for cell in document["cells"]))
    lines += _goals(document)
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
    lines = [f"## {shape} levels", "", "Microseconds a token:", ""]
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
        "Times faster than dense fp32 / than the best dense layer / than the dense layer of its own"
        f" type, for bf16 and int8 torch's (share of the {promise:.1f} that visited to all neurons"
        " promises):",
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


def _find(document: dict[str, Any], shape: str, batch: int, threads: int) -> Cell | None:
    for cell in document["cells"]:
        if (cell["shape"], cell["batch"], cell["threads"]) == (shape, batch, threads):
            return dict(cell)
    return None


def _asked(document: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """(what, asked, reached, in words) of one tree of 12 levels."""
    rows: list[tuple[str, float, float, str]] = []
    for batch, over_fp32, over_best in ((1, 800.0, 350.0), (128, None, 25.0), (16384, None, 20.0)):
        cell = _find(document, "1 x 12", batch, 1)
        if cell is None:
            continue
        ours, dense = _best(cell, _ours(cell)), _best(cell, _dense(cell))
        theirs = _best(cell, [name for name in _dense(cell) if name.startswith("torch")])
        words = f"1 x 12, batch {batch}, 1 thread, {ours}, times faster than"
        if over_fp32 is not None:
            reached = _time(cell, "torch fp32") / _time(cell, ours)
            rows.append((f"{words} dense fp32", over_fp32, reached, "x"))
        for name in dict.fromkeys((dense, theirs)):
            place = "the best dense" if name == dense else "the best of torch alone"
            gain = _time(cell, name) / _time(cell, ours)
            rows.append((f"{words} {place}, {name}", over_best, gain, "x"))
    for batch in (128, 16384):
        one, two = (_find(document, "1 x 12", batch, threads) for threads in (1, 2))
        if one is not None and two is not None:
            ours = _best(two, _ours(two))
            gain = _time(one, ours) / _time(two, ours)
            rows.append((f"1 x 12, batch {batch}, {ours}, two threads against one", 1.7, gain, "x"))
    return rows


def _shares(document: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    rows: list[tuple[str, float, float, str]] = []
    for shape in ("16 x 7", "128 x 4"):
        for batch in (1, 128):
            cell = _find(document, shape, batch, 1)
            if cell is None:
                continue
            dense, promise = _best(cell, _dense(cell)), document["promises"][shape]
            theirs = _best(cell, [name for name in _dense(cell) if name.startswith("torch")])
            for name in ("fff bf16", "fff int8", "fff ternary"):
                places = {"the best dense": dense, "its own type": OWN_TYPE[name]}
                places["the best of torch"] = theirs
                for over in dict.fromkeys(places.values()):
                    share = 100 * _time(cell, over) / _time(cell, name) / promise
                    what = ", ".join(place for place, there in places.items() if there == over)
                    words = f"{shape}, batch {batch}, 1 thread, {name}, of the promise over {over}"
                    rows.append((f"{words} ({what})", 60.0, share, " %"))
    return rows


def _goals(document: dict[str, Any]) -> list[str]:
    rows = _asked(document) + _shares(document)
    training = document["training"]
    if training is not None:
        gain = training["masked"]["median"] / training["native"]["median"]
        rows.append(("training step, batch 4096, 2 threads, over masked dense", 20.0, gain, "x"))
    lines = ["", "## Asked and reached", "", _row(["figure", "asked", "reached", ""])]
    lines.append(_row(["---", "--:", "--:", "---"]))
    for words, asked, reached, unit in rows:
        mark = "reached" if reached >= asked else "MISSED"
        lines.append(_row([words, f"{asked:g}{unit}", f"{reached:.1f}{unit}", mark]))
    return lines


def _training(training: dict[str, Any]) -> list[str]:
    lines = ["## Training step", "", "Forward and backward of the layer 1 x 12 at batch 4,096, two"]
    lines[-1] += " threads, gradients of inputs, weights and biases, float32; milliseconds:"
    lines += ["", _row(["implementation", "median", "quartiles"]), _row(["---", "--:", "--:"])]
    for name, found in training.items():
        low, mid, high = (f"{1e3 * found[key]:.1f}" for key in ("low", "median", "high"))
        lines.append(_row([name, mid, f"{low} - {high}"]))
    return lines
