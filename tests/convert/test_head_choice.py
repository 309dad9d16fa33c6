"""A float head becomes int8 rows, or does not: what that costs decides, ahead of the packing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf_models import write_gguf
from model_files import write_tokenizer
from support.published_lm import BITNET, LLAMA, bfloat16, random_model, write_packed

from nomatmul import cli
from nomatmul.convert import check, head, pack, packing
from nomatmul.convert.check_text import DEFAULT_TEXT, MORE_TEXT, more_ids, token_ids
from nomatmul.convert.head import HeadCost, int8_cost
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.tokenizer import load_tokenizer
from nomatmul.reference.model import ReferenceModel


def clear(directory, rng):
    """The head is the embedding's copy: the token that was read is likely by far."""
    model = random_model(LLAMA, rng)
    model.floats["lm_head.weight"] = model.floats["model.embed_tokens.weight"].copy()
    return write_packed(directory, model, legacy=True)


def close(directory, rng, change=bfloat16):
    """Rows that differ by less than the steps of their int8."""
    model = random_model(LLAMA, rng)
    rows = rng.standard_normal((1, 64)) + 0.01 * rng.standard_normal((61, 64))
    model.floats["lm_head.weight"] = change(rows)
    return write_packed(directory, model, legacy=True)


def tensors(directory):
    reader = PackedReader(directory)
    return {name: reader.read(name) for name in reader.infos}


def said(capsys, *arguments):
    assert cli.main(["pack", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_int8_rows_are_taken_where_they_cost_little(tmp_path, rng):
    result = pack(clear(tmp_path / "source", rng), tmp_path / "packed")
    assert (result.head, result.head_choice) == ("int8", "measured")
    cost = result.head_int8
    assert cost.positions >= 200
    assert cost.same_argmax >= head.LEAST_SAME
    assert 0 < cost.mean_kl <= head.MOST_KL


def test_a_head_of_close_rows_keeps_16_bits(tmp_path, rng):
    source = close(tmp_path / "source", rng)
    result = pack(source, tmp_path / "packed")
    assert (result.head, result.head_choice, result.embedding) == ("bf16", "measured", "bf16")
    assert result.head_int8.same_argmax < 0.9
    found = tensors(tmp_path / "packed")
    assert (
        pack(source, tmp_path / "asked", head="int8").check.same_argmax < result.check.same_argmax
    )
    others = tensors(tmp_path / "asked")
    assert found.keys() ^ others.keys() == {"head.scale"}
    for name in found.keys() - {"head.weight"}:
        np.testing.assert_array_equal(found[name], others[name], err_msg=name)


@pytest.mark.parametrize(("asked", "stored"), [("int8", "int8"), ("float16", "f16")])
@pytest.mark.parametrize("kind", [clear, close], ids=lambda kind: kind.__name__)
def test_a_form_that_is_asked_for_is_not_judged(tmp_path, rng, kind, asked, stored):
    result = pack(kind(tmp_path / "source", rng), tmp_path / "packed", head=asked)
    assert (result.head, result.head_choice, result.head_int8) == (stored, "asked", None)


def test_without_the_check_the_head_is_int8_and_that_is_said(tmp_path, rng, capsys):
    source = close(tmp_path / "source", rng)
    shown = " ".join(said(capsys, source, tmp_path / "a", "--no-check").split())
    assert "head int8, its cost not measured" in shown
    found = json.loads(said(capsys, source, tmp_path / "b", "--no-check", "--json"))
    assert (found["head"], found["head_choice"]) == ("int8", "not measured")
    assert found["head_int8"] is None


@pytest.mark.parametrize(
    ("kind", "form", "word"), [(clear, "int8", "taken"), (close, "bf16", "too costly")]
)
def test_the_report_has_the_form_and_both_figures(tmp_path, rng, capsys, kind, form, word):
    source = kind(tmp_path / "source", rng)
    found = json.loads(said(capsys, source, tmp_path / "a", "--json"))
    assert (found["head"], found["head_choice"]) == (form, "measured")
    cost = found["head_int8"]
    assert cost.keys() == {"positions", "same_argmax", "mean_kl"}
    shown = " ".join(said(capsys, source, tmp_path / "b").split())
    figures = f"same token {100 * cost['same_argmax']:.1f} %, mean KL {cost['mean_kl']:.2e}"
    assert f"head {form} head in int8 rows {figures} on {cost['positions']} positions" in shown
    assert f"positions: {word}" in shown


def test_the_source_runs_once(tmp_path, rng, monkeypatch):
    opened, build = [], ReferenceModel.from_checkpoint.__func__
    counted = classmethod(lambda cls, checkpoint: opened.append(1) or build(cls, checkpoint))
    monkeypatch.setattr(ReferenceModel, "from_checkpoint", counted)
    written, writer = [], packing.PackedWriter
    monkeypatch.setattr(packing, "PackedWriter", lambda *a: written.append(1) or writer(*a))
    result = pack(close(tmp_path / "source", rng), tmp_path / "packed")
    assert (len(opened), len(written)) == (1, 1)
    assert result.check.tokens == 64
    assert result.check.source_backend == "numpy oracle"


def test_the_check_is_that_of_a_source_run_afterwards(tmp_path, rng):
    source = clear(tmp_path / "source", rng)
    found = pack(source, tmp_path / "packed").check
    wanted = check.check_packed(open_checkpoint(source), tmp_path / "packed", check.CheckText())
    assert (found.tokens, found.text, found.kv_int8) == (wanted.tokens, wanted.text, wanted.kv_int8)
    for name in ("mean_kl", "relative_error", "same_argmax", "source_loss", "packed_loss"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-3)


def test_what_is_tied_or_int8_already_has_no_choice(tmp_path, rng):
    tied = write_packed(tmp_path / "a", random_model(BITNET, rng), legacy=False)
    result = pack(tied, tmp_path / "1")
    assert (result.head, result.head_choice, result.head_int8) == ("int8", None, None)
    write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="TQ1_0", outer="Q8_0")
    result = pack(tmp_path / "m.gguf", tmp_path / "2")
    assert (result.head, result.head_choice, result.head_int8) == ("int8-32", None, None)


@pytest.mark.parametrize(("largest", "form"), [(1.0, "f16"), (1e5, "bf16")])
def test_floats_that_no_16_bits_hold_are_rounded_to_float16_where_it_can(
    tmp_path, rng, largest, form
):
    """An element of 1e5 is beyond float16, whose range ends at 65504."""

    def change(rows):
        rows[:, 0] = largest
        return rows.astype(np.float32)

    result = pack(close(tmp_path / "source", rng, change), tmp_path / "packed")
    assert (result.head, result.head_choice) == (form, "measured")


def test_a_head_of_zeros_is_int8(tmp_path, rng):
    model = random_model(LLAMA, rng)
    model.floats["lm_head.weight"][:] = 0
    result = pack(write_packed(tmp_path / "a", model, legacy=True), tmp_path / "packed")
    assert result.head == "int8"
    assert (result.head_int8.same_argmax, result.head_int8.mean_kl) == (1, 0)


def test_numbers_that_are_not_finite_are_not_judged(rng):
    weight, hidden = rng.standard_normal((2, 8, 8)).astype(np.float32)
    assert int8_cost(weight, hidden, hidden @ weight.T).positions == 8
    hidden[3, 3] = np.inf
    assert int8_cost(weight, hidden, np.zeros((8, 8), np.float32)) is None
    assert int8_cost(weight, weight, np.full((8, 8), np.nan, np.float32)) is None


def test_the_figures_are_those_of_int8_rows_and_activations(rng, monkeypatch):
    weight = rng.standard_normal((50, 32)).astype(np.float32)
    hidden = rng.standard_normal((300, 32)).astype(np.float32)
    wanted = hidden @ weight.T
    monkeypatch.setattr(head, "_BLOCK_ELEMENTS", 7 * 32)
    found = int8_cost(weight, hidden, wanted)

    def rounded(values):
        step = np.abs(values).max(axis=1, keepdims=True) / 127.0
        return np.rint(values / step) * step

    rough = rounded(hidden.astype(np.float64)) @ rounded(weight.astype(np.float64)).T
    a, b = (2 / wanted.std() * logits for logits in (wanted.astype(np.float64), rough))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    assert found.positions == 300
    assert found.same_argmax == np.mean(a.argmax(1) == b.argmax(1)) < 1
    assert found.mean_kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-3)


