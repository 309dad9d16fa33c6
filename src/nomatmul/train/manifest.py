"""Sizes and checksums of the files of a checkpoint: manifest.json, written last, checked first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nomatmul.formats.files.directory import write_json

_FILE = "manifest.json"


def describe_files(directory: Path, part: int = 0, parts: int = 1) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 by name; of many processes each takes its part of the files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of([path]),
        }
        for path in files[part::parts]
    }


def write_manifest(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write manifest.json; files: {name: size and checksum}, of all of them."""
    write_json(directory / _FILE, {"files": {name: files[name] for name in sorted(files)}})


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is as it was written."""
    try:
        manifest = json.loads((path / _FILE).read_text("utf-8"))
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {facts['bytes']} were written"
            if sha256_of([file]) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_FILE}: {error}"
    return None


def sha256_of(files: Iterable[Path]) -> str:
    """One checksum of the contents of all files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def model_sha256(directory: Path) -> str:
    """One checksum of a model's weights and config; directory: or the GGUF file that has both."""
    if directory.is_file():
        return sha256_of([directory])
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin")
    return sha256_of(sorted(file for pattern in patterns for file in directory.glob(pattern)))
