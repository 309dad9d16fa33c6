"""The README.md ("model card") of a packed directory, made from config.json alone."""

from __future__ import annotations

from nomatmul.formats.architecture import FFF, Attention, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.packed.layout import Forms

_WORDS = {
    "2bit": "two bits a weight",
    "1.6bit": "five weights a byte (1.6 bits a weight)",
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "int8": "int8, one scale a row",
    "int8-32": "int8, one scale for 32 weights",
}
_KINDS = {
    "ternary": "ternary weights",
    "dense": "dense matrices",
    "rows": "rows of trees",
    "scale": "scales of groups",
}
_GENERATE = 'print(model.generate("Once upon a time", max_tokens=50))'
_COMMAND = """
```
nomatmul generate --model . --prompt "Once upon a time"
```
"""
# Of a task: pipeline_tag of the Hub, and a line that uses the model.
_TASKS = {
    "masked": ("fill-mask", 'print(model.fill_mask("Paris is the [MASK] of France."))'),
    "sequence": ("text-classification", 'print(model.classify(["what a fine day"]))'),
    "token": ("token-classification", 'print(model.classify(["Ada Lovelace lived in London"]))'),
}


def card_text(config: ModelConfig, forms: Forms, reading: EncoderReading | None) -> str:
    """The card of a model; reading: of an encoder, what it is for."""
    kind = "language model" if reading is None else "encoder"
    tag, line = ("text-generation", _GENERATE) if reading is None else _TASKS[reading.task]
    quantised = (
        "\nIts ternary layers hold only -1, 0 and +1 (arXiv 2406.02528), already quantised: they"
        "\nmust not be quantised again.\n"
        if forms.ternary != "none"
        else ""
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in _rows(config, forms, reading))
    return f"""---
library_name: nomatmul
pipeline_tag: {tag}
---
# A packed {kind}

Written by `nomatmul pack`, read by `pip install nomatmul`.
{quantised}
| | |
|---|---|
{table}
{_COMMAND if reading is None else ""}
```python
import nomatmul

model = nomatmul.load(".")
{line}
```

Data, training and licence of the weights: see the model that this was packed from.
"""


def _rows(
    config: ModelConfig, forms: Forms, reading: EncoderReading | None
) -> list[tuple[str, str]]:
    model = architecture_of(config)
    mixer, channel = model.blocks[0].mixer, model.blocks[0].channel
    rows = [("token mixer", config.token_mixer), ("channel mixer", config.channel_mixer)]
    trees = next(iter(model.trees().values()), None)
    if trees is not None:
        rows.append(("trees a layer", f"{trees.trees} of depth {trees.depth}"))
        rows.append(("active neurons", f"{trees.active_rows} of {trees.rows}"))
    rows += [("layers", str(len(model.blocks))), ("hidden size", str(model.size))]
    if channel is not None and not isinstance(channel, FFF):
        rows.append(("intermediate size", str(config.mlp_size)))
    if isinstance(mixer, Attention):
        rows.append(("heads", str(mixer.heads)))
        if mixer.kv_heads != mixer.heads:
            rows.append(("key-value heads", str(mixer.kv_heads)))
        rows.append(("positions", str(config.max_position_embeddings)))
    rows += [("vocabulary", str(model.vocabulary)), ("parameters", f"{model.parameters():,}")]
    rows += [(_KINDS.get(kind, kind), _WORDS[form]) for kind, form in forms.to_dict().items()]
    if reading is not None and reading.labels:
        rows.append(("labels", ", ".join(reading.labels[:20])))
    return rows
