"""A comparison goes on with its own data only; others are refused before tokens are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_jobs import make_text, tiny_config

from nomatmul.evaluate.compare import CompareOptions, prepare_data


def test_other_data_is_refused_before_tokens_are_replaced(tmp_path: Path) -> None:
    names = ("a", "b", "valid")
    for seed, name in enumerate(names):
        (tmp_path / f"{name}.txt").write_text(make_text(900, seed))
    a, b, valid = (str(tmp_path / f"{name}.txt") for name in names)

    def prepare(data: str, held_out: str = valid) -> None:
        out = tmp_path / "out"
        prepare_data(CompareOptions(tiny_config(), (data,), out, 100, (held_out,)), lambda _: None)

    prepare(b)
    prepare(a)  # no run has ended yet
    (tmp_path / "out/rows.jsonl").touch()
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.bin")}
    assert len(files) == 2
    for arguments in ((b,), (a, b)):
        with pytest.raises(ValueError, match=r"the data or the tokenizer of the run in .* changed"):
            prepare(*arguments)
        assert {path: path.read_bytes() for path in files} == files
    prepare(a)
