"""`EncoderModel`: embeddings, masked words and classes from a packed encoder, without torch.

    model = nomatmul.load("my-encoder-packed")
    model.embed(["The river", "The sea"])              # float32 [2, D]
    model.fill_mask("Paris is the [MASK] of France.")

Legend: B sequences, T tokens, N tokens of all sequences, D hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.engine.blas import blas_name
from nomatmul.engine.encoder_passes import Pass, Passes, checked_ids
from nomatmul.engine.encoder_text import Text, TextSide, Tokens, best, softmax
from nomatmul.engine.heads import TaskHead, pooled

if TYPE_CHECKING:
    from nomatmul.engine.backend import EncoderBackend
    from nomatmul.engine.state import Float
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.encoder import EncoderReading
    from nomatmul.formats.packed.layout import Forms

POOLINGS = {"mean": "avg", "first": "zero_index", "max": "max"}


class EncoderModel:
    """A packed encoder; made by `nomatmul.load`.

    Texts are strings; where a model has learned pairs, a text may also be a pair (a, b) of
    strings. Sequences of different lengths are computed side by side without padding, and in the
    native core a text's hidden states have the same bits whatever its company and the number of
    threads. (Masked words' logits come from numpy's BLAS, which promises no such thing.) One call
    at a time computes; others wait.
    """

    def __init__(
        self,
        backend: EncoderBackend,
        config: ModelConfig,
        reading: EncoderReading,
        *,
        fingerprint: str,
        forms: Forms,
        path: Path,
        tokenizer_path: Path | None = None,
    ) -> None:
        self.backend, self.config, self.reading = backend, config, reading
        self.fingerprint, self.forms, self.path = fingerprint, forms, path
        self.threads = backend.threads
        self._passes = Passes(backend, config)
        self._head = TaskHead(backend.tensor, backend.linear, config, reading)
        self._text = TextSide(tokenizer_path, config)

    def __repr__(self) -> str:
        config = self.config
        labels = f", labels {', '.join(self.labels)}" if self.labels else ""
        return (
            f"<EncoderModel from {str(self.path)!r}: {self.task}{labels}, {config.param_count():,}"
            f" parameters, {config.num_layers} layers of {config.hidden_size},"
            f" {config.channel_mixer}, vocabulary {config.vocab_size}, {self.threads} threads>"
        )

    @property
    def task(self) -> str:
        """ "masked", "sequence" or "token": what the head on the encoder is for."""
        return self.reading.task

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty without a classifier."""
        return self.reading.labels

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`; raises ValueError for a model packed without one."""
        return self._text.tokenizer

    # -- texts ----------------------------------------------------------------------------------

    def embed(
        self,
        texts: Text | Sequence[Text],
        pooling: str = "mean",
        *,
        normalize: bool = False,
        truncate: bool = False,
    ) -> Float:
        """Return one vector a text, float32 [B, D], from the hidden states of its tokens.

        pooling: "mean" or "max" over the tokens ([CLS] and [SEP] too), or "first" ([CLS]).
        normalize: divide by the length, so that a dot product is the cosine. truncate: cut a text
        that is longer than the model's positions instead of refusing it. Raises ValueError.
        """
        ids = [encoding.ids for encoding in self._text.encode(texts, truncate)]
        return self.embed_ids(ids, pooling, normalize=normalize)

    def text_ids(self, text: Text) -> list[int]:
        """Return the token ids of a text as `embed` reads it, with special tokens around it.

        Raises ValueError for an empty text, or one that is longer than the model's positions.
        """
        return self._text.encode([text], False)[0].ids

    def checked_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of one text; raises ValueError for none, too many, or one out of range."""
        return [int(token) for token in checked_ids(np.asarray(ids)[None], self.config)[0]]

    def embed_ids(
        self, sequences: Sequence[Sequence[int]], pooling: str = "mean", *, normalize: bool = False
    ) -> Float:
        """Return float32 [B, D], as `embed`, for token ids, which are taken as they are."""
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown; legal are {', '.join(POOLINGS)}")
        out: list[Float] = []
        ids = [self.checked_ids(sequence) for sequence in sequences]
        for hidden_ND, offsets in self._passes.side_by_side(ids):
            for first, last in itertools.pairwise(offsets):
                part, seen = hidden_ND[first:last], np.ones(last - first, bool)
                out.append(pooled(part, seen, self.reading, POOLINGS[pooling]))
        vectors = np.stack(out)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def fill_mask(self, text: str, top_k: int = 5) -> list[list[dict[str, Any]]]:
        """Return, for each mask token in the text, its most likely fillings, best first.

        A filling is {"token", "token_id", "score" (probability), "text" (the text with it)}.
        Raises ValueError for a text without a mask, or a model without this head.
        """
        self._need("masked", "fill_mask")
        limit = int(self._text.named_ids.sum())
        if not 1 <= top_k <= limit:
            raise ValueError(f"top_k is {top_k}, it must lie in 1..{limit}")
        ids, places = self._text.encode_masked(text)
        ((hidden_ND, _),) = self._passes.side_by_side([ids])
        scores = softmax(self._logits(hidden_ND[places]))
        fillings = []
        for place, row in zip(places, scores, strict=True):
            chosen = best(np.where(self._text.named_ids, row, -1), top_k)
            fillings.append(
                [
                    {
                        "token": self.tokenizer.id_to_token(int(token)),
                        "token_id": int(token),
                        "score": float(row[token]),
                        "text": self._text.filled(ids, place, int(token)),
                    }
                    for token in chosen
                ]
            )
        return fillings

    def classify(
        self, texts: Text | Sequence[Text], *, truncate: bool = False
    ) -> list[dict[str, Any]]:
        """Return one answer a text: by a sequence classifier its class, by a token classifier all.

        Sequence: {"label", "score", "scores" {label: probability}}; with a single label (a
        regression) {"label", "value"}. Token: {"tokens": [{"text", "start", "end", "label",
        "score"}, ...]} without special tokens. Raises ValueError for a model without classifier.
        """
        if self.task == "masked":
            self._need("sequence", "classify")
        encodings = self._text.encode(texts, truncate)
        answers: list[dict[str, Any]] = []
        if self.task == "sequence":
            logits_BC = self._sequence_logits([e.ids for e in encodings])
            return [self._class_answer(row) for row in logits_BC]
        for start, (hidden_ND, offsets) in _counted(self._side_by_side(encodings)):
            scores = softmax(self._logits(hidden_ND))
            for b, (first, last) in enumerate(itertools.pairwise(offsets)):
                found = self._text.tagged(encodings[start + b], scores[first:last], self.labels)
                answers.append({"tokens": found})
        return answers

    # -- token ids ------------------------------------------------------------------------------

    def logits(self, ids: ArrayLike, mask: ArrayLike | None = None) -> Float:
        """Return the head's logits for ids [B, T] (or [T]), float32.

        [B, T, V] of a masked language model (large: 4 V bytes a token), [B, C] of a sequence
        classifier, [B, T, C] of a token classifier. mask [B, T]: 0 hides a token from all others,
        as for padding. Raises ValueError for ids or a mask that do not fit.
        """
        hidden_BTD, seen_BT = self._passes.padded(ids, mask)
        if self.task == "sequence":
            pairs = zip(hidden_BTD, seen_BT, strict=True)
            return self._logits(np.stack([pooled(h, s, self.reading) for h, s in pairs]))
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return self._logits(flat).reshape(*hidden_BTD.shape[:2], -1)

    def hidden(self, ids: ArrayLike, mask: ArrayLike | None = None) -> Float:
        """Return the final-normed hidden states [B, T, D]; arguments as of `logits`."""
        return self._passes.padded(ids, mask)[0]

    def paths(self, ids: ArrayLike, mask: ArrayLike | None = None) -> dict[int, NDArray[np.int32]]:
        """Return {layer: visited rows int32 [B, T, trees, levels]} of the layers of trees."""
        found: dict[int, NDArray[np.int32]] = {}
        hidden_BTD, _ = self._passes.padded(ids, mask, paths=found)
        return {
            layer: rows.reshape(*hidden_BTD.shape[:2], *rows.shape[1:])
            for layer, rows in found.items()
        }

    def profile(self, ids: ArrayLike) -> dict[str, float]:
        """Return seconds of each part of one forward pass over ids [B, T], the head included."""
        seconds: dict[str, float] = {}
        hidden_BTD, _ = self._passes.padded(ids, None, seconds=seconds)
        if self.task == "masked":
            start = time.perf_counter()
            self._logits(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]))
            seconds["vocabulary head"] = time.perf_counter() - start
        return seconds

    def info(self) -> dict[str, Any]:
        """Return what this model is and what runs it, as plain values."""
        config, forms = self.config, self.forms
        trees = None
        if config.channel_mixer == "fff":
            trees = {"trees": config.fff_trees, "depth": config.fff_depth}
        return {
            "kind": "encoder",
            "task": self.task,
            "labels": list(self.labels),
            "path": str(self.path),
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "channel_mixer": config.channel_mixer,
            "fff": trees,
            "vocabulary": config.vocab_size,
            "positions": config.max_position_embeddings,
            "parameters": config.param_count(),
            "forms": {"rows": forms.rows, "dense": forms.dense, "embedding": forms.embedding},
            "threads": self.threads,
            "kernels": self.backend.isa,
            "blas": blas_name(),
        }

    def weight_bytes(self) -> dict[str, int]:
        """Return bytes of the weights in memory, by part."""
        return self.backend.weight_bytes()

    # -- inside ---------------------------------------------------------------------------------

    def _need(self, task: str, method: str) -> None:
        if self.task != task:
            have = f'its head is for task "{self.task}"'
            if method == "classify":
                have += "; `nomatmul finetune` makes a classifier of an encoder and your labels"
            raise ValueError(f'{method} needs a model with a head for task "{task}"; {have}')

    def _logits(self, x: Float) -> Float:
        """The head's finite logits of hidden or, for a sequence's class, pooled states."""
        with self._passes.alone():
            logits = self._head.logits(x)
        # A float64 sum of finite float32 cannot overflow.
        if not np.isfinite(np.sum(logits, dtype=np.float64)):
            raise ValueError("the logits are not finite (NaN or infinity)")
        return logits

    def _class_answer(self, logits_C: Float) -> dict[str, Any]:
        if len(self.labels) == 1:
            return {"label": self.labels[0], "value": float(logits_C[0])}
        scores = softmax(logits_C[None])[0]
        top = int(scores.argmax())
        named = dict(zip(self.labels, map(float, scores), strict=True))
        return {"label": self.labels[top], "score": float(scores[top]), "scores": named}

    def _sequence_logits(self, sequences: list[list[int]]) -> Float:
        """[B, C]; sequences share padded rows only if the head was trained to pool over them."""
        if self.reading.head.pool_padding:
            length = max(map(len, sequences))
            ids_BT = np.zeros((len(sequences), length), np.int64)
            for row, ids in zip(ids_BT, sequences, strict=True):
                row[: len(ids)] = ids
            mask_BT = np.arange(length) < np.array([[len(ids)] for ids in sequences])
            return self.logits(ids_BT, mask_BT)
        states: list[Float] = []
        for hidden_ND, offsets in self._passes.side_by_side(sequences):
            for first, last in itertools.pairwise(offsets):
                seen = np.ones(last - first, bool)
                states.append(pooled(hidden_ND[first:last], seen, self.reading))
        return self._logits(np.stack(states))

    def _side_by_side(self, encodings: Sequence[Tokens]) -> Iterator[Pass]:
        return self._passes.side_by_side([encoding.ids for encoding in encodings])


def _counted(passes: Iterator[Pass]) -> Iterator[tuple[int, Pass]]:
    """Each pass with the number of sequences before it."""
    start = 0
    for hidden_ND, offsets in passes:
        yield start, (hidden_ND, offsets)
        start += len(offsets) - 1
