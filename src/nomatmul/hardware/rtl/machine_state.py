"""What the sequencer tells the host and the counters, and what the host gives it."""

# No `from __future__ import annotations`: data.Struct reads the shapes from the annotations.
from amaranth import unsigned
from amaranth.lib import data, enum

from nomatmul.hardware import registers


class Phase(enum.Enum, shape=3):
    """What the machine does, for the counters."""

    CONTROL = 0
    TOKEN = 1
    SCALAR = 2
    VECTOR = 3
    ROWS = 4


class TokenEntry(data.Struct):
    """A token of the host: its id, and what it asks for (registers.TokenFlag)."""

    id: unsigned(registers.TOKEN_BITS)
    argmax_only: unsigned(1)
    fresh: unsigned(1)
    want_logits: unsigned(1)


class Faults(data.Struct):
    """Pulses."""

    bad_instruction: unsigned(1)
    bad_token: unsigned(1)
    exponent: unsigned(1)
    watchdog: unsigned(1)
