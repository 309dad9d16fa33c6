"""Packed directories of models on the Hugging Face Hub, kept in a cache: packed once, then loaded.

$NOMATMUL_CACHE/packed/OWNER--NAME[--FILE]@COMMIT, by default in ~/.cache/nomatmul.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.hub import download
from nomatmul.formats.hub_files import HubName, Snapshot, cache_directory


def packed_directory(text: str) -> Path:
    """The packed directory of `hf:owner/name[/file.gguf][@revision]`.

    A repository that holds a packed model is used as it is; any other is packed into the cache, by
    one process at a time. Raises as `formats.hub.download` and `convert.pack`.
    """
    name = HubName.parse(text)
    snapshot = download(name)
    config = snapshot.path / "config.json"
    if snapshot.path.is_dir() and "format" in read_json_object(config):
        return snapshot.path
    words = name.repository if name.file is None else f"{name.repository}/{name.file}"
    target = cache_directory() / "packed" / f"{words.replace('/', '--')}@{snapshot.commit}"
    if not target.exists():
        _pack_once(name, snapshot, target)
    return target


def _pack_once(name: HubName, snapshot: Snapshot, target: Path) -> None:
    from filelock import FileLock, Timeout

    from nomatmul.convert.packing import pack
    from nomatmul.convert.progress import line

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"nomatmul: {name}: waiting for another process that packs it", file=sys.stderr)
        lock.acquire()
    try:
        if target.exists():
            return
        for left in target.parent.glob(f".{target.name}.part-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        print(f"nomatmul: {name}: packing it into {target}", file=sys.stderr)
        pack(
            snapshot.path,
            target,
            check=False,
            progress=line("packing") if sys.stderr.isatty() else None,
        )
    finally:
        lock.release()
