"""The packed model directory: `PackedReader` and `PackedWriter` (see docs/formats.md)."""

from nomatmul.formats.packed.layout import (
    EMBEDDING_FORMS,
    FORMAT,
    FORMAT_VERSION,
    check_packable,
    packed_tensors,
)
from nomatmul.formats.packed.reader import PackedReader
from nomatmul.formats.packed.writer import PackedWriter

__all__ = [
    "EMBEDDING_FORMS",
    "FORMAT",
    "FORMAT_VERSION",
    "PackedReader",
    "PackedWriter",
    "check_packable",
    "packed_tensors",
]
