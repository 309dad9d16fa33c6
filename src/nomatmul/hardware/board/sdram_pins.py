"""The sides of an SDRAM controller: the chip's pins and commands, the host's requests."""

from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.board.sdram_chip import SdramChip

HOST_ADDRESS_BITS = 28  # of 32-bit words


class Command(enum.Enum, shape=3):
    """{we, cas, ras} as the chip sees them, active high here."""

    NOP = 0b000
    ACTIVATE = 0b001
    READ = 0b010
    REFRESH = 0b011
    WRITE = 0b110
    PRECHARGE = 0b101
    LOAD_MODE = 0b111


class HostRequest(data.Struct):
    address: HOST_ADDRESS_BITS
    write: 1
    data: 32


class SdramPins(wiring.Signature):
    """A chip's pins seen from the controller, all active high; `dq_oe` drives the data."""

    def __init__(self, chip: SdramChip) -> None:
        super().__init__(
            {
                "cke": Out(1),
                "cs": Out(1),
                "command": Out(Command),
                "a": Out(chip.row_bits),
                "ba": Out(chip.bank_bits),
                "dqm": Out(chip.data_bits // 8),
                "dq_o": Out(chip.data_bits),
                "dq_oe": Out(1),
                "dq_i": In(chip.data_bits),
            }
        )
