"""A union checkpoint and its packed form: the same bytes, and the same model as in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_files import packed_values, write_tokenizer, write_training

import nomatmul
from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.packed import PackedReader

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=36, num_layers=3, channel_mixer="fff", activation="silu",
    fff_trees=6, fff_depth=3,
)  # fmt: skip


@pytest.fixture
def source(tmp_path, rng) -> Path:
    write_training(tmp_path / "source", CONFIG, rng)
    write_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
def test_every_tensor_is_what_the_formats_say(source, tmp_path, packing):
    pack(source, tmp_path / "packed", packing=packing, embedding="int8", check=False)
    reader, checkpoint = PackedReader(tmp_path / "packed"), open_checkpoint(source)
    assert reader.config == CONFIG
    expected = packed_values(checkpoint, packing, "int8")
    assert set(expected) == set(reader.infos)
    for name, value in expected.items():
        if name.endswith("rows.packed"):
            found, _ = reader.rows(name.removesuffix(".rows.packed"))
        elif name.endswith(".packed"):
            found, _ = reader.ternary(name.removesuffix(".packed"))
        else:
            found = reader.read(name)
        np.testing.assert_array_equal(found, value, err_msg=name)


@pytest.mark.train
def test_the_check_against_torch_agrees(source, tmp_path):
    result = pack(source, tmp_path / "packed")
    assert result.check is not None
    assert result.check.source_backend == "torch"
    assert result.check.packed_backend.startswith("engine")
    assert result.check.relative_error < 2e-2
    assert result.check.same_argmax >= 0.98
    card = (tmp_path / "packed" / "README.md").read_text()
    for words in ("| trees a layer | 6 of depth 3 |", "| active neurons | 24 of 90 |"):
        assert words in card


@pytest.mark.train
def test_paths_of_torch_and_the_engine_are_equal(source, tmp_path):
    """Fed the same inputs, the layer of torch takes every decision as the native core does."""
    import torch

    from nomatmul.models import CausalLM

    pack(source, tmp_path / "packed", check=False)
    lm = nomatmul.load(tmp_path / "packed", threads=2)
    model = CausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found: dict[int, tuple[np.ndarray, ...]] = {}

    def keep(layer: int):
        def hook(module, arguments, output):
            from nomatmul.ops.fff.ternary import ternary_fff

            x_ND = arguments[0].reshape(-1, CONFIG.hidden_size)
            _, logits, rows = ternary_fff(
                x_ND, module.w_in, module.w_out, module.norm_in.weight, module.norm_out.weight,
                trees=module.trees, depth=module.depth, slots=module.slots,
            )  # fmt: skip
            found[layer] = (x_ND.numpy(), logits.numpy(), rows.numpy())

        return hook

    channels = [m for m in model.modules() if type(m).__name__ == "FFF"]
    assert len(channels) == CONFIG.num_layers
    for layer, channel in enumerate(channels):
        channel.register_forward_hook(keep(layer))
    with torch.inference_mode():
        model(torch.tensor([np.random.default_rng(1).integers(0, 50, 40).tolist()]))
    for layer, (x_ND, logits, rows) in found.items():
        rows_NA, logits_NA = lm.backend.model.walk(layer, x_ND)
        np.testing.assert_array_equal(rows.reshape(rows_NA.shape), rows_NA)
        # torch's absmean may be a few units in the last place off (docs/numerics.md)
        np.testing.assert_allclose(logits.reshape(rows_NA.shape), logits_NA, rtol=1e-6)


def test_damaged_rows_are_refused(source, tmp_path):
    pack(source, tmp_path / "packed", check=False)
    reader = PackedReader(tmp_path / "packed")
    info = reader.infos["layers.1.channel.rows.packed"]
    with open(reader.weights_path, "r+b") as file:
        file.seek(info.offset + info.nbytes // 2)
        file.write(b"\xff")
    with pytest.raises(FormatError, match=r"rows.packed does not match its checksum"):
        nomatmul.load(tmp_path / "packed")


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"linear": "dense"}, "is a dense model"),
        ({"activation": "gelu"}, "a packed model has no ternary trees with activation 'gelu'"),
        ({"norm": "layer"}, "a packed model has no norm 'layer'"),
    ],
)
def test_what_cannot_be_packed(tmp_path, rng, dials, message):
    config = ModelConfig(**{**CONFIG.to_dict(), **dials})
    write_training(tmp_path / "source", config, rng)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "source", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_trees_with_a_master_leaf_are_packed_and_computed_by_the_oracle(tmp_path, rng):
    config = ModelConfig(**{**CONFIG.to_dict(), "fff_master_width": 12})
    write_training(tmp_path / "source", config, rng)
    result = pack(tmp_path / "source", tmp_path / "packed")
    assert result.check is not None
    assert result.check.packed_backend == "numpy oracle"
    assert result.check.relative_error < 2e-2
