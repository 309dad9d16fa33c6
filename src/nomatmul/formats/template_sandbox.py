"""Where chat templates run: jinja2's sandbox, with a bound on everything that they may cost.

jinja2 forbids what is unsafe (attributes of Python's internals, changing what is given). What it
does not bound is time and memory: loops in loops, macros that call themselves, texts that double.
Here every loop's step, call, filter and operation counts against a budget, and what each of them
made is charged with its size, so that no value is ever larger than a limit; names of methods and
filters that could make much of little are not offered. Otherwise the language is that of Hugging
Face transformers, whose results these are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from nomatmul.formats.template_budget import Budget, UnsafeTemplate, budget_of_now

try:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    from nomatmul.formats.template_filters import CHECKS, counted, on_budget, to_json
except ImportError as error:
    raise ImportError(
        f'chat templates need jinja2 ({error}): pip install "nomatmul[chat]"'
    ) from None

_FILTERS = frozenset(
    """
    abs capitalize count d default dictsort e escape first float format groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse round safe select
    selectattr sort string sum title trim unique upper
    """.split()  # noqa: SIM905 - a list of these would be three times as long
)
_TEXT_METHODS = frozenset(
    """
    capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip title upper
    """.split()  # noqa: SIM905 - as above
)
_SAFE_METHODS: dict[type, frozenset[str]] = {
    str: _TEXT_METHODS,
    list: frozenset({"index", "count"}),
    tuple: frozenset({"index", "count"}),
    dict: frozenset({"get", "items", "keys", "values"}),
    int: frozenset(),
    float: frozenset(),
}
_DATE_FORMAT = re.compile(r"(%-?[A-Za-z%]|[^%]){0,200}")


class Sandbox:
    """A compiled template. Raises ValueError, in one line, for one that does not compile."""

    def __init__(self, template: str) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
        compiled = _bounded("does not compile", lambda: environment.from_string(template))
        self._template = compiled

    def render(self, values: dict[str, Any]) -> str:
        """The text for these values; raises ValueError, in one line, for whatever goes wrong."""
        return str(_bounded("fails", lambda: self._joined(values)))

    def _joined(self, values: dict[str, Any]) -> str:
        budget, pieces = budget_of_now.get(), []
        budget.charge({key: _plain(value) for key, value in values.items()})
        for piece in self._template.generate(**{k: _plain(v) for k, v in values.items()}):
            budget.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)


def _bounded(what: str, work: Callable[[], Any]) -> Any:
    """The result of some work of jinja2 on a budget of its own, errors as one line."""
    token = budget_of_now.set(Budget())
    try:
        return work()
    except RecursionError:
        raise UnsafeTemplate(f"the chat template {what}: it calls itself endlessly") from None
    except (UnsafeTemplate, SecurityError, OverflowError, MemoryError) as error:
        line = " ".join((str(error) or type(error).__name__).split())[:300]
        raise UnsafeTemplate(f"the chat template {what}: {line}") from None
    except Exception as error:  # a template is a program: it may fail in any way
        line = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(f"the chat template {what}: {line}") from None
    finally:
        budget_of_now.reset(token)


def _plain(value: Any) -> Any:
    """A value without methods of other libraries: of JSON's types, else the name of its type."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return f"<{type(value).__name__}>"


class _Counting(NodeTransformer):
    """Puts a count on what jinja2 compiles to plain Python: loops, joined texts, literals."""

    def visit_For(self, node: nodes.For, *more: Any) -> nodes.For:
        self.generic_visit(node)
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filtered(node.iter, "_counted", nodes.Const(size))
        return node

    def _charged(self, node: nodes.Expr, *more: Any) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "_charged")

    visit_List = visit_Dict = _charged

    def visit_Concat(self, node: nodes.Concat, *more: Any) -> nodes.Expr:
        self.generic_visit(node)
        parts = node.nodes
        while len(parts) > 1:  # some at a time, so that a long chain is counted as it grows
            groups = [parts[at : at + 16] for at in range(0, len(parts), 16)]
            joined = [nodes.Concat(group, lineno=node.lineno) for group in groups]
            parts = [_filtered(group, "_charged") for group in joined]
        return parts[0]

    def visit_Getitem(self, node: nodes.Getitem, *more: Any) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):
            return self._charged(node)
        self.generic_visit(node)
        return node

    def visit_Tuple(self, node: nodes.Tuple, *more: Any) -> nodes.Expr:
        return self._charged(node) if node.ctx == "load" else node


def _filtered(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox on a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=lambda value: budget_of_now.get().charge(value), **options)
        known: dict[str, Any] = dict(self.filters)
        self.filters = {name: on_budget(known[name], CHECKS.get(name)) for name in _FILTERS}
        self.filters |= {"tojson": on_budget(to_json, None), "_counted": counted}
        self.filters["_charged"] = lambda value: budget_of_now.get().charge(value)
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: on_budget(test, None) for name, test in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }
        self.data_size = 0

    def _parse(self, *arguments: Any) -> nodes.Template:
        tree: nodes.Template = super()._parse(*arguments)
        self.data_size = sum(len(data.data) for data in tree.find_all(nodes.TemplateData))
        _Counting().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _SAFE_METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return bool(super().is_safe_attribute(obj, attr, value))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2's would print as nothing where it is not used further
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is forbidden")

    def _load_template(self, name: Any, *more: Any) -> Any:
        raise SecurityError(f"it asks for the file {str(name)[:100]!r}")

    def wrap_str_format(self, value: Any) -> None:
        """`"...".format` is not offered: its widths are no part of what `call` sees."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # the odd names are jinja2's: a template may call with any others
        budget = budget_of_now.get()
        budget.step()
        if isinstance(__obj, Macro | LoopContext):
            budget.spend(__self.data_size)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in CHECKS:
            CHECKS[name](*((args[0], owner) if name == "join" and args else (owner, *args)))
        return budget.charge(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            CHECKS["format"](left, right)
        elif operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(count, int):
                    budget_of_now.get().spend(len(text) * max(0, count))
        elif operator == "**" and not (abs(left) <= 1 << 32 and abs(right) <= 64):
            raise UnsafeTemplate(f"{left} ** {right} is too large")
        return budget_of_now.get().charge(super().call_binop(context, operator, left, right))


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(text: str) -> str:
    if not _DATE_FORMAT.fullmatch(text):
        raise SecurityError(f"{text[:50]!r} is no format of a date")
    return datetime.now().strftime(text)


class _Namespace(Namespace):
    """jinja2's, without names of internals, and shown without what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what a model wrote; here it is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> Any:
        return caller()


_EXTENSIONS = (loopcontrols, _Generation)
