"""The state of a sequence: pieces by the table of parts, going back, and files of every kind."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG, random_ids, state_of, total_bytes

from nomatmul.engine import LanguageModel
from nomatmul.engine.state import HostState, Layout
from nomatmul.engine.state_file import read_state, write_state
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig

GROWING = ModelConfig(
    vocab_size=31, hidden_size=24, num_layers=2, intermediate_size=32, num_heads=3,
    token_mixer="attention", linear="dense",
)  # fmt: skip


def test_the_table_of_parts_names_the_pieces() -> None:
    layout = Layout.of(architecture_of(CONFIG))
    assert list(layout.pieces) == [f"layers.{n}.mixer.h" for n in range(CONFIG.num_layers)]
    assert layout.nbytes(0) == layout.nbytes(99) == 4 * CONFIG.num_layers * CONFIG.hidden_size
    grown = Layout.of(architecture_of(GROWING))
    assert grown.shapes(5) == {
        f"layers.{n}.mixer.{piece}": (5, 3, 8) for n in range(2) for piece in "kv"
    }
    assert grown.nbytes(5) == 5 * 2 * 2 * 2 * 24  # float16
    assert grown.nbytes(0) == 0
    narrow = Layout.of(architecture_of(GROWING), "int8")
    assert narrow.shapes(5)["layers.1.mixer.k"] == (5, 3, 8)
    assert narrow.shapes(5)["layers.1.mixer.k_scale"] == (5, 3)
    assert narrow.nbytes(5) == 5 * 2 * 2 * (24 + 3 * 4)


def test_pieces_of_one_size_lie_side_by_side() -> None:
    layout = Layout.of(architecture_of(CONFIG))
    room = np.arange(np.prod(layout.fixed_shape), dtype=np.float32).reshape(layout.fixed_shape)
    views = layout.views(room)
    np.testing.assert_array_equal(views["layers.2.mixer.h"], room[2])
    views["layers.1.mixer.h"][3] = -1
    assert room[1, 3] == -1
    np.testing.assert_array_equal(layout.gathered(views), room)


def test_going_back_needs_a_fork(lm: LanguageModel) -> None:
    ids = random_ids(9)
    session = lm.session()
    session.append(ids[:4])
    fork = session.fork()
    session.append(ids[4:])
    before = state_of(session)
    with pytest.raises(ValueError, match=r"to position 4: each token overwrites the state 'layers"):
        session.roll_back(4)
    for unreached in (10, -1):
        with pytest.raises(ValueError, match="the sequence has 9 tokens"):
            session.roll_back(unreached)
    with pytest.raises(ValueError, match="belongs to another model"):
        session.roll_back(lm.with_threads(1).session())
    assert session.position == 9
    np.testing.assert_array_equal(state_of(session), before)
    session.roll_back(9)
    np.testing.assert_array_equal(state_of(session), before)
    session.roll_back(fork)
    assert session.position == fork.position == 4
    np.testing.assert_array_equal(session.append(ids[4:]), lm.session().append(ids))
    assert fork.position == 4  # it is a copy
    session.roll_back(0)
    assert session.position == 0
    np.testing.assert_array_equal(session.append(ids), lm.session().append(ids))


def test_forks_in_main_memory_count_what_they_share_once() -> None:
    layout = Layout.of(architecture_of(GROWING))
    grown = {
        name: np.zeros(shape, np.float16)
        for name, shape in layout.shapes(7).items()
        if name in layout.growing
    }
    state = HostState(layout, position=7, grown=grown)
    fork = state.fork()
    assert total_bytes([state]) == total_bytes([state, fork]) == layout.nbytes(7)
    fork.roll_back(3)  # its rows still lie in the whole arrays
    assert fork.nbytes == layout.nbytes(3)
    assert total_bytes([fork]) == total_bytes([state, fork]) == layout.nbytes(7)


def test_a_failed_step_advances_no_state(lm: LanguageModel) -> None:
    states = [lm.backend.new_state() for _ in range(2)]
    with pytest.raises(ValueError, match="out of range"):
        lm.backend.step(states, [random_ids(3), np.array([CONFIG.vocab_size], np.int32)], "last")
    assert [state.position for state in states] == [0, 0]
    assert not any(a.any() for state in states for a in state.arrays().values())


def test_a_saved_session_names_its_pieces(lm: LanguageModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    session = lm.session()
    session.append(random_ids(5))
    session.save(tmp_path / "state")
    stored = load_file(tmp_path / "state")
    assert sorted(stored) == sorted(lm.backend.layout.pieces)
    for name, array in session.arrays().items():
        np.testing.assert_array_equal(stored[name], array)
    assert (tmp_path / "state").stat().st_size < session.nbytes + 2000


def test_a_session_that_version_1_saved_still_loads(lm: LanguageModel, tmp_path: Path) -> None:
    session = lm.session()
    session.append(random_ids(6))
    write_version_1(tmp_path / "old", state_of(session), 6, lm.fingerprint)
    loaded = lm.session(tmp_path / "old")
    assert loaded.position == 6
    np.testing.assert_array_equal(state_of(loaded), state_of(session))
    np.testing.assert_array_equal(loaded.append([7]), session.append([7]))


def test_a_version_of_the_future_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    lm.session().save(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    newer = content.replace(b'"format_version":"2"', b'"format_version":"3"')
    assert newer != content
    (tmp_path / "state").write_bytes(newer)
    with pytest.raises(ValueError, match="state version '3'; this nomatmul reads versions 1 and 2"):
        lm.session(tmp_path / "state")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    layout = Layout.of(architecture_of(GROWING))
    arrays = {name: np.ones(shape, np.float16) for name, shape in layout.shapes(3).items()}
    for value in (np.inf, -np.inf, np.nan):
        arrays["layers.1.mixer.v"][2, 1, 3] = value
        write_state(tmp_path / "state", arrays, 3, "this model")
        with pytest.raises(ValueError, match=r"layers\.1\.mixer\.v holds a value .* not finite"):
            read_state(tmp_path / "state", layout, "this model")
    arrays["layers.1.mixer.v"][2, 1, 3] = np.finfo(np.float16).max
    write_state(tmp_path / "state", arrays, 3, "this model")
    assert read_state(tmp_path / "state", layout, "this model")[1] == 3


def test_growing_pieces_are_saved_with_as_many_rows_as_positions(tmp_path: Path) -> None:
    layout = Layout.of(architecture_of(GROWING))
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
        for name, shape in layout.shapes(7).items()
    }
    write_state(tmp_path / "state", arrays, 7, "this model")
    found, position = read_state(tmp_path / "state", layout, "this model")
    assert position == 7
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    write_state(tmp_path / "short", arrays, 6, "this model")
    with pytest.raises(ValueError, match="its pieces are not those of the model's state"):
        read_state(tmp_path / "short", layout, "this model")
    write_state(tmp_path / "empty", {n: a[:0] for n, a in arrays.items()}, 0, "this model")
    assert read_state(tmp_path / "empty", layout, "this model")[1] == 0


def test_version_1_has_no_growing_pieces(tmp_path: Path) -> None:
    layout = Layout.of(architecture_of(GROWING))
    write_version_1(tmp_path / "old", np.zeros(layout.fixed_shape), 6, "this model")
    with pytest.raises(ValueError, match="version '1', which holds no keys and values"):
        read_state(tmp_path / "old", layout, "this model")


def test_growing_pieces_of_the_oracle_are_forked_and_cut() -> None:
    layout = Layout.of(architecture_of(GROWING))
    arrays = {
        name: np.arange(np.prod(shape)).reshape(shape).astype(np.float16)
        for name, shape in layout.shapes(7).items()
    }
    state = HostState(layout, position=7, grown=arrays)
    fork = state.fork()
    state.roll_back(3)
    assert (state.position, fork.position) == (3, 7)
    for name, array in arrays.items():
        np.testing.assert_array_equal(state.arrays()[name], array[:3])
        np.testing.assert_array_equal(fork.arrays()[name], array)
    assert (state.nbytes, fork.nbytes) == (layout.nbytes(3), layout.nbytes(7))


def write_version_1(path: Path, state_LD: np.ndarray, position: int, fingerprint: str) -> None:
    """A saved session as it was written before pieces had names."""
    data = state_LD.astype("<f4").tobytes()
    crc = zlib.crc32(data, zlib.crc32(str(position).encode()))
    header = {
        "__metadata__": {
            "format": "nomatmul-state",
            "format_version": "1",
            "model": fingerprint,
            "position": str(position),
            "crc32": f"{crc:08x}",
        },
        "state": {
            "dtype": "F32",
            "shape": list(state_LD.shape),
            "data_offsets": [0, len(data)],
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
