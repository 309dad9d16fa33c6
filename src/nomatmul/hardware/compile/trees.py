"""Layers of trees in the memory image: records of nodes that are fetched one by one, and limits.

A node has a record in w_in (`image.node_records`) and one in w_out. Those of w_out do not meet the
product array but the adders of COMBINE, so they are 2-bit coded whatever the design's packing is:
column k in bits 2k and 2k + 1, zero weights up to a multiple of `combine_lanes`, whole words.

Legend: V rows of all trees of a layer, D outputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.packing import PER_BYTE, pack_ternary
from nomatmul.hardware.design import TREE_ROW_BITS, Design
from nomatmul.reference.integer.folds import Forest

_FORM = "2bit"


def out_words(columns: int, design: Design) -> int:
    """Words of a record of w_out, and the stride from one to the next."""
    return design.words(2 * _padded(columns, design))


def out_records(t_VD: NDArray[np.int8], design: Design) -> NDArray[np.uint8]:
    """uint8 [V, bytes] of the rows of w_out."""
    columns = t_VD.shape[1]
    padded = np.pad(t_VD, ((0, 0), (0, _padded(columns, design) - columns)))
    packed = pack_ternary(padded, _FORM)[:, : padded.shape[1] // PER_BYTE[_FORM]]
    size = out_words(columns, design) * design.memory_bytes
    return np.pad(packed, ((0, 0), (0, size - packed.shape[1])))


def check_trees(part: Forest, design: Design) -> None:
    """Raise ValueError, naming the layer, for trees that the design has no room for."""
    if not design.trees:
        raise ValueError(
            f"{part.name} has trees, and the design has no unit for them (trees is false)"
        )
    ((_, w_out),) = part.leave.linears()
    rows, columns = w_out.values.shape
    limits = (
        ("visits a token", part.leave.inputs, "tree_rows is", design.tree_rows),
        ("rows", rows, "a layer may have", (1 << TREE_ROW_BITS) - 1),
        ("outputs", columns, "half of vector_words is", design.tree_columns),
        ("beats of values", design.beats(part.leave.inputs), "activation_beats is",
         design.activation_beats),
    )  # fmt: skip
    for what, need, words, limit in limits:
        if need > limit:
            raise ValueError(f"{part.name}: its trees have {need} {what}, and {words} {limit}")


def _padded(columns: int, design: Design) -> int:
    return -(-columns // design.combine_lanes) * design.combine_lanes
