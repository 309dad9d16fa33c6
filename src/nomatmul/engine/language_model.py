"""A language model that runs: prompts in, text out, and vectors of texts.

Legend: B texts, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from nomatmul.engine.causal_model import CausalModel
from nomatmul.engine.embeddings import embed_ids
from nomatmul.engine.generation import (
    Generation,
    Matcher,
    TextGeneration,
    TextStream,
    TextWriter,
    make_tokens,
    write_texts,
)
from nomatmul.engine.keywords import explains_options
from nomatmul.engine.language_text import LanguageText, Prompt, prompts_of
from nomatmul.engine.native import checked_threads
from nomatmul.engine.sampling import Sampler, Sampling, check_count
from nomatmul.engine.text import checked_stop

if TYPE_CHECKING:
    from nomatmul.engine.backend import CausalBackend
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float


class LanguageModel(CausalModel):
    """A packed model in memory; made by `nomatmul.load` or `nomatmul.engine.random_model`.

    config: ModelConfig. path: its directory, or None. fingerprint: names weights and config;
    saved states carry it. max_length: the longest sequence, None where nothing limits it. All
    methods may be called from several threads.
    """

    def __repr__(self) -> str:
        config = self.config
        where = f" from {str(self.path)!r}" if self.path is not None else ""
        return (
            f"<LanguageModel{where}: {config.param_count():,} parameters, {config.num_layers}"
            f" layers of {config.hidden_size}, {config.channel_mixer}, vocabulary"
            f" {config.vocab_size}, {self.packing} weights, {self.backend.name} {self.backend.isa},"
            f" {self.backend.threads} thread{'' if self.backend.threads == 1 else 's'}>"
        )

    @functools.cached_property
    def _text(self) -> LanguageText:
        return LanguageText(self.tokenizer_path, self.config)

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of the model, or None when it has none."""
        return self._text.tokenizer

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
            tokenizer_path=self.tokenizer_path,
        )

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
                ids.append(self.checked_ids(self.whole_ids(text)))
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from None
        return embed_ids(self.backend, ids)

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
        tokens are chosen, in place of the six keywords behind it; it has more (penalties on what
        was made, biases of single tokens). temperature: 0 takes the likeliest token each time;
        above 0 tokens are drawn, the higher the wilder. top_k: draw among the K likeliest tokens
        (0: all). top_p: draw among the fewest tokens whose probabilities sum to this share. min_p:
        drop tokens below this share of the likeliest one's probability. repetition_penalty: above
        1 makes tokens that were used less likely. seed: makes draws repeatable. stop: a text, or
        several, before which the answer ends. session: a sequence to go on from (one prompt only).

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
        end_tokens: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> TextGeneration:
        """Return the state machine of one text, for a driver that steps many of them together.

        Arguments and errors as of `stream`; matcher: a grammar that the text must follow. Nothing
        is computed here.
        """
        count, stops = check_count("max_tokens", max_tokens), checked_stop(stop)
        self._text.need_tokenizer()
        ids = self.prompt_ids(prompt)
        count = self._room(len(ids), count)
        ends = {*self.config.end_token_ids, *end_tokens}
        writer = TextWriter(self.tokenizer, ids, stops, ends)
        return TextGeneration(self._generation(ids, count, sampling), writer, matcher)

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
        sampling.check_vocabulary(self.config.vocab_size)
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

    def whole_ids(self, text: Prompt) -> list[int]:
        """Return the token ids of a text as `embed` reads it, with special tokens around it.

        Raises ValueError for an empty text, one that is longer than the model's positions, or a
        model without tokenizer.
        """
        ids = self._text.whole_ids(text)
        self._check_length(0, len(ids))
        return ids
