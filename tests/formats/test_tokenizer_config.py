"""tokenizer_config.json: names that agree with the model's config, own names and templates kept."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tokenizers import Tokenizer, models

from nomatmul.engine.loading import BOX
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.tokenizer import load_tokenizer, save_tokenizer
from nomatmul.formats.tokenizer_config import tokenizer_config, tokenizer_config_bytes

CONFIG = ModelConfig(vocab_size=8, hidden_size=32, num_layers=1, intermediate_size=48)


def tokenizer(*names: str) -> Tokenizer:
    ids = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(ids, unk_token=names[0]))
    made.add_special_tokens([name for name in names if name[0] in "<["])
    return made


def test_ids_of_the_config_decide_the_names():
    made = tokenizer("<unk>", "<s>", "</s>", "word", "<|done|>")
    config = dataclasses.replace(CONFIG, bos_token_id=1, eos_token_id=4)
    document = tokenizer_config(made, config)
    names = {key: value for key, value in document.items() if key.endswith("_token")}
    assert names == {"bos_token": "<s>", "eos_token": "<|done|>", "unk_token": "<unk>"}
    assert document["split_special_tokens"] is True
    beyond = dataclasses.replace(CONFIG, eos_token_id=7)  # an id that has no token
    assert "eos_token" not in tokenizer_config(made, beyond)


def test_names_and_template_of_the_source_are_kept(tmp_path):
    made = tokenizer("<unk>", "<s>", "</s>", "<hole>", "<fill>")
    given = {
        "pad_token": {"content": "<fill>", "special": True},
        "mask_token": "<hole>",
        "sep_token": "<absent>",
        "bos_token": "<hole>",
        "chat_template": "{{ messages }}",
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    config = dataclasses.replace(CONFIG, bos_token_id=1, eos_token_id=2)
    save_tokenizer(made, tmp_path, config, source=tmp_path)
    document = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (document["pad_token"], document["mask_token"]) == ("<fill>", "<hole>")
    assert (document["bos_token"], document["chat_template"]) == ("<s>", "{{ messages }}")
    assert not {"sep_token", "add_bos_token"} & set(document)
    assert document["split_special_tokens"] is False  # a template spells special tokens
    (tmp_path / "tokenizer_config.json").write_text("no JSON")
    assert "mask_token" not in tokenizer_config(made, config, tmp_path)


@pytest.mark.parametrize(("mixer", "limit"), [("mlgru", int(1e30)), ("attention", 96)])
def test_only_models_with_positions_have_a_longest_text(mixer, limit):
    heads = {"num_heads": 4} if mixer == "attention" else {}
    config = dataclasses.replace(CONFIG, token_mixer=mixer, max_position_embeddings=96, **heads)
    assert tokenizer_config(tokenizer("<unk>"), config)["model_max_length"] == limit


def test_the_model_in_the_box_has_the_file_of_its_tokenizer():
    config = PackedReader(BOX).config
    expected = tokenizer_config_bytes(load_tokenizer(BOX), config)
    assert (BOX / "tokenizer_config.json").read_bytes() == expected


def test_special_tokens_are_text_unless_asked_for(tmp_path):
    made = Tokenizer(models.BPE({"<": 0, "a": 1, ">": 2, "<a>": 3}, []))
    made.add_special_tokens(["<a>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a<a>").ids == [1, 0, 1, 2]
    assert load_tokenizer(tmp_path, special_in_text=True).encode("a<a>").ids == [1, 3]
