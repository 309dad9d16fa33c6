"""The packed model directory, of decoders and encoders alike (see docs/formats.md)."""

from nomatmul.formats.packed.description import FORMAT, FORMAT_VERSION
from nomatmul.formats.packed.layout import FLOAT_FORMS, Forms, layout_of, packed_tensors
from nomatmul.formats.packed.reader import PackedReader
from nomatmul.formats.packed.writer import PackedWriter

__all__ = [
    "FLOAT_FORMS",
    "FORMAT",
    "FORMAT_VERSION",
    "Forms",
    "PackedReader",
    "PackedWriter",
    "layout_of",
    "packed_tensors",
]
