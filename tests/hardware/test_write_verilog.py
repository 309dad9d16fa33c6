"""What `nomatmul hardware verilog` writes: ports that constraints name, and nothing half."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hardware.models import trained_model

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.board.pll import dividers
from nomatmul.hardware.board.ulx3s import PINS
from nomatmul.hardware.board.write import BOARDS, write_verilog
from nomatmul.hardware.compile import compile_model
from nomatmul.hardware.design import Design

SMALL = Design(
    lanes=32, element_lanes=4, memory_bits=32, fifo_words=32, vector_words=64, parameter_words=64,
    state_words=64, activation_beats=2, program_words=16,
)  # fmt: skip
# constraints of the board's makers, some of them, by hand from the schematics of v3.0.8
KNOWN_SITES = {
    "clk_25mhz": "G2", "ftdi_rxd": "L4", "ftdi_txd": "M1", "led[0]": "B2", "led[7]": "H3",
    "sdram_clk": "F19", "sdram_a[10]": "N19", "sdram_ba[1]": "N20", "sdram_dqm[1]": "E20",
    "sdram_d[0]": "J16", "sdram_d[7]": "U20", "sdram_d[15]": "J17", "sdram_csn": "P20",
}  # fmt: skip


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("verilog")
    for board in BOARDS:
        summary = write_verilog(SMALL, at / board, board)
        assert summary["board"] == board
        assert summary["files"] == sorted(path.name for path in (at / board).iterdir())
    return {board: at / board for board in BOARDS}


def _ports(path: Path, module: str) -> dict[str, tuple[str, int]]:
    """{port: (direction, bits)} of a module."""
    text = path.read_text()
    body = text[re.search(rf"^module {module}\(", text, re.MULTILINE).start() :]  # type: ignore[union-attr]
    body = body[: body.index("endmodule")]
    found = {}
    for way, high, name in re.findall(
        r"^  (input|output|inout) (?:\[(\d+):0\] )?(\w+);", body, re.M
    ):
        found[name] = way, int(high or 0) + 1
    return found


def test_the_constraints_name_every_port_of_the_ulx3s_once(boards: dict[str, Path]) -> None:
    ports = _ports(boards["ulx3s"] / "ulx3s.v", "ulx3s")
    assert {name: bits for name, (_, bits) in ports.items()} == {
        name: len(sites) for name, sites in PINS.items()
    }
    assert ports["sdram_d"][0] == "inout"
    assert {name for name, (way, _) in ports.items() if way == "input"} == {
        "clk_25mhz", "ftdi_txd", "btn_pwr_n",
    }  # fmt: skip
    text = (boards["ulx3s"] / "ulx3s.lpf").read_text()
    sites = dict(re.findall(r'LOCATE COMP "([\w\[\]]+)" SITE "(\w+)";', text))
    assert len(sites) == sum(map(len, PINS.values())) == len(set(sites.values()))
    assert KNOWN_SITES.items() <= sites.items()
    assert re.findall(r'IOBUF PORT "([\w\[\]]+)"', text) == list(sites)


def test_the_axi_top_has_the_names_that_tools_group(boards: dict[str, Path]) -> None:
    ports = _ports(boards["axi"] / "axi_top.v", "axi_top")
    assert ports["m_axi_rdata"] == ("input", 32)
    assert ports["m_axi_arvalid"] == ports["s_axi_awready"] == ("output", 1)
    assert ports["m_axi_araddr"] == ("output", 64)
    assert {"aclk", "aresetn"} < ports.keys()
    assert not [name for name in ports if not re.match(r"aclk|aresetn|[ms]_axi_", name)]
    assert "EHXPLLL" not in (boards["axi"] / "axi_top.v").read_text()  # plain Verilog


def test_the_script_of_yosys_reads_what_lies_beside_it(boards: dict[str, Path]) -> None:
    lines = (boards["ulx3s"] / "ulx3s.ys").read_text().splitlines()
    assert lines[:2] == ["read_verilog ulx3s.v", "hierarchy -top ulx3s"]
    assert any("-json ulx3s.json" in line for line in lines)


def test_zeros_of_memories_are_left_out(boards: dict[str, Path]) -> None:
    text = (boards["core"] / "core.v").read_text()
    assert "initial begin" in text
    assert not re.search(r"^ +\S+\[\d+\] = \d+'(d0|h0+);", text, re.MULTILINE)


def test_every_board_says_how_to_build_and_for_which_design(boards: dict[str, Path]) -> None:
    for path in boards.values():
        assert Design(**json.loads((path / "design.json").read_text())) == SMALL
        text = (path / "README.md").read_text()
        assert "--lanes 32 --set element_lanes=4" in text
        assert "{" not in text


def test_what_exists_or_is_unknown_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="board 'de10' is not one of ulx3s, axi, core"):
        write_verilog(SMALL, tmp_path / "a", "de10")
    with pytest.raises(ValueError, match="exists"):
        write_verilog(SMALL, tmp_path, "axi")
    wide = Design(memory_bits=16, burst=1)
    with pytest.raises(ValueError, match="memory_bits is 16"):
        write_verilog(wide, tmp_path / "b", "axi")
    assert list(tmp_path.iterdir()) == []


def test_dividers_make_the_clock_or_say_that_they_cannot() -> None:
    found = dividers(25e6, 100e6)
    assert 25e6 / found.in_div * found.feedback == 100e6
    assert 400e6 <= 100e6 * found.out_div <= 800e6
    with pytest.raises(ValueError, match=r"101\.3 MHz"):
        dividers(25e6, 101.3e6)


def test_a_compiled_model_lies_on_chip(tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    packed = PackedReader(trained_model("glu"))
    design = dataclasses.replace(
        SMALL, vector_words=256, parameter_words=1024, state_words=256, activation_beats=16,
        program_words=256,
    )  # fmt: skip
    compile_model(packed, design, compiled)
    write_verilog(SMALL, tmp_path / "out", "core", compiled)
    text = (tmp_path / "out" / "on_chip.v").read_text()
    assert Design(**json.loads((tmp_path / "out" / "design.json").read_text())) == design
    assert _ports(tmp_path / "out" / "on_chip.v", "on_chip").keys() >= {"bus__adr", "bus__ack"}
    # every word of the image that is not zero stands in the memory
    image = (compiled / "image.bin").read_bytes()
    words = {k: image[4 * k : 4 * k + 4] for k in range(len(image) // 4)}
    expected = {
        (k, value) for k, word in words.items() if (value := int.from_bytes(word, "little"))
    }
    found = {(int(k), int(v)) for k, v in re.findall(r"memory\[(\d+)\] = 32'd(\d+);", text)}
    assert expected <= found
    with pytest.raises(ValueError, match="needs the board core, got axi"):
        write_verilog(SMALL, tmp_path / "other", "axi", compiled)
