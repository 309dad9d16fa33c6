"""The words of docs/fff.md; verdicts.py has what follows from the rows.

A library of run.py.
"""

from __future__ import annotations

import re

from studies.compare.summary import Entry

INTRODUCTION = """\
A fast feedforward layer (FFF) keeps the neurons of a feed-forward layer in binary trees. A token
computes one node, goes left or right by the sign of its logit, and so on: of a tree of 7 levels it
computes 7 of 127 neurons (arXiv 2311.10770). Nothing else of the layer is read. This page asks what
that costs in quality, with the controls that were never published: a dense layer of the same
*active* width, and no layer at all. Levels count neurons on a path, so UltraFastBERT-1x11 (11
decisions) is "1 x 12" here."""

METHOD = """\
`studies/fff/run.py` trains every variant through the code of `nomatmul compare`: 8 layers of
width 512, texts of `wikipedia-en-2015` and `english-novels-98`, the same order of tokens for equal
seeds and the same learning rate for all variants of a section; only the channel mixer differs.
Causal models have 8,192 byte-pair tokens, sequences of 512 and 32,768 tokens a step; encoders 8,192
WordPieces, sequences of 128, 8,192 tokens a step, 25 % of the tokens hidden. The models with
ternary weights and attention are the causal ones with half as many tokens. AdamW, cosine,
bfloat16 autocast. Held-out scores are of the valid parts of both texts, with hard paths.
Trees were trained in the masked form (under torch.compile, ternary ones without), which computes
all nodes and multiplies by a mask: its gradients are equal to the conditional form's (tests/ops),
but the seconds are those of masked training. The leaf form mixes all its leaves in training, which
hardens over three quarters of the run, and is scored hard. Encoders read 15M tokens of the texts
(one part of Wikipedia and every fourth novel). ± is one standard error; the spread of seeds is
pooled over all variants of a table.

*neurons*: of one layer; *active*: of these, on a token's path; *worth*: the width of the dense
layer that would score the same, between the dense controls of the same table (a dash: outside of
them); *FLOPs*: of the path, whole model, relative to the whole layer's model. A gated neuron's
weights, those of a GLU or of a gated tree, count as 1.5 neurons."""

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
these columns flatter the cheap variants. Seconds are of training in the masked form, two to four
runs to a GPU: they say what training costs today, not what inference costs. Runs that shared a GPU
with more, and with other kinds of work, have no seconds here (a dash)."""

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
Trees in every second layer, 64 x 5 and 32 x 6 in the causal model and 128 x 4 in the union were
planned, and did not get their turn: the run with load balancing held up what waited behind it.
torch.compile sorted its counts, 64 bit integers that it has no atomic sum for; they are 32 bit now
([log](log.md)), which no GPU has run yet. So nothing is said about those variants at this size; nor
about balancing to the end of a run, about more than one seed of gated trees, a master leaf and
ternary weights with attention, or about longer training than these runs. Gated trees were tried in
one shape only. Ternary training steps of the union were
replayed as CUDA graphs, whose losses were checked against launched ones before each run.
`nomatmul compare` runs all variants on anybody's text, for example
`nomatmul compare transformer_box --data ... --valid ... --budget 26M --out runs/trees
--variant dense --variant fff-16x7 --variant fff-16x7-balanced --variant fff-16x7-master64
--variant fff-16x7-every2`; `studies/fff/run.py train --cells
causal:fff-16x7-every2:1,2` adds a row to this page."""

_SHAPE = re.compile(r"(fff|gated)-(\d+)x(\d+)(.*)")


def name_of(variant: str) -> str:
    """The short name of a command line as it stands in the tables."""
    if found := _SHAPE.fullmatch(variant):
        rest = found[4].replace("-balanced", ", balanced").replace("-master", " + ")
        kind = "FFF" if found[1] == "fff" else "gated FFF"
        return f"{kind} {found[2]} x {found[3]}{rest}"
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
