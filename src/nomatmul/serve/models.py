"""Models that are served: each with its name, its conversations as token ids, its defaults.

Legend: V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nomatmul._hub_names import is_hub_name, packed_directory
from nomatmul.engine.language_model import LanguageModel
from nomatmul.engine.loading import encoder_directory, load, talking_directory
from nomatmul.engine.sampling import Sampling
from nomatmul.engine.state import Layout
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.paths import checked_path
from nomatmul.formats.generation_config import sampling_defaults
from nomatmul.formats.packed.layout import WEIGHTS_FILE
from nomatmul.formats.packed.reader import PackedReader
from nomatmul.serve.limits import check_size
from nomatmul.serve.rendered import Rendered, plain_rendered

if TYPE_CHECKING:
    from nomatmul.engine.chat_text import ChatText
    from nomatmul.engine.encoder_model import EncoderModel
    from nomatmul.formats.chat_template import Message
    from nomatmul.serve.grammar import Grammars
    from nomatmul.serve.logprobs import TokenBytes

BOX_NAME = "nomatmul-box"
# names of the box's models, for a server of several; a directory of that name goes first
_BOXES: dict[str, Callable[[], Path]] = {
    BOX_NAME: talking_directory,
    "nomatmul-box-encoder": functools.partial(encoder_directory, None),
}
PLAIN = "plain"  # what --chat-template calls the template of models without one
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_log = logging.getLogger("nomatmul.serve")

Stamps = dict[str, tuple[int, int, int]]


@dataclass(eq=False)
class ServedModel:
    """A model in memory and what its directory says about texts.

    created: when its weights were written, Unix seconds. chat: its chat template; None of the plain
    template (`template` "plain"), and of encoders (None). defaults: {field of Sampling: value} of
    generation_config.json. end_tokens: what ends an answer of a chat beside the model's own.
    """

    name: str
    lm: LanguageModel | EncoderModel
    kind: Literal["language", "encoder"]
    created: int
    directory: Path
    chat: ChatText | None = None
    template: Literal["model", "plain"] | None = None
    defaults: Mapping[str, float | int] = field(default_factory=dict)
    end_tokens: frozenset[int] = frozenset()
    stamps: Stamps = field(default_factory=dict)
    replaced: bool = False

    @property
    def language(self) -> LanguageModel:
        """The language model; raises ValueError for an encoder."""
        if not isinstance(self.lm, LanguageModel):
            raise ValueError(f"model {self.name!r} is an encoder, which continues no text")
        return self.lm

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles grammars for the vocabulary; made when first asked for."""
        from nomatmul.serve.grammar import Grammars

        lm = self.language
        return Grammars(lm.tokenizer, lm.config.vocab_size, self._ends)

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of the tokens; looking through the special ones takes a while."""
        from nomatmul.serve.logprobs import TokenBytes

        return TokenBytes(self.language.tokenizer, self._ends)

    @property
    def _ends(self) -> set[int]:
        """Tokens that end an answer of a chat."""
        return {*self.language.config.end_token_ids, *self.end_tokens}

    @property
    def source(self) -> str:
        """The text of the chat template; "" of the plain one, and of encoders."""
        return "" if self.chat is None else self.chat.source

    def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """A conversation as token ids; raises ValueError where the template refuses it or fails,
        or the text is longer than that of a request may be.

        tools, options: names that the template may read; the plain one reads none.
        """
        lm = self.language
        if self.chat is None:
            return plain_rendered(lm, messages)
        text = self.chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{"tools": None if tools is None else list(tools), **(options or {})},
        )
        shown = self.chat.shown(text)
        check_size(len(shown))
        ids = tuple(self.chat.ids(text))
        ends = self._ends
        boundaries = tuple(place for place, token in enumerate(ids, 1) if token in ends)
        return Rendered(ids, boundaries, shown)

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt that is no conversation; errors of `LanguageModel.prompt_ids`, and
        ValueError for one that is longer than those of a request may be."""
        check_size(len(text))
        return tuple(self.language.prompt_ids(text))

    def warm(self) -> None:
        """Do now what the first request would wait for: the vocabulary's tables.

        That of grammars is made while Python's lock is held, with 128,000 tokens for a second:
        better now than when streams run.
        """
        if self.kind == "language":
            self.language.text_generation([0], 0, Sampling())
            with contextlib.suppress(ValueError):  # a tokenizer may be of no use for grammars
                assert self.grammars
            with contextlib.suppress(ValueError):  # a template may want another conversation
                self.chat_ids([{"role": "user", "content": "question"}])

    def changed(self) -> bool:
        """Whether a file of the model was replaced or changed since it was opened.

        What is in memory goes on as it is; the first time a line in the log says so.
        """
        if self.stamps == stamps_of(self.directory):
            return False
        if not self.replaced:
            self.replaced = True
            _log.warning(
                "the files of model %s in %s have changed; what was loaded is served on until a"
                " restart",
                self.name,
                self.directory,
            )
        return True