@pytest.mark.parametrize(
    ("same", "kl", "bearable"),
    [(0.99, 1e-3, True), (0.989, 0.0, False), (1.0, 1.01e-3, False), (1.0, np.nan, False)],
)
def test_both_limits_count(same, kl, bearable):
    assert HeadCost(256, same, kl).bearable is bearable


def test_a_source_that_memory_cannot_hold_is_not_measured(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(check, "available_memory", lambda: 100_000)
    with pytest.warns(UserWarning, match="was not compared with its source"):
        result = pack(close(tmp_path / "source", rng), tmp_path / "packed")
    assert (result.head, result.head_choice, result.check) == ("int8", "not measured", None)


def test_a_destination_that_exists_is_refused_before_the_source_runs(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(packing, "run_source", None)  # a call would fail otherwise
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine").touch()
    with pytest.raises(ValueError, match="packed already exists"):
        pack(close(tmp_path / "source", rng), tmp_path / "packed")


@pytest.mark.parametrize(("longest", "shape"), [(8, (128, 8)), (64, (16, 64)), (4096, (4, 256))])
def test_positions_to_judge_a_small_head_by(tmp_path, rng, longest, shape):
    values = {**LLAMA, "max_position_embeddings": longest}
    source = write_packed(tmp_path / "source", random_model(values, rng), legacy=True)
    config = open_checkpoint(source).config
    ids, _ = token_ids(config, None, check.CheckText())
    found = more_ids(config, None, ids)
    assert found.shape == shape
    assert found[0, : len(ids)].tolist() == ids
    assert 0 <= found.min() <= found.max() < config.vocab_size


def test_a_short_text_goes_on(tmp_path, rng):
    """A head is not judged by three tokens, and the check is of them alone."""
    values = {**LLAMA, "max_position_embeddings": 256}
    source = write_packed(tmp_path / "source", random_model(values, rng), legacy=True)
    write_tokenizer(source)
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    result = pack(source, tmp_path / "packed", check_text=tmp_path / "short.txt")
    reader = PackedReader(tmp_path / "packed")
    ids, _ = token_ids(reader.config, reader.tokenizer_path, check.CheckText("w1 w2 w3"))
    found = more_ids(reader.config, reader.tokenizer_path, ids)
    more = load_tokenizer(reader.tokenizer_path).encode(MORE_TEXT).ids
    assert found.tolist() == [[*ids, *more][:256]]
    assert result.check.tokens == len(ids)
    assert result.head_int8.positions == found.size >= 200


def test_the_built_in_text_is_long_enough():
    """A word is a token or more."""
    assert len((DEFAULT_TEXT + MORE_TEXT).split()) > 200
