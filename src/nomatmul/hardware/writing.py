"""Text that an accelerator writes, simulated or on a board: sampling is the host's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nomatmul.engine.generation import TextWriter
from nomatmul.engine.language_text import LanguageText
from nomatmul.engine.sampling import Sampler, Sampling

NO_LOGITS, LARGEST_LOGIT, ALL_LOGITS = 0, 1, 2  # what a token is asked for


def continued(
    text: LanguageText,
    ids: list[int],
    end_tokens: tuple[int, ...],
    max_tokens: int,
    sampling: Sampling,
    run: Callable[[int, int], dict[str, Any]],
    logits_scale: float,
) -> Iterator[str]:
    """Continue the text of `ids`; pieces come as they are certain.

    run(token, want) gives {"argmax": id} for LARGEST_LOGIT, {"logits": whole numbers of
    `logits_scale`} for ALL_LOGITS, and ends the text where it raises StopIteration.
    """
    assert text.tokenizer is not None
    sampler = Sampler(sampling, ids, text.legal)
    own_choice = sampling == Sampling(seed=sampling.seed) and text.legal is None
    writer = TextWriter(text.tokenizer, ids, (), end_tokens)
    for token in ids[:-1]:
        run(token, NO_LOGITS)
    last = ids[-1]
    for _ in range(max_tokens):
        try:
            answer = run(last, LARGEST_LOGIT if own_choice else ALL_LOGITS)
        except StopIteration:
            return
        if own_choice:
            last = answer["argmax"]
        else:
            last = sampler.sample(np.array(answer["logits"], np.float32) * np.float32(logits_scale))
        if piece := writer.push(last):
            yield piece
        if writer.finish_reason:
            return
    if rest := writer.finish("length"):
        yield rest
