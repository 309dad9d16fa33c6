"""The directory of a run: may this run live there, and run.json, which says what it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from nomatmul.formats.files.directory import remove_leftovers, write_json
from nomatmul.train.config import TrainConfig, differences
from nomatmul.train.prepare import Prepared
from nomatmul.train.start import Start
from nomatmul.train.teacher_files import TeacherFiles

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_out(
    out: Path,
    config: TrainConfig,
    resume: str,
    override: bool,
    start: Start | None = None,
    teacher: TeacherFiles | None = None,
) -> dict[str, str] | None:
    """Refuse a directory that is not ours, or holds a run with another config.

    Returns the checksums of the data that a run there must be continued with; None for any.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory")
    file = out / "run.json"
    if not file.exists():
        foreign = [p.name for p in out.iterdir() if p.name != "tokens"] if out.exists() else []
        if foreign:
            raise ValueError(
                f"{out} holds {foreign[0]!r} and is no training run: choose an empty directory"
            )
        return None
    if resume == "never":
        raise ValueError(f"{out} holds a training run: choose another directory or resume it")
    try:
        facts = json.loads(file.read_text("utf-8"))
        old, data = TrainConfig.from_dict(facts["config"]), facts.get("data")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or of another version: {error}") from None
    same_ids = dataclasses.replace(
        config.model, **{name: getattr(old.model, name) for name in _IDS}
    )
    found = differences(old, dataclasses.replace(config, model=same_ids))
    found += _other_model("start", facts.get("start"), start)
    found += _other_model("teacher", facts.get("teacher"), teacher)
    refuse_differences(out, found, override)
    return data if isinstance(data, dict) and not override else None


def _other_model(
    what: str, old: dict[str, str] | None, new: Start | TeacherFiles | None
) -> list[str]:
    """The difference, if any, between a model that a run had beside its own and the one now."""
    if (old or {}).get("sha256") == (None if new is None else new.sha256):
        return []
    was, now = (old or {}).get("path", "none"), "none" if new is None else new.path
    return [f"{what}: {was} -> {now}" if was != now else f"{what}: {now} has other weights now"]


def refuse_differences(out: Path, found: list[str], override: bool) -> None:
    """Raise ValueError for differences that were not asked for; the model's are never allowed."""
    fixed = [text for text in found if text.startswith("model.")]
    if fixed or (found and not override):
        hint = "" if fixed else " (--override-config continues with the new values)"
        raise ValueError(
            f"{out} holds a run with another config: {'; '.join(fixed or found)}{hint}"
        )


def write_run_file(
    out: Path,
    config: TrainConfig,
    prepared: Prepared,
    override: bool,
    ranks: int = 1,
    start: Start | None = None,
    teacher: TeacherFiles | None = None,
) -> None:
    """run.json: what this run is. On a resume the data must be what it was."""
    file = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    if file.exists():
        old = json.loads(file.read_text("utf-8"))
        if old.get("data") != prepared.sha256 and not override:
            raise ValueError(f"the data or the tokenizer of the run in {out} have changed")
    facts: dict[str, Any] = {
        "format": "nomatmul-run",
        "version": 1,
        "config": config.to_dict(),
        "data": prepared.sha256,
        "tokenizer_sha256": prepared.train.tokenizer_sha256,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }
    if start is not None:
        facts["start"] = start.facts()
    if teacher is not None:
        facts["teacher"] = teacher.facts()
    write_json(file, facts)
