"""The counters: what each cycle went to (registers.COUNTERS), 48 bits each in two halves.

Every cycle is counted once, by its first cause in the order below; so the causes add up to the
cycles.
"""

from amaranth import Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware import registers
from nomatmul.hardware.rtl.machine_state import Phase

HALF = registers.COUNTER_HALF


class Counters(wiring.Component):
    """What happens in a cycle: `phase` of the sequencer; `beat`: the array took weights;
    `logits`: a logit waits for the host; `starved`: a unit wants a memory word that is not there;
    and pulses. `values` are the halves, low before high.
    """

    phase: In(Phase)
    beat: In(1)
    logits: In(1)
    starved: In(1)
    retired: In(1)
    word: In(1)
    saturated: In(1)
    freeze: In(1)
    clear: In(1)
    values: Out(data.ArrayLayout(HALF, 2 * len(registers.COUNTERS)))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        events = {
            name: Signal(name=f"event_{name}", reset_less=True) for name in registers.COUNTERS
        }
        m.d.sync += [event.eq(0) for event in events.values()]
        rows = self.phase == Phase.ROWS
        with m.If(~self.freeze):
            m.d.sync += [
                events["cycles"].eq(1),
                events["instructions"].eq(self.retired),
                events["words"].eq(self.word),
                events["saturations"].eq(self.saturated),
            ]
            with m.If(self.beat):
                m.d.sync += events["beats"].eq(1)
            with m.Elif(rows & self.logits):
                m.d.sync += events["logits"].eq(1)
            with m.Elif(rows & self.starved):
                m.d.sync += events["memory"].eq(1)
            with m.Else():
                m.d.sync += [
                    events["array"].eq(rows),
                    events["vector"].eq(self.phase == Phase.VECTOR),
                    events["scalar"].eq(self.phase == Phase.SCALAR),
                    events["token"].eq(self.phase == Phase.TOKEN),
                    events["control"].eq(self.phase == Phase.CONTROL),
                ]
        clear = Signal(init=1)  # one register for all of them, of the host's word and of a reset
        m.d.sync += clear.eq(self.clear)
        for k, event in enumerate(events.values()):
            low = Signal(HALF, name=f"low{k}", reset_less=True)
            high = Signal(HALF, name=f"high{k}", reset_less=True)
            carry = Signal(name=f"carry{k}", reset_less=True)
            total = Signal(HALF + 1, name=f"total{k}")
            m.d.comb += total.eq(low + event)
            m.d.sync += [low.eq(total), carry.eq(total[HALF]), high.eq(high + carry)]
            with m.If(clear):
                m.d.sync += [low.eq(0), high.eq(0), carry.eq(0)]
            m.d.comb += [self.values[2 * k].eq(low), self.values[2 * k + 1].eq(high)]
        return m
