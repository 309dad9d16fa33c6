"""Texts in, vectors, words and classes out; bad input and damaged directories are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from encoder_files import TREES, encoder_config, write_encoder, write_word_piece
from safetensors.numpy import load_file, save_file

import nomatmul
from nomatmul.convert import pack
from nomatmul.formats.encoder import EncoderHead
from nomatmul.formats.errors import FormatError

LABELS = ("bad", "good", "odd")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Make a packed encoder of some task, once each."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def make(task="masked", tokenizer=True, labels=None, head=None):
        key = (task, tokenizer, labels, head)
        if key not in made:
            source, target = root / f"source{len(made)}", root / f"packed{len(made)}"
            names = (LABELS if labels is None else labels) if task != "masked" else ()
            write_encoder(source, encoder_config(**TREES), task, names, head)
            if tokenizer:
                write_word_piece(source)
            pack(source, target)
            made[key] = target
        return made[key]

    return make


@pytest.fixture(scope="module")
def model(packed):
    return nomatmul.load(packed())


def test_embedding_a_batch_is_embedding_each(model):
    texts = ["the river", "a quiet old town is green", "stones", "The river"]
    together = model.embed(texts)
    assert together.shape == (4, 24)
    assert together.dtype == np.float32
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(model.embed(text)[0], row, atol=1e-5)
    np.testing.assert_allclose(together[0], together[3], atol=1e-5)  # the tokenizer lower-cases


def test_pooling(model):
    ids = model.tokenizer.encode("the river flows").ids
    hidden = model.hidden(np.array([ids]))[0]
    for pooling, wanted in (
        ("mean", hidden.mean(0)),
        ("first", hidden[0]),
        ("max", hidden.max(0)),
    ):
        found = model.embed("the river flows", pooling)[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    unit = model.embed("the river flows", normalize=True)[0]
    np.testing.assert_allclose(np.linalg.norm(unit), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="pooling 'sum' is unknown; legal are mean, first, max"):
        model.embed("the river", "sum")


def test_fill_mask(model):
    first, second = model.fill_mask("the [MASK] flows to [MASK]", top_k=3)
    ids = np.array([model.tokenizer.encode("the river flows to river").ids])
    ids[0, [2, 5]] = 4
    logits = model.logits(ids)[0]
    for place, fillings in ((2, first), (5, second)):
        known = logits[place, :23]  # the vocabulary has 32, the tokenizer names 23
        order = np.argsort(-known, kind="stable")[:3]
        assert [f["token_id"] for f in fillings] == order.tolist()
        p = np.exp(logits[place] - logits[place].max())
        np.testing.assert_allclose([f["score"] for f in fillings], (p / p.sum())[order], rtol=1e-4)
        assert fillings[0]["token"] == model.tokenizer.id_to_token(int(order[0]))
    text = first[0]["text"]
    assert text.startswith("the ")
    assert text.endswith("flows to [MASK]")


def test_special_words_in_a_text_are_text(model):
    """Only fill_mask tells [MASK] from ordinary words, as in training."""
    plain = model.embed("the [SEP] river")
    model.fill_mask("a [MASK]")
    np.testing.assert_array_equal(model.embed("the [SEP] river"), plain)
    ids = model.tokenizer.encode("the [SEP] river").ids
    assert 3 not in ids[1:-1]


def test_sequence_classifier(packed):
    model = nomatmul.load(packed("sequence"))
    texts = ["the river", "a quiet old town is green"]
    answers = model.classify(texts)
    for text, answer in zip(texts, answers, strict=True):
        logits = model.logits(np.array([model.tokenizer.encode(text).ids]))[0]
        assert logits.shape == (3,)
        assert answer["label"] == LABELS[int(logits.argmax())]
        np.testing.assert_allclose(sum(answer["scores"].values()), 1, rtol=1e-5)
        assert answer["score"] == answer["scores"][answer["label"]]
    pair = model.classify(("the river", "a town"))
    ids = model.tokenizer.encode("the river", "a town").ids
    assert pair[0]["label"] == LABELS[int(model.logits(np.array([ids]))[0].argmax())]


def test_sequence_classifier_by_hand(packed):
    """Pooler, tanh and classifier from the stored tensors."""
    directory = packed("sequence")
    model = nomatmul.load(directory)
    stored = load_file(directory / "model.safetensors")
    ids = np.array([[2, 7, 9, 3, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    mean = model.hidden(ids, mask)[0, :4].mean(0)
    inner = np.tanh(stored["pooler.weight"] @ mean + stored["pooler.bias"])
    wanted = stored["classifier.weight"] @ inner + stored["classifier.bias"]
    np.testing.assert_allclose(model.logits(ids, mask)[0], wanted, atol=1e-5)


def test_pooling_over_padding_as_the_published_code_does(packed):
    head = EncoderHead(pooler_size=None, pooler_activation="relu", pool_padding=True)
    model = nomatmul.load(packed("sequence", head=head))
    long, short = "a quiet old town is green", "the river"
    ids = [model.tokenizer.encode(text).ids for text in (long, short)]
    padded = np.array([ids[0], ids[1] + [0] * (len(ids[0]) - len(ids[1]))])
    mask = np.arange(len(ids[0])) < np.array([[len(i)] for i in ids])
    wanted = model.logits(padded, mask)
    for answer, row in zip(model.classify([long, short]), wanted, strict=True):
        p = np.exp(row - row.max())
        np.testing.assert_allclose(list(answer["scores"].values()), p / p.sum(), rtol=1e-4)


def test_regression(packed):
    model = nomatmul.load(packed("sequence", labels=("score",)))
    ids = np.array([model.tokenizer.encode("the river").ids])
    answer = model.classify("the river")[0]
    assert answer["label"] == "score"
    assert answer["value"] == pytest.approx(float(model.logits(ids)[0, 0]), abs=1e-5)


def test_token_classifier(packed):
    model = nomatmul.load(packed("token"))
    texts = ["the rivers", "a quiet old town"]
    for text, answer in zip(texts, model.classify(texts), strict=True):
        encoding = model.tokenizer.encode(text)
        logits = model.logits(np.array([encoding.ids]))[0]
        assert logits.shape == (len(encoding.ids), 3)
        assert [t["text"] for t in answer["tokens"]] == encoding.tokens[1:-1]
        labels = [LABELS[i] for i in logits.argmax(1)[1:-1]]
        assert [t["label"] for t in answer["tokens"]] == labels
        spans = [text[t["start"] : t["end"]] for t in answer["tokens"]]
        assert "".join(spans) == text.replace(" ", "")


def test_truncation_is_asked_for(model):
    text = " ".join(["river"] * 30)
    with pytest.raises(ValueError, match="text 1 has 32 tokens, the model has 20 positions"):
        model.embed(["the town", text])
    cut = model.embed(text, truncate=True)
    fitting = model.embed(" ".join(["river"] * 18))
    np.testing.assert_allclose(cut, fitting, atol=1e-5)  # [CLS], 18 rivers, [SEP]


def test_special_tokens_of_a_model_that_names_its_own(tmp_path):
    """Without a post-processor in the tokenizer: start, text, end, as the trainer writes rows."""
    from model_files import write_tokenizer

    config = encoder_config(**TREES, bos_token_id=30, eos_token_id=31)
    write_encoder(tmp_path / "source", config)
    write_tokenizer(tmp_path / "source", words=29)
    pack(tmp_path / "source", tmp_path / "packed")
    model = nomatmul.load(tmp_path / "packed")
    for text, ids in (
        ("w5 w6", [30, 5, 6, 31]),
        (("w5 w6", "w7"), [30, 5, 6, 31, 7, 31]),
        (" ".join(["w1"] * 40), [30, *[1] * 18, 31]),
        ((" ".join(["w1"] * 40), "w2 w3"), [30, *[1] * 15, 31, 2, 3, 31]),
    ):
        found = model.embed(text, "first", truncate=True)[0]
        np.testing.assert_array_equal(found, model.hidden([ids])[0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.embed([]), "there are no texts"),
        (lambda m: m.embed([3]), "text 0 must be a string or a pair of them, got 3"),
        (lambda m: m.embed("a \udc80"), "text 0 is not UTF-8"),
        (lambda m: m.fill_mask("the river"), r"the text has no \[MASK\] to fill in"),
        (lambda m: m.fill_mask("a [MASK]", top_k=0), "top_k is 0, it must lie in 1..23"),
        (lambda m: m.classify("the river"), 'classify needs a model with a head for task "seq'),
        (lambda m: m.logits([[0, 32]]), r"token id 32 is out of range; the vocabulary is 0..31"),
        (lambda m: m.logits([[-1]]), "token id -1 is out of range"),
        (lambda m: m.logits([[0.5]]), r"must be whole numbers \[B, T\], got float64 \[1, 1\]"),
        (lambda m: m.logits([[]]), "token ids must be whole numbers"),
        (lambda m: m.logits([[1] * 21]), "a sequence of 21 tokens is longer than the model's 20"),
        (lambda m: m.logits([[1, 2]], [[1]]), r"the mask has shape \[1, 1\], the token ids"),
        (lambda m: m.logits([[1, 2]], [[1, 2]]), "the mask must hold 0 and 1 only"),
        (lambda m: m.logits([[1], [2]], [[1], [0]]), "sequence 1 has no token"),
    ],
)
def test_mistakes_are_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_model_without_tokenizer_takes_ids(packed):
    model = nomatmul.load(packed(tokenizer=False))
    assert model.logits([[1, 2]]).shape == (1, 2, 32)
    with pytest.raises(ValueError, match="packed without a tokenizer"):
        model.embed("the river")


def test_arguments_of_load(packed):
    with pytest.raises(ValueError, match="is an encoder: the engine runs it on the CPU"):
        nomatmul.load(packed(), device="cuda")
    with pytest.raises(ValueError, match="isa 'sse9' is not available here"):
        nomatmul.load(packed(), isa="sse9")
    with pytest.raises(ValueError, match="threads must be a whole number"):
        nomatmul.load(packed(), threads=0)


def test_no_torch_is_imported(packed):
    script = (
        "import sys, nomatmul; m = nomatmul.load(sys.argv[1]); m.embed('the river');"
        " m.fill_mask('a [MASK]'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(packed())], check=True, timeout=60)


# -- directories ------------------------------------------------------------------------------


def changed_copy(directory, target, change):
    """A copy whose config is changed; its checksum is made to fit."""
    import hashlib
    import shutil

    shutil.copytree(directory, target)
    values = json.loads((target / "config.json").read_text())
    change(values)
    text = json.dumps(values).encode()
    (target / "config.json").write_bytes(text)
    raw = (target / "model.safetensors").read_bytes()
    old = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    new = hashlib.sha256(text).hexdigest()
    (target / "model.safetensors").write_bytes(raw.replace(old.encode(), new.encode()))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].update(fff_depth=3), r"rows is F32 \[21, 2, 24\], the config asks"),
        (lambda v: v["model"].update(fff_trees=2), r"rows is F32 \[21, 2, 24\], the config asks"),
        (lambda v: v["model"].update(fff_depth=60), "fff_depth 60 is out of range"),
        (lambda v: v.update(format_version=3), "format_version 3 is unknown"),
        (lambda v: v.update(more=1), "unknown config key 'more'"),
        (lambda v: v["forms"].update(rows="f16"), "rows form 'f16' is unknown"),
        (lambda v: v["head"].update(task="poem"), "task 'poem' is unknown"),
        (lambda v: v["head"].update(labels=["a"]), "task 'masked' does not go with 1 labels"),
        (lambda v: v["model"].update(causal=True), "a causal model has no task head"),
        (lambda v: v.pop("head"), "an encoder needs a task head"),
    ],
)
def test_configs_that_do_not_fit_are_refused(packed, tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        nomatmul.load(changed_copy(packed(), tmp_path / "changed", change))


def test_damage_is_found(packed, tmp_path):
    import shutil

    target = tmp_path / "damaged"
    shutil.copytree(packed(), target)
    path = target / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    at = 8 + length + header["layers.1.channel.rows"]["data_offsets"][0]
    raw[at + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"layers.1.channel.rows does not match its checksum"):
        nomatmul.load(target)
    path.write_bytes(raw[:-9])
    with pytest.raises(FormatError, match="is truncated"):
        nomatmul.load(target)


def test_weights_that_are_not_finite_are_not_packed(tmp_path):
    tensors = write_encoder(tmp_path / "source", encoder_config(**TREES))
    tensors["layers.1.channel.w_in"][3, 2] = np.nan
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(FormatError, match=r"w_in holds a value that is not finite"):
        pack(tmp_path / "source", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("place", ["layers.{}.channel.w_out", "final_norm.weight"])
def test_values_that_overflow_are_reported(place, tmp_path):
    tensors = write_encoder(tmp_path / "source", encoder_config(**TREES))
    for layer in range(2):
        tensors[place.format(layer)][:] = 3e38
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    for backend in ("native", "numpy"):
        model = nomatmul.load(tmp_path / "packed", backend=backend)
        with pytest.raises(ValueError, match="not finite"), np.errstate(all="ignore"):
            model.hidden([[1, 2, 3]])


def test_what_cannot_be_packed_is_named(packed, tmp_path):
    write_encoder(tmp_path / "ternary", encoder_config(linear="ternary", channel_mixer="ffn"))
    with pytest.raises(ValueError, match="a packed model has no linear 'ternary' in an encoder"):
        pack(tmp_path / "ternary", tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed already"):
        pack(packed(), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
