"""Continue a prompt on the simulated accelerator: the design's own Verilog, cycle by cycle.

The model is compiled, the design is translated by Verilator (once a design: the result is kept in
the user's cache) and runs beside a model of its memory. Text comes as it is made; then cycles a
token, bytes fetched, how busy the array was and what it waited for. --check computes every value of
every instruction again, in numpy, and says that all are equal, or the first that differs. Sampling
is done outside the accelerator, as a host would; --temperature 0 takes the accelerator's own
choice. Needs the extra `hardware`, perl, g++ and make.

Memory: --board is a class of boards, or --latency and --bytes-a-cycle say it themselves. --stalls
SEED makes memory and host pause at random: the text must not change, and does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nomatmul.cli.hardware_options import (
    DesignOptions,
    board_option,
    design_of,
    note,
    open_packed,
    packed_option,
)
from nomatmul.cli.options import json_option, option
from nomatmul.cli.sampling import before_numpy, checked_text
from nomatmul.cli.show import print_json, print_table
from nomatmul.cli.signals import clean_up_when_terminated

if TYPE_CHECKING:
    from nomatmul.hardware.simulate import Report

EXAMPLES = """
examples:
  nomatmul hardware simulate --prompt "The river"            the model in the box
  nomatmul hardware simulate --prompt "The river" --max-tokens 8 --check
  nomatmul hardware simulate my-packed --prompt "Once" --lanes 128 --bytes-a-cycle 2 --latency 20
  nomatmul hardware simulate --prompt "The river" --max-tokens 2 --plot busy.png --vcd waves.vcd
  nomatmul hardware simulate --prompt "The river" --max-tokens 4 --board ddr3-x16
  nomatmul hardware simulate --prompt "The river" --stalls 7 --json
"""


@dataclass(frozen=True, kw_only=True)
class Options(DesignOptions):
    packed: str | None = packed_option()
    prompt: str = option(metavar="TEXT", help="the text to continue")
    max_tokens: int = option(32, metavar="N", help="stop after so many tokens")
    temperature: float = option(0.0, metavar="T", help="0 takes the most likely token")
    top_k: int = option(0, metavar="K", help="sample among the K most likely tokens (0: all)")
    seed: int | None = option(None, metavar="S", help="makes sampling repeatable")
    check: bool = option(False, help="compare every instruction with the integer oracle")
    board: str | None = board_option()
    latency: int = option(30, metavar="CYCLES", help="from a request to its first word")
    bytes_a_cycle: float = option(
        0.0, metavar="B", help="bandwidth of the memory (0: a whole word each cycle)"
    )
    stalls: int | None = option(
        None, metavar="SEED", help="let memory and host pause at random, drawn from this seed"
    )
    threads: int = option(1, metavar="N", help="threads of the simulation")
    plot: str | None = option(
        None, metavar="FILE", help="draw how busy the array was over time (needs matplotlib)"
    )
    vcd: str | None = option(None, metavar="FILE", help="write all signals' waveform, slow and big")
    fst: str | None = option(
        None, metavar="FILE", help="the same, compressed (needs zlib1g-dev, liblz4-dev)"
    )
    json: bool = json_option()


def run(options: Options) -> int:
    before_numpy()
    from nomatmul.engine.language_text import LanguageText
    from nomatmul.engine.sampling import Sampling
    from nomatmul.hardware.simulate import Memory, Simulation, Waves

    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens is {options.max_tokens}, it must be 1 or more")
    clean_up_when_terminated()
    memory = Memory(options.latency, _bytes_a_cycle(options), stalls=options.stalls)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, seed=options.seed)
    reader = open_packed(options.packed)
    design = design_of(options, reader, probe=options.check)
    text = LanguageText(reader.tokenizer_path, reader.config)
    text.need_tokenizer()
    text.prompt_ids(checked_text(options.prompt), fresh=True)  # before minutes of a build
    simulation = Simulation(
        reader,
        design,
        memory,
        check=options.check,
        plot=None if options.plot is None else Path(options.plot),
        waves=Waves.of(options.vcd, options.fst),
        threads=options.threads,
        note=note,
    )
    with simulation:
        pieces = []
        for piece in simulation.write(options.prompt, options.max_tokens, sampling):
            pieces.append(piece)
            if not options.json:
                print(piece, end="", flush=True)
        report = simulation.report()
    if options.json:
        print_json({"prompt": options.prompt, "text": "".join(pieces), **report.to_dict()})
    else:
        print()
        _show(report)
    return 0 if report.equal else 1


def _bytes_a_cycle(options: Options) -> float:
    """The memory's bandwidth; 0 for a whole word each cycle."""
    if options.board is None:
        return options.bytes_a_cycle
    if options.bytes_a_cycle:
        raise ValueError("the bandwidth is given twice; give --board or --bytes-a-cycle")
    from nomatmul.hardware.boards import board

    kind = board(options.board)
    return kind.bandwidth / kind.clock


def _show(report: Report) -> None:
    print_table(report.rows())
