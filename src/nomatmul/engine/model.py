"""A language model that runs: sessions, logits, probabilities, text.

Legend: S sequences, T tokens, V vocabulary, L layers, D hidden size.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.generation import TextStream
from nomatmul.engine.sampling import Sampler, Sampling, check_count
from nomatmul.engine.session import Session, read_state
from nomatmul.engine.text import checked_stop

if TYPE_CHECKING:
    from nomatmul.engine.backend import Backend, Float, Ids, Want
    from nomatmul.formats.config import ModelConfig

# Positions whose logits are in memory at once while a text is scored.
_SCORE_BLOCK = 128


class LanguageModel:
    """A packed model in memory; made by `nomatmul.load` or `nomatmul.engine.random_model`.

    config: ModelConfig. path: its directory, or None. fingerprint: names weights and config;
    saved states carry it. All methods may be called from several threads.
    """

    def __init__(
        self,
        backend: Backend,
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
        self._tokenizer_path = tokenizer_path
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of the model, or None when it has none."""
        if self._tokenizer is None and self._tokenizer_path is not None:
            from nomatmul.formats.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer_path)
        return self._tokenizer

    def session(self, path: str | Path | None = None) -> Session:
        """Return a new sequence, or the one that `Session.save` wrote to `path`.

        Raises FormatError (a ValueError) for a damaged or foreign file.
        """
        shape = (self.config.num_layers, self.config.hidden_size)
        if path is None:
            return Session(self, self.backend.new_state())
        state_LD, position = read_state(path, shape, self.fingerprint)
        return Session(self, self.backend.state_from_numpy(state_LD), position)

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
        succeeds. Raises ValueError for no ids, ids out of range, a session of another model,
        a session given twice, or a model whose values stop being finite.
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
        with contextlib.ExitStack() as stack:
            for session in sorted(sessions, key=id):  # one order for all threads: no deadlock
                stack.enter_context(session._lock)
            states = [session._state for session in sessions]
            result = self.backend.step(states, arrays, logits)
            for session, array in zip(sessions, arrays, strict=True):
                session._position += len(array)
        if logits == "last":
            return list(result)
        if logits == "none":
            return [result for _ in sessions]
        ends = np.cumsum([len(array) for array in arrays])
        return list(np.split(result, ends[:-1]))

    def logits(self, ids: Sequence[int] | NDArray[Any]) -> Float:
        """Return float32 [T, V]: the logits after each id of a new sequence."""
        return self.session().append(ids, logits="all")

    def token_logprobs(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float64]:
        """Return float64 [T-1]: natural log of p(ids[t] | ids[:t]) for t = 1..T-1."""
        array = self.checked_ids(ids)
        session, parts = self.session(), [np.zeros(0)]
        for start in range(0, len(array) - 1, _SCORE_BLOCK):
            block = array[start : min(start + _SCORE_BLOCK, len(array) - 1)]
            logits_TV = session.append(block, logits="all")
            targets = array[start + 1 : start + 1 + len(block)]
            parts.append(log_probabilities(logits_TV, targets))
        return np.concatenate(parts)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Return the text that continues a prompt; options as in `stream`."""
        return "".join(self.stream(prompt, **options))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        session: Session | None = None,
    ) -> TextStream:
        """Continue a prompt (text or token ids) and yield the text in pieces as it is made.

        Pieces hold whole characters and never any part of a stop string. The stream ends after
        `max_tokens` tokens, before the first stop string, or at the model's end token; its
        `finish_reason` says which and `token_ids` holds what was made. With `session` the
        prompt continues that sequence, which then contains the prompt and all made tokens.
        Bad arguments raise ValueError here, before anything is computed (see Sampling).
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        max_tokens = check_count("max_tokens", max_tokens)
        stops = checked_stop(stop)
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer.json, so it makes no text; use generate_ids"
            )
        if session is not None and session.model is not self:
            raise ValueError("the session belongs to another model")
        fresh = session is None or session.position == 0
        ids = self.prompt_ids(prompt, fresh)
        tokens = self._tokens(ids, max_tokens, sampling, session)
        return TextStream(self.tokenizer, ids, tokens, stops, self.config.eos_token_id)

    def generate_ids(
        self,
        ids: Sequence[int] | NDArray[Any],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> list[int]:
        """Continue token ids by token ids; stops after the model's end token. No text needed."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        prompt = [int(token) for token in self.checked_ids(ids)]
        made = []
        for token in self._tokens(prompt, check_count("max_tokens", max_tokens), sampling, None):
            made.append(token)
            if token == self.config.eos_token_id:
                break
        return made

    def prompt_ids(self, prompt: str | Sequence[int], fresh: bool = True) -> list[int]:
        """Return the token ids of a prompt; a new sequence starts with the config's bos token.

        Raises ValueError for an empty prompt, or a text where the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in self.checked_ids(prompt)]
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json; give the prompt as token ids")
        if not prompt:
            raise ValueError("the prompt is empty")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no text: half a character at {error.start}") from None
        ids = list(self.tokenizer.encode(prompt, add_special_tokens=False).ids)
        if fresh and self.config.bos_token_id is not None:
            ids = [self.config.bos_token_id, *ids]
        return [int(token) for token in self.checked_ids(ids)]

    def checked_ids(self, ids: Sequence[int] | NDArray[Any]) -> Ids:
        """Return ids as int32 [T]; raises ValueError for none, or one out of range."""
        if isinstance(ids, str | bytes):
            raise ValueError("token ids are numbers; encode the text with lm.tokenizer first")
        try:
            array = np.asarray(ids)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"token ids must be a list of numbers: {error}") from None
        if array.size == 0:
            raise ValueError("the prompt is empty: give at least one token id")
        # numpy reads True among whole numbers as 1, and keeps ones beyond 64 bits as objects
        items = ids if isinstance(ids, list | tuple) else ()
        huge = array.dtype == object and all(isinstance(item, numbers.Integral) for item in items)
        odd = any(isinstance(item, bool | np.bool_) for item in items)
        if array.ndim != 1 or odd or not (array.dtype.kind in "iu" or (items and huge)):
            raise ValueError(
                f"token ids must be a list of whole numbers, got {array.dtype} {list(array.shape)}"
            )
        low, high, size = int(array.min()), int(array.max()), self.config.vocab_size
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is out of range: this model has ids 0 to {size - 1}")
        return np.ascontiguousarray(array, dtype=np.int32)

    def footprint(self) -> dict[str, int]:
        """Return bytes by part; see `nomatmul.engine.info.footprint_of`."""
        from nomatmul.engine.info import footprint_of

        return footprint_of(self)

    def _tokens(
        self, ids: list[int], max_tokens: int, sampling: Sampling, session: Session | None
    ) -> Iterator[int]:
        """Yield made tokens for as long as they are asked for.

        Each token is fed back when the next one is asked for; the last one only into a session
        of the caller, who may go on from it.
        """
        sequence = session if session is not None else self.session()
        sampler = Sampler(sampling, ids)
        waiting = ids  # what the sequence has not seen yet
        try:
            for _ in range(max_tokens):
                fed, waiting = waiting, []
                logits_V = sequence.append(fed)
                waiting = [sampler.sample(logits_V)]
                yield waiting[0]
        finally:
            if session is not None and waiting:
                sequence.append(waiting, logits="none")


def log_probabilities(logits_TV: Float, targets_T: NDArray[Any]) -> NDArray[np.float64]:
    """Return float64 [T]: log softmax of each row of float32 [T, V] at its target id."""
    top_T = logits_TV.max(axis=1)
    chosen_T = logits_TV[np.arange(len(targets_T)), targets_T].astype(np.float64)
    shifted_TV = logits_TV - top_T[:, None]
    sums_T = np.exp(shifted_TV, out=shifted_TV).sum(axis=1, dtype=np.float64)
    return chosen_T - top_T.astype(np.float64) - np.log(sums_T)
