"""A seed's result on disk, and the checksums that say whether it still belongs to the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from nomatmul.finetune.data import Encoded


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """Scores of one seed after its last epoch, on each held-out file; the first one decides."""

    seed: int
    scores: dict[str, dict[str, float]]
    losses: list[float]  # mean training loss of each epoch
    history: list[dict[str, float]]  # scores of the first held-out file after each epoch
    seconds: float


def read_result(file: Path, described: dict[str, Any]) -> SeedResult:
    """Raises ValueError for a damaged file, or one with other settings."""
    try:
        values = json.loads(file.read_text("utf-8"))
        old = values.pop("settings")
        result = SeedResult(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): remove it to train this seed again"
        ) from None
    check_settings(file, old, described)
    return result


def check_settings(file: Path, old: dict[str, Any], described: dict[str, Any]) -> None:
    """Raises ValueError naming the first setting that is not what it was."""
    for name in {**described, **old}:
        if old.get(name) != described.get(name):
            raise ValueError(
                f"{file} was made with another {name} ({old.get(name)}, now "
                f"{described.get(name)}): "
                "choose another directory"
            )


def data_digest(data: dict[str, Encoded]) -> str:
    digest = hashlib.sha256()
    for name, part in data.items():
        digest.update(name.encode())
        digest.update(part.ids.cpu().numpy().tobytes())
        digest.update(part.labels.double().cpu().numpy().tobytes())
    return digest.hexdigest()
