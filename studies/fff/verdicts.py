"""What the rows of the study of fast feedforward layers allow to say.

A sentence names the error that the seeds give; what lies within twice of it is no difference.

A library of run.py.
"""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from studies.compare.summary import Entry, difference
from studies.fff.words import name_of


def _pick(entries: list[Entry], name: str) -> Entry | None:
    return next((e for e in entries if e.variant == name), None)


def trees_of(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if e.kind == "fff"]


def verdicts(entries: list[Entry]) -> list[str]:
    """Trees against the dense layer of their active width, against none, and what options do."""
    lines = []
    none = _pick(entries, "none")
    for entry in trees_of(entries):
        bare = entry.variant.count("-") == 1
        same = _pick(entries, entry.control)
        if bare and same is not None:
            lines.append(
                f"{entry.label} against {same.label}, its active width: {compared(entry, same)}."
            )
        told = entry.label.startswith(("FFF 1 x", "gated"))
        if none is not None and ((bare and told) or "-leaf" in entry.variant or same is None):
            lines.append(f"{entry.label} against no channel mixer: {compared(entry, none)}.")
        base = _pick(entries, "-".join(entry.variant.split("-")[:2]))
        if not bare and base is not None:
            words = entry.label.removeprefix(base.label).strip(", +")
            extra = f"a master leaf of {words}" if words.isdigit() else words
            lines.append(f"{base.label}, {extra}: {compared(entry, base)} than without.")
    return lines


def cut_short(section: str, rows: list[dict[str, Any]]) -> list[str]:
    """Runs that were cut late, look by look beside those of the layer without their options."""
    lines = []
    mine = [row for row in rows if (row["section"], row["stage"]) == (section, "final")]
    for row in mine:
        looks = row.get("held_out_curve") or []
        if row["status"] != "cut" or len(looks) < 4:
            continue
        base = "-".join(row["variant"].split("-")[:2])
        others = [r for r in mine if (r["variant"], r["status"]) == (base, "ok")]
        others = [r for r in others if r["steps_planned"] == row["steps_planned"]]
        curves = {r["seed"]: {int(p[0]): p[1] for p in r["held_out_curve"]} for r in others}
        if not curves:
            continue
        ahead = sum(all(p[1] < curve[int(p[0])] for curve in curves.values()) for p in looks)
        step, loss = int(looks[-1][0]), looks[-1][1]
        there = ", ".join(f"{curve[step]:.3f} (seed {n})" for n, curve in sorted(curves.items()))
        lines.append(
            f"{row['label']}, seed {row['seed']}, was cut after {row['steps']} of "
            f"{row['steps_planned']} steps and has no score. At its last look (step {step}) its "
            f"held-out loss was {loss:.3f} nats, without the option {there}; it was ahead of "
            f"{'both' if len(curves) == 2 else 'all'} at {ahead} of {len(looks)} looks. One run."
        )
    return lines


def doubt(entries: list[Entry]) -> str | None:
    """Is a tree as good as no layer at all? The claim of the authors' issue 19."""
    none, whole = _pick(entries, "none"), _pick(entries, "dense")
    single = [e for e in trees_of(entries) if re.fullmatch(r"fff-1x\d+", e.variant)]
    if none is None or whole is None or not single:
        return None
    tree = single[0]
    gain, error = difference(none, tree)
    share = gain / (none.score - whole.score) if none.score != whole.score else math.nan
    unit = "bits per byte" if tree.metric == "bpb" else "nats"
    shown = f"{gain:.3f}" + ("" if error is None else f" ± {error:.3f}")
    start = f"one deep tree ({tree.label.removeprefix('FFF ')}, {tree.active} active neurons)"
    if error is None or abs(gain) <= 2 * error:
        better = "better" if gain >= 0 else "worse"
        size = shown.removeprefix("-")
        return f"{start} is not told apart from no channel mixer ({size} {unit} {better})"
    if gain < 0:
        return f"{start} is worse than no channel mixer by {-gain:.3f} {unit}"
    return (
        f"{start} is better than no channel mixer by {shown} {unit}, {share:.0%} of what the "
        "whole layer gives"
    )


