"""Turn a training checkpoint or a published model into a packed one, and check the result.

SRC is a checkpoint directory, the directory of a training run (its finished model, else its latest
checkpoint), a published MatMul-free LM (hgrn_bit; float32, float16 or bfloat16; one file or
shards), a published ternary transformer (bitnet, llama, qwen3: BitNet, Falcon, TriLM, Bonsai), or a
GGUF file of one, or hf:owner/name[/file.gguf][@revision]: that is downloaded from the Hugging Face
Hub first (the extra `hub`). A chat template and generation_config.json go along. Weights become
ternary once, by the absmean rule of the model's training, or are kept exactly where they are
ternary already; a model that is packed already is refused, because quantising twice would break it.
In a published ternary transformer an embedding that is not ternary keeps 16 bits, and such a head
becomes int8 rows, unless --embedding or --head asks for something else. The check says what that
costs. A head that is not tied is looked at before: it keeps 16 bits where int8 rows, alone, on the
source's own hidden states, change the most likely token at more than 1 % of positions or have a
mean KL above 1e-3. An encoder (our own, or a published crammedBERT: BERT, UltraFastBERT) keeps its
weights as they are unless --rows, --dense or --embedding asks for less; the check then says what
that costs. DST must not exist. Nothing is left under DST when packing fails. Memory stays at a few
blocks of rows, whatever the size; the check loads both models (--no-check leaves it out).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nomatmul._hub_names import PREFIX
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import hide_progress_bars, print_json, print_table, size
from nomatmul.cli.signals import clean_up_when_terminated

if TYPE_CHECKING:
    from nomatmul.convert import PackResult
    from nomatmul.convert.head import HeadCost

_FORMS = ("auto", "f32", "bf16", "f16", "int8", "float32", "bfloat16", "float16")
EXAMPLES = """
examples:
  nomatmul pack runs/mine packed/mine
  nomatmul pack ridger-mmfreelm-370M packed/370M --check-text wiki.valid.txt.bz2
  nomatmul pack runs/mine packed/mine-small --packing 1.6bit --embedding int8
  nomatmul pack BitNet-b1.58-2B-4T packed/bitnet --head bfloat16
  nomatmul pack Ternary-Bonsai-1.7B.gguf packed/bonsai
  nomatmul pack hf:owner/name/model-TQ2_0.gguf@main packed/hub
  nomatmul pack my-bert packed/bert --dense int8
  nomatmul pack huge-checkpoint packed/huge --no-check --json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    src: str = option(
        positional=True, metavar="SRC", help="the model to pack, a path or hf:owner/name"
    )
    dst: str = option(positional=True, metavar="DST", help="the directory to make")
    packing: str = option(
        "2bit", choices=("2bit", "1.6bit"), help="2bit is faster, 1.6bit a fifth smaller"
    )
    embedding: str = option(
        "auto",
        choices=_FORMS,
        help="how the embedding is kept; auto: bf16 where that loses nothing, else f32 (published"
        " transformers: bf16, f16, else int8)",
    )
    head: str = option(
        "auto",
        choices=_FORMS,
        help="published transformers: how a head that is not ternary is kept; auto: int8 groups"
        " that the source has, else int8 rows, or 16 bits where the check finds these too costly"
        " (not with --no-check or where it is tied); with a float type the embedding loses nothing"
        " either",
    )
    rows: str = option(
        "auto",
        choices=("auto", "f32", "bf16", "int8"),
        help="encoders: how rows of fast feedforward trees are kept; rounding them changes paths",
    )
    dense: str = option(
        "auto",
        choices=("auto", "f32", "bf16", "f16", "int8"),
        help="encoders, dense transformers: how dense matrices are kept; int8 computes on int8 too"
        " and is the fastest",
    )
    check: bool = option(True, help="compare the packed model with its source")
    check_text: str | None = option(
        None, metavar="FILE", help="the text of that comparison (default: a built-in paragraph)"
    )
    json: bool = json_option()


