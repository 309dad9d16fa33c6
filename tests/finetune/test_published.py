"""Fine-tuning a published encoder: texts get the special tokens that it was trained with."""

from __future__ import annotations

from pathlib import Path

import crammed
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import nomatmul
from nomatmul.convert import pack
from nomatmul.finetune import FinetuneConfig, find_task, finetune, run
from nomatmul.finetune.data import encode
from nomatmul.finetune.tsv import Rows
from nomatmul.models import EncoderForSequenceClassification

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<cls>", "<sep>", "<mask>"]
WORDS = ["river", "bridge", "old", "stone", "boat", "light"]
ID = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}


def _tokenizer() -> Tokenizer:
    """As that code base makes them: no start token before a text alone, and "<s>" never used."""
    tokenizer = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <sep>",
        pair="<cls> $A <sep> $B <sep>",
        special_tokens=[("<cls>", ID["<cls>"]), ("<sep>", ID["<sep>"])],
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(
    ("texts", "length", "expected", "cut"),
    [
        (("old stone",), 8, ["old", "stone", "<sep>"], 0),
        (("old stone boat",), 3, ["old", "stone", "<sep>"], 1),
        (("old", "stone"), 8, ["<cls>", "old", "<sep>", "stone", "<sep>"], 0),
        (("old boat light", "stone"), 6, ["<cls>", "old", "boat", "<sep>", "stone", "<sep>"], 1),
    ],
)
def test_the_tokenizers_own_template(texts, length, expected, cut):
    tokenizer = _tokenizer()
    rows = Rows([texts], [0.0])
    data = encode(rows, tokenizer, length, False, torch.device("cpu"), template=True)
    assert data.ids[0].tolist() == [ID[word] for word in expected]
    assert data.truncated == cut
    assert tokenizer.truncation is None


def test_a_template_leaves_room_and_no_row_is_empty():
    tokenizer, cpu = _tokenizer(), torch.device("cpu")
    with pytest.raises(ValueError, match=r"max_length 4 leaves no room for 2 text"):
        encode(Rows([("old", "old")], [0.0]), tokenizer, 4, False, cpu, template=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.normalizer = None
    with pytest.raises(ValueError, match=r"row 2 has no tokens: \('  ',\)"):
        encode(Rows([("old",), ("  ",)], [0.0] * 2), tokenizer, 9, False, cpu, template=True)


def test_the_engine_reads_texts_as_fine_tuning_did(tmp_path: Path, monkeypatch) -> None:
    source = crammed.make(tmp_path / "published")
    _tokenizer().save(str(source / "tokenizer.json"))
    lines = ["sentence\tlabel"]
    lines += [f"{('river', 'bridge')[i % 2]} {WORDS[2 + i % 4]}\t{i % 2}" for i in range(20)]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    seen = []
    real = run.train_seed
    monkeypatch.setattr(run, "train_seed", lambda *a, **k: seen.append(a[2]) or real(*a, **k))
    config = FinetuneConfig(seeds=1, epochs=1, max_length=12)
    task = find_task(str(tmp_path / "rows.tsv"))
    done = finetune(
        source, task, tmp_path / "rows.tsv", tmp_path / "out", config, device="cpu", quiet=True
    )
    first = seen[0].ids[0]
    assert first.tolist() == [ID["river"], ID["old"], ID["<sep>"]]

    pack(done.model, tmp_path / "packed")
    (found,) = nomatmul.load(tmp_path / "packed", threads=1).classify("river old")
    model = EncoderForSequenceClassification.from_pretrained(done.model).eval()
    with torch.inference_mode():
        wanted = model(first[None].long()).logits.softmax(-1)[0].numpy()
    scores = [found["scores"][name] for name in ("0", "1")]
    assert np.allclose(scores, wanted, atol=1e-5)
