"""Whether models fit into memory, before any of them is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nomatmul.engine.graph import describe, rearranged
from nomatmul.engine.state import Layout
from nomatmul.engine.weights import encoder_sizes, panel_sizes
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.host_memory import available_memory
from nomatmul.formats.packed.reader import PackedReader

if TYPE_CHECKING:
    from nomatmul.serve.options import ServeOptions

_log = logging.getLogger("nomatmul.serve")


def weight_bytes(reader: PackedReader) -> int:
    """Bytes of a packed model's weights once they are loaded for a CPU."""
    if not reader.config.causal:
        return sum(encoder_sizes(reader).values())
    names = set(rearranged(describe(reader.config, reader.forms)))
    return sum(panel_sizes(reader, names).values())


def check_memory(directories: Iterable[Path], options: ServeOptions) -> None:
    """Raise MemoryError for models that do not fit; warn where a full cache would not.

    On a GPU the weights lie elsewhere, and its own allocator refuses.
    """
    available = available_memory()
    if options.device != "cpu" or available is None:
        return
    weights, states = 0, 0
    for directory in directories:
        reader = PackedReader(directory)
        weights += weight_bytes(reader)
        if reader.config.causal:
            states += options.max_streams * Layout.of(architecture_of(reader.config)).nbytes(0)
    if weights > available:
        raise MemoryError(
            f"the models take {weights / 1e9:.2f} GB, {available / 1e9:.2f} GB are available"
        )
    if weights + states + options.state_cache > available:
        _log.warning(
            "a full state cache would not fit: %.2f GB of weights, %.2f GB of cache (--state-cache)"
            " and %d streams, %.2f GB are available",
            weights / 1e9,
            options.state_cache / 1e9,
            options.max_streams,
            available / 1e9,
        )
