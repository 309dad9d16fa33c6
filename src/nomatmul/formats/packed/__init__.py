"""The packed model directory, of decoders and encoders alike (see docs/formats.md)."""

from typing import TYPE_CHECKING

from nomatmul.formats.packed.description import FORMAT, FORMAT_VERSION
from nomatmul.formats.packed.layout import FLOAT_FORMS, Forms, layout_of, packed_tensors
from nomatmul.formats.packed.reader import PackedReader

if TYPE_CHECKING:
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


def __getattr__(name: str) -> object:
    # whoever runs a model starts without the writer, which tokenizers and cards belong to
    if name == "PackedWriter":
        from nomatmul.formats.packed.writer import PackedWriter

        return PackedWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
