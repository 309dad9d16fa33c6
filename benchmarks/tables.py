"""Pages whose words are written by hand and whose tables are written by scripts.

A block lies between <!-- table: NAME --> and <!-- end of table -->. A library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def filled(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """`text` with the lines of these tables in their blocks; an empty table leaves its block alone.

    Raises ValueError for a table that the text has no block for.
    """
    for name, lines in tables.items():
        if not lines:
            continue
        begin = f"<!-- table: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?<!-- end of table -->", re.DOTALL)
        block = "\n".join([begin, *lines, "<!-- end of table -->"])
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise ValueError(f"the page has {count} blocks for the table {name!r}, not one")
    return text


def fill(page: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Write the tables into their blocks of `page`."""
    page.write_text(filled(page.read_text("utf-8"), tables), "utf-8")