def stamps_of(directory: Path) -> Stamps:
    """{file: (inode, bytes, time of the last change)} of a directory; {} where it is gone."""
    found: Stamps = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.startswith("."):
                    stat = entry.stat()
                    found[entry.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return {}
    return found


def model_paths(models: Sequence[str]) -> dict[str, Path]:
    """{name: directory} of models as the command line gives them; where there is none, the box's
    talking model, or its base where the package has no other. That one and the box's encoder also
    go by name, nomatmul-box and nomatmul-box-encoder.

    Raises ValueError for a name that is given twice or cannot be one; see `load` for Hub names.
    """
    if not models:
        return {BOX_NAME: talking_directory()}
    found: dict[str, Path] = {}
    for text in models:
        name, separator, path = text.partition("=")
        if not separator or not _NAME.fullmatch(name):
            name, path = "", text
        if path in _BOXES and not Path(path).exists():
            directory, name = _BOXES[path](), name or path
        else:
            directory = (
                packed_directory(path) if is_hub_name(path) else checked_path(path, "a model")
            )
        name = name or _own_name(path, directory)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a model; give NAME={path}")
        if name in found:
            raise ValueError(f"two models are called {name!r}; give one of them as NAME=PATH")
        found[name] = directory
    return found


def _own_name(path: str, directory: Path) -> str:
    if is_hub_name(path):
        return path.removeprefix("hf:").partition("@")[0].rpartition("/")[2].removesuffix(".gguf")
    return directory.resolve().name


def open_models(
    paths: Mapping[str, Path],
    *,
    threads: int | None = None,
    device: str = "cpu",
    kv: str = "f16",
    chat_template: str | None = None,
) -> dict[str, ServedModel]:
    """Load models, {name: directory} as of `model_paths`.

    kv: of those models that keep keys and values. chat_template: a file, or "plain", in place of
    the one model's own. Raises ValueError for what cannot be served, in one line.
    """
    forms = {name: kv if _keeps_keys(path) else "f16" for name, path in paths.items()}
    if kv not in forms.values():
        raise ValueError(f"kv {kv!r} is about keys and values, and no model here keeps any")
    if chat_template is not None and len(paths) > 1:
        raise ValueError("a chat template in place of the model's own is for a server of one model")
    return {
        name: _open(name, directory, threads, device, forms[name], chat_template)
        for name, directory in paths.items()
    }


def _keeps_keys(directory: Path) -> bool:
    config = PackedReader(directory).config
    return config.causal and Layout.of(architecture_of(config)).grows


def _open(
    name: str, directory: Path, threads: int | None, device: str, kv: str, template: str | None
) -> ServedModel:
    stamps = stamps_of(directory)
    lm = load(directory, threads=threads, device=device, kv=kv, private=True)
    return served_model(name, lm, directory, template, stamps)


def served_model(
    name: str,
    lm: LanguageModel | EncoderModel,
    directory: Path,
    template: str | None = None,
    stamps: Stamps | None = None,
) -> ServedModel:
    """A model in memory with what its directory says; errors as of `open_models`."""
    stamps = stamps_of(directory) if stamps is None else stamps
    _, _, changed = stamps.get(WEIGHTS_FILE, (0, 0, 0))
    created = changed // 10**9
    if not isinstance(lm, LanguageModel):
        return ServedModel(name, lm, "encoder", created, directory, stamps=stamps)
    if lm.tokenizer is None:
        raise FormatError(f"{directory} has no tokenizer.json, so it can be sent no text")
    chat = _chat_text(lm, directory, template)
    return ServedModel(
        name,
        lm,
        "language",
        created,
        directory,
        chat=chat,
        template="plain" if chat is None else "model",
        defaults=sampling_defaults(directory),
        end_tokens=frozenset(() if chat is None else chat.ends),
        stamps=stamps,
    )


def _chat_text(lm: LanguageModel, directory: Path, template: str | None) -> ChatText | None:
    """The template of a model, that of a file, or None for the plain one."""
    from nomatmul.formats.chat_template import ChatTemplate, find_template, read_template
    from nomatmul.formats.tokenizer_config import special_names

    if template == PLAIN:
        return None
    source = find_template(directory) if template is None else read_template(Path(template))
    if source is None:
        return None
    from nomatmul.engine.chat_text import ChatText

    assert lm.tokenizer_path is not None
    compiled = ChatTemplate(source, special_names(directory))
    return ChatText(compiled, lm.tokenizer_path, ordinary=lm.tokenizer)
