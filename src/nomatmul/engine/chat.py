"""A conversation with a model that has a chat template; its state is kept from turn to turn.

    chat = Chat(lm, system="Be brief.")
    for piece in chat.ask("What is a ternary weight?"):
        print(piece, end="")

Before each answer the template renders the whole conversation. Where that begins with what the
state has seen, only the rest is computed. Otherwise (a template may leave thoughts of earlier
answers out) the state goes back to where both part, if it can, or everything is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomatmul.engine.chat_text import ChatText
from nomatmul.formats.chat_template import ChatTemplate, Message
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.json import check_keys, read_json_object

if TYPE_CHECKING:
    from nomatmul.engine.generation import TextStream
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.sampling import Sampling
    from nomatmul.engine.session import Session

STATES = ("new", "continued", "rolled back", "started again")
_FORMAT = "nomatmul-chat"
_KEYS = {"format", "messages", "ids", "text"}


class Chat:
    """Messages, and the sequence of the model that has read them.

    messages: [{"role": ..., "content": ...}, ...] so far. system: the first of them. options: names
    that the template may read ({"enable_thinking": False}).
    Raises ValueError for a model without tokenizer or without template, and for a template that
    fails with such a conversation; see also `ChatText`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        system: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        template = None if lm.path is None else ChatTemplate.of(lm.path)
        if template is None or lm.path is None or lm.tokenizer is None:
            raise ValueError("this model has no chat template")
        self.lm, self.text = lm, ChatText(template, lm.path / "tokenizer.json", options)
        self._system: list[Message] = []
        if system is not None:
            self._system.append({"role": "system", "content": system})
        # an unsafe template, or one without place for a system message, is refused before a turn
        self.text.render([*self._system, {"role": "user", "content": "question"}])
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)
        self.session: Session = self.lm.session()
        self._ids: list[int] = []  # what the session has seen
        self._seen: str | None = ""  # its text, None where that is not known for certain

    def ask(
        self,
        content: str,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Turn:
        """Say something and return the answer, an iterator of pieces of text.

        Question and answer are among the messages when the answer has ended, or was closed early.
        Options as of `LanguageModel.stream`; raises ValueError before anything is computed.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        text = self.text.render(messages)
        ids, state = self._go_to(text)
        stream = self.lm.stream(
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            session=self.session,
            end_tokens=self.text.ends,
        )
        return Turn(self, stream, messages, text, state)

    def _go_to(self, text: str) -> tuple[list[int], str]:
        """(ids that lead from the state to this text, how: one of STATES)."""
        seen = self._seen
        if not self._ids:
            return self.text.ids(text), "new"
        if seen is not None and text.startswith(seen) and len(text) > len(seen):
            ids = self.text.ids_after(seen, text[len(seen) :])
            if ids:
                return ids, "continued"
        ids, self._seen = self.text.ids(text), None
        common = 0
        while common < min(len(ids) - 1, len(self._ids)) and ids[common] == self._ids[common]:
            common += 1
        if common == len(self._ids):
            return ids[common:], "continued"
        try:
            self.session.roll_back(common)
        except ValueError:  # each token overwrites the state
            common, self.session = 0, self.lm.session()
        self._ids = ids[:common]
        return ids[common:], "rolled back" if common else "started again"

    def _keep(self, turn: Turn, answer: str) -> None:
        """Note what the session has seen of a turn that is over."""
        stream, known = turn.stream, len(self._ids)
        made = [*stream.token_ids, *([] if stream.end_token is None else [stream.end_token])]
        fed = self.session.position - known
        self._ids += [*stream.prompt_ids, *made][:fed]
        if fed < len(stream.prompt_ids):  # refused or interrupted: the question was not read
            if fed:
                self._seen = None
            return
        self.messages = [*turn.messages, {"role": "assistant", "content": answer}]
        self._seen = None
        if stream.finish_reason in ("end", "length") and self._is_text(stream.token_ids, answer):
            ended = stream.end_token is not None and fed == len(stream.prompt_ids) + len(made)
            end = self.lm.tokenizer.id_to_token(stream.end_token) if ended else ""
            self._seen = turn.text + self.text.guarded(answer) + (end or "")

    def _is_text(self, ids: Sequence[int], answer: str) -> bool:
        """Whether tokens are just this text: no special ones among them, no half character."""
        special = {*self.text.special.values(), *self.text.call_tokens}
        return not special.intersection(ids) and "\ufffd" not in answer

    def save(self, path: str | Path) -> None:
        """Write the state to a file and the messages to a second one, `path`.json."""
        self.session.save(path)
        content = {"format": _FORMAT, "messages": self.messages, "ids": self._ids}
        document = json.dumps({**content, "text": self._seen}, ensure_ascii=False, indent=1)
        write_file(Path(f"{path}.json"), (document + "\n").encode("utf-8"))

    def load(self, path: str | Path) -> None:
        """Go on from files that `save` wrote; raises FormatError, changing nothing, for others."""
        beside = Path(f"{path}.json")
        values = read_json_object(beside)
        if values.get("format") != _FORMAT:
            raise FormatError(f"{beside} holds no conversation")
        check_keys(f"key of {beside}", values, _KEYS)
        session = self.lm.session(path)
        if session.position != len(values["ids"]):
            raise FormatError(f"{beside} is of another state than {path}")
        self.session, self.messages = session, list(values["messages"])
        self._ids, self._seen = list(values["ids"]), values["text"]


class Turn:
    """An answer while it is made: an iterator over pieces of text.

    state: one of STATES. reused, computed: how many tokens of the rendered conversation the state
    had seen, and how many are computed for this turn. stream: see `TextStream`.
    """

    def __init__(
        self, chat: Chat, stream: TextStream, messages: list[Message], text: str, state: str
    ) -> None:
        self._chat, self.stream, self.state = chat, stream, state
        self.messages, self.text = messages, text
        self.reused, self.computed = chat.session.position, len(stream.prompt_ids)
        self._pieces: list[str] = []
        self._over = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            piece = next(self.stream)
        except BaseException:  # the end, an error or an interruption: the session knows how far
            self._finish()
            raise
        self._pieces.append(piece)
        return piece

    def close(self) -> None:
        """End the answer early; what was written of it stays in the conversation."""
        self.stream.close()
        self._finish()

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._chat._keep(self, "".join(self._pieces))
