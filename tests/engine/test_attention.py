"""Causal attention in the engine: pages of keys and values that are forked, shared, cut, saved and
loaded, and logits that depend on none of it.

Legend: T tokens, V vocabulary, P positions.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from engine_models import ATTENTION, random_ids, rebuilt, total_bytes

from nomatmul.engine import LanguageModel, random_model
from nomatmul.engine.backend import Options
from nomatmul.engine.backends.native import open_random
from nomatmul.engine.native import native
from nomatmul.engine.state import PagedState, State
from nomatmul.formats.packed.layout import Forms

VOCABULARY = ATTENTION.vocab_size


def ids_of(count: int, seed: int = 0) -> np.ndarray:
    return random_ids(count, VOCABULARY, seed)


@pytest.fixture(scope="module", params=["f16", "int8", "f32"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    backend = open_random(
        ATTENTION, Forms.of(ATTENTION, embedding="int8"), 3, Options(threads=2, kv=request.param)
    )
    model = random_model(ATTENTION, seed=3, threads=2)
    return model.on(backend)


def pages_of(session: object) -> list[int]:
    state = session._state  # type: ignore[attr-defined]
    assert isinstance(state, PagedState)
    return list(state.pages.addresses)


def kv_of(lm: LanguageModel) -> str:
    """In which form a model keeps keys and values."""
    dtype = lm.backend.layout.pieces["layers.1.mixer.k"].dtype
    return "int8" if dtype == "i8" else dtype


def state_of(session: object) -> State:
    return session._state  # type: ignore[attr-defined,no-any-return]


def test_chunks_threads_and_isas_give_the_same_bits(lm: LanguageModel) -> None:
    ids = ids_of(150)
    wanted = lm.logits(ids)
    kv = kv_of(lm)
    for isa in native().kernels.isas():
        for threads, chunk in ((1, 256), (2, 37), (5, 64), (3, 1)):
            other = rebuilt(lm, isa=isa, threads=threads, chunk=chunk, kv=kv)
            np.testing.assert_array_equal(other.logits(ids), wanted)
    session = lm.session()
    cuts = [0, 1, 2, 15, 17, 63, 64, 65, 130, 150]
    parts = [session.append(ids[a:b], "all") for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_sequences_side_by_side_are_those_alone(lm: LanguageModel) -> None:
    lengths, more = [70, 1, 64, 129, 16], [1, 30, 2, 1, 60]
    texts = [ids_of(n + m, seed) for seed, (n, m) in enumerate(zip(lengths, more, strict=True))]
    sessions = [lm.session() for _ in texts]
    lm.step(sessions, [text[:n] for text, n in zip(texts, lengths, strict=True)], "none")
    rows = lm.step(sessions, [text[n:] for text, n in zip(texts, lengths, strict=True)])
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_array_equal(row, lm.session().append(text))


@pytest.mark.parametrize("length", [1, 40, 63, 64, 65, 100, 128])
def test_forks_share_pages_until_they_append(lm: LanguageModel, length: int) -> None:
    ids = ids_of(length)
    session = lm.session()
    session.append(ids)
    fork, third = session.fork(), session.fork()
    assert pages_of(fork) == pages_of(session)
    one = session.nbytes
    assert one == total_bytes([state_of(session)])
    assert total_bytes(map(state_of, (session, fork, third))) < one + 4096
    full = length // 64
    for other, tail in ((fork, ids_of(70, 1)), (session, ids_of(9, 2)), (third, ids_of(1, 3))):
        expected = lm.session().append(np.concatenate([ids, tail]))
        np.testing.assert_array_equal(other.append(tail), expected)
    pages = [pages_of(other) for other in (session, fork, third)]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert pages[left][:full] == pages[right][:full]
        assert not set(pages[left][full:]) & set(pages[right][full:])


def test_the_last_owner_of_a_page_appends_without_a_copy(lm: LanguageModel) -> None:
    session = lm.session()
    session.append(ids_of(70))
    before = pages_of(session)
    session.append(ids_of(5))
    assert pages_of(session) == before
    fork = session.fork()
    session.append([1])
    assert pages_of(session)[0] == before[0]
    assert pages_of(session)[1] != before[1]
    fork.append([1])
    assert pages_of(fork) == before


@pytest.mark.parametrize("back", [0, 1, 30, 63, 64, 65, 128, 140])
def test_going_back_is_a_cold_run(lm: LanguageModel, back: int) -> None:
    ids, tail = ids_of(140), ids_of(7, 1)
    session = lm.session()
    session.append(ids)
    fork = session.fork()
    session.roll_back(back)
    assert session.position == back
    assert len(pages_of(session)) == -(-back // 64)
    expected = lm.session().append(np.concatenate([ids[:back], tail]))
    np.testing.assert_array_equal(session.append(tail), expected)
    np.testing.assert_array_equal(
        fork.append(tail), lm.session().append(np.concatenate([ids, tail]))
    )


def test_a_position_that_was_not_reached_is_refused(lm: LanguageModel) -> None:
    session = lm.session()
    session.append(ids_of(5))
    for bad in (6, -1):
        with pytest.raises(ValueError, match=f"to position {bad}: the sequence has 5 tokens"):
            session.roll_back(bad)
    assert session.position == 5


@pytest.mark.parametrize("length", [0, 1, 64, 77])
def test_a_saved_session_goes_on_bit_for_bit(
    lm: LanguageModel, tmp_path: Path, length: int
) -> None:
    session = lm.session()
    if length:
        session.append(ids_of(length))
    session.save(tmp_path / "state")
    loaded = lm.session(tmp_path / "state")
    assert loaded.position == length
    for name, array in session.arrays().items():
        np.testing.assert_array_equal(loaded.arrays()[name], array)
        assert array.shape[0] == length
    tail = ids_of(90, 1)
    np.testing.assert_array_equal(loaded.append(tail, "all"), session.append(tail, "all"))


def test_the_saved_form_is_the_kept_one(lm: LanguageModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    session = lm.session()
    session.append(ids_of(10))
    session.save(tmp_path / "state")
    stored = load_file(tmp_path / "state")
    assert sorted(stored) == sorted(lm.backend.layout.pieces)
    kv = kv_of(lm)
    dtype = {"f16": np.float16, "int8": np.int8, "f32": np.float32}[kv]
    assert stored["layers.1.mixer.k"].dtype == dtype
    assert stored["layers.0.mixer.v"].shape == (10, 2, 20)
    assert ("layers.0.mixer.v_scale" in stored) == (kv == "int8")
    other = rebuilt(lm, kv="f16" if kv == "int8" else "int8")
    with pytest.raises(ValueError, match=r"keeps keys and values as .* load it with the other kv"):
        other.session(tmp_path / "state")


def test_a_failed_step_changes_nothing(lm: LanguageModel) -> None:
    ids, tail = ids_of(60), ids_of(20, 1)
    session, other = lm.session(), lm.session()
    lm.step([session, other], [ids, ids[:3]], "none")
    fork = session.fork()
    before, pages = session.arrays(), pages_of(session)
    with pytest.raises(ValueError, match="out of range"):
        lm.step([session, other], [tail, [VOCABULARY]])
    with pytest.raises(ValueError, match="150 tokens behind 60 tokens are more than the 200"):
        lm.step([other, session], [tail, ids_of(150)])
    states = [state_of(session), state_of(other)]
    with pytest.raises(ValueError, match="more than the model's 200 positions"):  # of the core
        lm.backend.step(states, [ids_of(150), ids_of(1)], "last")
    assert (session.position, other.position) == (60, 3)
    assert pages_of(session) == pages
    for name, array in session.arrays().items():
        np.testing.assert_array_equal(array, before[name])
    for one in (session, fork):
        expected = lm.session().append(np.concatenate([ids, tail]))
        np.testing.assert_array_equal(one.append(tail), expected)


def test_values_that_are_not_finite_change_nothing() -> None:
    lm = random_model(ATTENTION, seed=4, threads=2)
    session = lm.session()
    session.append(ids_of(30))
    weights = lm.backend.weights.arrays  # type: ignore[attr-defined]
    scale = weights["layers.1.mixer.v_proj.scale"]
    kept, expected = scale.copy(), lm.session().append(ids_of(45))
    pages = pages_of(session)
    for bad in (np.float32(1e7), np.float32(np.inf)):  # float16 ends at 65504
        scale[...] = bad
        broken = rebuilt(lm)
        states = [PagedState(broken.backend.layout, state_of(session).pages)]  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="keys and values of layer 1 are not finite"):
            broken.backend.step(states, [ids_of(45)[30:]], "last")
        assert states[0].position == session.position == 30
    scale[...] = kept
    assert pages_of(session) == pages
    np.testing.assert_array_equal(session.append(ids_of(45)[30:]), expected)


def test_a_prompt_longer_than_the_positions_is_refused(lm: LanguageModel) -> None:
    assert lm.max_length == 200
    with pytest.raises(ValueError, match="201 tokens are more than the 200 positions"):
        lm.logits(ids_of(201))
    with pytest.raises(ValueError, match="201 tokens are more than the 200 positions"):
        lm.generate_ids(ids_of(201))
    assert lm.logits(ids_of(200)).shape == (200, VOCABULARY)


def test_a_text_longer_than_the_positions_is_not_scored(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lm.token_logprobs(ids_of(201)).shape == (200,)
    monkeypatch.setattr(lm.backend, "step", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="201 tokens are more than the 200 positions"):
        lm.token_logprobs(ids_of(202))


@pytest.mark.parametrize(("prompt", "made"), [(195, 6), (200, 1)])
def test_a_text_ends_where_the_positions_do(lm: LanguageModel, prompt: int, made: int) -> None:
    ids = ids_of(prompt)
    tokens = lm.generate_ids(ids, max_tokens=50)
    assert len(tokens) == made
    assert lm.generate_ids(ids, max_tokens=1) == tokens[:1]


def test_hidden_states_are_those_before_the_head(lm: LanguageModel) -> None:
    texts = [ids_of(5), ids_of(150, 1), ids_of(64, 2)]
    states = [lm.backend.new_state() for _ in texts]
    hidden = lm.backend.step(states, texts, "hidden")
    assert hidden.shape == (3, 72)
    assert [state.position for state in states] == [5, 150, 64]
    for text, row in zip(texts, hidden, strict=True):
        alone = lm.backend.step([lm.backend.new_state()], [text], "hidden")
        np.testing.assert_array_equal(alone[0], row)
    vectors = lm.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    length = np.linalg.norm(hidden.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, hidden / length, rtol=1e-6)


def test_seconds_of_a_step_are_those_of_its_parts(lm: LanguageModel) -> None:
    import time

    seconds = {"head": 1.0}
    state = lm.backend.new_state()
    start = time.perf_counter()
    lm.backend.step([state], [ids_of(100)], "last", seconds=seconds)  # type: ignore[call-arg]
    spent = time.perf_counter() - start
    parts = {"embedding", "norms", "projections", "attention core", "channel mixer", "head"}
    assert set(seconds) == parts
    assert all(value > 0 for value in seconds.values())
    assert 1 < sum(seconds.values()) <= 1 + spent
    kept = dict(seconds)  # what is computed later is none of its business
    lm.backend.model.logits_of(np.ones((3, 72), np.float32))  # type: ignore[attr-defined]
    assert seconds == kept


def test_what_embed_refuses(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="a list of texts"):
        lm.embed([])
    with pytest.raises(ValueError, match="a list of texts"):
        lm.embed("a text")
    with pytest.raises(ValueError, match="text 1: 201 tokens are more than the 200 positions"):
        lm.embed([ids_of(3), ids_of(201)])
    with pytest.raises(ValueError, match=r"text 0: this model has no tokenizer\.json"):
        lm.embed(["a text"])


def test_int8_is_near_float16_in_half_of_the_memory() -> None:
    wide = random_model(ATTENTION, seed=3, threads=1)
    narrow = rebuilt(wide, kv="int8")
    ids = ids_of(120)
    a, b = wide.logits(ids), narrow.logits(ids)
    assert 0 < np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)
    sessions = [wide.session(), narrow.session()]
    for session in sessions:
        session.append(ids, "none")
    assert sessions[1].nbytes < 0.7 * sessions[0].nbytes
