"""One meaning of a text that spells a special token, and names that other programs understand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_jobs import tiny_config, train_here

import nomatmul
from nomatmul.convert.packing import pack
from nomatmul.evaluate import score_text
from nomatmul.evaluate.torch_scorer import TorchScorer
from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM
from nomatmul.train.documents import find_sources
from nomatmul.train.shards import build_shards
from nomatmul.train.tokenizer import load_tokenizer
from nomatmul.train.tokens import open_stream

TEXT = "the boats <|endoftext|> wait\n<|pad|><|endoftext|>for light\n"


@pytest.fixture(scope="module")
def packed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    pack(finished, directory, check=False)
    return directory


@pytest.fixture(scope="module")
def encoder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step of an encoder."""
    model = ModelConfig(
        vocab_size=200, hidden_size=32, num_layers=1, intermediate_size=48, causal=False,
        token_mixer="attention", num_heads=2, linear="dense", channel_mixer="ffn", norm="layer",
        positions="sinusoidal", max_position_embeddings=32, tie_embeddings=True,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("encoder") / "run"
    train_here(tiny_config(steps=1, model=model, diagnostics_interval=0), text_file, out)
    return out


def test_every_room_reads_a_spelt_special_token_as_text(
    finished: Path, packed: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(finished / "model")
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    special = {tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|pad|>")}
    assert not special & set(ids)
    assert tokenizer.decode(ids) == TEXT

    (tmp_path / "text.txt").write_text(TEXT)
    shards = build_shards(find_sources([str(tmp_path / "text.txt")]), tokenizer, tmp_path / "t")
    stream = open_stream(shards)
    assert stream.read(0, len(stream)).tolist() == [*ids, tokenizer.token_to_id("<|endoftext|>")]

    lm = nomatmul.load(packed)
    assert lm.prompt_ids(TEXT, fresh=False) == ids
    assert lm.prompt_ids(TEXT)[1:] == ids  # a new text begins with the start token
    torch_model = CausalLM.from_pretrained(finished / "model")
    assert torch_model.tokenizer.encode(TEXT).ids == ids
    for scorer in (lm, TorchScorer.from_directory(finished / "model")):
        score = score_text(scorer, TEXT)
        assert (score.tokens, score.bytes) == (len(ids), len(TEXT))


@pytest.mark.parametrize("where", ["model", "checkpoint", "packed", "saved again"])
def test_a_decoder_in_transformers(
    finished: Path, packed: Path, tmp_path: Path, where: str
) -> None:
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    if where == "saved again":
        CausalLM.from_pretrained(finished / "model").save_pretrained(tmp_path)
    directory = {
        "model": finished / "model",
        "checkpoint": next(finished.glob("checkpoints/step-*")),
        "packed": packed,
        "saved again": tmp_path,
    }[where]
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert (theirs.bos_token, theirs.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    config = json.loads((finished / "model/config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs, key) == config[key] is not None
    for text in (TEXT, "the river", " a  b , c .", ""):
        assert theirs(text)["input_ids"] == theirs.encode(text) == ours.encode(text).ids
        assert theirs.decode(ours.encode(text).ids) == text
    padded = theirs(["the old stone bridge", "the"], padding=True, return_tensors="pt")
    assert list(padded) == ["input_ids", "attention_mask"]
    assert padded["attention_mask"][1].tolist()[-1] == 0
    batch = DataCollatorForLanguageModeling(theirs, mlm=False)([theirs("the river"), theirs("a")])
    assert (batch["labels"] == -100).sum() == (batch["attention_mask"] == 0).sum() > 0


def test_an_encoder_in_transformers(encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, pipeline

    pack(encoder, tmp_path / "packed", check=False)
    ours = load_tokenizer(encoder / "model")
    for directory in (encoder / "model", tmp_path / "packed"):
        theirs = AutoTokenizer.from_pretrained(directory)
        names = (theirs.mask_token, theirs.pad_token, theirs.cls_token, theirs.sep_token)
        assert names == ("[MASK]", "[PAD]", "[CLS]", "[SEP]")
        assert (theirs.unk_token, theirs.model_max_length) == ("[UNK]", 32)
        assert theirs("the river")["input_ids"] == ours.encode("the river").ids
        assert theirs("the", "a")["input_ids"] == ours.encode("the", "a").ids
        rows = [theirs("the river runs under", truncation=True), theirs("a")]
        assert (DataCollatorForLanguageModeling(theirs)(rows)["attention_mask"] == 0).any()
    fill = pipeline("fill-mask", model=str(encoder / "model"))
    text = "the [MASK] runs"
    ours_best = nomatmul.load(tmp_path / "packed").fill_mask(text, 3)[0]
    theirs_best = fill(text, top_k=3)
    assert [a["token"] for a in theirs_best] == [a["token_id"] for a in ours_best]


def test_generation_in_a_pipeline(finished: Path) -> None:
    from transformers import pipeline

    write = pipeline("text-generation", model=str(finished / "model"))
    text = write("the river", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("the river")
