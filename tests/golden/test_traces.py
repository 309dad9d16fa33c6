"""Today's code computes and writes what it did when the traces were recorded."""

from __future__ import annotations

import json

import golden_traces as g
import numpy as np
import pytest
from encoder_files import tolerance
from engine_models import rebuilt
from safetensors.numpy import load_file

import nomatmul

ISAS = g.isas()


@pytest.fixture(scope="module")
def expected():
    return load_file(g.TRACES / "traces.safetensors")


@pytest.fixture(scope="module")
def inputs():
    return load_file(g.TRACES / "inputs.safetensors")


@pytest.fixture(scope="module")
def hashes():
    return json.loads((g.TRACES / "hashes.json").read_text())


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory):
    made = {}

    def directory(case):
        if case not in made:
            made[case] = g.packed(case, tmp_path_factory.mktemp(case) / "packed")
        return made[case]

    return directory


def of(expected, case):
    return {k[len(case) + 1 :]: v for k, v in expected.items() if k.startswith(case + ".")}


@pytest.mark.parametrize("case", [*g.DECODER_CASES, *g.ENCODER_CASES])
def test_pack_writes_the_recorded_bytes(case, directory_of, hashes):
    assert g.payload_hashes(directory_of(case)) == hashes[case]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", g.DECODER_CASES)
def test_decoders_have_the_recorded_bits(case, isa, directory_of, expected, inputs):
    wanted = of(expected, case)
    for threads, step in ((1, 53), (2, 53), (3, 1), (2, 7)):
        lm = nomatmul.load(directory_of(case), threads=threads, isa=isa)
        found = g.run_decoder(lm, inputs["decoder_ids"], step)
        np.testing.assert_array_equal(found["logits"], wanted["logits"])
        np.testing.assert_array_equal(found["state"], wanted["state"])
    found = g.accumulators(lm, "layers.1.mixer.g_proj", inputs["q"])
    np.testing.assert_array_equal(found, wanted["acc"])
    if "walk.rows" in wanted:
        walked = g.walk(lm, 1, inputs["walk_x"])
        np.testing.assert_array_equal(walked["rows"], wanted["walk.rows"])
        np.testing.assert_array_equal(walked["logits"], wanted["walk.logits"])


@pytest.mark.parametrize("chunk", [1, 5, 16, 50])
def test_chunks_have_the_recorded_bits(chunk, directory_of, expected, inputs):
    for case in ("glu-1.6bit-bf16", "union-2bit-bf16"):
        lm = nomatmul.load(directory_of(case))
        found = g.run_decoder(rebuilt(lm, chunk=chunk), inputs["decoder_ids"], 53)
        for name in ("logits", "state"):
            np.testing.assert_array_equal(found[name], expected[f"{case}.{name}"])


@pytest.mark.parametrize("backend", [*ISAS, "numpy"])
@pytest.mark.parametrize("case", g.ENCODER_CASES)
def test_encoders_take_the_recorded_paths_and_come_close(
    case, backend, directory_of, expected, inputs
):
    ids, mask, wanted = inputs["encoder_ids"], inputs["encoder_mask"], of(expected, case)
    options = {"backend": "numpy"} if backend == "numpy" else {"isa": backend, "threads": 2}
    found = g.run_encoder(directory_of(case), ids, mask, **options)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        if name.startswith("path."):
            np.testing.assert_array_equal(found[name], values)
            continue
        # int8: a rounding that falls the other way moves one int8 value, 1/127 of the largest
        limit = 0.02 * np.abs(values).max() if "int8" in case else tolerance(values, 40)
        assert np.abs(found[name] - values).max() < limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", g.FFF_FORMS)
def test_layers_of_trees_have_the_recorded_bits(form, isa, expected, inputs):
    stored = {key[4:]: values for key, values in inputs.items() if key.startswith("fff.")}
    for threads in (1, 2):
        found = g.run_fff(form, stored, isa=isa, threads=threads)
        for name, values in of(expected, f"fff.{form}").items():
            np.testing.assert_array_equal(found[name], values)


def test_the_packaged_model_has_the_recorded_bits(hashes):
    assert g.box_hashes() == hashes["box"]


def test_packed_directories_of_version_1_still_load(expected, inputs):
    case = g.OLD_PACKED["packed-decoder-v1"]
    lm = nomatmul.load(g.TRACES / "packed-decoder-v1")
    found = g.run_decoder(lm, inputs["decoder_ids"], 53)
    np.testing.assert_array_equal(found["logits"], expected[f"{case}.logits"])

    case = g.OLD_PACKED["packed-encoder-v1"]
    found = g.run_encoder(
        g.TRACES / "packed-encoder-v1", inputs["encoder_ids"], inputs["encoder_mask"]
    )
    wanted = expected[f"{case}.logits"]
    assert np.abs(found["logits"] - wanted).max() < tolerance(wanted, 40)
    np.testing.assert_array_equal(found["path.1"], expected[f"{case}.path.1"])
