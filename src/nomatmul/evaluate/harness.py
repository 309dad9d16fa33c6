"""Packed models in lm-evaluation-harness (extra `eval`), as its model `nomatmul`.

The harness looks for models in its own list alone: it has no entry points for others, and what it
finds by --include_path are tasks. So this module is run in its place, with the same arguments,

    python -m nomatmul.evaluate.harness --model nomatmul --model_args path=DIR,threads=2 --tasks ...

or imported before `lm_eval.simple_evaluate(model="nomatmul", ...)`.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nomatmul._extras import install_line

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    _missing = f"the harness needs lm-eval ({error}): {install_line('eval')}"
    if __name__ == "__main__":  # a line for a user, status 1
        raise SystemExit(f"nomatmul: error: {_missing}") from None
    raise ImportError(_missing) from None

from nomatmul.engine.chat_text import ChatText
from nomatmul.engine.generation import write_texts
from nomatmul.engine.loading import load
from nomatmul.engine.sampling import Sampling
from nomatmul.evaluate.continuations import score_continuations
from nomatmul.formats.chat_template import ChatTemplate

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from nomatmul.engine.language_model import LanguageModel

_LANES = 16
_SAMPLING = frozenset(field.name for field in dataclasses.fields(Sampling)) - {"seed"}


class HarnessModel(TemplateLM):
    """A packed language model.

    path: its directory, by default the model in the box; or `lm`, a model that is loaded. threads,
    kv: as of `nomatmul.load`. gpu: its device there, "cuda" or "cuda:1"; the harness's own device
    and max_batch_size, which it hands to every model whether or not anyone chose them (its default
    is a GPU on every machine), say nothing. batch_size: contexts that are read side by side, which
    changes no result; 1, what the harness says where nobody did, and "auto" stand for 16.
    max_length: tokens of a request at most, those in front are left out of longer ones; by default
    the positions of the model. max_gen_toks: of an answer, where the task says nothing.
    add_bos_token: whether each text begins with the model's bos token (as the harness has it for
    all models: no). seed: of tasks that sample.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        lm: LanguageModel | None = None,
        threads: int | None = None,
        kv: str = "f16",
        batch_size: int | str | None = None,
        gpu: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if lm is None:
            lm = load(path, kind="language", threads=threads, kv=kv, device=gpu or "cpu")
        self.lm, self.path = lm, path
        if lm.tokenizer is None:
            raise ValueError("the harness gives texts, and this model has no tokenizer.json")
        unsaid = str(batch_size) in ("None", "1") or str(batch_size).startswith("auto")
        self.batch_size = _LANES if unsaid else int(str(batch_size))
        self.max_length = lm.max_length if max_length is None else max_length
        self._max_gen_toks, self._seed = max_gen_toks, seed
        self._bos = lm.config.bos_token_id if add_bos_token else None
        self._chat: ChatText | None = None

    # -- texts and token ids ---------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The first of the model's end tokens. Raises ValueError where there is none."""
        ends = self.lm.config.end_token_ids
        if not ends:
            raise ValueError("this model has neither bos nor end token to stand before a text")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: bos, or else the end token."""
        bos = self.lm.config.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; the bos token stands before it where the model is to have one."""
        if self._chat is not None:
            return self._chat.ids(string)
        ids = self.lm.tokenizer.encode(string, add_special_tokens=False).ids
        if self._bos is None or add_special_tokens is False or ids[:1] == [self._bos]:
            return list(ids)
        return [self._bos, *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation by the model's template, whose special tokens are tokens."""
        if not add_generation_prompt:
            raise ValueError("answers that are begun in the prompt are not supported")
        if self._chat is None:
            template = None if self.lm.path is None else ChatTemplate.of(self.lm.path)
            if template is None or self.lm.path is None:
                raise ValueError("this model has no chat template")
            self._chat = ChatText(template, self.lm.path / "tokenizer.json")
        return self._chat.render(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's own cache of requests."""
        return f"nomatmul {self.lm.fingerprint}"

    # -- requests --------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        **_ignored: Any,  # disable_tqdm
    ) -> list[tuple[float, bool]]:
        pairs = [self._within(context, continuation) for _, context, continuation in requests]
        found = score_continuations(self.lm, pairs, lanes=self.batch_size)
        for (key, _, _), result in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def _within(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both without the first tokens of the context, where they are longer than a request."""
        if self.max_length is None:
            return context, continuation
        # the last token is predicted and not fed
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the"
                f" {self.max_length} of a request"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, behind the prefix token, in windows of max_length."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = [(None, *window) for window in self._windows(self.tok_encode(text))]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        longest = max(len(ids), 1) if self.max_length is None else self.max_length
        windows = get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=longest, context_len=1
        )
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts until one of the task's stop strings, an end token or max_gen_toks."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers: dict[int, str] = {}
        for numbers in groups.values():
            options = dict(requests[numbers[0]].args[1])
            texts = self._generated([requests[number].args[0] for number in numbers], options)
            answers.update(zip(numbers, texts, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[number])
        return [answers[number] for number in range(len(requests))]

    def _generated(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        options = {**normalize_gen_kwargs(options, self._max_gen_toks)}
        count, stop = options.pop("max_gen_toks"), options.pop("until")
        options.pop("do_sample", None)  # it has made the temperature 0 where it is false
        if unknown := sorted(set(options) - _SAMPLING):
            raise ValueError(f"generation option {unknown[0]!r} is not one of nomatmul's")
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        if self.max_length is not None:
            room = self.max_length - count
            if room < 1:
                raise ValueError(
                    f"{count} tokens of an answer leave no room in {self.max_length} (max_gen_toks)"
                )
            prompts = [prompt[-room:] for prompt in prompts]
        sampling, stops = Sampling(**options, seed=self._seed), [text for text in stop if text]
        ends = () if self._chat is None else self._chat.ends
        return write_texts(
            self.lm,
            [self.lm.text_generation(ids, count, sampling, stops, ends) for ids in prompts],
        )


# by its name, not by the class: run as a program, this module is another one than when imported
model_registry.register("nomatmul", target="nomatmul.evaluate.harness:HarnessModel")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
