"""What a text may be, token by token: grammars compiled by llguidance for a model's vocabulary.

Everything that a grammar may cost is bounded: its compilation and each of its steps end when they
have used up their fuel (`LIMITS`), and one compilation runs at a time.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakValueDictionary

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from nomatmul.engine.sampling import Unanswerable
from nomatmul.serve.schema_parts import children
from nomatmul.serve.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import TokenizerWrapper
    from llguidance._lib import JsonCompileOptions
    from tokenizers import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "lark"]

KEPT = 128  # compiled grammars a model, beside those that are in use
KEPT_TEXT = 1 << 20  # characters of their specs; a grammar takes some 150 bytes for each
BLAME_SECONDS = 0.5  # for the search of what is at fault in a schema that is refused
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Between the parts of JSON: nothing, a space, or a new line indented by up to 16 spaces. Any white
# space is legal there, but a model that has lost its way would write nothing else.
# Escapes: those that have but one way to write a character, so that a key cannot be written twice.
JSON_STYLE: JsonCompileOptions = {
    "whitespace_pattern": r" |\n {0,16}",
    "json_allowed_escapes": 'nrbtf\\"',
}
_OBJECT = {"type": "object"}
_EMBEDDED = re.compile(r"^(\w+): %json (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar as a request asks for it.

    kind: "json_object" (value is not read), "json_schema" (value: the schema as JSON text),
    "regex" or "lark" (value: its text).
    """

    kind: Kind
    value: str = ""


