"""The encoder engine against the oracle and the authors' recorded outputs.

The tolerance (encoder_files.py) holds where no decision of a tree falls the other way, which the
tests of paths show.
"""

from __future__ import annotations

import crammed
import numpy as np
import pytest
from encoder_files import DIALS, encoder_config, tolerance, write_encoder
from safetensors.numpy import load_file

import nomatmul
from nomatmul import _native
from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.reference.model import ReferenceModel
from nomatmul.reference.weights import FloatWeights

BACKENDS = [*_native.kernels.isas(), "numpy"]


def load(path, backend, **options):
    if backend == "numpy":
        return nomatmul.load(path, backend="numpy", **options)
    return nomatmul.load(path, isa=backend, **options)


@pytest.fixture(scope="module")
def golden(crammed_tiny):
    return crammed_tiny, load_file(crammed_tiny / "golden.safetensors")


@pytest.fixture(scope="module")
def golden_packed(golden, tmp_path_factory):
    target = tmp_path_factory.mktemp("golden") / "packed"
    pack(golden[0], target, check=False)
    return target


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_logits_and_paths(golden, golden_packed, backend, masked):
    recorded = golden[1]
    model = load(golden_packed, backend, threads=2)
    mask = recorded["attention_mask"] if masked else None
    expected = recorded["logits" if masked else "logits_nomask"]
    found = model.logits(recorded["input_ids"], mask)
    assert np.abs(found - expected).max() < tolerance(expected, 64)
    if masked:  # the recorded paths are of the masked run, and in order of positions first
        batch, length = recorded["input_ids"].shape
        for layer, rows in model.paths(recorded["input_ids"], mask).items():
            path = recorded[f"path.{layer}"].reshape(length, batch, 1, 5).swapaxes(0, 1)
            np.testing.assert_array_equal(rows, path)


def test_oracle_has_the_recorded_outputs(golden):
    directory, recorded = golden
    oracle = ReferenceModel.load(directory)
    for mask, name in ((recorded["attention_mask"], "logits"), (None, "logits_nomask")):
        found = oracle.forward(recorded["input_ids"], mask).logits_BTV
        assert np.abs(found - recorded[name]).max() < tolerance(recorded[name], 64)


@pytest.mark.parametrize("variant", crammed.VARIANTS)
def test_published_variants_compute_the_authors_formulas(variant, tmp_path):
    values = crammed.config(crammed.VARIANTS[variant])
    stored = crammed.tensors(values)
    pack(crammed.write(tmp_path / "source", values, stored), tmp_path / "packed", check=False)
    ids = np.random.default_rng(7).integers(0, 48, (3, 11))
    expected = crammed.logits(values, stored, ids, None)
    for backend in BACKENDS:
        found = load(tmp_path / "packed", backend).logits(ids)
        assert np.abs(found - expected).max() < tolerance(expected, 16)


