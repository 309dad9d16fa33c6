"""The README.md ("model card") of a packed directory."""

from __future__ import annotations

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.packed.encoder import Forms
from nomatmul.formats.packed.layout import active_rows

EMBEDDINGS = {"f32": "float32", "bf16": "bfloat16", "int8": "int8, one scale a row"}


def card_text(config: ModelConfig, packing: str, embedding: str) -> str:
    """The card's text, from the config alone."""
    bits = {"2bit": "two bits a weight", "1.6bit": "five weights a byte (1.6 bits a weight)"}
    rows = [
        ("token mixer", config.token_mixer),
        ("channel mixer", config.channel_mixer),
        ("layers", str(config.num_layers)),
        ("hidden size", str(config.hidden_size)),
        ("intermediate size", str(config.intermediate_size)),
        ("vocabulary", str(config.vocab_size)),
        ("parameters", f"{config.param_count():,}"),
        ("ternary weights", bits[packing]),
        ("embedding", EMBEDDINGS[embedding]),
    ]
    if config.channel_mixer == "fff":
        trees = f"{config.fff_trees} of depth {config.fff_depth}"
        rows[4] = ("trees a layer", trees)
        rows.insert(5, ("active neurons", f"{active_rows(config)} of {config.tree_rows}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: nomatmul
tags: [ternary, matmul-free, text-generation]
---
# A packed ternary language model

Written by `nomatmul pack`. Its linear layers hold only -1, 0 and +1 (arXiv 2406.02528), already
quantised: they must not be quantised again.

| | |
|---|---|
{table}

```
pip install nomatmul
nomatmul generate --model . --prompt "Once upon a time"
```

```python
import nomatmul

lm = nomatmul.load(".")
print(lm.generate("Once upon a time", max_tokens=50))
```

Data, training and licence of the weights: see the model that this was packed from.
"""


_USES = {
    "masked": ("fill-mask", 'print(model.fill_mask("Paris is the [MASK] of France."))'),
    "sequence": ("text-classification", 'print(model.classify(["what a fine day"]))'),
    "token": ("token-classification", 'print(model.classify(["Ada Lovelace lived in London"]))'),
}


def encoder_card(config: ModelConfig, forms: Forms, reading: EncoderReading) -> str:
    """The text of an encoder's card, from its config alone."""
    use, line = _USES[reading.task]
    rows = [
        ("channel mixer", config.channel_mixer),
        ("layers", str(config.num_layers)),
        ("hidden size", str(config.hidden_size)),
        ("heads", str(config.num_heads)),
        ("vocabulary", str(config.vocab_size)),
        ("positions", str(config.max_position_embeddings)),
        ("parameters", f"{config.param_count():,}"),
        ("dense matrices", EMBEDDINGS[forms.dense]),
        ("embedding", EMBEDDINGS[forms.embedding]),
    ]
    if config.channel_mixer == "fff":
        trees = f"{config.fff_trees} of depth {config.fff_depth}, {EMBEDDINGS[forms.rows]}"
        rows.insert(1, ("trees a layer", trees))
    if reading.labels:
        rows.append(("labels", ", ".join(reading.labels[:20])))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: nomatmul
pipeline_tag: {use}
---
# A packed encoder

Written by `nomatmul pack` (fast feedforward networks: arXiv 2311.10770).

| | |
|---|---|
{table}

```python
import nomatmul

model = nomatmul.load(".")
{line}
print(model.embed(["one text", "another"]).shape)
```

Data, training and licence of the weights: see the model that this was packed from.
"""
