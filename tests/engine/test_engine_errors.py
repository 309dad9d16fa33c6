"""What a user can get wrong: one clear ValueError each, and nothing half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import CONFIG, random_ids, state_of
from hypothesis import given
from hypothesis import strategies as st

import nomatmul
from nomatmul.engine import LanguageModel, load, random_model
from nomatmul.engine.backends.native import NativeBackend
from nomatmul.formats import capability
from nomatmul.formats.config import ModelConfig


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([5, 301], "token id 301 is out of range: this model has ids 0 to 300"),
        ([-1], "token id -1 is out of range"),
        ([2**40], "out of range"),
        ([0.5], "whole numbers"),
        ([True], "whole numbers"),
        ([1, True], "whole numbers"),
        ([1, 10**30], "token id 10{30} is out of range"),
        ([-(10**30)], "token id -10{30} is out of range"),
        ([None, 10**30], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        ("text", "encode the text"),
        ([[1], [2, 3]], "list of numbers"),
        (["1"], "whole numbers"),
        (5, "whole numbers, got 5$"),
    ],
)
def test_bad_ids(lm: LanguageModel, ids: Any, message: str) -> None:
    session = lm.session()
    session.append([1])
    for call in (session.append, lm.logits, lm.token_logprobs, lm.generate_ids):
        with pytest.raises(ValueError, match=message):
            call(ids)
    with pytest.raises(ValueError, match=message):
        lm.step([session, lm.session()], [[1], ids])
    assert session.position == 1


@pytest.mark.parametrize("path", [5, "", b"model", ["model"]])
def test_what_is_no_path_is_refused(lm: LanguageModel, path: Any) -> None:
    """An empty one would be the working directory."""
    for call in (load, lm.session, lm.session().save):
        with pytest.raises(ValueError, match="must be a non-empty text or a Path, got"):
            call(path)


def test_the_native_core_checks_ids_too(lm: LanguageModel) -> None:
    state = lm.backend.new_state()
    for bad in (-1, CONFIG.vocab_size, 2**31 - 1):
        with pytest.raises(ValueError, match="out of range"):
            lm.backend.step([state], [np.array([1, bad], np.int32)], "last")
    assert state.position == 0
    assert not any(array.any() for array in state.arrays().values())


def test_bad_steps(lm: LanguageModel) -> None:
    session, other = lm.session(), random_model(CONFIG, threads=1).session()
    with pytest.raises(ValueError, match="given twice"):
        lm.step([session, session], [[1], [2]])
    with pytest.raises(ValueError, match="another model"):
        lm.step([other], [[1]])
    with pytest.raises(ValueError, match="1 sessions need as many id lists, got 2"):
        lm.step([session], [[1], [2]])
    with pytest.raises(ValueError, match="logits must be"):
        lm.step([session], [[1]], logits="some")  # type: ignore[arg-type]
    assert lm.step([], []) == []


def test_bad_generation_arguments(text_lm: LanguageModel) -> None:
    for options, message in (
        ({"max_tokens": -1}, "max_tokens must be a whole number of at least 0, got -1"),
        ({"temperature": -1}, "temperature"),
        ({"stop": [""]}, "stop string"),
        ({"stop": 5}, "stop must be a text"),
        ({"session": random_model(CONFIG, threads=1).session()}, "another model"),
    ):
        with pytest.raises(ValueError, match=message):
            text_lm.stream("Hello", **options)
    for prompt in ("", []):
        with pytest.raises(ValueError, match="the prompt is empty"):
            text_lm.stream(prompt)
    with pytest.raises(ValueError, match="half a character at 1"):
        text_lm.stream("a\ud800b")


def test_nan_weights_stop_the_step_and_leave_the_session(lm: LanguageModel) -> None:
    session = lm.session()
    session.append([1, 2])
    before = state_of(session)
    lm.backend.weights.arrays["layers.1.channel_norm.weight"][3] = np.nan
    with pytest.raises(ValueError, match="before the channel mixer of layer 1 are not finite"):
        session.append(random_ids(20))
    assert session.position == 2
    np.testing.assert_array_equal(state_of(session), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' (cannot be used|does not exist|needs)"),
        ({"device": "gpu"}, 'device is \'gpu\'; it must be "cpu", "cuda" or "cuda:N"'),
        ({"device": "cuda:-1"}, "device is 'cuda:-1'; it must be"),
        ({"device": 0}, 'device must be a text such as "cuda", got 0'),
        ({"device": "cuda", "threads": 2}, "threads is about the CPU; with device 'cuda' leave"),
        ({"device": "cuda", "isa": "avx2"}, "isa is about the CPU"),
        ({"device": "cuda", "mmap": True}, "mmap is about the CPU"),
        ({"backend": "torch"}, "backend is 'torch'"),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, got 0"),
        ({"threads": 1.5}, "threads must be"),
        ({"isa": "mmx"}, "isa 'mmx' is not available here; available: .*scalar"),
        ({"isa": "scalar", "backend": "numpy"}, "no instruction sets"),
    ],
)
def test_bad_load_arguments(packed: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(packed, **options)


TREES = {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 2, "activation": "silu"}


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"token_mixer": "attention", "positions": "none"}, "attention without rotary"),
        ({"linear": "dense"}, "linear 'dense' in a causal model"),
        ({"channel_mixer": "ffn"}, "channel_mixer 'ffn' in a causal model"),
        ({"norm": "layer"}, "norm 'layer' in a causal model"),
        ({"embedding_norm": True}, "norm behind the embedding"),
        ({**TREES, "activation": "gelu"}, "ternary trees with activation 'gelu'"),
        ({**TREES, "fff_master_width": 8}, "master leaf"),
        ({**TREES, "fff_layers": (1,), "num_layers": 2}, "channel_mixer 'ffn' in a causal model"),
    ],
)
def test_models_that_others_run(dials: dict[str, Any], message: str) -> None:
    config = ModelConfig(**{"vocab_size": 20, "hidden_size": 8, "num_layers": 1, **dials})
    with pytest.raises(ValueError, match=message + ".*nomatmul.models runs it with torch"):
        capability.check(config, "native")
    with pytest.raises(ValueError, match=message):
        random_model(config)


def test_missing_and_foreign_directories(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not packed"):
        load(tiny)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_bit_anywhere_is_found(packed: Path, tmp_path: Path, mmap: bool) -> None:
    rng = np.random.default_rng(8)
    weights = (packed / "model.safetensors").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    load(copy, threads=2, mmap=mmap)
    for at in [*rng.integers(0, len(weights), 25).tolist(), len(weights) - 1]:
        broken = bytearray(weights)
        broken[at] ^= 1 << int(rng.integers(8))
        (copy / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"."):
            load(copy, threads=2, mmap=mmap)


@pytest.mark.parametrize(
    "name", ["layers.0.mixer.i_proj.packed", "layers.1.channel.down_proj.packed"]
)
@pytest.mark.parametrize("where", ["first", "padding"])
def test_illegal_codes_are_found_even_with_a_matching_checksum(
    make_packed: Callable[..., Path], packing: str, tmp_path: Path, name: str, where: str
) -> None:
    import zlib

    copy = tmp_path / "copy"
    shutil.copytree(make_packed(CONFIG, packing), copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
    at = begin if where == "first" else end - 1
    illegal = 0xFF if packing == "2bit" else 1
    content[at] = illegal if where == "first" else 0
    table = json.loads(header["__metadata__"]["crc32"])
    table[name] = f"{zlib.crc32(content[begin:end]):08x}"
    header["__metadata__"]["crc32"] = json.dumps(table, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    content[8 : 8 + length] = text
    (copy / "model.safetensors").write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(ValueError, match=f"{name} holds an illegal code or wrong padding"):
            load(copy, threads=1, mmap=mmap)


def test_unverified_loading_reads_the_same(packed: Path) -> None:
    ids = random_ids(9)
    expected = load(packed, threads=1).logits(ids)
    for options in ({"verify": False}, {"mmap": True}, {"mmap": True, "verify": False}):
        np.testing.assert_array_equal(load(packed, threads=1, **options).logits(ids), expected)


def test_state_of_another_model_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    session = random_model(CONFIG, seed=77, threads=1).session()
    session.append([1])
    session.save(tmp_path / "state")
    with pytest.raises(ValueError, match="the state of another model"):
        lm.session(tmp_path / "state")
    with pytest.raises(ValueError, match="cannot read the state"):
        lm.session(tmp_path / "absent")


@given(data=st.data())
def test_damaged_state_files_are_refused(state_file: tuple[Any, bytes, Path], data: Any) -> None:
    lm, content, path = state_file
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    broken = bytearray(content)
    if kind == "flip":
        broken[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del broken[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "grow":
        broken += data.draw(st.binary(min_size=1, max_size=20))
    else:
        broken = bytearray(data.draw(st.binary(max_size=300)))
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"."):
        lm.session(path)


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, bytes, Path]:
    """A model, the bytes of a good state file of it, and a path to put bad ones."""
    lm = random_model(CONFIG, threads=1)
    session = lm.session()
    session.append([1, 2, 3])
    path = tmp_path_factory.mktemp("state") / "state"
    session.save(path)
    return lm, path.read_bytes(), path


def test_a_state_that_cannot_be_written_leaves_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    session = lm.session()
    with pytest.raises(ValueError, match="cannot write"):
        session.save(tmp_path / "no" / "such" / "folder")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="cannot write"):
        session.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_without_the_native_core_numpy_steps_in(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nomatmul.engine.backends.native as core
    import nomatmul.engine.loading as loading
    import nomatmul.engine.native as native

    def missing() -> None:
        raise ImportError("the native core of nomatmul is missing")

    for module in (core, loading, native):
        monkeypatch.setattr(module, "native", missing)
    monkeypatch.delenv("NOMATMUL_ISA", raising=False)
    with pytest.warns(RuntimeWarning, match="slow numpy reference"):
        lm = load(packed)
    assert lm.backend.name == "numpy"
    with pytest.raises(ImportError):
        load(packed, backend="native")
    monkeypatch.setenv("NOMATMUL_ISA", "avx2")
    with pytest.raises(ValueError, match="NOMATMUL_ISA asks for a native kernel"):
        load(packed)


def test_a_forced_instruction_set(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMATMUL_ISA", "scalar")
    assert load(packed).backend.isa == "scalar"
    monkeypatch.setenv("NOMATMUL_ISA", "mmx")
    with pytest.raises(ValueError, match="NOMATMUL_ISA=mmx is not available here; available:"):
        load(packed)


def test_warnings_are_not_raised_by_a_normal_load(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load(packed).backend, NativeBackend)


def test_importing_and_running_imports_no_torch(packed: Path) -> None:
    code = (
        "import sys, nomatmul; assert 'numpy' not in sys.modules;"
        f"lm = nomatmul.load({str(packed)!r}); lm.generate('Hi', max_tokens=2);"
        "bad = {'torch', 'transformers', 'scipy', 'safetensors'} & set(sys.modules);"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_public_face() -> None:
    assert nomatmul.__version__
    assert nomatmul.load is load
    assert nomatmul.engine.random_model is random_model
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        nomatmul.lod  # noqa: B018
