"""A document without doubled spaces and remnants of markup; paragraphs and wording stay.

The Wikipedia texts were made by a program that took templates and tables out of the articles and
left their surroundings (`(, an acronym`, `a diameter of up to .`), and placeholders where formulas
and code had been. The books have rows of asterisks, box drawings of tables, captions of pictures
and verse that is indented by spaces.

A library of run.py.
"""

from __future__ import annotations

import re

_TITLE = re.compile(r"^(=+) (.+?) \1$")  # a section's or article's title: the line stays
_HEADING = re.compile(r"^#{1,6} +")
# What stood here was a formula, a piece of code or a picture: the rest of the line makes no sense.
_PLACEHOLDER = re.compile(
    r"\b(?:formula|codice)_\d+|^\[(?:Illustration|Footnote|Image|File)\b.*\]$|^(?:Image|File):"
)
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?: [^<>]*)?/?>|<!--.*?-->")
_ENTITIES = {"&nbsp;": " ", "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&ndash;": "–",
             "&mdash;": "—"}  # fmt: skip
_ENTITY = re.compile("|".join(_ENTITIES))
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EMPHASIS = re.compile(r"(?<!\w)(\*\*|__|_)(?=\S)([^*_]+?)(?<=\S)\1(?!\w)|'''?(?=\S)([^']+?)'''?")
_EMPTY_BRACKETS = re.compile(r" ?\([\s,;:]*\)| ?\[[\s,;:]*\]")
_AFTER_BRACKET = re.compile(r"([(\[])[\s,;]+")
_BEFORE_BRACKET = re.compile(r"[\s,;]+([)\]])")
_REPEATED_COMMA = re.compile(r",(?:\s*,)+")
# A space before a full stop or comma where a template was; ". . ." and " ..." are the author's own.
_LOOSE_MARK = re.compile(r"(?<![\s.]) +([,;.])(?![.\w])(?! \.)")
# Every remnant has one of these in it; nine lines of ten have none.
_SIGNS = ("<", "&", "[", "]", "|", "*", "_", "''", " ,", " ;", " .", "(,", "(;", "( ", "()", " )",
          ",)", ";)", ",,", "= ", "# ", "Image:", "File:")  # fmt: skip
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(document: str) -> str:
    """The cleaned document, "" where nothing is left. clean(clean(x)) == clean(x)."""
    lines = [_line(line) for line in document.splitlines()]
    return _BLANK_LINES.sub("\n\n", "\n".join(line for line in lines if line is not None)).strip()


def _line(line: str) -> str | None:
    """The line, "" for a blank one, None for one to be left out."""
    line = " ".join(line.split())
    if not line:
        return ""
    if any(sign in line for sign in _SIGNS):
        line = _HEADING.sub("", _TITLE.sub(r"\2", line))
        if _PLACEHOLDER.search(line) or line.count("|") > 1:
            return None
        while (cleaner := _without_remnants(line)) != line:  # a bracket may hold an empty one
            line = cleaner
    # Rules, rows of asterisks, page numbers: a line without a letter says nothing.
    return line if any(character.isalpha() for character in line) else None


def _without_remnants(line: str) -> str:
    line = _ENTITY.sub(lambda match: _ENTITIES[match[0]], line)
    line = _LINK.sub(r"\1", _TAG.sub("", line))
    line = _EMPHASIS.sub(lambda match: match[2] or match[3], line)
    line = _EMPTY_BRACKETS.sub("", line)
    line = _BEFORE_BRACKET.sub(r"\1", _AFTER_BRACKET.sub(r"\1", line))
    line = _LOOSE_MARK.sub(r"\1", _REPEATED_COMMA.sub(",", line))
    return " ".join(line.split())
