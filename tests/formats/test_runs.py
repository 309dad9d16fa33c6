"""The newest weights of a run are taken, whatever the run is."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from nomatmul.formats.errors import FormatError
from nomatmul.formats.runs import MODEL_STEP_FILE, find_checkpoint


def weights(directory: Path, at: int, **files: dict) -> Path:
    """A model's files, written at second `at`."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    os.utime(directory / "model.safetensors", (at, at))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def found(path: Path) -> tuple[Path, str]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        directory = find_checkpoint(path)
    return directory, " ".join(str(warning.message) for warning in warned)


def test_a_run_without_a_finished_model_gives_its_latest_checkpoint(tmp_path: Path) -> None:
    step = weights(tmp_path / "checkpoints/step-00000030", 5)
    assert found(tmp_path) == (
        step, f"{tmp_path}: taking its checkpoint step-00000030; the run has not finished"
    )  # fmt: skip


@pytest.mark.parametrize(("at", "step", "newer"), [(1, 40, True), (9, 30, False), (9, 20, False)])
def test_the_later_step_wins_whatever_the_times(
    tmp_path: Path, at: int, step: int, newer: bool
) -> None:
    model = weights(tmp_path / "model", 5, **{MODEL_STEP_FILE.removesuffix(".json"): {"step": 30}})
    later = weights(tmp_path / f"checkpoints/step-{step:08d}", at, state={"step": step})
    directory, warned = found(tmp_path)
    assert directory == (later if newer else model)
    assert (f"step-{step:08d}" in warned and str(model) in warned) == newer
    assert bool(warned) == newer


@pytest.mark.parametrize(("at", "newer"), [(9, True), (5, False), (1, False)])
def test_without_a_recorded_step_the_time_tells(tmp_path: Path, at: int, newer: bool) -> None:
    model = weights(tmp_path / "model", 5)
    later = weights(tmp_path / "checkpoints/step-00000040", at, state={"step": 40})
    assert found(tmp_path)[0] == (later if newer else model)


def test_a_fine_tuning_gives_the_model_of_its_task(tmp_path: Path) -> None:
    model = weights(tmp_path / "letters/model", 5)
    assert found(tmp_path) == (model, "")
    assert found(tmp_path / "letters") == (model, "")
    weights(tmp_path / "notes/model", 5)
    with pytest.raises(FormatError, match=r"several tasks \(letters, notes\): give .*letters$"):
        find_checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(FormatError, match=r"no config.json, no checkpoints/, no task whose"):
        find_checkpoint(tmp_path)


def test_a_gguf_file_beside_its_config(tmp_path: Path) -> None:
    """Repositories of GGUF files often carry the config of the model that they were made of."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_checkpoint(tmp_path) == tmp_path / "m.gguf"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_checkpoint(tmp_path) == tmp_path


def test_parts_of_one_gguf_file_are_no_choice(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    assert find_checkpoint(tmp_path).name == "m-00001-of-00002.gguf"
    for other in ("other.gguf", "n-00001-of-00002.gguf"):
        (tmp_path / other).write_bytes(b"GGUF")
        with pytest.raises(FormatError, match="holds several GGUF files"):
            find_checkpoint(tmp_path)
        (tmp_path / other).unlink()


def test_a_model_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    first, second = (weights(cache / "snapshots" / name, 5) for name in ("a1", "b2"))
    with pytest.raises(FormatError, match=r"several snapshots \(a1, b2\): give one of them"):
        find_checkpoint(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b2")
    assert find_checkpoint(cache) == second
    assert find_checkpoint(first) == first


def test_a_file_of_a_model_leads_to_its_directory(tmp_path: Path) -> None:
    model = weights(tmp_path / "model", 5)
    with pytest.raises(FormatError, match=f"is a file; .*config.json: give {model}$"):
        find_checkpoint(model / "model.safetensors")
    (tmp_path / "notes.txt").write_text("otter")
    with pytest.raises(FormatError, match=r"notes\.txt is a file; a model is a .*config\.json$"):
        find_checkpoint(tmp_path / "notes.txt")


def test_a_gguf_file_by_any_name(tmp_path: Path) -> None:
    """A cache keeps it under its digest; elsewhere it may end in .GGUF."""
    for name in ("0" * 64, "MODEL.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
        assert find_checkpoint(tmp_path / name) == tmp_path / name


def test_what_looks_like_a_name_on_the_hub_is_advised_as_one() -> None:
    with pytest.raises(FormatError, match=r"^no/such does not exist; a model of .* is hf:no/such$"):
        find_checkpoint(Path("no/such"))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="holds an adapter, no model: merge it"):
        find_checkpoint(tmp_path)
