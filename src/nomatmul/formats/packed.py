"""The packed model directory: `PackedReader` and `PackedWriter` (see docs/formats.md)."""

from nomatmul.formats.packed_layout import (
    EMBEDDING_FORMS,
    FORMAT,
    FORMAT_VERSION,
    check_packable,
    packed_tensors,
)
from nomatmul.formats.packed_reader import PackedReader
from nomatmul.formats.packed_writer import PackedWriter

__all__ = [
    "EMBEDDING_FORMS",
    "FORMAT",
    "FORMAT_VERSION",
    "PackedReader",
    "PackedWriter",
    "check_packable",
    "packed_tensors",
]