def summary(
    entries: dict[str, list[Entry]], glue: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[str]:
    """The page's answer in a few lines, each as strong as its numbers."""
    lines = ["## In short", ""]
    for name, found in entries.items():
        if name != "ternary" and (text := gain_line(name, found)):
            lines.append(f"- {text}")
    doubts = [(name, text) for name, found in entries.items() if (text := doubt(found))]
    if doubts:
        told = "; ".join(f"{_where(name)}, {text}" for name, text in doubts)
        lines.append(
            "- The doubt of the authors' users (issue 19: a language model with FFF is no better "
            f"than one without any feed-forward layer): {told}."
        )
    if text := union_verdict(entries.get("union", []), rows):
        lines.append(f"- {text}")
    if text := first_pair(entries.get("ternary", [])):
        lines.append(f"- {text}")
    lines += [f"- After fine-tuning, {text}" for text in glue_verdict(glue)]
    lines += [f"- {text}" for text in balance_lines(entries)]
    if text := time_line(entries):
        lines.append(f"- {text}")
    if text := advice(entries):
        lines.append(f"- {text}")
    return [*lines, ""]


def union_verdict(entries: list[Entry], rows: list[dict[str, Any]]) -> str | None:
    """Do ternary trees in the MatMul-free LM give anything beyond no channel mixer?"""
    none, whole = _pick(entries, "none"), _pick(entries, "dense")
    trees = [e for e in trees_of(entries) if e.variant.count("-") == 1]
    plain = [e for e in trees if not e.variant.startswith("gated")]
    if none is None or not trees:
        return None
    parts = [
        f"{tree.label.removeprefix('FFF ')} {round(tree.score - none.score, 3) + 0.0:+.3f}"
        for tree in sorted(trees, key=lambda e: e.active)
    ]
    told = (
        "The union of ternary trees and MLGRU, bits per byte against no channel mixer at all: "
        + ", ".join(parts)
        + "."
    )
    if whole is not None:
        told += (
            f" The whole GLU is worth {none.score - whole.score:.3f} there: MLGRU's own gates and "
            "projections leave little for a channel mixer to do at this size."
        )
    at_rates = union_rates(rows)
    if at_rates:
        told += f" Short runs at other rates: {at_rates}."
    gated = [e for e in trees if e not in plain and _clearly_better(e, none)]
    if not any(_clearly_better(e, none) for e in plain):
        told += (
            " So here plain trees give nothing that their parameters are worth: no union recipe is "
            "recommended for them and no model of theirs is shipped. That is a result for this "
            "size, these tokens and this training, not a proof for others."
        )
    if gated and whole is not None:
        told += _gated_verdict(gated, none, whole, entries)
    return told


def _gated_verdict(gated: list[Entry], none: Entry, whole: Entry, entries: list[Entry]) -> str:
    """The best trees of gated neurons, and whether a GLU of their active width does as well."""

    def share(entry: Entry) -> str:
        return f"{(none.score - entry.score) / (none.score - whole.score):.0%}"

    best = min(gated, key=lambda e: e.score)
    runs = "one run" if len(best.values) == 1 else f"{len(best.values)} runs"
    told = (
        " Trees of gated neurons are better than none: "
        f"{best.label.removeprefix('gated FFF ')} keeps {share(best)} of what the GLU gives with "
        f"{best.active / best.neurons:.0%} of its neurons active ({compared(best, none)} than "
        f"none; {runs} of one shape)."
    )
    same = _pick(entries, best.control)
    if same is not None and not _clearly_better(best, same):
        told += (
            f" But {same.label}, which has only so many neurons and no trees, keeps {share(same)} "
            f"({compared(best, same)}): beside MLGRU a small GLU is the better buy."
        )
    return told


def _clearly_better(entry: Entry, other: Entry) -> bool:
    gain, error = difference(other, entry)
    return error is not None and gain > 2 * error


def first_pair(entries: list[Entry]) -> str | None:
    """Ternary weights with attention, where single runs are all there is."""
    none, whole = _pick(entries, "none"), _pick(entries, "dense")
    trees = trees_of(entries)
    if none is None or whole is None or not trees or any(len(e.values) > 1 for e in entries):
        return None
    tree = min(trees, key=lambda e: e.score)
    return (
        f"Ternary weights with attention, one run each of {tree.tokens / 1e6:.0f}M tokens: "
        f"{tree.label.removeprefix('FFF ')} ({tree.active} active) {tree.score:.3f} bits per byte, "
        f"the whole ternary layer {whole.score:.3f}, none {none.score:.3f}. An earlier trial saw "
        "the trees come near the whole layer and single ternary runs differ by 0.03 to 0.04. Here "
        "the whole layer is behind no layer at all, so what the trees are ahead by measures its "
        "trouble in a short run as much as their worth: promising, not shown."
    )


def union_rates(rows: list[dict[str, Any]]) -> str:
    """Trees and GLU against none at each rate that short runs tried."""
    scores: dict[float, dict[str, float]] = {}
    for row in rows:
        if (row["section"], row["stage"], row["status"]) == ("union", "rate", "ok"):
            scores.setdefault(row["learning_rate"], {})[row["variant"]] = row["bpb"]
    parts = []
    for rate, found in sorted(scores.items()):
        if "none" not in found:
            continue
        others = ", ".join(
            f"{'GLU' if name == 'dense' else name_of(name)} {score - found['none']:+.3f}"
            for name, score in sorted(found.items())
            if name != "none"
        )
        if others:
            parts.append(f"at {rate:g} {others}")
    return "; ".join(parts)


def _where(section: str) -> str:
    return {
        "causal": "in the causal model",
        "encoder": "in the encoder",
        "union": "in the ternary union",
        "ternary": "with ternary weights and attention",
    }[section]


def gain_line(section: str, entries: list[Entry]) -> str | None:
    """Trees of equal parameters: share of the whole layer's gain, and against equal width."""
    none, whole = _pick(entries, "none"), _pick(entries, "dense")
    plain = [
        e
        for e in trees_of(entries)
        if whole is not None and e.variant.count("-") == 1 and e.neurons <= whole.neurons * 1.05
    ]
    if whole is None or not plain:
        return None
    parts = []
    for e in sorted(plain, key=lambda e: e.active):
        gap, error = difference(e, whole)
        shown = f"{round(gap, 3) + 0.0:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        share = ""
        if none is not None and none.score > whole.score:
            share = f", {(none.score - e.score) / (none.score - whole.score):.0%} of the gain"
        parts.append(f"{e.label.removeprefix('FFF ')} ({e.active} active) {shown}{share}")
    unit = "bits per byte" if whole.metric == "bpb" else "nats a hidden token"
    return (
        f"{_where(section).capitalize()}, against the whole layer ({whole.label}, "
        f"{whole.score:.3f}) at equal parameters, {unit}: " + "; ".join(parts) + "."
    )


def time_line(entries: dict[str, list[Entry]]) -> str | None:
    """Who is ahead at equal seconds of training, and the best tree there."""
    parts = []
    for name, found in entries.items():
        timed = [e for e in found if not math.isnan(e.at_seconds)]
        trees = trees_of(timed)
        if timed and trees:
            first = min(timed, key=lambda e: e.at_seconds)
            tree = min(trees, key=lambda e: e.at_seconds)
            parts.append(
                f"{_where(name)} {first.label} ({first.at_seconds:.2f} nats; the best tree, "
                f"{tree.label.removeprefix('FFF ')}, {tree.at_seconds:.2f})"
            )
    if not parts:
        return None
    return (
        "Trees do not make training cheaper as it was run (masked form): at equal seconds the "
        f"best is {'; '.join(parts)}. What they save is inference."
    )


def balance_lines(entries: dict[str, list[Entry]]) -> list[str]:
    """What load balancing did, all sections in one line."""
    parts = []
    for name, found in entries.items():
        for entry in found:
            if not entry.variant.endswith("-balanced"):
                continue
            base = _pick(found, entry.variant.removesuffix("-balanced"))
            if base is not None:
                parts.append(f"{base.label} {_where(name)} {compared(entry, base)}")
    return [f"Load balancing (weight 0.01): {'; '.join(parts)}."] if parts else []


def glue_verdict(glue: list[dict[str, Any]]) -> list[str]:
    """Medians of each task, and whether they tell the encoders apart."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in glue):
        scores: dict[str, list[float]] = {}
        for row in glue:
            if row["task"] == task:
                scores.setdefault(row["variant"], []).append(row["score"] * 100)
        medians = {name: statistics.median(found) for name, found in scores.items()}
        shown = ", ".join(
            f"{name_of(name)} {score:.1f}"
            for name, score in sorted(medians.items(), key=lambda pair: -pair[1])
        )
        text = f"{task} {shown}."
        if not any(name.startswith("fff") for name in medians):
            text += " No run of a tree ended in time."
        elif max(medians.values()) - min(medians.values()) < 2 * _dev_error(task, medians):
            text += (
                f" The scores differ by less than twice what {DEV_ROWS[task]} development rows can "
                f"resolve ({_dev_error(task, medians):.1f} points, one standard error), and the "
                "encoder without any channel mixer is among them: at this size and so little "
                "pre-training the task does not tell the layers apart."
            )
        lines.append(text)
    return lines


DEV_ROWS = {"SST-2": 872, "CoLA": 1043}


def _dev_error(task: str, medians: dict[str, float]) -> float:
    """Points of standard error of a share of right answers on the development rows.

    For Matthews correlation, which no share is, that of a correlation near zero.
    """
    rows = DEV_ROWS[task]
    if task == "CoLA":
        return 100 / math.sqrt(rows)
    share = statistics.fmean(medians.values()) / 100
    return 100 * math.sqrt(share * (1 - share) / rows)


def advice(entries: dict[str, list[Entry]]) -> str | None:
    """What a user should pick, by a rule that is stated: most gain kept for each active neuron."""
    picks = []
    for name, found in entries.items():
        none, whole = _pick(found, "none"), _pick(found, "dense")
        if none is None or whole is None:
            continue
        span = none.score - whole.score
        if span <= 0:  # the whole layer itself gives nothing
            continue
        good = [e for e in trees_of(found) if none.score - e.score >= 0.75 * span]
        if not good:
            best = min(trees_of(found), key=lambda e: e.score, default=None)
            kept = ""
            if best is not None and none.score > best.score:
                kept = f" (the best, {best.label}, keeps {(none.score - best.score) / span:.0%})"
            picks.append(f"{_where(name)} none of those that were tried{kept}")
            continue
        best = min(good, key=lambda e: e.active)
        same = _pick(found, best.control)
        than = f", {compared(best, same)} than dense {same.active}" if same is not None else ""
        picks.append(
            f"{_where(name)} {best.label.removeprefix('FFF ')} ({best.active} of {best.neurons} "
            f"neurons active, {(none.score - best.score) / span:.0%} of the gain{than})"
        )
    if not picks:
        return None
    return (
        "What to pick: many shallow trees, and a dense layer where there is no need to save; by "
        "the rule of fewest active neurons that keep three quarters of the whole layer's gain, "
        f"{'; '.join(picks)}. One deep tree computes least and gives least."
    )


def compared(a: Entry, b: Entry) -> str:
    """a minus b in words, with the error where seeds give one."""
    gap, error = difference(a, b)
    unit = "bits per byte" if a.metric == "bpb" else "nats"
    side = "better" if gap < 0 else "worse"
    if error is None:
        return f"{abs(gap):.4f} {unit} {side} (single seeds: no error known)"
    clear = "" if abs(gap) > 2 * error else ", within twice the error of the seeds: no difference"
    return f"{abs(gap):.4f} ± {error:.4f} {unit} {side}{clear}"
