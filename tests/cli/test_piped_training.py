"""`train` from standard input and from /dev/fd/N, with a tokenizer given: no byte is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SMALL = ("warmup_steps=0", "batch_size=1", "micro_batch_size=1", "sequence_length=64",
         "eval_tokens=64", "sample_tokens=1")  # fmt: skip


@pytest.mark.train
@pytest.mark.parametrize("name", ["-", "/dev/fd/0"])
def test_train_reads_all_of_a_pipe(tmp_path: Path, warm_python: str, name: str) -> None:
    from nomatmul.train.documents import find_sources
    from nomatmul.train.shards import read_index
    from nomatmul.train.tokenizer import train_tokenizer

    text, tokenizer = tmp_path / "t.txt", tmp_path / "tokenizer.json"
    text.write_text("".join(f"Rope {i} holds the gull's mast.\n" for i in range(2500)))
    train_tokenizer(find_sources([str(text)]), 300).save(str(tokenizer))
    done = subprocess.run(
        [warm_python, "-m", "nomatmul", "train", "cpu_minute", "--quiet", "--data", name,
         "--tokenizer", tokenizer, "--out", tmp_path / "run", "--steps", "1",
         *(word for option in SMALL for word in ("--set", option))],
        input=text.read_bytes(), capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [read_index(path.parent) for path in (tmp_path / "run").rglob("index.json")]
    assert [index["text_bytes"] for index in found] == [text.stat().st_size]
