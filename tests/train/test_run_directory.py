"""What lies in a run's directory: permissions, and which weights are the run's newest."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from train_jobs import signal_when, start, tiny_config, train_here

from nomatmul.convert import pack
from nomatmul.formats.runs import find_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A finished run of 3 steps, made under a umask of 027."""
    old = os.umask(0o027)
    try:
        out = tmp_path_factory.mktemp("finished") / "run"
        train_here(tiny_config(steps=3, eval_interval=0, diagnostics_interval=0), text_file, out)
        pack(out, out.with_name("packed"), check=False)
    finally:
        os.umask(old)
    return out


def modes(directory: Path) -> set[tuple[bool, str]]:
    return {
        (path.is_dir(), oct(stat.S_IMODE(path.stat().st_mode)))
        for path in [directory, *directory.rglob("*")]
    }


def test_files_have_the_permissions_of_the_process(finished: Path) -> None:
    assert modes(finished) == {(True, "0o750"), (False, "0o640")}
    assert modes(finished.with_name("packed")) == {(True, "0o750"), (False, "0o640")}


def test_a_finished_run_that_is_continued_and_stopped_gives_its_newest_weights(
    finished: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert find_checkpoint(out) == out / "model"
    job = start(
        tiny_config(steps=20_000, eval_interval=0, diagnostics_interval=0), text_file, out,
        override_config=True,
    )  # fmt: skip
    newer = out / "checkpoints/step-00000009"
    assert signal_when(job, signal.SIGTERM, newer.exists) == 64
    with pytest.warns(UserWarning, match="taking its checkpoint step-0.*model is older"):
        found = find_checkpoint(out)
    assert found.name == (out / "checkpoints/latest").read_text()
    assert int(found.name.removeprefix("step-")) >= 9
