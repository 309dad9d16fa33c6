"""However a sequence is computed, its logits have the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_models import CONFIG, random_ids, rebuilt, state_of

from nomatmul.engine import LanguageModel, random_model
from nomatmul.engine.native import native
from nomatmul.formats.config import ModelConfig

# More than two blocks of 256 tokens, and more than one chunk of 512.
LONG = 530


def one_by_one(lm: LanguageModel, ids: np.ndarray) -> np.ndarray:
    session = lm.session()
    return np.stack([session.append([token]) for token in ids])


def test_prefill_equals_decode(lm: LanguageModel) -> None:
    ids = random_ids(LONG)
    np.testing.assert_array_equal(lm.logits(ids), one_by_one(lm, ids))


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 64, 256, 300, 1000])
def test_chunks_do_not_matter(lm: LanguageModel, chunk: int) -> None:
    ids = random_ids(LONG if chunk > 16 else 70)
    other = rebuilt(lm, chunk=chunk, threads=2)
    np.testing.assert_array_equal(other.logits(ids), lm.logits(ids))


def test_cuts_into_calls_do_not_matter(lm: LanguageModel, rng: np.random.Generator) -> None:
    ids = random_ids(90)
    whole = lm.logits(ids)
    session, at = lm.session(), 0
    while at < len(ids):
        count = int(rng.integers(1, 20))
        last = session.append(ids[at : at + count])
        at = min(at + count, len(ids))
        np.testing.assert_array_equal(last, whole[at - 1])
        assert session.position == at


def test_batched_equals_alone(lm: LanguageModel) -> None:
    lengths = [1, 40, 7, 300, 2, 260]
    parts = [random_ids(n, seed=n) for n in lengths]
    sessions = [lm.session() for _ in lengths]
    for round_ in range(2):
        results = lm.step(sessions, parts, logits="all" if round_ else "last")
        for part, session, result in zip(parts, sessions, results, strict=True):
            alone = lm.session()
            if round_:
                alone.append(part)
                np.testing.assert_array_equal(result, alone.append(part, logits="all"))
            else:
                np.testing.assert_array_equal(result, alone.append(part))
            assert session.position == alone.position
            np.testing.assert_array_equal(state_of(session), state_of(alone))


def test_batch_of_single_tokens(lm: LanguageModel) -> None:
    sessions = [lm.session() for _ in range(19)]
    ids = random_ids(19)
    rows = lm.step(sessions, [[token] for token in ids])
    for token, row in zip(ids, rows, strict=True):
        np.testing.assert_array_equal(row, lm.session().append([token]))


def test_fork_and_saved_state_equal_the_continued_one(lm: LanguageModel, tmp_path: Path) -> None:
    first, second = random_ids(33), random_ids(21, seed=1)
    session = lm.session()
    session.append(first)
    fork = session.fork()
    session.save(tmp_path / "state")
    expected = session.append(second)
    np.testing.assert_array_equal(fork.append(second), expected)
    loaded = lm.session(tmp_path / "state")
    assert loaded.position == 33
    np.testing.assert_array_equal(loaded.append(second), expected)
    assert fork.position == loaded.position == session.position == 54


def test_a_fork_does_not_touch_its_parent(lm: LanguageModel) -> None:
    session = lm.session()
    session.append([1, 2, 3])
    fork = session.fork()
    fork.append([4, 5])
    fresh = lm.session()
    fresh.append([1, 2, 3])
    np.testing.assert_array_equal(session.append([9]), fresh.append([9]))


def test_save_writes_one_moment_though_another_thread_waits(
    lm: LanguageModel, tmp_path: Path
) -> None:
    class FedWhenFree:
        """A lock; as soon as it is free, another thread's step has changed the session."""

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            session._state.fixed_LS += 1
            session._state.position += 1

    session = lm.session()
    session.append([1, 2, 3])
    before = state_of(session)
    session._lock = FedWhenFree()
    session.save(tmp_path / "state")
    loaded = lm.session(tmp_path / "state")
    np.testing.assert_array_equal(state_of(loaded), before)
    assert loaded.position == 3


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_threads_do_not_matter(lm: LanguageModel, threads: int) -> None:
    ids = random_ids(LONG)
    other = rebuilt(lm, threads=threads)
    assert other.backend.threads == threads
    np.testing.assert_array_equal(other.logits(ids), lm.logits(ids))
    np.testing.assert_array_equal(one_by_one(other, ids[:5]), lm.logits(ids[:5]))


@pytest.mark.parametrize("isa", native().kernels.isas())
def test_instruction_sets_do_not_matter(lm: LanguageModel, isa: str) -> None:
    ids = random_ids(70)
    other = rebuilt(lm, threads=2, isa=isa)
    assert other.backend.isa == isa
    scalar = rebuilt(lm, threads=1, isa="scalar")
    np.testing.assert_array_equal(other.logits(ids), scalar.logits(ids))
    np.testing.assert_array_equal(one_by_one(other, ids[:9]), scalar.logits(ids)[:9])


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 1, "intermediate_size": 1, "vocab_size": 2, "num_layers": 1},
        {"hidden_size": 64, "intermediate_size": 640, "vocab_size": 1000, "num_layers": 1},
        {"hidden_size": 257, "intermediate_size": 96, "vocab_size": 33, "num_layers": 2},
    ],
)
@pytest.mark.parametrize("embedding", ["bf16", "int8"])
def test_odd_sizes(sizes: dict[str, int], embedding: str, packing: str) -> None:
    config = ModelConfig(**sizes)
    lm = random_model(config, packing, embedding, seed=2, threads=3)
    ids = random_ids(20, config.vocab_size)
    logits = lm.logits(ids)
    assert logits.shape == (20, config.vocab_size)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, one_by_one(lm, ids))


def test_blocks_without_a_channel_mixer(packing: str) -> None:
    config = ModelConfig(vocab_size=50, hidden_size=40, num_layers=2, channel_mixer="none")
    lm = random_model(config, packing, threads=2)
    ids = random_ids(30, 50)
    np.testing.assert_array_equal(lm.logits(ids), one_by_one(lm, ids))


def test_token_logprobs_are_the_log_softmax_of_logits(lm: LanguageModel) -> None:
    ids = random_ids(150)
    logits = lm.logits(ids[:-1]).astype(np.float64)
    top = logits.max(axis=1)
    expected = logits - (np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top)[:, None]
    found = lm.token_logprobs(ids)
    assert found.dtype == np.float64
    assert found.shape == (149,)
    # float32 exponentials of V terms: relative error of the sum below 2^-23 * a few
    np.testing.assert_allclose(found, expected[np.arange(149), ids[1:]], atol=2e-6)
    assert lm.token_logprobs(ids[:1]).shape == (0,)


def test_random_model_is_repeatable_and_not_trivial() -> None:
    first = random_model(CONFIG, seed=1, threads=1)
    again = random_model(CONFIG, seed=1, threads=1)
    other = random_model(CONFIG, seed=2, threads=1)
    ids = random_ids(4)
    np.testing.assert_array_equal(first.logits(ids), again.logits(ids))
    assert not np.array_equal(first.logits(ids), other.logits(ids))
    assert 0.05 < first.logits(ids).std() < 20