def run(options: Options) -> int:
    if not options.src.startswith(PREFIX):  # bars of a download are wanted
        hide_progress_bars()
    from nomatmul.convert import pack
    from nomatmul.convert.progress import line

    clean_up_when_terminated()
    quiet = options.json or not sys.stderr.isatty()
    result = pack(
        options.src,
        options.dst,
        packing=options.packing,
        embedding=options.embedding,
        head=options.head,
        rows=options.rows,
        dense=options.dense,
        check=options.check,
        check_text=options.check_text,
        progress=None if quiet else line("packing"),
    )
    if options.json:
        print_json(dataclasses.asdict(result))
    else:
        _show(result)
    return 0


def _show(result: PackResult) -> None:
    print(f"packed {result.parameters:,} parameters to {result.destination}")
    rows = [
        ("source", size(result.source_bytes)),
        ("packed", size(result.packed_bytes)),
        ("seconds", f"{result.seconds:.1f}"),
        ("embedding", result.embedding),
        ("tokenizer", result.tokenizer),
    ]
    if result.dense is not None:
        rows.insert(3, ("dense matrices", result.dense))
    if result.rows is not None:
        rows.insert(4, ("rows of trees", result.rows))
    if result.weights is not None:
        rows[3:3] = _found_rows(result)
    if result.ignored_keys:
        rows.append(("ignored config keys", ", ".join(result.ignored_keys)))
    if result.check is not None:
        encoder = not hasattr(result.check, "mean_kl")
        rows += _encoder_rows(result.check) if encoder else _check_rows(result.check)
    print_table(rows)


_WHY = {"not measured": ", its cost not measured", "asked": ", as asked"}


def _cost_of_head(cost: HeadCost) -> str:
    figures = f"same token {100 * cost.same_argmax:.1f} %, mean KL {cost.mean_kl:.2e}"
    chosen = "taken" if cost.bearable else "too costly"
    return f"{figures} on {cost.positions} positions: {chosen}"


def _found_rows(result: PackResult) -> list[tuple[str, str]]:
    """What was found in a published transformer, and what each part of it takes."""
    rows = [("weights", str(result.weights))]
    if result.scales:
        found = ", ".join(f"{what} ({count} matrices)" for what, count in result.scales.items())
        rows.append(("one scale for", found))
    if result.scale_group:
        rows.append(("activations", f"int8 for each {result.scale_group} inputs"))
    if result.packing != "none":
        rows.append(("ternary", result.packing))
    if result.head is not None:
        rows.append(("head", result.head + _WHY.get(result.head_choice or "", "")))
    if (cost := result.head_int8) is not None:
        rows.append(("head in int8 rows", _cost_of_head(cost)))
    parts = ", ".join(f"{kind} {size(count)}" for kind, count in result.parts.items())
    return [*rows, ("parts", parts)]


def _encoder_rows(check: Any) -> list[tuple[str, str]]:
    rows = [
        ("checked on", f"{check.tokens} tokens, {check.text}"),
        ("error of hidden states", f"{check.hidden_error:.2e}"),
        ("error of logits", f"{check.logit_error:.2e}"),
        ("largest logit difference", f"{check.largest_difference:.3g}"),
        ("  of logits up to", f"{check.largest_logit:.3g}"),
        ("same prediction", f"{100 * check.same_argmax:.1f} %"),
    ]
    if check.same_path is not None:
        rows.append(("tokens on the same path", f"{100 * check.same_path:.2f} %"))
    return rows


def _check_rows(check: Any) -> list[tuple[str, str]]:
    rows = [
        ("checked on", f"{check.tokens} tokens, {check.text}"),
        ("backends", f"{check.source_backend} against {check.packed_backend}"),
        ("largest logit difference", f"{check.largest_difference:.3g}"),
        ("  of logits up to", f"{check.largest_logit:.3g}"),
        ("relative error", f"{check.relative_error:.2e}"),
        ("same most likely token", f"{100 * check.same_argmax:.1f} %"),
        ("mean KL", f"{check.mean_kl:.2e} nats a token"),
        ("loss of the source", f"{check.source_loss:.4f}"),
        ("loss when packed", f"{check.packed_loss:.4f}"),
    ]
    if (kv := check.kv_int8) is not None:
        cost = f"mean KL {kv.mean_kl:.2e}, same token {100 * kv.same_argmax:.1f} %"
        rows.append(("keys and values in int8", cost))
    return rows
