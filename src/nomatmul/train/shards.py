"""Token shards: memory-mapped files of token ids, built in parallel, resumable, atomic.

A token directory holds `tokenizer.json`, `shard-SSSS-CCCCC.bin` (source S, chunk C: little-endian
uint16, or uint32 for vocabularies above 65,536) with a `.json` beside each (counts, checksums,
origin), and `index.json`, written last: its presence says that the build is complete. How the
shards are made is in `chunks.py`.

Documents are joined as [bos] text eos; bos only where the tokenizer has one that is not eos. A
directory with conversations holds the `chat_template.jinja` that rendered them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nomatmul.formats.chat_template import DEFAULT_TEMPLATE, TEMPLATE_FILE
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import write_json
from nomatmul.train.chunks import Progress, Tasks, encode_all, shard_files
from nomatmul.train.conversations import stored_template
from nomatmul.train.documents import Source
from nomatmul.train.encode import dtype_of
from nomatmul.train.tokenizer import fingerprint

FORMAT, VERSION = "nomatmul-tokens", 1
CHUNK_CHARACTERS = 16 << 20  # text in one shard: about 8 MB of ids


def is_token_directory(path: str | Path) -> bool:
    """Whether a complete token directory lies at `path`."""
    return (Path(path) / "index.json").is_file()


def read_index(path: str | Path) -> dict[str, Any]:
    """The index of a complete token directory. Raises ValueError for a foreign or newer one."""
    file = Path(path) / "index.json"
    try:
        index = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is no index of token shards")
    if index.get("version") != VERSION:
        raise ValueError(f"{file} has version {index.get('version')}, this program reads {VERSION}")
    return index


def build_shards(
    sources: list[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    template: str = DEFAULT_TEMPLATE,
    workers: int | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Path:
    """Encode the sources into `out` and return it; what is there already and still fits is kept.

    template: of conversations. workers: processes (None: one a CPU that this process may use).
    Raises ValueError when the sources hold no text, or conversations that cannot be rendered.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sha = fingerprint(tokenizer)
    if is_current(out, sources, sha, template):
        return out
    (out / "index.json").unlink(missing_ok=True)
    write_file(out / "tokenizer.json", tokenizer.to_str().encode("utf-8"))
    tasks = Tasks(out, sha, template, CHUNK_CHARACTERS)
    done = list(encode_all(tasks, sources, tokenizer, workers, progress))
    if not any(shard["documents"] for shard in done):
        raise ValueError(f"no text in {', '.join(source.path for source in sources)}")
    for stale in set(out.glob("shard-*")) - {
        out / name for s in done for name in shard_files(s["name"])
    }:
        stale.unlink()
    conversations = sum(shard["conversations"] for shard in done)
    if conversations:
        write_file(out / TEMPLATE_FILE, template.encode("utf-8"))
    else:
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": sha,
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": dtype_of(tokenizer).name,
        "tokens": sum(shard["tokens"] for shard in done),
        "documents": sum(shard["documents"] for shard in done),
        "conversations": conversations,
        "text_bytes": sum(shard["text_bytes"] for shard in done),
        "sources": [s.stamp() | s.settings() | {"sha256": s.sha256()} for s in sources],
        "shards": done,
    }
    write_json(out / "index.json", index)
    return out


def is_current(
    out: Path, sources: list[Source], sha: str | None, template: str = DEFAULT_TEMPLATE
) -> bool:
    """Whether a complete build of just these sources lies in `out`, made with the tokenizer of
    fingerprint `sha` (None: with any), its conversations with this template."""
    if not is_token_directory(out):
        return False
    index = read_index(out)
    if index.get("conversations") and stored_template(out) != template:
        return False
    if sha not in (None, index["tokenizer_sha256"]) or len(index["sources"]) != len(sources):
        return False
    for source, seen in zip(sources, index["sources"], strict=True):
        if any(seen.get(key) != value for key, value in source.settings().items()):
            return False
        stamp = source.stamp()
        if stamp["size"] != seen["size"]:
            return False
        if stamp["mtime_ns"] != seen["mtime_ns"] and source.sha256() != seen["sha256"]:
            return False
    return True
