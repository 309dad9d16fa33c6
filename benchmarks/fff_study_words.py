"""The words of docs/fff.md, and the verdicts that the rows allow."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from nomatmul.evaluate.compare_report import compared
from nomatmul.evaluate.compare_summary import Entry, difference

INTRODUCTION = """\
A fast feedforward layer (FFF) keeps the neurons of a feed-forward layer in binary trees. A token
computes one node, goes left or right by the sign of its logit, and so on: of a tree of 7 levels it
computes 7 of 127 neurons (arXiv 2311.10770). Nothing else of the layer is read. This page asks what
that costs in quality, with the controls that were never published: a dense layer of the same
*active* width, and no layer at all. Levels count neurons on a path, so UltraFastBERT-1x11 (11
decisions) is "1 x 12" here."""

METHOD = """\
`benchmarks/fff_study.py` trains every variant through the code of `nomatmul compare`: 8 layers of
width 512, texts of `wikipedia-en-2015` and `english-novels-98`, the same order of tokens for equal
seeds and the same learning rate for all variants of a section; only the channel mixer differs.
Causal models have 8,192 byte-pair tokens, sequences of 512 and 32,768 tokens a step; encoders 8,192
WordPieces, sequences of 128, 8,192 tokens a step, 25 % of the tokens hidden. AdamW, cosine,
bfloat16 autocast. Held-out scores are of the valid parts of both texts, with hard paths.
Trees were trained in the masked form (under torch.compile, ternary ones without), which computes
all nodes and multiplies by a mask: its gradients are equal to the conditional form's (tests/ops),
but the seconds are those of masked training. Encoders read 15M tokens of the texts (one part of
Wikipedia and every fourth novel). ± is one standard error; the spread of seeds is pooled over all
variants of a table.