@pytest.mark.parametrize("dials", DIALS)
def test_every_dial_against_the_oracle(dials, tmp_path):
    config = encoder_config(**DIALS[dials])
    write_encoder(tmp_path / "source", config)
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    oracle = ReferenceModel.load(tmp_path / "source")
    ids = np.random.default_rng(1).integers(0, 32, (3, 13))
    mask = np.ones((3, 13), int)
    mask[0, 9:] = 0
    mask[1, [0, 4]] = 0
    for backend in BACKENDS:
        model = load(tmp_path / "packed", backend)
        for seen in (mask, None):
            expected = oracle.forward(ids, seen)
            paths = model.paths(ids, seen)
            assert paths.keys() == expected.paths.keys()
            for layer, rows in paths.items():
                np.testing.assert_array_equal(
                    rows.reshape(39, *rows.shape[2:]), expected.paths[layer]
                )
            wanted = expected.logits_BTV
            assert np.abs(model.logits(ids, seen) - wanted).max() < tolerance(wanted, 40)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_other_forms_compute_with_what_they_store(form, tmp_path):
    """The engine on bfloat16 is the oracle on rounded weights; int8 agrees with numpy's steps."""
    config = encoder_config(**DIALS["trees"])
    write_encoder(tmp_path / "source", config)
    result = pack(tmp_path / "source", tmp_path / "packed", rows=form, dense=form, embedding=form)
    assert result.check.logit_error < 0.2
    ids = np.random.default_rng(2).integers(0, 32, (2, 11))
    logits = [load(tmp_path / "packed", backend).logits(ids) for backend in BACKENDS]
    # int8: a rounding that falls the other way moves one int8 value, 1/127 of the largest
    limit = tolerance(logits[0], 40) if form == "bf16" else 0.02 * np.abs(logits[0]).max()
    for other in logits[1:]:
        assert np.abs(other - logits[0]).max() < limit
    if form == "bf16":
        from nomatmul.formats.quantise import from_bfloat16, to_bfloat16

        checkpoint = open_checkpoint(tmp_path / "source")

        def rounded(name):
            values = checkpoint.read(name)
            matrix = values.ndim == 2
            return from_bfloat16(to_bfloat16(values)) if matrix else values

        wanted = ReferenceModel(config, FloatWeights(rounded)).forward(ids).logits_BTV
        assert np.abs(logits[0] - wanted).max() < limit


@pytest.mark.parametrize("dense", ["f32", "int8"])
@pytest.mark.parametrize("isa", _native.kernels.isas())
def test_threads_and_company_do_not_change_a_bit(golden, tmp_path, isa, dense):
    pack(golden[0], tmp_path / "packed", dense=dense, check=False)
    ids = golden[1]["input_ids"]
    one, two = (nomatmul.load(tmp_path / "packed", threads=t, isa=isa) for t in (1, 5))
    together = one.hidden(ids)
    np.testing.assert_array_equal(two.hidden(ids), together)
    for row in range(len(ids)):
        np.testing.assert_array_equal(one.hidden(ids[row])[0], together[row])


def test_padding_is_not_seen(golden, golden_packed):
    ids = np.array(golden[1]["input_ids"][:1])
    model = nomatmul.load(golden_packed)
    mask = np.ones_like(ids)
    mask[0, 25:] = 0
    other = ids.copy()
    other[0, 25:] = 7
    a, b = (model.hidden(x, mask)[0, :25] for x in (ids, other))
    np.testing.assert_array_equal(a, b)
    alone = model.hidden(ids[:, :25])[0]  # whose sums have fewer terms, none of them a zero
    np.testing.assert_allclose(a, alone, atol=tolerance(alone, 64))


def test_long_batches_are_cut_into_passes(golden_packed, monkeypatch):
    from nomatmul.engine import encoder_passes

    model = nomatmul.load(golden_packed)
    ids = np.random.default_rng(3).integers(0, 512, (5, 12))
    whole = model.hidden(ids)
    monkeypatch.setattr(encoder_passes, "PASS_TOKENS", 25)
    np.testing.assert_array_equal(model.hidden(ids), whole)
    rows = model.paths(ids)
    assert {layer: path.shape for layer, path in rows.items()} == {
        0: (5, 12, 1, 5),
        1: (5, 12, 1, 5),
    }


def test_info_says_what_it_is(golden_packed):
    info = nomatmul.load(golden_packed, threads=1).info()
    assert info["kind"] == "encoder"
    assert info["task"] == "masked"
    assert info["fff"] == {"trees": 1, "depth": 4}
    assert info["forms"] == {"rows": "f32", "dense": "f32", "embedding": "f32"}
    assert info["threads"] == 1
    report = nomatmul.footprint(golden_packed)
    assert report["trees"] == 2 * (31 * 2 * 64 + 31) * 4
    assert report["weights"] == sum(report[k] for k in ("trees", "dense", "norms", "embedding"))


def test_profile_covers_the_parts(golden_packed):
    parts = nomatmul.load(golden_packed).profile(np.zeros((1, 8), int))
    assert set(parts) == {
        *("embedding", "norms", "projections", "attention core", "channel mixer"),
        "vocabulary head",
    }
