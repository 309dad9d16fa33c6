"""What a causal model computes of token ids: sessions, steps, logits, probabilities.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.ids import checked_ids, log_probabilities
from nomatmul.engine.session import Session
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.files.directory import directory_bytes

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend, Ids, Want
    from nomatmul.engine.state import Float
    from nomatmul.formats.config import ModelConfig

# Positions whose logits are in memory at once while a text is scored.
_SCORE_BLOCK = 128


class CausalModel:
    """The side of a `LanguageModel` that knows token ids and no text."""

    def __init__(
        self,
        backend: CausalBackend,
        config: ModelConfig,
        *,
        fingerprint: str,
        packing: str,
        embedding_form: str,
        path: Path | None = None,
        tokenizer_path: Path | None = None,
    ) -> None:
        self.backend = backend
        self.config = config
        self.fingerprint = fingerprint
        self.packing = packing
        self.embedding_form = embedding_form
        self.path = path
        self.tokenizer_path = tokenizer_path
        self.max_length = architecture_of(config).max_length

    def session(self, path: str | Path | None = None) -> Session:
        """Return a new sequence, or the one that `Session.save` wrote to `path`.

        Raises FormatError (a ValueError) for a damaged or foreign file.
        """
        if path is None:
            return Session(self, self.backend.new_state())
        from nomatmul.engine.state_file import read_state

        arrays, position = read_state(path, self.backend.layout, self.fingerprint)
        return Session(self, self.backend.load_state(arrays, position))

    def step(
        self,
        sessions: Sequence[Session],
        ids: Sequence[Sequence[int] | NDArray[Any]],
        logits: Want = "last",
    ) -> list[Float]:
        """Feed several sequences at once, each with its own ids, of any lengths.

        All tokens go through the layers together, which is far cheaper than one sequence after
        the other and gives the same bits. Returns one array a session: float32 [V] ("last"),
        [T, V] ("all"), or an empty one ("none"). Sessions change only if the whole step
        succeeds. Raises ValueError for no ids, ids out of range, more positions than a model
        with attention has, a session of another model, a session given twice, or a model whose
        values stop being finite.
        """
        if logits not in ("last", "all", "none"):
            raise ValueError(f"logits must be 'last', 'all' or 'none', got {logits!r}")
        if len(sessions) != len(ids):
            raise ValueError(f"{len(sessions)} sessions need as many id lists, got {len(ids)}")
        if len({id(session) for session in sessions}) != len(sessions):
            raise ValueError("a session is given twice; fork it first")
        if any(session.model is not self for session in sessions):
            raise ValueError("a session belongs to another model")
        if not sessions:
            return []
        arrays = [self.checked_ids(part) for part in ids]
        result = self._advance(sessions, arrays, logits)
        if logits == "last":
            return list(result)
        if logits == "none":
            return [result for _ in sessions]
        ends = np.cumsum([len(array) for array in arrays])
        return list(np.split(result, ends[:-1]))

    def _advance(self, sessions: Sequence[Session], arrays: Sequence[Ids], want: Want) -> Float:
        """One step of the backend, while no other thread feeds these sessions."""
        held: list[Session] = []
        try:
            for session in sorted(sessions, key=id):  # one order for all threads: no deadlock
                session._lock.acquire()
                held.append(session)
            states = [session._state for session in sessions]
            for state, array in zip(states, arrays, strict=True):
                self._check_length(state.position, len(array))
            return self.backend.step(states, arrays, want)
        finally:
            for session in held:
                session._lock.release()

    def _check_length(self, position: int, count: int) -> None:
        """Raise ValueError for more positions than the model has, before any work."""
        if self.max_length is not None and position + count > self.max_length:
            behind = f" behind {position} tokens" if position else ""
            raise ValueError(
                f"{count} tokens{behind} are more than the {self.max_length} positions of this"
                " model (max_position_embeddings)"
            )

    def logits(self, ids: Sequence[int] | NDArray[Any]) -> Float:
        """Return float32 [T, V]: the logits after each id of a new sequence."""
        return self.session().append(ids, logits="all")

    def token_logprobs(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float64]:
        """Return float64 [T-1]: natural log of p(ids[t] | ids[:t]) for t = 1..T-1."""
        array = self.checked_ids(ids)
        self._check_length(0, len(array) - 1)
        session, parts = self.session(), [np.zeros(0)]
        for start in range(0, len(array) - 1, _SCORE_BLOCK):
            block = array[start : min(start + _SCORE_BLOCK, len(array) - 1)]
            logits_TV = session.append(block, logits="all")
            targets = array[start + 1 : start + 1 + len(block)]
            parts.append(log_probabilities(logits_TV, targets))
        return np.concatenate(parts)

    def checked_ids(self, ids: Sequence[int] | NDArray[Any]) -> Ids:
        """Return ids as int32 [T]; raises ValueError for none, or one out of range."""
        return checked_ids(ids, self.config.vocab_size)

    def footprint(self) -> dict[str, int]:
        """Return bytes by part.

        embedding, core (packed matrices of the blocks), head, norms (and scales, lower bounds):
        together `weights`. state: one sequence before its first token; with attention also
        kv_token, the keys and values of a token, and kv_longest, of a sequence of all positions.
        scratch: work space of the largest step so far.
        total: weights + state + scratch. disk: the directory's files, 0 for a model without one.
        dense_bf16: what the same parameters take unpacked.
        """
        parts = self.backend.weight_bytes()
        weights, scratch = sum(parts.values()), self.backend.scratch_bytes()
        layout, longest = self.backend.layout, self.max_length
        state = layout.nbytes(0)
        kv = {"kv_token": layout.nbytes(1) - state} if layout.grows else {}
        if kv and longest is not None:
            kv["kv_longest"] = longest * kv["kv_token"]
        return {
            **parts,
            "weights": weights,
            "state": state,
            **kv,
            "scratch": scratch,
            "total": weights + state + scratch,
            "disk": 0 if self.path is None else directory_bytes(self.path),
            "dense_bf16": 2 * self.config.param_count(),
        }
