"""Changing packed directories: damaged ones, and those of version 1."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def to_version_1(directory: Path) -> None:
    """Turn a directory of version 2 into what the first writers left."""
    values = json.loads((directory / "config.json").read_text())
    forms, head, model = values["forms"], values.get("head"), values["model"]
    if head is None:
        old = {"format": "nomatmul-packed", "format_version": 1, "packing": forms["ternary"]}
        old["embedding"] = forms["embedding"]
    else:
        order = ("rows", "dense", "embedding")
        old = {"format": "nomatmul-packed-encoder", "format_version": 1}
        old |= {"forms": {kind: forms.get(kind, "f32") for kind in order}, "head": head}
    text = json.dumps({**old, "model": model}, indent=2) + "\n"
    (directory / "config.json").write_text(text)
    sign_config(directory)


def sign_config(directory: Path) -> None:
    """Make the checksum of config.json right."""
    digest = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    edit_header(directory, lambda h: h["__metadata__"].update(config_sha256=digest))


def edit_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the safetensors header after `change(header)`; the data stays."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
