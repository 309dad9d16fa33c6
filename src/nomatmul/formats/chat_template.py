"""Chat templates: the text that a model was trained to read for a conversation.

A template lies in chat_template.jinja, or in tokenizer_config.json (one, or several by name, of
which "default" or the only one is taken). It is a program that came with a model, so it runs in a
sandbox with limits (`template_sandbox`), and needs jinja2: the extra `chat`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.tokenizer_config import CONFIG_FILE, special_names

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE = 1 << 16  # characters; the longest in use have some ten thousand
# Of models that are trained here; its tokens are special_tokens.CHAT_TOKENS.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' ~ message.role) }}{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Message = dict[str, Any]


def find_template(directory: Path) -> str | None:
    """The chat template of a model directory, None where it has none.

    Of several without a default none is taken, with a warning. Raises FormatError for a file that
    is damaged or too large.
    """
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return read_template(path) or None
    path = directory / CONFIG_FILE
    template = read_json_object(path).get("chat_template") if path.is_file() else None
    if template in (None, "", [], {}):
        return None
    if not isinstance(template, str):
        template = _default_of(template, path)
    return None if template is None else _checked_length(template, path)


def read_template(path: Path) -> str:
    """The chat template in a file of its own.

    Raises FormatError for a file that is no UTF-8 text or too large, OSError where it is missing.
    """
    if path.stat().st_size > 4 * MAX_TEMPLATE:
        raise _too_large(path, path.stat().st_size, "bytes")
    try:
        return _checked_length(path.read_bytes().decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text ({error.reason})") from None


def _checked_length(template: str, path: Path) -> str:
    if len(template) > MAX_TEMPLATE:
        raise _too_large(path, len(template), "characters")
    return template


def _default_of(templates: object, path: Path) -> str | None:
    """Of named templates the one named "default", or the only one."""
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        templates = {str(entry.get("name")): entry.get("template") for entry in templates}
    if not isinstance(templates, dict):
        kind = type(templates).__name__
        raise FormatError(f"{path}: chat_template must be a text or named texts, found {kind}")
    odd = next((name for name, text in templates.items() if not isinstance(text, str)), None)
    if odd is not None:
        raise FormatError(f"{path}: the chat template {odd!r} is no text")
    if len(templates) == 1:
        return str(next(iter(templates.values())))
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        warnings.warn(
            f"{path} has chat templates {names}, and none is the default: none is taken",
            stacklevel=1,
        )
        return None
    return str(templates["default"])


def _too_large(path: Path, size: int, unit: str) -> FormatError:
    return FormatError(
        f"{path}: the chat template has {size:,} {unit}; at most {MAX_TEMPLATE:,} are read"
    )


class ChatTemplate:
    """A compiled chat template.

    names: special tokens that the template may put in ({"eos_token": "</s>"}). Raises ImportError
    without jinja2, ValueError for a template that is no program or does what is forbidden.
    """

    def __init__(self, template: str, names: dict[str, Any] | None = None) -> None:
        from nomatmul.formats.template_sandbox import Sandbox

        self.source = template
        self._names = dict(names or {})
        self._sandbox = Sandbox(template)

    @classmethod
    def of(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model directory, or None. Errors as above and of `find_template`."""
        template = find_template(directory)
        return None if template is None else cls(template, special_names(directory))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """The text of a conversation: [{"role": "user", "content": "..."}, ...].

        add_generation_prompt: end with the words after which the model's answer begins. options:
        further names that a template may read (tools, enable_thinking). Raises ValueError, one
        line, when the template refuses the messages, fails, or exceeds the limits.
        """
        values = {"tools": None, "documents": None, **self._names, **options}
        return self._sandbox.render(
            {
                **values,
                "messages": list(messages),
                "add_generation_prompt": add_generation_prompt,
            }
        )


def check_template(directory: Path, where: Path) -> None:
    """Try the template of a directory with a short conversation, where jinja2 is at hand.

    where: what to call the directory, which may be one of copies.
    Raises FormatError for one that is unsafe; one that fails otherwise costs a warning, because a
    model is of use without it.
    """
    try:
        template = ChatTemplate.of(directory)
        if template is not None:
            template.render([{"role": "user", "content": "question"}])
    except ImportError:  # whoever chats needs it, and is told so
        return
    except FormatError:
        raise
    except ValueError as error:
        from nomatmul.formats.template_budget import UnsafeTemplate

        if isinstance(error, UnsafeTemplate):
            raise FormatError(f"{where}: {error}") from None
        warnings.warn(f"{where}: {error}; chat with --no-template", stacklevel=2)
