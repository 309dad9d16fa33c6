"""Turn a packed model into what the accelerator reads: a program, a memory image and a map.

OUT/program.bin holds 16 bytes an instruction, OUT/image.bin the weights in exactly the order in
which a token takes them (then the head, the embedding and the nodes of trees), OUT/map.json where
everything lies, the constants, the fractions of the fixed-point numbers, and the checksums of model
and design. Widths are proved from the weights: a model whose values could overflow is refused, with
the width that would do. So is one that does not fit the design's memories (or the
board's, with --board), or that has a part which the accelerator lacks (attention, dense matrices).
OUT must not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.cli.hardware_options import (
    DesignOptions,
    board_option,
    design_of,
    open_packed,
    packed_option,
)
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json, print_table, size
from nomatmul.cli.signals import clean_up_when_terminated

EXAMPLES = """
examples:
  nomatmul hardware compile compiled                         the model in the box
  nomatmul hardware compile my-packed compiled --lanes 128 --packing 1.6bit
  nomatmul hardware compile my-packed compiled --set vector_bits=28 --set program_words=2048
  nomatmul hardware compile my-packed compiled --json | jq .bytes_a_token
"""


@dataclass(frozen=True, kw_only=True)
class Options(DesignOptions):
    packed: str | None = packed_option()
    out: str = option(positional=True, metavar="OUT", help="the directory to make")
    board: str | None = board_option()
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.hardware.boards import board
    from nomatmul.hardware.compile import compile_model

    clean_up_when_terminated()
    room = None if options.board is None else int(board(options.board).capacity)
    reader = open_packed(options.packed)
    design = design_of(options, reader)
    summary = compile_model(reader, design, options.out, memory_bytes=room)
    if options.json:
        print_json(summary)
        return 0
    print_table(
        [
            ("instructions", str(summary["instructions"])),
            ("memory image", size(summary["image_bytes"])),
            ("streamed a token", size(summary["bytes_a_token"])),
            ("of it by the head", size(summary["head_bytes"])),
            *((f"fraction of {name}", str(bits)) for name, bits in summary["fractions"].items()),
        ]
    )
    return 0
