"""Cycles, energy, resources and activity: what a report says, from parts that can be checked."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hardware.models import trained_model

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware import isa
from nomatmul.hardware.boards import BOARDS, board
from nomatmul.hardware.cycles import DISPATCH, PRODUCT_FILL, Cycles, token_cycles
from nomatmul.hardware.design import Design
from nomatmul.hardware.energy import Events, Picojoules, energy, sensitivity
from nomatmul.hardware.measured import PLACED, SWITCHING, activity, placed
from nomatmul.hardware.report import OTHERS, Workload, lines, on_board, report
from nomatmul.hardware.synthesis.activity import count_toggles
from nomatmul.hardware.synthesis.nextpnr import critical_lines, how_far, read_report
from nomatmul.hardware.synthesis.resources import resources

DESIGN = Design(lanes=32, memory_bits=64, fifo_words=64, burst=16)


def _products(count: int, rows: int, beats: int = 1) -> list[isa.Instruction]:
    words = count * rows * beats * DESIGN.beat_bits // 64
    product = isa.Product(rows=rows, beats=beats, slots=1, act=0, epilogue=0, m=0)
    return [isa.Stream(0, words), *[product] * count]


def test_a_fast_memory_leaves_the_array_as_the_limit() -> None:
    found = token_cycles(_products(4, 1000), DESIGN, 1.0)
    assert found.beats == 4000
    assert found.cycles == 4000 + 4 * PRODUCT_FILL + 5 * DISPATCH
    assert found.waiting == 0
    assert found.words == 4000


def test_a_slow_memory_sets_the_pace_and_fills_the_fifo_meanwhile() -> None:
    found = token_cycles(_products(4, 1000), DESIGN, 0.25)
    assert found.cycles == pytest.approx(4000 / 0.25, rel=0.01)
    assert found.waiting == pytest.approx(found.cycles - 4000, rel=0.02)
    # a pause in which no weights are taken costs nothing until the FIFO is full
    stream, *products = _products(2, 1000)
    wide = dataclasses.replace(DESIGN, element_lanes=4)
    straight = token_cycles([stream, *products], DESIGN, 0.25).cycles
    for elements, cost in ((800, 0), (3200, 3200 // 4 - 64 / 0.25)):
        pause = isa.Scan(sd=0, src=0, count=elements)
        paused = token_cycles([stream, products[0], pause, products[1]], wide, 0.25).cycles
        assert paused - straight == pytest.approx(cost, abs=40)


def test_energy_is_the_sum_of_its_parts_and_its_sensitivity_is_right() -> None:
    events = Events(1e6, 2e6, 3e4, 4e3, 5e5, 1e-3)
    cost = Picojoules(1, 0.5, 10, 5, 100)
    found = energy(events, cost, 2.0, 0.5)
    assert dataclasses.astuple(found) == pytest.approx(
        (0.5e-6, 0.5e-6, 0.15e-6, 0.01e-6, 50e-6, 2e-3)
    )
    swings = sensitivity(events, cost, 2.0, 0.5)
    assert set(swings) == {*dataclasses.asdict(cost), "static"}
    assert swings["static"][0] == pytest.approx(1 / (found.total - 1e-3))
    assert swings["memory"][1] == pytest.approx(1 / (found.total + 50e-6))
    assert all(half > 1 / found.total > twice for half, twice in swings.values())


def test_a_report_says_what_fits_and_what_each_figure_is() -> None:
    found = report(PackedReader(trained_model("glu")), DESIGN)
    assert [row["board"] for row in found["boards"]] == list(BOARDS)
    for row in found["boards"]:
        assert row["fits"]
        assert row["cycles_kind"] == "computed"
        assert sum(row["joules_by_part"].values()) == pytest.approx(row["joules_a_token"])
        assert row["tokens_per_joule"] * row["watts"] == pytest.approx(row["tokens_per_second"])
    slow, fast = found["boards"][0], found["boards"][1]
    assert slow["cycles"] > fast["cycles"]
    text = "\n".join(lines(found))
    for other in OTHERS:
        assert other.name in text
        assert other.kind in text
    assert "estimate" in text
    (only,) = report(PackedReader(trained_model("glu")), DESIGN, "hbm2")["boards"]
    assert only["board"] == "hbm2"


def test_simulated_cycles_take_the_place_of_computed_ones() -> None:
    workload = Workload.of(PackedReader(trained_model("glu")), DESIGN)
    row = on_board(workload, DESIGN, board("ddr3-x16"), Cycles(1e5, 5e4, 100, 4e4))
    assert row["cycles_kind"] == "simulated"
    assert row["tokens_per_second"] == pytest.approx(1000)
    assert row["bytes_a_token"] == 4e4 * 8


def test_layers_repeat_in_a_workload() -> None:
    workload = Workload.of(PackedReader(trained_model("glu")), DESIGN)
    twice = workload.repeated(2, "twice", layer_bytes=100)
    once, both = (token_cycles(w.program, DESIGN, 1.0) for w in (workload, twice))
    assert once.cycles * 1.2 < both.cycles < once.cycles * 2
    assert twice.bytes == workload.bytes + 100


def test_an_unknown_board_class_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'ddr5' is not one of ulx3s, ddr3-x16, ddr4-x64, hbm2"):
        board("ddr5")


def test_sizes_between_the_placed_ones_are_interpolated_and_say_so() -> None:
    low, high = PLACED[0], PLACED[1]
    middle = placed((low.lanes + high.lanes) // 2)
    assert middle.luts == pytest.approx((low.luts + high.luts) / 2)
    assert "interpolated" in middle.kind
    assert placed(low.lanes) == low
    assert activity(SWITCHING[-1].lanes * 2).beat > SWITCHING[-1].beat


VCD = """
$timescale 1ns $end
$scope module top $end
 $var wire 1 ! clk $end
 $var wire 8 " data [7:0] $end
 $scope module unit $end
  $var wire 1 ! clk $end
  $var wire 8 " data_in [7:0] $end
  $var reg 4 # count [3:0] $end
  $var real 64 $ energy $end
 $upscope $end
