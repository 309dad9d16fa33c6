"""The host's registers: addresses, bits and what they mean; read by the hardware, its drivers and
the documents.

Addresses count 32-bit words. Counters have 48 bits, low 24 bits first, each half a register.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum, IntFlag

from nomatmul.hardware.design import PACKINGS, Design

VERSION = 0x4E4D0001  # "NM", and the version of this table and of the instruction set
ADDRESS_BITS = 8
TOKEN_BITS = 20
TOKEN_QUEUE = 8
LOGIT_QUEUE = 512
COUNTER_HALF = 24  # bits: two halves make a counter
WATCHDOG_BITS = 20


class Register(IntEnum):
    """Word addresses. COUNTERS and DESIGN are the first of many."""

    VERSION = 0  # r: names this table and the instruction set
    CONTROL = 1  # rw: see Control
    STATUS = 2  # r: see Status; writing ones clears sticky flags
    TOKEN = 3  # w: the next token, see TokenFlag; the id in bits 0..19
    LOGIT = 4  # r: takes the next logit, sign-extended; 0 and a flag where none waits
    LOGITS_WAITING = 5  # r: logits that wait
    ARGMAX = 6  # r: the id of the largest logit of the last answer, the first of equals
    ARGMAX_VALUE = 7  # r: that logit
    ANSWERS = 8  # r: answers since reset: tokens whose logits are all done
    PROGRAM_ADDRESS = 9  # w: the instruction that PROGRAM_DATA writes next
    PROGRAM_DATA = 10  # w: 32 bits, low ones first; four make an instruction
    PC = 11  # r: the instruction that runs
    TOKENS = 12  # r: tokens taken since reset
    COUNTERS = 32  # r: pairs of a counter's low and high half, in the order of COUNTERS
    DESIGN = 64  # r: the design's parameters, in the order of `Design`


class Control(IntFlag):
    """Bits of CONTROL."""

    RUN = 1 << 0  # w: start at instruction 0; r: an instruction runs
    RESET = 1 << 1  # w: stop, drop tokens and logits that wait; keeps program and counters
    FREEZE = 1 << 2  # rw: counters stand still
    CLEAR = 1 << 3  # w: counters to 0


class Status(IntFlag):
    """Bits of STATUS: faults stay until they are cleared, states are as they are now."""

    ILLEGAL_CODE = 1 << 0  # a weight's code that means none; counted as 0
    MEMORY_ERROR = 1 << 1  # an address out of range, or a fault of the memory
    SATURATED = 1 << 2  # a number did not fit and was clamped
    BAD_INSTRUCTION = 1 << 3  # unknown, or a field beyond the design; halted
    EXPONENT = 1 << 4  # a scalar's exponent was clamped
    BAD_TOKEN = 1 << 5  # an id beyond the vocabulary, dropped
    TOKEN_LOST = 1 << 6  # written while there was no room, dropped
    LOGIT_UNDERRUN = 1 << 7  # read while none waited
    WATCHDOG = 1 << 8  # nothing moved for 2^20 cycles; halted
    HALTED = 1 << 16  # no instruction runs
    WAITING = 1 << 17  # for a token
    TOKEN_ROOM = 1 << 18  # the queue of tokens takes one more
    RESETTING = 1 << 19  # words of the memory are still due; RUN does nothing yet


FAULTS = 9  # of Status, the low bits


class TokenFlag(IntFlag):
    """Bits of TOKEN above the id."""

    ARGMAX_ONLY = 1 << 29  # logits are computed, but do not wait for the host
    FRESH = 1 << 30  # the state begins at zero
    WANT_LOGITS = 1 << 31  # else the head is skipped


# What each cycle went to; all but the first and the last three add up to the first.
COUNTERS = (
    "cycles",
    "beats",  # the array took a beat of weights
    "memory",  # it waited for weights
    "array",  # products and row units fill, drain, or hold up the weights
    "logits",  # the host did not take logits
    "vector",
    "scalar",
    "token",  # no token to work on
    "control",  # fetch, decode, dispatch; halted
    "instructions",  # retired
    "words",  # memory words that came
    "saturations",
)


def counter_address(name: str) -> int:
    """The register of the counter's low half; the high half is the next one."""
    return Register.COUNTERS + 2 * COUNTERS.index(name)


def design_words(design: Design) -> list[int]:
    """What the registers from DESIGN on read."""
    values = dataclasses.asdict(design)
    values["packing"] = PACKINGS.index(design.packing)
    return [int(value) for value in values.values()]
