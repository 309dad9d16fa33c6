"""Designs: sizes that follow, and parameters that cannot be built are refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nomatmul.hardware.design import Design


def test_sizes_follow_from_the_parameters() -> None:
    design = Design()
    assert (design.beat_bits, design.memory_bytes, design.beats(1000)) == (512, 64, 4)
    assert Design(packing="1.6bit").beat_bits == 8 * 52
    assert design.words(513) == 2
    assert design.activation_groups == 64 * 256 // 8
    assert design.piece_words(8 * 648) == design.words(8 * 648) == 11
    # 648 bytes are 81 words of 64 bits, and the loader takes two at once
    assert Design(memory_bits=64).piece_words(8 * 648) == 82


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lanes": 48}, "lanes is 48, not a multiple of 32"),
        ({"lanes": 4096}, "lanes is 4096, not a whole number in 32..2048"),
        ({"memory_bits": 48}, "memory_bits is 48, not a power of two"),
        ({"vector_bits": 40}, "vector_bits is 40"),
        ({"vector_bits": True}, "vector_bits is True"),
        ({"state_fraction": 11}, r"vector_fraction is 12, more than state_fraction \(11\)"),
        ({"vector_fraction": 6, "table_bits": 10}, "table_bits is 10, more than vector_fraction"),
        ({"fifo_words": 16}, r"twice the burst is 32, more than fifo_words \(16\)"),
        ({"combine_lanes": 512}, r"combine_lanes is 512, more than lanes \(256\)"),
        ({"packing": "3bit"}, "packing is '3bit', not one of 2bit, 1.6bit"),
        ({"trees": 1}, "trees is 1, not true or false"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Design(**values)  # type: ignore[arg-type]  # wrong on purpose


def test_without_amaranth_the_instruction_set_works_and_the_design_says_what_to_install() -> None:
    code = """
import sys
sys.modules["amaranth"] = None
from nomatmul.hardware import design, disassemble, isa
try:
    import nomatmul.hardware.rtl
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("The accelerator's design needs amaranth")
    assert done.stdout.endswith('pip install "nomatmul[hardware]"\n')