$upscope $end
$enddefinitions $end
#0
0!
b0 "
bxxxx #
#1
1!
#2
0!
b11 "
b0001 #
#3
1!
b1 "
b1110 #
r1.5 $
#4
0!
b0 "
#5
1!
"""


def test_toggled_bits_are_counted_once_a_wire_and_by_module() -> None:
    found = count_toggles(VCD.splitlines())
    assert found.cycles == {"other": 3}
    assert found.toggles == {("other", ""): 2 + 1 + 1, ("other", "unit"): 4}
    assert found.per_cycle() == pytest.approx(8 / 3)
    assert found.per_cycle("unit") == pytest.approx(4 / 3)
    part = count_toggles(VCD.splitlines(), begin=1, end=2)
    assert part.cycles == {"other": 1}
    assert part.toggles == {("other", ""): 1 + 1, ("other", "unit"): 4}


def test_cycles_belong_to_the_phase_that_is_on_in_them() -> None:
    text = VCD.replace("1 ! clk", "1 ! clk $end\n $var wire 1 % busy", 1).replace(
        "#3\n", "#3\n1%\n"
    )
    found = count_toggles(text.replace("#5\n", "#5\n0%\n").splitlines(), phases=["busy"])
    assert found.cycles == {"other": 2, "busy": 1}
    # busy itself rises in the cycle and falls in the next one
    assert found.per_cycle(phase="busy") == 2 + 4
    assert found.per_cycle(phase="other") == (2 + 1) / 2


@pytest.mark.parametrize(("text", "clock"), [("nothing", "clk"), (VCD, "clock")])
def test_what_is_no_dump_or_has_no_clock_is_refused(text: str, clock: str) -> None:
    with pytest.raises(ValueError, match="dump"):
        count_toggles(text.splitlines(), clock)


def test_cells_become_the_resources_that_people_compare() -> None:
    found = resources(
        {"LUT4": 10, "CCU2C": 3, "TRELLIS_DPR16X4": 1, "DP16KD": 2, "PFUMX": 5}, "ecp5"
    )
    assert (found.luts, found.block_rams, found.dsps) == (10 + 6 + 6, 2, 0)
    assert resources({"LUT6": 4, "RAMB18E1": 1, "FDRE": 9}, "xc7").block_rams == 0.5
    with pytest.raises(ValueError, match="ice40"):
        resources({}, "ice40")


SOURCES = ["/a/src/nomatmul/hardware/y.py:3"] * 2 + ["/share/lattice/arith.v:1"]
REPORT = {
    "fmax": {
        "slow": {"achieved": 90.0, "constraint": 25.0},
        "clk": {"achieved": 101.0, "constraint": 100.0},
        "io": {"achieved": 120.0, "constraint": 100.0},
    },
    "utilization": {
        "TRELLIS_COMB": {"used": 5, "available": 10},
        "GSR": {"used": 0, "available": 1},
    },
    "critical_paths": [
        {"from": "posedge clk", "to": "posedge clk", "path": [
            {"delay": 0.5, "type": "clk-to-q", "to": {"cell": "a"}},
            {"delay": 1.25, "type": "routing", "to": {"cell": "b"}, "sources": SOURCES},
        ]},
        {"from": "<async>", "to": "posedge clk", "path": [
            {"delay": 9.0, "type": "routing", "to": {"cell": "c"}},
        ]},
    ],
}  # fmt: skip


def test_a_report_of_nextpnr_gives_the_clock_that_was_asked_for_and_its_longest_path() -> None:
    found = read_report(REPORT, 3, 12.0)
    assert found.mhz == 101.0
    assert found.used == {"TRELLIS_COMB": (5, 10)}
    assert critical_lines(found) == ["  0.50 clk-to-q a", "  1.75 routing  b  hardware/y.py:3"]
    with pytest.raises(ValueError, match="no report"):
        read_report({"fmax": 1}, 1, 0.0)


def test_a_run_that_did_not_end_says_how_far_it_came() -> None:
    log = """Info: Max frequency for clock '$glbnet$clk': 75.41 MHz (FAIL at 100.00 MHz)
Info:     iter=1 wires=461846 overused=36042 overuse=45939 archfail=NA
Info:     iter=2 wires=479849 overused=2259 overuse=24865 archfail=NA
"""
    assert how_far(log) == (
        "; behind placement nextpnr estimates 75.41 MHz"
        "; 2,259 wires shared after iteration 2 of router2"
    )
    assert how_far(log[:80]) == "; behind placement nextpnr estimates 75.41 MHz"
    assert how_far("ERROR: out of memory") == ""


def test_figures_of_another_design_say_so_and_are_whole_numbers() -> None:
    reader = PackedReader(trained_model("glu"))
    plain = report(reader, Design(lanes=96))
    other = report(reader, Design(lanes=512, packing="1.6bit", element_lanes=16))
    assert plain["resources"]["of_another_design"] == {}
    assert plain["resources"]["fits"]
    assert not other["resources"]["fits"]
    assert other["resources"]["of_another_design"] == {"packing": "2bit", "element_lanes": 8}
    text = "\n".join(lines(other))
    assert "(more than the chip has)" in text
    assert "of a design with packing=2bit, element_lanes=8" in text
    head = lines(plain)[1]
    assert not re.search(r"\d\.\d", head), head
    assert "design with" not in "\n".join(lines(plain))
