"""One sequence in progress: it can be fed, forked, rolled back, saved and loaded.

Legend: V vocabulary, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend, Want
    from nomatmul.engine.state import Float, State


class Stepper(Protocol):
    """What sessions and drivers need of a `LanguageModel`, which knows both of them."""

    backend: CausalBackend
    fingerprint: str

    def session(self) -> Session:
        """A new sequence."""

    def step(
        self,
        sessions: Sequence[Session],
        ids: Sequence[Sequence[int] | NDArray[Any]],
        logits: Want = "last",
    ) -> list[Float]:
        """Feed several sequences at once; one array a session."""


class Session:
    """A sequence in progress, made by `LanguageModel.session`.

    Results do not depend on how the ids were cut into calls, on other sessions in the same
    step, or on whether the state went through `fork` or a file: they are equal bit for bit.
    """

    def __init__(self, model: Stepper, state: State) -> None:
        self.model = model
        self._state = state
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Session: {self.position} tokens, {self.nbytes} bytes>"

    @property
    def position(self) -> int:
        """Number of tokens that this sequence has seen."""
        return self._state.position

    @property
    def nbytes(self) -> int:
        """Bytes of the state; pages of keys and values that forks share count in each of them."""
        return self._state.nbytes

    def memory(self) -> dict[int, int]:
        """{address: bytes} of what the state holds; forks share what has the same address."""
        with self._lock:
            return self._state.memory()

    def append(self, ids: Sequence[int] | NDArray[Any], logits: Want = "last") -> Float:
        """Feed token ids; return float32 [V], the logits after the last one.

        logits="all" returns [T, V], one row after every id; "none" skips the head and returns
        an empty array. Raises ValueError, and leaves the session as it was, for no ids, an id
        out of range, more positions than a model with attention has, or a model whose values stop
        being finite.
        """
        return self.model.step([self], [ids], logits=logits)[0]

    def fork(self) -> Session:
        """Return an independent copy that goes on from here."""
        with self._lock:
            return Session(self.model, self._state.fork())

    def roll_back(self, to: int | Session) -> None:
        """Go back to an earlier moment: a position, or a fork that was made there.

        Keys and values of attention end where the position says. A state that each token
        overwrites (MLGRU's) keeps no earlier position but the beginning: there a fork is needed,
        or a file that `save` wrote. Raises ValueError, and changes
        nothing, for a position that is lost or not reached, or a session of another model.
        """
        if isinstance(to, Session):
            if to.model is not self.model:
                raise ValueError("a session belongs to another model")
            state = to.fork()._state
            with self._lock:
                self._state = state
            return
        with self._lock:
            if to == 0:
                self._state = self.model.backend.new_state()
            else:
                self._state.roll_back(to)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state's pieces by name ("layers.0.mixer.h"), copied to the host."""
        with self._lock:
            return self._state.arrays()

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Raises WriteError (a ValueError and an OSError) when the disk refuses.
        """
        from nomatmul.engine.state_file import write_state

        with self._lock:  # one moment: copied before another thread may feed this session
            arrays, position = self._state.arrays(), self._state.position
        write_state(path, arrays, position, self.model.fingerprint)
