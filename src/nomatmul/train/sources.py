"""What a source of text is: read off a file's contents before any of it is used.

kinds: "text", "jsonl" (an object a line), "json" (an array, or objects over several lines),
"parquet", "saved" (datasets.save_to_disk) or "hub".
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from nomatmul.formats.files.contents import PARQUET, check_text, json_layout
from nomatmul.formats.files.texts import read_head

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")


@dataclasses.dataclass(frozen=True)
class Source:
    """One input. path: as the user named it. drop_start: the line that matches document_start is
    no part of the document. copy: of a pipe, the temporary file with its bytes.
    """

    path: str
    kind: str
    text_field: str = "text"
    document_start: str | None = None
    drop_start: bool = False
    copy: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def file(self) -> str:
        """Where the bytes lie."""
        return self.path if self.copy is None else str(self.copy.name)

    def stamp(self) -> dict[str, Any]:
        """What tells cheaply that the source is unchanged: size and time of change of its files."""
        if self.kind == "hub":
            return {"path": self.path, "size": 0, "mtime_ns": 0}
        files = [Path(self.file)]
        if self.kind == "saved":
            files = sorted(path for path in Path(self.path).rglob("*") if path.is_file())
        stats = [path.stat() for path in files]
        return {
            "path": str(Path(self.path).resolve()) if self.copy is None else self.path,
            "size": sum(stat.st_size for stat in stats),
            "mtime_ns": max(stat.st_mtime_ns for stat in stats),
        }

    def settings(self) -> dict[str, Any]:
        """What changes the documents that are read from equal bytes."""
        return {
            "kind": self.kind,
            "text_field": self.text_field if self.kind != "text" else None,
            "document_start": self.document_start if self.kind == "text" else None,
        } | ({"drop_start": True} if self.drop_start and self.kind == "text" else {})

    def sha256(self) -> str:
        """SHA-256 of the file as it lies on disk; of all files in turn for a saved data set."""
        digest = hashlib.sha256()
        if self.kind != "hub":
            root = Path(self.file)
            for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
                if path.is_file():
                    with open(path, "rb") as file:
                        while block := file.read(1 << 20):
                            digest.update(block)
        return digest.hexdigest()


def kind_of(name: str, file: str) -> str:
    """The kind of the source `name`, whose bytes lie in `file`. Raises ValueError or OSError."""
    if name.startswith("hf:"):
        import_datasets(name)
        return "hub"
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            import_datasets(name)
            return "saved"
        raise ValueError(
            f"{name} is a directory, but no data set saved by `datasets` and no token directory"
        )
    return _kind_of_file(name, file)


def _kind_of_file(name: str, file: str) -> str:
    head, whole = read_head(file)
    if not head:
        raise ValueError(f"{name} is empty")
    suffix = suffix_of(name)
    if head.startswith(PARQUET):
        with open(file, "rb") as stream:
            if stream.read(len(PARQUET)) != PARQUET:
                raise ValueError(f"{name} is a compressed parquet file: unpack it first")
        import_datasets(name)
        return "parquet"
    text = check_text(head, name, whole=whole)
    if suffix in (".csv", ".tsv", ".parquet"):
        what = "no parquet file" if suffix == ".parquet" else "a table by its name"
        raise ValueError(
            f"{name} is {what}: write its texts as JSON lines, or name it .txt to train on its"
            " lines as they are"
        )
    layout = json_layout(text, whole=whole)
    if layout is None and suffix in _JSON_SUFFIXES:
        layout = "values" if suffix == ".json" else "lines"  # read so, it will be refused by row
    return {"lines": "jsonl", "values": "json", None: "text"}[layout]


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, without that of a compression."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in _COMPRESSED_SUFFIXES else path).suffix


def import_datasets(name: str) -> Any:
    """The package datasets. Raises ValueError saying that `name` needs it."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} needs the package datasets: pip install datasets") from None
    return datasets
