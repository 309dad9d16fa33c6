"""Directories of version 1 and what today's packer makes of the same checkpoints."""

from __future__ import annotations

import json

import golden_traces as g
import pytest
from packed_files import to_version_1

from nomatmul.formats.files.safetensors import SafetensorsFile
from nomatmul.formats.packed import PackedReader


@pytest.mark.parametrize("old", g.OLD_PACKED)
def test_the_payload_is_that_of_version_1(old, tmp_path):
    new = g.packed(g.OLD_PACKED[old], tmp_path / "packed")
    assert json.loads((new / "config.json").read_text())["format_version"] == 2
    files = [SafetensorsFile(d / "model.safetensors") for d in (g.TRACES / old, new)]
    assert set(files[0].infos) == set(files[1].infos)
    for name in files[0].infos:
        assert files[0].info(name).dtype == files[1].info(name).dtype
        assert files[0].read(name).tobytes() == files[1].read(name).tobytes(), name


@pytest.mark.parametrize("old", g.OLD_PACKED)
def test_version_1_says_what_version_2_says(old, tmp_path):
    new = g.packed(g.OLD_PACKED[old], tmp_path / "packed")
    readers = [PackedReader(g.TRACES / old), PackedReader(new)]
    assert readers[0].config == readers[1].config
    assert readers[0].forms == readers[1].forms
    assert readers[0].reading == readers[1].reading
    for reader in readers:
        reader.verify_all()


@pytest.mark.parametrize("old", g.OLD_PACKED)
def test_the_damage_tests_make_the_version_1_that_was_written(old, tmp_path):
    new = g.packed(g.OLD_PACKED[old], tmp_path / "packed")
    to_version_1(new)
    assert (new / "config.json").read_bytes() == (g.TRACES / old / "config.json").read_bytes()
    PackedReader(new).verify_all()
