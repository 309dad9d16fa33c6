"""A language model that runs: sessions, logits, probabilities, text.

Legend: S sequences, T tokens, V vocabulary, L layers, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.embeddings import embed_ids
from nomatmul.engine.generation import (
    Generation,
    TextGeneration,
    TextStream,
    TextWriter,
    make_tokens,
    write_texts,
)
from nomatmul.engine.ids import checked_ids, log_probabilities
from nomatmul.engine.keywords import explains_options
from nomatmul.engine.language_text import LanguageText, Prompt, prompts_of
from nomatmul.engine.native import checked_threads
from nomatmul.engine.sampling import Sampler, Sampling, check_count
from nomatmul.engine.session import Session
from nomatmul.engine.text import checked_stop
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.files.directory import directory_bytes

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend, Ids, Want
    from nomatmul.engine.state import Float
    from nomatmul.formats.config import ModelConfig

# Positions whose logits are in memory at once while a text is scored.
_SCORE_BLOCK = 128


class LanguageModel:
    """A packed model in memory; made by `nomatmul.load` or `nomatmul.engine.random_model`.

    config: ModelConfig. path: its directory, or None. fingerprint: names weights and config;
    saved states carry it. max_length: the longest sequence, None where nothing limits it. All
    methods may be called from several threads.
    """

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
        self.max_length = architecture_of(config).max_length
        self._text = LanguageText(tokenizer_path, config)

    def __repr__(self) -> str:
        config = self.config
        where = f" from {str(self.path)!r}" if self.path is not None else ""
        return (
            f"<LanguageModel{where}: {config.param_count():,} parameters, {config.num_layers}"
            f" layers of {config.hidden_size}, {config.channel_mixer}, vocabulary"
            f" {config.vocab_size}, {self.packing} weights, {self.backend.name} {self.backend.isa},"
            f" {self.backend.threads} threads>"
        )

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of the model, or None when it has none."""
        return self._text.tokenizer

    def session(self, path: str | Path | None = None) -> Session:
        """Return a new sequence, or the one that `Session.save` wrote to `path`.

        Raises FormatError (a ValueError) for a damaged or foreign file.
        """
        if path is None:
            return Session(self, self.backend.new_state())
        from nomatmul.engine.state_file import read_state

        arrays, position = read_state(path, self.backend.layout, self.fingerprint)
        return Session(self, self.backend.load_state(arrays, position))

    def with_threads(self, threads: int) -> LanguageModel:
        """Return a model of the same weights, not copied, with another number of threads.

        Raises ValueError for a number below 1, or a backend that has no threads to choose.
        """
        return self.on(self.backend.with_threads(checked_threads(threads)))

    def on(self, backend: CausalBackend) -> LanguageModel:
        """Return this model on another backend of the same weights."""
        return LanguageModel(
            backend,
            self.config,
            fingerprint=self.fingerprint,
            packing=self.packing,
            embedding_form=self.embedding_form,
            path=self.path,
            tokenizer_path=self._text.path,
        )

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
        with contextlib.ExitStack() as stack:
            for session in sorted(sessions, key=id):  # one order for all threads: no deadlock
                stack.enter_context(session._lock)
            states = [session._state for session in sessions]
            for state, array in zip(states, arrays, strict=True):
                self._check_length(state.position, len(array))
            return self.backend.step(states, arrays, want)

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

    def embed(self, texts: Sequence[Prompt]) -> Float:
        """Return float32 [B, D]: a vector of length 1 for each text (or list of token ids).

        It is the final-normed hidden state behind the last token, divided by its length, as
        models made for it are read; a text gets the special tokens of its tokenizer. Raises
        ValueError for no texts, an empty or too long one, or a model without tokenizer.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError("embed takes a list of texts, at least one")
        ids = []
        for number, text in enumerate(texts):
            try:
                ids.append(self.checked_ids(self._text.whole_ids(text)))
                self._check_length(0, len(ids[-1]))
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from None
        return embed_ids(self.backend, ids)

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

    @explains_options
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        session: Session | None = None,
    ) -> str | list[str]:
        """Return the text that continues a prompt, or a list of texts for a list of prompts.

        prompt: a text or its token ids, or a list of these: they are computed together, and each
        answer equals that of its prompt alone. max_tokens: tokens to make at most. sampling: how
        tokens are chosen, in place of the six keywords behind it. temperature: 0 takes the
        likeliest token each time; above 0 tokens are drawn, the higher the wilder. top_k: draw
        among the K likeliest tokens (0: all). top_p: draw among the fewest tokens whose
        probabilities sum to this share. min_p: drop tokens below this share of the likeliest one's
        probability. repetition_penalty: above 1 makes tokens that were used less likely. seed:
        makes draws repeatable. stop: a text, or several, before which the answer ends. session: a
        sequence to go on from (one prompt only).

        Tokens that the tokenizer has no name for are never chosen; every end token of the model
        ends the text. Raises ValueError for a bad argument or a model without tokenizer.
        """
        keywords = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        chosen = keywords.unless(sampling)
        prompts = prompts_of(prompt)
        if prompts is None:
            return "".join(
                self.stream(
                    cast("Prompt", prompt), max_tokens=max_tokens, sampling=chosen, stop=stop,
                    session=session,
                )
            )  # fmt: skip
        if session is not None:
            raise ValueError("a session goes on from one prompt, not from a list of them")
        texts = []
        for number, part in enumerate(prompts):
            try:
                texts.append(self.text_generation(part, max_tokens, chosen, stop))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        return write_texts(self, texts)

    @explains_options
    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        session: Session | None = None,
        end_tokens: Sequence[int] = (),
    ) -> TextStream:
        """Continue a prompt (text or token ids) and yield the text in pieces as it is made.

        Options as of `generate`. Pieces hold whole characters and never any part of a stop string.
        The stream ends after `max_tokens` tokens, before the first stop string, or at an end token;
        its `finish_reason` says which and `token_ids` holds what was made. With `session` the
        prompt continues that sequence, which then contains the prompt and all made tokens.
        end_tokens: ids that end the text beside those of the model.
        Bad arguments raise ValueError here, before anything is computed.
        """
        keywords = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        chosen = keywords.unless(sampling)
        if prompts_of(prompt) is not None:
            raise ValueError("stream takes one prompt; generate takes a list of them")
        count, stops = check_count("max_tokens", max_tokens), checked_stop(stop)
        self._text.need_tokenizer()
        if session is not None and session.model is not self:
            raise ValueError("the session belongs to another model")
        ids = self.prompt_ids(prompt, fresh=session is None or session.position == 0)
        count = self._room(len(ids), count, session)
        tokens = make_tokens(self, self._generation(ids, count, chosen), session)
        ends = {*self.config.end_token_ids, *end_tokens}
        return TextStream(self.tokenizer, ids, tokens, stops, ends)

    def text_generation(
        self,
        prompt: Prompt,
        max_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str] | None = None,
    ) -> TextGeneration:
        """Return the state machine of one text, for a driver that steps many of them together.

        Arguments and errors as of `stream`; nothing is computed here.
        """
        count, stops = check_count("max_tokens", max_tokens), checked_stop(stop)
        self._text.need_tokenizer()
        ids = self.prompt_ids(prompt)
        count = self._room(len(ids), count)
        writer = TextWriter(self.tokenizer, ids, stops, self.config.end_token_ids)
        return TextGeneration(self._generation(ids, count, sampling), writer)

    @explains_options
    def generate_ids(
        self,
        ids: Sequence[int] | NDArray[Any],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> list[int]:
        """Continue token ids by token ids; stops behind an end token. Options as of `generate`.

        A model without tokenizer is fine: then any id may be chosen.
        """
        keywords = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        count = check_count("max_tokens", max_tokens)
        prompt = self.checked_ids(ids).tolist()
        count = self._room(len(prompt), count)
        made = []
        for token in make_tokens(self, self._generation(prompt, count, keywords.unless(sampling))):
            made.append(token)
            if token in self.config.end_token_ids:
                break
        return made

    def _generation(self, ids: list[int], count: int, sampling: Sampling) -> Generation:
        return Generation(ids, count, Sampler(sampling, ids, self._text.legal))

    def _room(self, prompt: int, count: int, session: Session | None = None) -> int:
        """Of so many tokens, those that the model's positions leave room for.

        The last one takes a position only in a session that goes on. Raises ValueError for a
        prompt that is too long, before any work.
        """
        position = 0 if session is None else session.position
        self._check_length(position, prompt)
        if self.max_length is None:
            return count
        return min(count, self.max_length - position - prompt + (session is None))

    def prompt_ids(self, prompt: Prompt, fresh: bool = True) -> list[int]:
        """Return the token ids of a prompt; a new sequence starts with the config's bos token.

        Raises ValueError for an empty prompt, or a text where the model has no tokenizer.
        """
        return self._text.prompt_ids(prompt, fresh)

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
