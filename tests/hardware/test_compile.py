"""Compiling: what lies in the image, a program that the checker accepts, faults that it finds."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hardware.conftest import SMALL
from hardware.models import RANDOM
from random_packed import family, write_random

from nomatmul.formats.packed import PackedReader
from nomatmul.formats.packing import unpack_ternary
from nomatmul.hardware import isa
from nomatmul.hardware.compile import compile_model, formats_of, listing, open_compiled
from nomatmul.hardware.compile.check import Memory, check_program
from nomatmul.hardware.design import Design
from nomatmul.hardware.disassemble import assemble
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.trace import Trace


def _compiled(reader, out, **values):
    design = Design(**{**SMALL, "trees": True, **values})
    compile_model(reader, design, out)
    return open_compiled(out)


@pytest.fixture(scope="module")
def glu(reader_of, tmp_path_factory):
    return _compiled(reader_of("glu"), tmp_path_factory.mktemp("glu") / "compiled")


@pytest.fixture(scope="module")
def trees(reader_of, tmp_path_factory):
    return _compiled(reader_of("trees-3x3"), tmp_path_factory.mktemp("trees") / "compiled")


def _region(compiled, name):
    region = next(r for r in compiled.regions if r.name == name)
    width = compiled.design.memory_bytes
    data = np.frombuffer(compiled.image_path.read_bytes(), np.uint8)
    return data[region.address * width : (region.address + region.words) * width]


def _rows(data, rows, inputs, design):
    """int8 [rows, inputs] out of beats, by the packing's own reader."""
    beats = design.beats(inputs)
    size = design.beat_bits // 8
    packed = data[: rows * beats * size].reshape(rows * beats, size)
    form = design.packing
    lanes = size * (4 if form == "2bit" else 5)
    whole = np.full((len(packed), 32), 0x55 if form == "2bit" else 0x80, np.uint8)
    whole[:, :size] = packed
    values = unpack_ternary(whole, lanes, form)[:, : design.lanes]
    return values.reshape(rows, beats * design.lanes)[:, :inputs]


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
@pytest.mark.parametrize("name", sorted(RANDOM))
def test_every_model_compiles_and_its_trace_is_covered(reader_of, tmp_path, name, packing):
    reader = reader_of(name)
    compiled = _compiled(reader, tmp_path / "out", packing=packing)
    model = IntegerModel.from_packed(reader, formats_of(compiled.design))
    trace = Trace()
    model.step(0, model.new_state(), trace)
    named = [value for values in compiled.values for value in values]
    seen = [n for n in trace.names if not n.endswith((".sums", ".rows", "argmax"))]
    assert list(dict.fromkeys(named)) == seen  # in the order of execution, none left out


@pytest.mark.parametrize("packing", ["2bit", "1.6bit"])
def test_rows_lie_interleaved_in_the_order_of_slots(reader_of, tmp_path, packing):
    reader = reader_of("glu")
    compiled = _compiled(reader, tmp_path / "out", packing=packing)
    names = [f"layers.1.mixer.{gate}_proj" for gate in "fig"]
    matrices = [reader.ternary(name)[0] for name in names]
    rows, inputs = matrices[0].shape
    data = _region(compiled, "layers.1.mixer.rows")
    found = _rows(data, 3 * rows, inputs, compiled.design)
    for slot, matrix in enumerate(matrices):
        np.testing.assert_array_equal(found[slot::3], matrix)


def test_embedding_records_hold_scale_and_values(reader_of, glu):
    reader = reader_of("glu")
    values, scale = reader.matrix("embedding")
    records = _region(glu, "embedding").reshape(len(values), -1)
    m, e = records[:, :8].copy().view("<i4").T
    np.testing.assert_array_equal(np.ldexp(m.astype(np.float64), e), scale.reshape(-1))
    np.testing.assert_array_equal(records[:, 8 : 8 + values.shape[1]].view(np.int8), values)


