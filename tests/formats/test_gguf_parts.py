"""A model in several GGUF files is that of one; parts that do not belong together are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import finish
from gguf_models import sizes, write_gguf

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.directory import model_bytes
from nomatmul.formats.files.gguf_names import part_names
from nomatmul.formats.published.gguf import open_gguf

FIRST, SECOND, THIRD = (f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3))


def write_parts(directory: Path) -> dict[str, np.ndarray]:
    """Three parts, as llama.cpp's converter writes them, and the same model in one file."""
    directory.mkdir(exist_ok=True)
    options = {"kind": "TQ2_0", "keys": sizes}
    write_gguf(directory / "whole", "llama", np.random.default_rng(0), **options)
    rng = np.random.default_rng(0)
    return write_gguf(directory / "m.gguf", "llama", rng, part_tensors=9, **options)


def test_any_part_and_the_directory_open_all(tmp_path: Path) -> None:
    wanted = write_parts(tmp_path / "parts")
    whole = (tmp_path / "parts/whole").rename(tmp_path / "whole")
    values, _ = open_gguf(whole)
    for path in (FIRST, SECOND, THIRD):
        found, source = open_gguf(tmp_path / "parts" / path)
        assert found == values
        for name, value in wanted.items():
            np.testing.assert_array_equal(source.read(name), value, name)
    one, parts = open_checkpoint(whole), open_checkpoint(tmp_path / "parts")
    assert (parts.config, parts.directory.name) == (one.config, FIRST)
    assert parts.names() == one.names()
    for name in one.names():
        np.testing.assert_array_equal(parts.read(name), one.read(name), name)
        assert (parts.quantised(name) is None) == (one.quantised(name) is None)
    assert model_bytes(tmp_path / "parts" / SECOND) > whole.stat().st_size


def test_the_first_part_may_hold_no_tensor(tmp_path: Path) -> None:
    """As llama-gguf-split --no-tensor-first-split writes it."""
    writer = gguf.GGUFWriter(
        tmp_path / "m.gguf", "llama", split_max_tensors=99, small_first_shard=True
    )
    sizes(writer)
    writer.add_tensor("token_embd.weight", np.zeros((40, 256), np.float32))
    finish(writer)
    with pytest.raises(FormatError, match=r"of-00002\.gguf lacks the tensor 'output_norm\.weight'"):
        open_gguf(tmp_path / "m-00002-of-00002.gguf")


def test_missing_and_foreign_parts_are_refused_by_name(tmp_path: Path) -> None:
    write_parts(tmp_path)
    refused = [
        (lambda: (tmp_path / SECOND).unlink(), f"one of 3 parts; its directory lacks {SECOND}"),
        (lambda: copy(FIRST, SECOND), rf"{SECOND}: split\.no is 0; beside the other .* must be 1"),
        (lambda: write_other(tmp_path, 5), rf"{SECOND}: split\.count is 5; .* must be 3"),
        (
            lambda: write_other(tmp_path, 3, extra=True),
            rf"{SECOND}: general\.name is not what {FIRST}",
        ),
        (
            lambda: write_other(tmp_path, 3, count=9),
            rf"{SECOND}: split\.tensors\.count is 9; .* be 21",
        ),
        (
            lambda: write_other(tmp_path, 3, name="output_norm.weight"),
            f"{SECOND} has the tensor '.*', as",
        ),
        (
            lambda: write_other(tmp_path, 3),
            r"the parts hold 13 tensors; split\.tensors\.count is 21",
        ),
        (lambda: (tmp_path / SECOND).write_bytes(b""), f"{SECOND} is no GGUF file: it is empty"),
    ]

    def copy(source: str, target: str) -> None:
        shutil.copyfile(tmp_path / source, tmp_path / target)

    for spoil, message in refused:
        spoil()
        with pytest.raises(FormatError, match=message) as caught:
            open_gguf(tmp_path / THIRD)
        assert len(str(caught.value).splitlines()) == 1
    renamed = (tmp_path / FIRST).rename(tmp_path / "m.gguf")
    with pytest.raises(
        FormatError, match=r"m\.gguf is one of 3 parts .*: their names must be NAME-"
    ):
        open_gguf(renamed)


def write_other(
    directory: Path, parts: int, extra: bool = False, count: int = 21, name: str = "x.weight"
) -> None:
    """A second part of another model."""
    writer = gguf.GGUFWriter(directory / SECOND, "llama")
    writer.kv_data[0].clear()
    writer.add_key_value("split.no", 1, gguf.GGUFValueType.UINT16)
    writer.add_key_value("split.count", parts, gguf.GGUFValueType.UINT16)
    writer.add_key_value("split.tensors.count", count, gguf.GGUFValueType.INT32)
    if extra:
        writer.add_name("other")
    writer.add_tensor(name, np.zeros((1, 32), np.float32))
    finish(writer)


def test_names_of_parts() -> None:
    assert part_names("q/m-00002-of-00002.gguf") == [
        f"q/m-0000{part}-of-00002.gguf" for part in (1, 2)
    ]
    for name in ("m.gguf", "m-00003-of-00002.gguf", "m-2-of-2.gguf", "m-00001-of-00002.bin"):
        assert part_names(name) == []
