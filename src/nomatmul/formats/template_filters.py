"""What filters and methods of chat templates may be asked: what makes much of little is refused.

Each call counts against the budget of the rendering, and what it made is charged with its size.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Undefined

from nomatmul.formats.template_budget import budget_of_now

_WIDE_FORMAT = re.compile(r"[0-9]{4}|\*")  # widths that make a long text of a short one


def on_budget(function: Callable[..., Any], check: Callable[..., None] | None) -> Any:
    """A filter or test that counts, whose arguments are looked at first."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context in front

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = budget_of_now.get()
        budget.step()
        if check is _check_join and isinstance(args[skipped], Iterator | range):
            entries = budget.charge(list(args[skipped]))
            args = (*args[:skipped], entries, *args[skipped + 1 :])
        if check is not None:
            check(*args[skipped:], **kwargs)
        return budget.charge(function(*args, **kwargs))

    return call


def counted(values: Any, size: int) -> Iterator[Any]:
    """The values of a loop, each counted with the text that the loop's body holds."""
    budget = budget_of_now.get()
    for value in values:
        budget.step()
        budget.spend(size)
        yield value


def _check_format(text: str, *values: Any, **named: Any) -> None:
    """`%` puts each value in once, at no great width: then the result is no longer than both."""
    parts = [part for value in values for part in (value if isinstance(value, tuple) else [value])]
    if named or _WIDE_FORMAT.search(text) or any(isinstance(part, dict) for part in parts):
        raise SecurityError("a format may have neither names nor widths of four digits")


def _check_replace(text: Any, old: Any, new: Any, count: Any = None, **more: Any) -> None:
    budget_of_now.get().spend((str(text).count(str(old)) if old else len(text)) * len(str(new)))


def _check_join(values: Any, d: Any = "", attribute: Any = None) -> None:
    if not isinstance(values, list | tuple | dict | str):
        raise SecurityError("join takes a list: put |list in front of it")
    budget_of_now.get().spend(len(values) * len(str(d)))


def _check_indent(text: Any, width: Any = 4, *more: Any, **named: Any) -> None:
    size = len(width) if isinstance(width, str) else int(width)
    if size > 100:
        raise SecurityError(f"indent has the width {size}; at most 100 is allowed")
    budget_of_now.get().spend((str(text).count("\n") + 1) * max(size, 0))


def _check_sum(values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("sum adds numbers only")


def _check_round(value: Any, precision: Any = 0, *more: Any, **named: Any) -> None:
    if not -100 <= precision <= 100:
        raise SecurityError(f"round has the precision {precision}; from -100 to 100 are allowed")


CHECKS: dict[str, Callable[..., None]] = {
    "format": _check_format,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_round,
    "sum": _check_sum,
}


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: jinja2's own writes <, > and & as escapes of HTML."""
    if isinstance(value, Undefined):
        raise TemplateError("tojson of a value that is undefined")
    wide = len(indent) if isinstance(indent, str) else indent or 0
    if wide > 16 or sum(map(len, separators or ())) > 16:
        raise SecurityError("tojson may indent by 16 and separate by 16 characters at most")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