def test_embedding_records_are_whole_pieces_of_what_the_loader_takes(reader_of, tmp_path):
    """Words narrower than a piece: the loader would wait for a word that no record has."""
    compiled = _compiled(reader_of("glu"), tmp_path / "out", memory_bits=16, element_lanes=16)
    design = compiled.design
    embed = next(i for i in compiled.program if isinstance(i, isa.Embed))
    assert (8 * (8 + embed.rows)) % design.piece_bits, "the test's model shows nothing"
    assert embed.words * design.memory_bits % design.piece_bits == 0
    assert embed.stride == embed.words
    region = next(r for r in compiled.regions if r.name == "embedding")
    assert region.words == embed.words * compiled.vocabulary
    short = dataclasses.replace(embed, words=embed.words - 1)
    program = [short if i is embed else i for i in compiled.program]
    memory = Memory(compiled.regions, region.address + region.words, compiled.vocabulary)
    with pytest.raises(ValueError, match="do not hold"):
        check_program(program, design, memory)


def test_streams_take_the_body_and_then_the_head(glu):
    streams = [i for i in glu.program if isinstance(i, isa.Stream)]
    bodies = [r for r in glu.regions if r.kind in ("parameters", "rows")]
    assert [s.address for s in streams] == [0, streams[0].words]
    assert sum(s.words for s in streams) == sum(r.words for r in bodies)
    assert glu.summary["bytes_a_token"] > glu.summary["head_bytes"] > 0


def test_a_listing_can_be_assembled_again(glu):
    lines = listing(glu.directory)
    assert tuple(assemble(line["text"]) for line in lines) == glu.program
    assert [tuple(line["values"]) for line in lines] == list(glu.values)
    alone = listing(glu.program_path)
    assert [line["text"] for line in alone] == [line["text"] for line in lines]


def _first(program, kind, nth=0):
    return [n for n, i in enumerate(program) if isinstance(i, kind)][nth]


# What is planted in a sound program: (kind of the instruction, which of them, changed fields or
# None to leave it out, what the checker says).
FAULTS = [
    (isa.Loadp, 0, {"dst": 1020}, "reaches behind"),
    (isa.Loadp, 0, {"count": 4}, "the stream brings"),
    (isa.Loadp, 1, None, "the stream brings"),
    (isa.Scan, 0, {"src": 512}, "nothing wrote it"),
    (isa.Scan, 0, {"w": 900}, "nothing wrote it"),
    (isa.Sumsq, 0, {"sa": 31}, "scalar 31 is read"),
    (isa.Smul, 0, {"sb": 30}, "scalar 30 is read"),
    (isa.Sdiv, 0, {"sb": 29}, "scalar 29 is read"),
    (isa.Quant, 2, None, "activation beat"),
    (isa.Quant, 0, {"dst": 15}, "reaches behind"),
    (isa.Product, 0, {"rows": 213}, "the stream brings"),
    (isa.Product, 0, {"dst": 1000}, "reaches behind"),
    (isa.Product, 0, {"aux": 1000}, "reaches behind"),
    (isa.Product, 1, {"aux": 900}, "nothing wrote it"),
    (isa.Product, -1, None, "nothing took them"),
    (isa.Stream, 0, None, "nothing streams"),
    (isa.Stream, 0, {"address": 1}, "the stream brings"),
    (isa.Stream, 1, {"words": 1 << 20}, "the image has"),
    (isa.Stream, 0, {"words": 100000}, "the image has"),
    (isa.Embed, 0, {"words": 2}, "do not hold"),
    (isa.Embed, 0, {"base": 1 << 20}, "the image has"),
    (isa.Embed, 0, {"stride": 1}, "the next one begins"),
    (isa.Jump, 0, {"target": 60000}, "behind its end"),
    (isa.Token, 0, None, "without a TOKEN"),
]


