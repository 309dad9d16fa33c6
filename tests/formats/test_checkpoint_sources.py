"""The same weights from one file, shards, half precisions and torch pickles; and bad sources."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from model_files import PUBLISHED, random_tensors, write_json, write_published, write_training
from safetensors.numpy import load_file, save_file

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.safetensors import SafetensorsFile
from nomatmul.formats.published import config_from_published, published_name


def assert_holds(directory: Path, tensors: dict, rel: float = 0.0) -> None:
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.names()) == set(tensors)
    for name, values in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, values, rtol=rel, atol=1e-7 if rel else 0, err_msg=name)


def shard(directory: Path, count: int = 3) -> dict[str, str]:
    """Split model.safetensors into `count` files and an index; return the weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[part::count]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": 1}, "weight_map": weight_map},
    )
    return weight_map


def test_shards(tmp_path, rng):
    tensors = write_published(tmp_path, rng)
    shard(tmp_path)
    assert_holds(tmp_path, tensors)


def unlisted(directory):
    """Two parts named as by an index that is gone; returns their paths."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    paths = [directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: tensors[name] for name in names[::2]}, paths[0])
    save_file({name: tensors[name] for name in names[1::2]}, paths[1])
    return paths


def test_parts_without_an_index(tmp_path, rng):
    tensors = write_published(tmp_path, rng)
    first, second = unlisted(tmp_path)
    assert_holds(tmp_path, tensors)
    second.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors, and an index"):
        open_checkpoint(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="holds parts of 2 and of 3, and no index"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="as another part does"):
        open_checkpoint(tmp_path)
    second.unlink()
    first.rename(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights: .*; weights\.safetensors has another"):
        open_checkpoint(tmp_path)


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
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits(tmp_path, dtype):
    """Every number that the type has, as torch reads it; what is none is refused."""
    import torch
    from safetensors.torch import save_file as save_torch

    stored = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    wanted = stored.float().numpy()
    finite = torch.from_numpy(np.isfinite(wanted))
    numbers = stored.view(torch.uint8)[finite].view(stored.dtype)
    save_torch({"all": stored, "finite": numbers}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.read_float32("finite"), wanted[np.isfinite(wanted)])
    np.testing.assert_array_equal(file.read_float32("finite", slice(3, 9)), wanted[3:9])
    with pytest.raises(ValueError, match="not finite"):
        file.read_float32("all")


def test_float16(tmp_path, rng):
    tensors = write_published(tmp_path, rng)
    stored = load_file(tmp_path / "model.safetensors")
    half = {name: values.astype(np.float16) for name, values in stored.items()}
    save_file(half, tmp_path / "model.safetensors")
    assert_holds(tmp_path, tensors, rel=2**-11)


@pytest.mark.train
@pytest.mark.parametrize("sharded", [False, True])
def test_bfloat16_as_torch_writes_it(tmp_path, rng, sharded):
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = write_published(tmp_path, rng)
    if sharded:
        shard(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_torch({n: t.to(torch.bfloat16) for n, t in load_torch(path).items()}, path)
    assert_holds(tmp_path, tensors, rel=2**-8)
    checkpoint = open_checkpoint(tmp_path)
    for name, values in tensors.items():
        expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(checkpoint.read(name), expected)


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


def test_tied_head_is_the_embedding(tmp_path, rng):
    options = {"tie_word_embeddings": True}
    tensors = write_published(tmp_path, rng, **options)
    assert "head.weight" not in tensors
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("head.weight"), tensors["embedding.weight"])
    assert checkpoint.shape("head.weight") == tensors["embedding.weight"].shape


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path, rng, equal):
    write_published(tmp_path, rng, tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embeddings.weight"] + np.float32(0 if equal else 1)
    save_file(stored, tmp_path / "model.safetensors")
    if equal:
        assert "head.weight" not in open_checkpoint(tmp_path).names()
    else:
        with pytest.raises(ValueError, match=r"ties the head .* 'lm_head\.weight' differs"):
            open_checkpoint(tmp_path)


def test_our_own_training_checkpoint(tmp_path, rng):
    config = ModelConfig(50, 32, 2, token_mixer="attention", linear="dense", num_heads=4)
    tensors = write_training(tmp_path, config, rng)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "training"
    assert checkpoint.config == config
    assert_holds(tmp_path, tensors)


def test_keys_that_hugging_face_adds_are_harmless_in_a_training_config(tmp_path, rng):
    config = ModelConfig(50, 32, 1, tie_embeddings=True)
    write_training(tmp_path, config, rng)
    values = {
        "model_type": "nomatmul",
        **config.to_dict(),
        "transformers_version": "5",
        "dtype": "x",
    }
    write_json(tmp_path / "config.json", {**values, "tie_word_embeddings": True})
    assert open_checkpoint(tmp_path).config == config
    write_json(tmp_path / "config.json", {**values, "tie_word_embeddings": False})
    with pytest.raises(ValueError, match="tie_word_embeddings False contradicts"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {**values, "colour": 1})
    with pytest.raises(ValueError, match="unknown config key 'colour'"):
        open_checkpoint(tmp_path)


def test_directories_that_are_no_model(tmp_path, rng):
    with pytest.raises(ValueError, match="none does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no/such does not exist; a model of the .* hf:no/such"):
        open_checkpoint("no/such")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is not a directory"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="model_type 'gpt2' is unknown"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {"format": "gguf"})
    with pytest.raises(ValueError, match="format 'gguf' is not 'nomatmul-packed'"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", PUBLISHED)
    with pytest.raises(ValueError, match="holds no weights"):
        open_checkpoint(tmp_path)


def damage_names(stored: dict, kind: str) -> None:
    if kind == "missing":
        del stored["model.layers.1.attn.f_proj.weight"]
    elif kind == "extra":
        stored["model.layers.2.attn.f_proj.weight"] = np.zeros((2, 2), np.float32)
    elif kind == "shape":
        stored["model.norm.weight"] = np.ones(31, np.float32)
    elif kind == "dtype":
        stored["model.norm.weight"] = np.ones(32, np.int32)
    elif kind == "nan":
        stored["model.norm.weight"][5] = np.nan
    else:
        stored["model.norm.weight"] = np.full(32, 1e300)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"lacks the tensor 'model\.layers\.1\.attn\.f_proj\.weight'"),
        ("extra", r"holds the unknown tensor 'model\.layers\.2\.attn\.f_proj\.weight'"),
        ("shape", r"'model\.norm\.weight' has shape \[31\], the config asks for \[32\]"),
        ("dtype", r"model\.norm\.weight has dtype I32, expected a float"),
        ("nan", r"model\.norm\.weight holds a value that is not finite"),
        ("overflow", r"model\.norm\.weight holds a value that is not finite"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, rng, kind, message):
    write_published(tmp_path, rng)
    stored = load_file(tmp_path / "model.safetensors")
    damage_names(stored, kind)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path).read("final_norm.weight")


def test_an_index_that_lies(tmp_path, rng):
    write_published(tmp_path, rng)
    weight_map = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    first, *_, last = weight_map
    for change, message in [
        ({first: weight_map[last]}, "which the index puts elsewhere"),
        ({"ghost": weight_map[first]}, "lacks 'ghost', which the index puts there"),
        ({first: "../../etc/passwd"}, "which is no plain file name"),
        ({first: "gone.safetensors"}, r"cannot read .*gone\.safetensors"),
        ({first: 3}, "which is no plain file name"),
    ]:
        write_json(index, {"weight_map": {**weight_map, **change}})
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path)
    write_json(index, {"weight_map": []})
    with pytest.raises(ValueError, match="has no weight_map"):
        open_checkpoint(tmp_path)


HEADERS = [
    (b"", "has only 0 bytes"),
    (b"\0" * 7, "has only 7 bytes"),
    (b"GGUF\3\0\0\0" + b"\0" * 50, "truncated or no safetensors file"),
    (struct.pack("<Q", 1 << 60), "claims a header of"),
    (struct.pack("<Q", 0), "its header is no JSON object"),
    (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
    (struct.pack("<Q", 3) + b"{,}", "is not valid JSON"),
    (b'{"a":1}', "is malformed"),
    (b'{"__metadata__":{"a":1}}', "must map names to strings"),
    (b'{"__metadata__":[]}', "must map names to strings"),
]
ENTRY = b'{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}%s}'
ENTRIES = [
    ((b"F31", b"[1]", b"[0,4]", b""), 4, "unknown dtype"),
    ((b"F32", b"[1.5]", b"[0,4]", b""), 4, "malformed shape"),
    ((b"F32", b"[-1]", b"[0,4]", b""), 4, "malformed shape"),
    ((b"F32", b"[true]", b"[0,4]", b""), 4, "malformed shape"),
    ((b"F32", b"[1]", b"[0]", b""), 4, "malformed shape or data range"),
    ((b"F32", b"[2]", b"[0,4]", b""), 4, "8 bytes, but its range"),
    ((b"F32", b"[1]", b"[4,0]", b""), 4, "but its range"),
    ((b"F32", b"[1]", b"[4,8]", b""), 8, "leaves a gap"),
    ((b"F32", b"[4611686018427387903]", b"[0,4]", b""), 4, "but its range"),
    ((b"F32", b"[1]", b"[0,4]", b""), 3, "truncated"),
    ((b"F32", b"[1]", b"[0,4]", b""), 5, "longer than its header says"),
    ((b"F32", b"[1]", b"[0,4]", b',"a":{}'), 4, "appears twice"),
    (
        (b"F32", b"[2]", b"[0,8]", b',"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'),
        8,
        "overlaps another tensor",
    ),
]


@pytest.mark.parametrize(("data", "message"), HEADERS)
def test_headers_that_are_wrong(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data if data.startswith(b"{") else data)
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(("entry", "size", "message"), ENTRIES)
def test_header_entries_that_lie(tmp_path, entry, size, message):
    path = tmp_path / "x.safetensors"
    header = ENTRY % entry
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


def test_the_reader_agrees_with_the_library(tmp_path, rng):
    tensors = random_tensors(config_from_published(PUBLISHED), rng)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    tensors["scalar"] = np.array(2.5, dtype=np.float32)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "np"}
    for name, values in tensors.items():
        np.testing.assert_array_equal(file.read(name), values)
        buffer = bytearray(file.infos[name].nbytes)
        file.read_into(name, buffer)
        assert bytes(buffer) == values.tobytes()
    with pytest.raises(ValueError, match="holds no tensor 'nothing'"):
        file.read("nothing")
    with pytest.raises(ValueError, match="the buffer 3"):
        file.read_into("scalar", bytearray(3))
