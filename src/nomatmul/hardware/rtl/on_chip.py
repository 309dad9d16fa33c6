"""A memory wholly on chip: block RAM that holds the image of a small model, one word a cycle.

It stands where a controller of external memory would stand. Words are read from the block RAM
into a short FIFO; a word is asked for only when the FIFO has room for it, so that the answer may
be held up and no ready of the reader reaches the block RAM.

Legend: M bits of a memory word; the memory has one word for each word of the image.
"""

from collections.abc import Sequence
from typing import Any

from amaranth import Cat, Module, Signal
from amaranth.lib import fifo, memory, wiring
from amaranth.lib.wiring import In

from nomatmul.hardware.rtl.ports import BURST_BITS, WORD_ADDRESS_BITS, MemoryPort

_FIFO_WORDS = 6  # two cycles of the memory, two of the FIFO, and slack for a word a cycle


class OnChipMemory(wiring.Component):
    """Answers a MemoryPort out of `words` (each below 2**memory_bits).

    An address behind the last word answers zeros with `error`. Raises ValueError for an empty
    image or a word that is too wide.
    """

    def __init__(self, memory_bits: int, words: Sequence[int]) -> None:
        if not words:
            raise ValueError("an on-chip memory needs at least one word")
        wide = next((k for k, word in enumerate(words) if not 0 <= word < 1 << memory_bits), None)
        if wide is not None:
            raise ValueError(f"word {wide} of the image does not fit {memory_bits} bits")
        self.memory_bits = memory_bits
        self.words = words
        super().__init__({"port": In(MemoryPort(memory_bits))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        depth = len(self.words)
        request, response = self.port.request, self.port.response
        m.submodules.memory = rom = memory.Memory(
            shape=self.memory_bits, depth=depth, init=self.words, attrs={"ram_style": "block"}
        )
        read = rom.read_port()
        m.submodules.answers = answers = fifo.SyncFIFOBuffered(
            width=self.memory_bits + 2, depth=_FIFO_WORDS
        )

        active = Signal()
        address = Signal(WORD_ADDRESS_BITS)
        left = Signal(BURST_BITS)  # words still to ask for, less one
        room = Signal(range(_FIFO_WORDS + 1), init=_FIFO_WORDS)
        ask = Signal()
        taken = Signal()
        m.d.comb += [
            request.ready.eq(~active),
            ask.eq(active & (room != 0)),
            taken.eq(answers.r_en & answers.r_rdy),
            read.addr.eq(address),
            read.en.eq(1),
        ]
        with m.If(request.valid & request.ready):
            m.d.sync += [
                active.eq(request.payload.length != 0),
                address.eq(request.payload.address),
                left.eq(request.payload.length - 1),
            ]
        with m.Elif(ask):
            m.d.sync += [address.eq(address + 1), left.eq(left - 1), active.eq(left != 0)]
        with m.If(ask & ~taken):
            m.d.sync += room.eq(room - 1)
        with m.Elif(~ask & taken):
            m.d.sync += room.eq(room + 1)

        # the block RAM's own register, then one more: its clock to output is slow
        asked = [Signal(3, name=f"asked_{k}") for k in range(2)]  # valid, error, last
        data = Signal(self.memory_bits, reset_less=True)
        m.d.sync += [
            asked[0].eq(Cat(ask, address >= depth, left == 0)),
            asked[1].eq(asked[0]),
            data.eq(read.data),
        ]
        valid, error, last = asked[1]
        word = Signal.like(data)
        with m.If(~error):
            m.d.comb += word.eq(data)
        m.d.comb += [
            answers.w_en.eq(valid),
            answers.w_data.eq(Cat(word, error, last)),
            response.valid.eq(answers.r_rdy),
            response.payload.as_value().eq(answers.r_data),
            answers.r_en.eq(response.ready),
        ]
        return m
