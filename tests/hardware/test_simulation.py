"""The whole design in Verilator against the integer oracle, with stalls, faults and resets."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nomatmul.engine.sampling import Sampling
from nomatmul.hardware import isa, tools
from nomatmul.hardware.compile import compile_model, formats_of, open_compiled
from nomatmul.hardware.compile.files import write_program
from nomatmul.hardware.simulate import Memory, Simulation, Stopped, Waves, build
from nomatmul.hardware.simulate.compare import Comparison
from nomatmul.hardware.simulate.events import Kind, read_events
from nomatmul.hardware.simulate.harness import (
    ALL_LOGITS,
    LARGEST_LOGIT,
    NO_LOGITS,
    Harness,
    status_flags,
)
from nomatmul.reference.integer.model import IntegerModel

pytestmark = pytest.mark.usefixtures("simulated")


def _ids(reader, count, seed=0):
    return np.random.default_rng(seed).integers(0, reader.config.vocab_size, count).tolist()


@pytest.mark.parametrize(
    ("name", "tokens", "memory"),
    [
        ("trained-glu", 64, Memory()),
        ("trained-trees", 64, Memory(latency=3)),
        ("glu", 5, Memory(stalls=1)),
        ("glu-unbounded", 5, Memory(stalls=2, latency=0)),
        ("glu-1.6bit", 5, Memory(bytes_a_cycle=1.5, latency=90, gap=5)),
        ("trees-3x3", 5, Memory(stalls=3)),
        ("trees-5x0", 5, Memory(refresh_every=100, refresh_cycles=20)),
        ("trees-1x5", 5, Memory(outstanding=1)),
        ("trees-7x2", 5, Memory(stalls=4, bytes_a_cycle=3)),
        ("trees-2x1-wide", 5, Memory(stalls=5)),
    ],
)
def test_every_instruction_is_the_oracles(reader_of, design, name, tokens, memory):
    reader = reader_of(name)
    with Simulation(reader, design, memory, check=True) as simulation:
        for number, token in enumerate(_ids(reader, tokens)):
            simulation.token(token, (LARGEST_LOGIT, ALL_LOGITS, NO_LOGITS)[number % 3])
    report = simulation.report()
    assert report.difference is None
    assert report.instructions >= tokens * 80
    assert report.to_dict()["faults"] == []


def test_logits_and_the_largest_reach_the_host(reader_of, design):
    reader = reader_of("glu")
    model = IntegerModel.from_packed(reader, formats_of(design))
    state = model.new_state()
    with Simulation(reader, design) as simulation:
        for token in _ids(reader, 3):
            expected = model.step(token, state)
            answer = simulation.token(token, ALL_LOGITS)
            assert answer["logits"] == expected.tolist()
            assert answer["argmax"] == int(expected.argmax())
            assert answer["argmax_value"] == int(expected.max())


@pytest.mark.parametrize("rate", [1.5, 3, 5.5])
def test_the_memorys_bandwidth_is_what_it_says(reader_of, design, rate):
    reader = reader_of("glu")
    with Simulation(reader, design, Memory(bytes_a_cycle=rate)) as simulation:
        simulation.token(1, LARGEST_LOGIT)
    report = simulation.report()
    least = report.words * design.memory_bytes / rate
    fast = 13_900  # about what the token takes where memory is no limit
    assert least <= report.cycles * 1.01
    assert report.cycles <= max(fast, least + 0.4 * fast)


def test_text_is_the_oracles(reader_of, design):
    reader = reader_of("trained-glu")
    with Simulation(reader, design) as simulation:
        text = "".join(simulation.write("the model", 24, Sampling()))
    model = IntegerModel.from_packed(reader, formats_of(design))
    ids, state = simulation.prompt_ids("the model"), model.new_state()
    for token in ids:
        logits = model.step(token, state)
    for _ in range(24):
        ids.append(int(logits.argmax()))
        logits = model.step(ids[-1], state)
    whole = simulation.tokenizer.decode(ids)
    assert text
    assert whole.endswith(text)
    report = simulation.report()
    assert report.tokens == 24
    assert report.to_dict()["bytes"] > 0


def test_a_seed_repeats_a_text(reader_of, design):
    texts = []
    for seed in (1, 1, 2):
        with Simulation(reader_of("trained-glu"), design) as simulation:
            sampling = Sampling(temperature=1.0, seed=seed)
            texts.append("".join(simulation.write("the", 12, sampling)))
    assert texts[0] == texts[1] != texts[2]


# -- faults ---------------------------------------------------------------------------------------


def _run(simulation, ids):
    return [simulation.token(token, LARGEST_LOGIT) for token in ids]


@pytest.mark.parametrize(
    ("fault", "flag"), [("--bad-code", "illegal_code"), ("--error", "memory_error")]
)
def test_a_fault_of_memory_is_flagged(reader_of, design, fault, flag):
    reader = reader_of("glu")
    compiled_rows = 400  # words into the first token: rows of the first product
    with Simulation(reader, design, faults=[fault, str(compiled_rows)]) as simulation:
        answers = _run(simulation, _ids(reader, 2))
    assert flag in status_flags(answers[0]["status"])
    with Simulation(reader, design) as simulation:
        assert status_flags(_run(simulation, _ids(reader, 2))[1]["status"]) == []


@pytest.mark.parametrize("cycle", [1000, 5555, 9000, 17000])
def test_a_reset_in_the_middle_begins_anew(reader_of, design, cycle):
    reader = reader_of("glu")
    ids = _ids(reader, 2)
    with Simulation(reader, design) as simulation:
        expected = [answer["argmax_value"] for answer in _run(simulation, ids)]
    with Simulation(reader, design, faults=["--reset", str(cycle)], check=True) as simulation:
        answers = _run(simulation, ids)
        lost = [answer.get("reset") for answer in answers]
        assert any(lost) == (cycle > 1000)  # before, the program is being loaded
        if any(lost):
            simulation.restart()
            answers = _run(simulation, ids)
    assert [answer["argmax_value"] for answer in answers] == expected
    assert simulation.report().difference is None


def _patched(reader, design, tmp_path, change):
    """A compiled model whose program `change` has changed, whatever the checker would say."""
    compile_model(reader, design, tmp_path / "compiled")
    compiled = open_compiled(tmp_path / "compiled")
    program = list(compiled.program)
    change(program)
    write_program(compiled.directory, program)
    return dataclasses.replace(compiled, program=tuple(program))


def _first(program, kind):
    return next(n for n, i in enumerate(program) if isinstance(i, kind))


def _behind_memory(program):
    at = _first(program, isa.Stream)
    program[at] = dataclasses.replace(program[at], address=1 << 30)


def _behind_the_vector(program):
    at = _first(program, isa.Scan)
    program[at] = dataclasses.replace(program[at], src=4096)


def _short_stream(program):
    at = _first(program, isa.Stream)
    program[at] = dataclasses.replace(program[at], words=8)


def test_an_address_out_of_range_is_flagged(reader_of, design, tmp_path):
    compiled = _patched(reader_of("glu"), design, tmp_path, _behind_memory)
    with Harness(build.simulator(design), compiled, Memory()) as harness:
        answer = harness.token(1, LARGEST_LOGIT, fresh=True)
    assert "memory_error" in status_flags(answer["status"])


def test_a_bad_instruction_stops_with_its_name(reader_of, design, tmp_path):
    compiled = _patched(reader_of("glu"), design, tmp_path, _behind_the_vector)
    with (
        Harness(build.simulator(design), compiled, Memory()) as harness,
        pytest.raises(Stopped, match=r"halted; instruction \d+ \(SCAN .*bad_instruction"),
    ):
        harness.token(1, LARGEST_LOGIT, fresh=True)


def test_a_program_that_hangs_stops_at_the_limit(reader_of, design, tmp_path):
    compiled = _patched(reader_of("glu"), design, tmp_path, _short_stream)
    with (
        Harness(build.simulator(design), compiled, Memory(), ["--limit", "20000"]) as harness,
        pytest.raises(Stopped, match=r"more cycles than the limit; instruction .*LOADP"),
    ):
        harness.token(1, LARGEST_LOGIT, fresh=True)


_ORPHAN = """
import sys
from pathlib import Path
from nomatmul.hardware.compile import open_compiled
from nomatmul.hardware.simulate.harness import Harness, Memory
harness = Harness(Path(sys.argv[1]), open_compiled(sys.argv[2]), Memory())
print(harness.pid, flush=True)
harness.token(1, 1, fresh=True)
"""


def test_a_simulation_ends_with_its_parent(reader_of, design, tmp_path):
    def endless(program):
        program[0] = isa.Jump(0)

    compiled = _patched(reader_of("glu"), design, tmp_path, endless)
    words = [sys.executable, "-c", _ORPHAN, str(build.simulator(design)), str(compiled.directory)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    for _ in range(400):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            break
        if state == "Z":  # whoever adopted it has not looked yet
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"process {child} still runs")


@pytest.mark.slow  # a build of its own, in `make hardware`
@pytest.mark.parametrize(("kind", "start"), [("vcd", b"$"), ("fst", b"\0")])
def test_a_waveform_is_written(reader_of, design, tmp_path, kind, start):
    if kind == "fst":
        try:
            for header in build.FST_HEADERS:
                tools.require_header(*header, "FST")
        except ValueError as error:
            pytest.skip(str(error))
    path = tmp_path / f"waves.{kind}"
    with Simulation(reader_of("glu"), design, waves=Waves(kind, path)) as simulation:
        simulation.token(1)
    assert path.read_bytes().startswith(start)


def test_a_token_outside_the_vocabulary_stops(reader_of, design):
    with (
        Simulation(reader_of("glu"), design) as simulation,
        pytest.raises(Stopped, match="not in the vocabulary"),
    ):
        simulation.token(61)


@pytest.mark.parametrize(
    "words", [["--latency", "x"], ["--what", "1"], ["--limit"], ["--refresh-every", "3"]]
)
def test_the_harness_refuses_what_it_does_not_know(reader_of, design, tmp_path, words, capfd):
    compile_model(reader_of("glu"), design, tmp_path / "out")
    options = [*words, *(["--refresh-cycles", "3"] if "--refresh-every" in words else [])]
    compiled = open_compiled(tmp_path / "out")
    with (
        Harness(build.simulator(design), compiled, Memory(), options) as harness,
        pytest.raises(RuntimeError, match="ended with status 2"),
    ):
        harness.token(0, NO_LOGITS, fresh=True)
    assert capfd.readouterr().err.startswith("harness: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency": -1}, "latency is -1"),
        ({"bytes_a_cycle": -0.5}, "bytes_a_cycle is -0.5"),
        ({"outstanding": 0}, "outstanding is 0"),
        ({"refresh_every": 5, "refresh_cycles": 5}, "would rest all the time"),
        ({"stalls": 1 << 32}, "stalls is"),
    ],
)
def test_impossible_memories_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Memory(**values)


# -- the comparison itself ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(reader_of, design, simulations, tmp_path_factory):
    """The events of one token, and what they are compared with."""
    reader, out = reader_of("trees-3x3"), tmp_path_factory.mktemp("logged")
    compile_model(reader, design, out / "compiled")
    compiled = open_compiled(out / "compiled")
    model = IntegerModel.from_packed(reader, formats_of(design))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOMATMUL_CACHE", str(simulations))
        program = build.simulator(design)
    with Harness(program, compiled, Memory(), ["--events", str(out / "events")]) as harness:
        harness.token(5, LARGEST_LOGIT, fresh=True)
        events = read_events(out / "events", design)
    return SimpleNamespace(compiled=compiled, model=model, events=events)


def _compared(logged, events, token=5):
    return Comparison(logged.compiled, logged.model).token(events, token, wanted=True, fresh=True)


def test_equal_events_are_equal(logged):
    assert _compared(logged, logged.events) is None


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.RETIRED])
@pytest.mark.parametrize("how", ["changed", "left out", "twice", "elsewhere"])
def test_a_difference_of_any_kind_is_found(logged, kind, how):
    events = logged.events.copy()
    found = np.flatnonzero(events["kind"] == kind)
    at = found[len(found) // 2]
    if how == "changed":
        field = "data" if kind in (Kind.ACTIVATION, Kind.PARAMETER) else "value"
        events[field][at] ^= 1
    elif how == "left out":
        events = np.delete(events, at)
    elif how == "twice":
        events = np.insert(events, at, events[at])
    elif kind == Kind.LOGIT:
        events = np.concatenate([events[:at], events[at + 1 :]])
    else:
        events["address"][at] ^= 1
    difference = _compared(logged, events)
    assert difference is not None
    assert difference.token == 0
    assert str(difference).startswith(f"token 0, instruction {difference.instruction} (")


@pytest.mark.parametrize("how", ["left out", "twice", "another"])
def test_another_path_is_found(logged, how):
    events = logged.events.copy()
    at = np.flatnonzero(events["kind"] == Kind.RETIRED)[40]
    if how == "left out":
        events = np.delete(events, at)
    elif how == "twice":
        events = np.insert(events, at, events[at])
    else:
        events["address"][at] += 1
    assert _compared(logged, events) is not None


def test_another_token_is_a_difference(logged):
    difference = _compared(logged, logged.events, token=6)
    assert difference.name == "embed"
    assert "EMBED" in difference.text
