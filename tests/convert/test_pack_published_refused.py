"""Published decoders that are not packed: one line says why, and nothing is left behind."""

from __future__ import annotations

import json

import pytest
from gguf_models import VOCAB, sizes, write_gguf
from support.published_kinds import bonsai, falcon, gguf
from support.published_lm import (
    LLAMA,
    QWEN3,
    packed_rows,
    random_model,
    write,
    write_packed,
    write_values,
)

import nomatmul
from nomatmul import cli
from nomatmul.convert import pack
from nomatmul.formats.errors import FormatError


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (falcon, {"head": "f8"}, "head 'f8' is unknown; legal values are f32, bf16, f16, int8"),
        (falcon, {"rows": "int8"}, "rows 'int8' is for encoders"),
        (falcon, {"dense": "int8"}, "dense 'int8' is for encoders and dense transformers"),
    ],
)
def test_forms_that_no_matrix_has(tmp_path, rng, kind, options, message):
    source = kind(tmp_path / "source", rng)
    with pytest.raises(ValueError, match=message):
        pack(source, tmp_path / "packed", check=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_head_that_float16_cannot_hold(tmp_path, rng):
    model = random_model(LLAMA, rng)
    model.floats["lm_head.weight"][5, 3] = 1e6
    source = write_packed(tmp_path / "source", model, legacy=True)
    with pytest.raises(ValueError, match=r"head.weight: f16 cannot hold 1e\+06, only up"):
        pack(source, tmp_path / "packed", head="float16", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damage_leaves_nothing_behind(tmp_path, rng, capsys):
    """Codes are seen only when they are read, behind many tensors that are written by then."""
    model = random_model(LLAMA, rng)
    source = write_packed(tmp_path / "source", model, legacy=True)
    t, _ = model.ternary["model.layers.1.mlp.down_proj"]
    tensors = {**model.floats}
    for name, (values, scale) in model.ternary.items():
        tensors[f"{name}.weight"] = packed_rows(values)
        tensors[f"{name}.weight_scale"] = scale[0]
    tensors["model.layers.1.mlp.down_proj.weight"] = packed_rows(t) | 3
    write(source, json.loads((source / "config.json").read_text()), tensors)
    assert cli.main(["pack", str(source), str(tmp_path / "packed"), "--no-check"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "down_proj.weight' holds the illegal code 3" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": None}, "has no quantization_config"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3 does not divide"),
        ({"num_local_experts": 4}, "'num_local_experts'"),
        ({"model_type": "gemma3_text"}, "'gemma3_text' is not supported yet"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is unknown"),
        ({"hidden_size": 68}, "has shape"),
        ({"vocab_size": 62}, "'model.embed_tokens.weight' has shape [61, 64]"),
        ({"head_dim": -4}, "head_dim"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000 is above"),
        ({"rope_theta": 10**400}, "must be finite and above 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention' alone"),
        ({"rope_scaling": {"factor": 2.0}}, "{'factor': 2.0} has a factor, but no rope_type"),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2},
                "rope_scaling": {"rope_type": "linear", "factor": 4},
            },
            "rope_scaling {'rope_type': 'linear', 'factor': 4} are not the same",
        ),
    ],
)
def test_bad_configs_are_one_line_and_leave_nothing(tmp_path, rng, capsys, change, words):
    source = write_packed(tmp_path / "source", random_model(LLAMA, rng), legacy=True)
    config = {**json.loads((source / "config.json").read_text()), **change}
    (source / "config.json").write_text(json.dumps(config))
    assert cli.main(["pack", str(source), str(tmp_path / "packed")]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert words in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_cannot_be_computed_leaves_nothing_behind(tmp_path, rng, capsys):
    """Keys that float16 cannot hold are seen by the check, behind the packing."""
    model = random_model(QWEN3, rng, group=32)
    model.floats["model.layers.1.self_attn.k_norm.weight"][:] = 1e30
    source = write_values(tmp_path / "source", model)
    assert cli.main(["pack", str(source), str(tmp_path / "packed")]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "not finite" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_truncated_gguf_leaves_nothing_behind(tmp_path, rng, capsys):
    write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="TQ2_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["pack", str(tmp_path / "m.gguf"), str(tmp_path / "packed")]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_loading_what_is_not_packed_says_how(tmp_path, rng):
    for kind in (bonsai, gguf):
        source = kind(tmp_path / kind.__name__, rng)
        target = f"{source.with_suffix('')}-packed"
        with pytest.raises(FormatError, match=f"is not packed: `nomatmul pack {source} {target}`"):
            nomatmul.load(source)


def test_an_unsafe_template_in_a_gguf_is_refused_by_the_file_s_place(tmp_path, rng):
    """Not by that of the scratch directory in which its files are looked at."""

    def keys(writer):
        sizes(writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*(chr(33 + i) for i in range(VOCAB - 1)), "AB"])
        writer.add_token_types([1] * VOCAB)
        writer.add_token_merges(["A B"])
        writer.add_chat_template("{{ ''.__class__ }}")

    write_gguf(tmp_path / "m.gguf", "qwen3", rng, kind="TQ2_0", keys=keys)
    with pytest.raises(FormatError, match="access to '__class__'") as caught:
        pack(tmp_path / "m.gguf", tmp_path / "packed", check=False)
    assert str(caught.value).startswith(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
