"""Turn texts into vectors with a packed model, for search, clustering or a classifier of yours.

Every text becomes one vector: of an encoder the mean (or the first, or the largest) of the hidden
states of its tokens, of a language model that of its last token, whose length is always 1. Texts of
any lengths go together; their order is kept. Without --json the vectors are
printed one a line, numbers separated by spaces; --out writes them as a NumPy file instead, which
`numpy.load` reads. --normalize makes every vector's length 1, so that a dot product of two is
their cosine. Without --model the encoder in the box reads them: it has learnt to guess hidden
words, not to compare sentences, so its vectors tell topics apart and little more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nomatmul.cli.encoding import read_texts
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json

EXAMPLES = """
examples:
  nomatmul embed "The river" "The sea" --normalize         the encoder in the box
  nomatmul embed --model my-encoder --file sentences.txt --out vectors.npy
  cat sentences.txt | nomatmul embed --model my-encoder --file - --json | jq .dimension
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = option(
        None,
        metavar="MODEL",
        help="packed model (nomatmul pack makes one), or hf:owner/name (default: the encoder in the"
        " box)",
    )
    words: tuple[str, ...] = option((), positional=True, metavar="TEXT", help="a text, or several")
    text: tuple[str, ...] = option((), metavar="TEXT", help="the same as TEXT alone")
    file: str | None = option(
        None, metavar="FILE", help="texts, one a line; - reads standard input"
    )
    pooling: str | None = option(
        None,
        choices=("mean", "first", "max", "last"),
        help="how tokens become one vector (default: mean of an encoder, last of other models)",
    )
    normalize: bool = option(False, help="divide each vector by its length")
    truncate: bool = option(False, help="cut texts that are too long instead of refusing them")
    out: str | None = option(None, metavar="FILE", help="write the vectors to this .npy file")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    json: bool = json_option()


def run(options: Options) -> int:
    import nomatmul

    texts = read_texts(options.words + options.text, options.file)
    if options.model is None:
        model: Any = nomatmul.load(kind="encoder", threads=options.threads)
    else:
        model = nomatmul.load(options.model, threads=options.threads)
    pooling, vectors_BD = _vectors(model, texts, options)
    if options.out is not None:
        _write(options.out, vectors_BD)
    if options.json:
        print_json(
            {
                "model": str(model.path),
                "pooling": pooling,
                "texts": len(texts),
                "dimension": int(vectors_BD.shape[1]),
                **(
                    {"out": options.out}
                    if options.out is not None
                    else {"embeddings": vectors_BD.tolist()}
                ),
            }
        )
    elif options.out is not None:
        print(f"wrote {len(texts)} vectors of {vectors_BD.shape[1]} numbers to {options.out}")
    else:
        for row in vectors_BD:
            print(" ".join(f"{value:.6g}" for value in row))
    return 0


def _vectors(model: Any, texts: list[str], options: Options) -> tuple[str, Any]:
    """(pooling, vectors [texts, D]). Raises ValueError for an option that is not for this model."""
    from nomatmul.engine.encoder_model import EncoderModel

    if isinstance(model, EncoderModel):
        pooling = options.pooling or "mean"
        return pooling, model.embed(
            texts, pooling, normalize=options.normalize, truncate=options.truncate
        )
    if options.pooling not in (None, "last"):
        raise ValueError(f'--pooling {options.pooling} is for encoders; this model has "last"')
    if options.truncate:
        raise ValueError("--truncate is for encoders")
    return "last", model.embed(texts)


def _write(path: str, vectors_BD: Any) -> None:
    import io
    from pathlib import Path

    import numpy as np

    from nomatmul.formats.files.atomic import write_file

    buffer = io.BytesIO()
    np.save(buffer, vectors_BD)
    write_file(Path(path), buffer.getvalue())