@pytest.mark.parametrize(("kind", "nth", "changes", "message"), FAULTS)
def test_planted_faults_are_found(glu, kind, nth, changes, message):
    program = list(glu.program)
    at = _first(program, kind, nth)
    if changes is None:
        # one that does nothing, so that jumps lead where they did
        program[at] = isa.Sconst(28, 1 << 23, 0)
    else:
        program[at] = dataclasses.replace(program[at], **changes)
    words = sum(r.words for r in glu.regions)
    memory = Memory(glu.regions, words, glu.vocabulary)
    check_program(glu.program, glu.design, memory)
    with pytest.raises(ValueError, match=message):
        check_program(program, glu.design, memory)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (isa.Walk, {"stride": 9}, "its stride is 9"),
        (isa.Walk, {"trees": 7}, "the image has"),
        (isa.Walk, {"trees": 20}, "tree_rows is 32"),
        (isa.Combine, {"stride": 9}, "its stride is 9"),
        (isa.Combine, {"count": 33}, "tree_rows is 32"),
        (isa.Combine, {"aux": 900}, "nothing wrote it"),
    ],
)
def test_planted_faults_of_trees_are_found(trees, kind, changes, message):
    program = list(trees.program)
    at = _first(program, kind, -1)
    program[at] = dataclasses.replace(program[at], **changes)
    words = sum(r.words for r in trees.regions)
    with pytest.raises(ValueError, match=message):
        check_program(program, trees.design, Memory(trees.regions, words, trees.vocabulary))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vector_words": 128}, "the design's vector_words is 128"),
        ({"parameter_words": 128}, "the design's parameter_words is 128"),
        ({"state_words": 64}, "the design's state_words is 64"),
        ({"activation_beats": 4}, "the design's activation_beats is 4"),
        ({"program_words": 128}, "the design's program_words is 128"),
        ({"vector_bits": 16, "vector_fraction": 11}, "vector_bits=.* would do"),
        ({"sum_bits": 12}, "sum_bits=.* would do"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(reader_of, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        compile_model(reader_of("glu"), Design(**{**SMALL, **values}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_trees_need_a_design_with_their_unit(reader_of, tmp_path):
    with pytest.raises(ValueError, match=r"layers.0.channel has trees.*trees is false"):
        compile_model(reader_of("trees-3x3"), Design(**SMALL), tmp_path / "out")


def test_the_boards_memory_is_a_limit(reader_of, tmp_path):
    reader, design = reader_of("glu"), Design(**SMALL)
    need = compile_model(reader, design, tmp_path / "fits")["image_bytes"]
    compile_model(reader, design, tmp_path / "just", memory_bytes=need)
    with pytest.raises(ValueError, match=f"needs {need} bytes.*has {need - 1}"):
        compile_model(reader, design, tmp_path / "not", memory_bytes=need - 1)
    assert not (tmp_path / "not").exists()


def test_a_model_with_attention_is_refused(tmp_path):
    write_random(tmp_path / "packed", *family("bitnet"))
    with pytest.raises(ValueError, match="the accelerator has no"):
        compile_model(PackedReader(tmp_path / "packed"), Design(**SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_left_alone(reader_of, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="mine exists"):
        compile_model(reader_of("glu"), Design(**SMALL), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "map.json").unlink(), "is no compiled model"),
        (lambda d: (d / "map.json").write_text("{"), "is no compiled model"),
        (lambda d: (d / "program.bin").write_bytes(b"x" * 17), "has 17 bytes"),
        (lambda d: (d / "program.bin").write_bytes(b"\xff" * 16), "instruction 0"),
        (lambda d: (d / "program.bin").write_bytes(bytes(16)), "1 instructions, and names of"),
        (lambda d: _change(d, format_version=2), "its format is"),
        (lambda d: _change(d, design={"lanes": 7}), "lanes is 7"),
    ],
)
def test_damaged_files_are_refused(reader_of, tmp_path, damage, message):
    out = _compiled(reader_of("glu"), tmp_path / "out").directory
    damage(out)
    with pytest.raises(ValueError, match=message):
        open_compiled(out)


def _change(directory, **values):
    path = directory / "map.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