*neurons*: of one layer; *active*: of these, on a token's path; *worth*: the width of the dense
layer that would score the same, between the dense controls of the same table (a dash: outside of
them); *FLOPs*: of the path, whole model, relative to the whole layer's model. A GLU's weights count
as 1.5 neurons for each of its units."""

PLATEAU = """\
The first encoders had crammed BERT's sinusoidal positions and 32,768 tokens a step, so 26M tokens
were 793 steps. Most of them never left the plateau near 5.9 nats where an encoder guesses by
frequency alone; which ones did is luck of the seed at this length. Nothing is concluded from them.
(A toy encoder on a CPU, 4 layers of 128 with 1,024 tokens a step, had a training loss of 3.63 at
step 800 with rotary positions and 5.33 at step 850 with sinusoidal ones: hence the setting of the
encoders above. Positions of the published form need many more steps than a short study has.)"""

BUDGETS = """\
Held-out nats a token where each curve had used as many FLOPs (of the path) or seconds as the
cheapest variant did in all. The dearer runs are read before their learning rate has come down, so
these columns flatter the cheap variants. Seconds are of training in the masked form, two runs to
a GPU: they say what training costs today, not what inference costs."""

RATES = """\
One rate for all variants of a section could favour some of them. Short runs at half, once
and twice the rate (one seed; lower is better):"""

SPEED = """\
What the layers gain in time is measured elsewhere:"""

# (what, pattern of the newest table below benchmarks/results, script that makes it)
TABLES = (
    ("one layer on a CPU, forward and training", "*fff-cpu*.md", "fff_cpu.py"),
    ("a whole encoder on a CPU, with where its time goes", "*bert-cpu*.md", "bert_cpu.py"),
    ("one layer on a GPU", "fff-gpu.md", "fff_gpu.py"),
    ("a union model beside the plain MatMul-free LM on a CPU", "*union*.md", "union_cpu.py"),
)

NOT_MEASURED = """\
The device time ended before the runs with load balancing, a master leaf, trees in every second
layer only, and the leaf form, and before second seeds of most encoders; so nothing is said about
them at this size. Ternary trees in a model with attention, where an earlier trial with few seeds
had looked promising, were not tried again: the union above has MLGRU. Its training steps were
replayed as CUDA graphs, whose losses were checked against launched ones before each run; a GPU test
of the gradients of ternary trees inside a graph had not been run by then (on a CPU they are
tested). A toy on a CPU, without graphs, shows the same pattern, in float as in ternary weights:
beside MLGRU a gated layer helps, a plain one of its size does not, and trees help a little
([log](log.md)). `nomatmul compare` runs all variants on anybody's text, for example
`nomatmul compare transformer_box --data ... --valid ... --budget 26M --out runs/trees
--variant dense --variant fff-16x7 --variant fff-16x7-balanced --variant fff-16x7-master64
--variant fff-16x7-every2 --variant fff-1x6-leaf64`."""

_SHAPE = re.compile(r"fff-(\d+)x(\d+)(.*)")


def name_of(variant: str) -> str:
    """The short name of a command line as it stands in the tables."""
    if found := _SHAPE.fullmatch(variant):
        rest = found[3].replace("-balanced", ", balanced").replace("-master", " + ")
        return f"FFF {found[1]} x {found[2]}{rest}"
    return variant.replace("-", " ")


def setting(section: str, entries: list[Entry]) -> str:
    """Tokens, seeds and rate of a section in a line."""
    pairs = sum(len(e.values) > 1 for e in entries)
    first = entries[0]
    text = (
        f"{first.tokens / 1e6:.1f}M tokens each, rate {first.learning_rate:g}, "
        f"{min(e.parameters for e in entries) / 1e6:.1f}M to "
        f"{max(e.parameters for e in entries) / 1e6:.1f}M parameters in all; {pairs} of "
        f"{len(entries)} variants have two seeds."
    )
    if pairs == 1:
        text += " So ± rests on one pair of runs: very rough."
    if section == "encoder":
        text += " FFF 1 x 12, UltraFastBERT's shape, has twice the neurons of the others."
    return text


def _pick(entries: list[Entry], name: str) -> Entry | None:
    return next((e for e in entries if e.variant == name), None)


def trees_of(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if e.kind == "fff"]


def verdicts(section: str, entries: list[Entry]) -> list[str]:
    """Trees against the dense layer of their active width, against none, and what options do."""
    lines = []
    none = _pick(entries, "none")
    for entry in trees_of(entries):
        bare = entry.variant.count("-") == 1
        same = _pick(entries, f"dense-{entry.active}")
        if bare and same is not None:
            lines.append(
                f"{entry.label} against dense {same.active}, its active width: "
                f"{compared(entry, same)}."
            )
        if bare and none is not None and entry.label.startswith("FFF 1 x"):
            lines.append(f"{entry.label} against no channel mixer: {compared(entry, none)}.")
        base = _pick(entries, "-".join(entry.variant.split("-")[:2]))
        if not bare and base is not None:
            words = entry.label.removeprefix(base.label).strip(", +")
            extra = f"a master leaf of {words}" if words.isdigit() else words
            lines.append(f"{base.label}, {extra}: {compared(entry, base)} than without.")
    del section
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
        if text := gain_line(name, found):
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
    lines += [f"- After fine-tuning, {text}" for text in glue_verdict(glue)]
    lines += [f"- {text}" for text in balance_lines(entries)]
    if text := time_line(entries):
        lines.append(f"- {text}")
    if text := advice(entries):
        lines.append(f"- {text}")
    return [*lines, ""]


def union_verdict(entries: list[Entry], rows: list[dict[str, Any]]) -> str | None:
    """Do ternary trees in the MatMul-free LM give anything beyond no channel mixer?"""
    none = _pick(entries, "none")
    trees = [e for e in trees_of(entries) if e.variant.count("-") == 1]
    if none is None or not trees:
        return None
    parts = []
    helps = False
    for tree in sorted(trees, key=lambda e: e.active):
        gain, error = difference(none, tree)
        helps = helps or (gain > 2 * error if error is not None else False)
        parts.append(f"{tree.label.removeprefix('FFF ')} {round(-gain, 3) + 0.0:+.3f}")
    told = (
        "The union of ternary trees and MLGRU, bits per byte against no channel mixer at all: "
        + ", ".join(parts)
        + "."
    )
    whole = _pick(entries, "dense")
    if whole is not None:
        told += (
            f" The whole GLU is worth {none.score - whole.score:.3f} there: MLGRU's own gates and "
            "projections leave little for a channel mixer to do at this size."
        )
    at_rates = union_rates(rows)
    if at_rates:
        told += f" Short runs at other rates: {at_rates}."
    if helps:
        return told
    return (
        f"{told} So here the trees give nothing that their parameters are worth: no union recipe "
        "is recommended and no model of it is shipped. That is a result for this size, these "
        "tokens and this training, not a proof for others."
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
        good = [e for e in trees_of(found) if none.score - e.score >= 0.75 * span]
        if not good:
            picks.append(f"{_where(name)} none of those that were tried")
            continue
        best = min(good, key=lambda e: e.active)
        same = _pick(found, f"dense-{best.active}")
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
