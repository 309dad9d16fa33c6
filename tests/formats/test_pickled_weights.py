"""Weights that torch pickled: the same numbers as from safetensors; no code, nothing sparse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_files import PUBLISHED, assert_holds, unlisted, write_json, write_published

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError
from nomatmul.formats.published import published_name


@pytest.mark.train
def test_pickled_parts_without_an_index(tmp_path, rng):
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = write_published(tmp_path, rng)
    for path in unlisted(tmp_path):
        name = path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save(load_torch(path), tmp_path / name)
        path.unlink()
    assert_holds(tmp_path, tensors)


@pytest.mark.train
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_pickles(tmp_path, rng, dtype, sharded, zipped):
    import torch

    tensors = write_published(tmp_path, rng)
    (tmp_path / "model.safetensors").unlink()
    state = {
        published_name(n): torch.from_numpy(t).to(getattr(torch, dtype)) for n, t in tensors.items()
    }
    parts = {"pytorch_model.bin": list(state)}
    if sharded:
        parts = {"a.bin": list(state)[::2], "b.bin": list(state)[1::2]}
        weight_map = {name: file for file, names in parts.items() for name in names}
        write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    for file, names in parts.items():
        torch.save(
            {n: state[n] for n in names},
            tmp_path / file,
            _use_new_zipfile_serialization=zipped,
        )
    assert_holds(tmp_path, tensors, rel={"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype])
    checkpoint = open_checkpoint(tmp_path)
    rows = checkpoint.read("embedding.weight", slice(3, 9))
    np.testing.assert_array_equal(rows, checkpoint.read("embedding.weight")[3:9])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 broken", b"\x80\x04N.", b"not a pickle"])
def test_a_broken_pickle_is_one_clear_line(tmp_path, data):
    write_json(tmp_path / "config.json", PUBLISHED)
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.train
def test_pickled_parameters_of_a_module(tmp_path, rng):
    """`torch.save(dict(model.named_parameters()))`: numpy takes no tensor with a gradient."""
    import torch

    tensors = write_published(tmp_path, rng)
    (tmp_path / "model.safetensors").unlink()
    state = {published_name(n): torch.nn.Parameter(torch.from_numpy(t)) for n, t in tensors.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path, tensors)


@pytest.mark.train
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_pickled_tensors_that_are_not_dense_are_refused(tmp_path, rng, kind):
    import torch

    tensors = write_published(tmp_path, rng)
    (tmp_path / "model.safetensors").unlink()
    state = {published_name(n): torch.from_numpy(t) for n, t in tensors.items()}
    odd = state["model.norm.weight"]
    state["model.norm.weight"] = odd.to_sparse() if kind == "sparse" else odd.to("meta")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"model\.norm\.weight has .*, expected a dense tensor"):
        open_checkpoint(tmp_path)


@pytest.mark.train
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import torch

    write_json(tmp_path / "config.json", PUBLISHED)
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read"):
        open_checkpoint(tmp_path)