class Grammars:
    """The grammars of one model: compiles specs, and keeps the last ones and those in use.

    vocab_size: the model's, which may be larger than the tokenizer's. end_tokens: every token that
    ends a text of this model; they are allowed where the grammar is complete, and nowhere else.
    Raises ValueError for a tokenizer whose tokens do not spell bytes. Methods may be called from
    several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int]) -> None:
        self.vocab_size, self._ends = vocab_size, frozenset(end_tokens)
        vocabulary = Vocabulary(tokenizer, vocab_size, self._ends)
        ends = sorted(self._ends) or None
        # by its attributes a TokenizerWrapper, whose own constructor wants another wrapper
        self._tokenizer = LLTokenizer(cast("TokenizerWrapper", vocabulary), eos_token=ends)
        self._kept: OrderedDict[GrammarSpec, Matcher] = OrderedDict()
        self._in_use: WeakValueDictionary[GrammarSpec, Matcher] = WeakValueDictionary()
        self._lock, self._compiling = threading.Lock(), threading.Lock()

    def compile(self, spec: GrammarSpec) -> Matcher:
        """Return a matcher at the beginning of a text; call it off the event loop.

        A spec that was compiled lately, or is in use, costs a copy. Raises ValueError, in one line,
        for a grammar that is wrong, not supported, or beyond the limits.
        """
        if (found := self._find(spec)) is not None:
            return found
        with self._compiling:
            if (found := self._find(spec)) is not None:  # made while this thread waited
                return found
            inner = self._matcher(grammar_text(spec))
            if inner.is_error():
                raise ValueError(self._reason(spec, inner.get_error()))
            matcher = Matcher(inner, self.vocab_size, self._ends)
            matcher.allowed()  # what the first step costs and refuses is known before it is needed
        with self._lock:
            self._in_use[spec] = matcher
            self._keep(spec, matcher)
            return matcher.copy()

    def _find(self, spec: GrammarSpec) -> Matcher | None:
        with self._lock:
            if (found := self._in_use.get(spec)) is None:
                return None
            self._keep(spec, found)
            return found.copy()

    def _keep(self, spec: GrammarSpec, matcher: Matcher) -> None:
        """Note a grammar as the last one, and forget the oldest beyond the limits."""
        self._kept[spec] = matcher
        self._kept.move_to_end(spec)
        text = sum(len(kept.value) for kept in self._kept)
        while len(self._kept) > max(1, KEPT) or (text > KEPT_TEXT and len(self._kept) > 1):
            oldest, _ = self._kept.popitem(last=False)
            text -= len(oldest.value)

    def _matcher(self, text: str) -> LLMatcher:
        # not LLMatcher.validate_grammar, which lets panics of the compiler through
        return LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)

    def _reason(self, spec: GrammarSpec, error: str) -> str:
        """Why a grammar is refused, with the place of the smallest schema that is refused alone."""
        deadline = time.monotonic() + BLAME_SECONDS
        for name, schema in _schemas(spec):
            if found := self._fault(schema, schema, deadline):
                place, reason = found
                return f"the JSON schema is not supported at {name}#{place}: {reason}"
        return f"the grammar is not supported: {_one_line(error)}"

    def _fault(self, schema: Any, root: Any, deadline: float) -> tuple[str, str] | None:
        """(place, reason) of the smallest schema in it that is refused; None for a good one."""
        if time.monotonic() > deadline:
            return None
        definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
        whole = {**definitions, **schema} if isinstance(schema, dict) else schema
        text = LLMatcher.grammar_from_json_schema(json.dumps(whole), overrides=JSON_STYLE)
        tried = self._matcher(text)
        if not tried.is_error():
            return None
        for place, child in children(schema):
            if found := self._fault(child, root, deadline):
                return place + found[0], found[1]
        return "", _one_line(tried.get_error())


class Matcher:
    """The state of a grammar behind the tokens of one text; made by `Grammars.compile`."""

    def __init__(self, inner: LLMatcher, vocab_size: int, ends: frozenset[int]) -> None:
        self._inner, self._vocab_size, self._ends = inner, vocab_size, ends
        words = (vocab_size + (not ends) + 31) // 32  # llguidance's own end token, if it needs one
        self._bits = np.zeros(4 * words, np.uint8)
        self._ended = False
        self._origin: Matcher | None = None  # what `Grammars` keeps while a copy of it is alive

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, bool [V].

        Raises Unanswerable when the grammar exceeds the limits of a step.
        """
        bits = self._bits
        self._inner.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._inner.is_error():
            raise Unanswerable(f"the grammar cannot go on: {_one_line(self._inner.get_error())}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on behind a token that `allowed` allowed.

        Raises Unanswerable for another one, and when the grammar exceeds the limits of a step.
        """
        if token in self._ends:
            self._ended = True
            return
        if not self._inner.consume_token(token):
            raise Unanswerable(f"the grammar cannot go on: {_one_line(self._inner.get_error())}")

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._ended or self._inner.is_stopped()

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        twin = Matcher(self._inner.deep_copy(), self._vocab_size, self._ends)
        twin._ended, twin._origin = self._ended, self._origin or self
        return twin


def grammar_text(spec: GrammarSpec) -> str:
    """A spec as llguidance reads it. Raises ValueError for JSON that is none."""
    if spec.kind == "lark":
        return str(LLMatcher.grammar_from_lark(spec.value))
    if spec.kind == "regex":
        return str(LLMatcher.grammar_from_regex(spec.value))
    schema = _OBJECT if spec.kind == "json_object" else json.loads(spec.value)
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))


def json_rule(schema: Any) -> str:
    """The right side of a rule of a lark grammar for the JSON that a schema allows."""
    styled = {**schema, "x-guidance": JSON_STYLE} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(styled)}"


def _schemas(spec: GrammarSpec) -> Iterator[tuple[str, Any]]:
    """The schemas of a spec with the names of their rules."""
    if spec.kind == "json_schema":
        yield "", json.loads(spec.value)
    elif spec.kind == "lark":
        for name, text in _EMBEDDED.findall(spec.value):
            yield name, json.loads(text)


def _one_line(error: str) -> str:
    if error.startswith("NoExtension"):
        return "no text satisfies it"
    if "panic" in error:  # what it says is of use to the compiler's makers only
        return "the grammar compiler fails with it"
    return " ".join(error.replace("<non-verbose/>", "").split())[:300]
