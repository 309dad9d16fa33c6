"""What the tests of the engine on a GPU, with trees and without, ask alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nomatmul.engine import LanguageModel

MODEL_ERROR = 2e-2  # of logits, beside the oracle's


def ids_of(lm: LanguageModel, count: int, seed: int = 2) -> np.ndarray:
    """Random token ids [count]."""
    return np.random.default_rng(seed).integers(0, lm.config.vocab_size, count)


def poison() -> None:
    """Fill memory that the allocator will hand out again with NaN."""
    import torch

    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")


def assert_all_paths_agree(lm: LanguageModel, slow: LanguageModel, directory: Path) -> None:
    """Logits are near the oracle's, and the same bits by whatever way they are computed."""
    ids = ids_of(lm, 150)
    poison()
    whole = lm.logits(ids)
    expected = slow.logits(ids)
    error = np.sqrt(np.mean((whole - expected) ** 2) / np.mean(expected**2))
    assert error < MODEL_ERROR
    assert np.mean(whole.argmax(axis=1) == expected.argmax(axis=1)) >= 0.97

    session = lm.session()
    np.testing.assert_array_equal([session.append([token]) for token in ids[:20]], whole[:20])
    fork = session.fork()
    session.save(directory / "state")
    np.testing.assert_array_equal(session.append(ids[20:140]), whole[139])
    loaded = lm.session(directory / "state")
    np.testing.assert_array_equal(fork.append(ids[20:22]), whole[21])
    rows = lm.step([loaded, lm.session(), lm.session()], [ids[20:21], ids[:9], ids[:149]])
    np.testing.assert_array_equal(rows, whole[[20, 8, 148]])
    batch = [lm.session() for _ in range(5)]
    rows = lm.step(batch, [ids[:1]] * 5)
    np.testing.assert_array_equal(rows, np.broadcast_to(whole[0], (5, whole.shape[1])))
    for count in (150, 131, 150):  # from the second on through a captured graph, 256 tokens wide
        np.testing.assert_array_equal(lm.logits(ids[:count]), whole[:count])
    longer = ids_of(lm, 370)
    whole = lm.logits(longer)
    lm.backend.chunk = 128
    np.testing.assert_array_equal(lm.logits(longer), whole)
    assert lm.backend._prompt_graph is not None
    assert session.position == 140
    assert loaded.position == 21
