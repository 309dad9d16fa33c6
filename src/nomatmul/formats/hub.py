"""Models of the Hugging Face Hub: which files are needed, downloaded and checked.

huggingface_hub (the extra `hub`) downloads into its own cache, goes on where a connection broke,
and takes its settings from the environment (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Here
it is decided which files a model needs, each is compared with the checksum that the Hub gives, and
a record of both is kept, with which the model can be used without a network.
"""

from __future__ import annotations

import contextlib
import glob
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nomatmul._hub_names import is_hub_name
from nomatmul.formats.files.gguf_names import part_names
from nomatmul.formats.generation_config import GENERATION_FILE
from nomatmul.formats.hub_files import HubName, Record, Snapshot, model_path

# Of a model in safetensors or pickles, beside its weights.
_SMALL = (
    *("config.json", GENERATION_FILE, "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
# Weights, the first that there are; an index names several files.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ATTEMPTS = 4
# Packages whose errors are those of a connection.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def local_path(path: str | Path) -> Path:
    """The path itself, or that to which a name on the Hub was downloaded."""
    return download(HubName.parse(str(path))).path if is_hub_name(path) else Path(path)


def download(name: HubName) -> Snapshot:
    """Download what a model needs and is not here yet.

    Raises ValueError, in one line, where there is no such model, revision or file, where the name
    leaves a choice, or where the download fails; FormatError for a file that is not what the Hub
    says it is; ImportError without huggingface_hub.
    """
    hub = _library()
    record = Record(name)
    fixed = re.fullmatch("[0-9a-f]{40}", name.revision or "") is not None
    if fixed and (found := record.snapshot(hub)):
        return found
    with _explained(name):
        try:
            info = hub.HfApi().model_info(
                name.repository, revision=name.revision, files_metadata=True
            )
        except Exception as error:  # each version of the library has errors of another transport
            if _is_final(hub, error) or not (found := record.snapshot(hub)):
                raise
            print(f"nomatmul: {name}: the Hub cannot be reached; using the cache", file=sys.stderr)
            return found
    listing = {entry.rfilename: _digest(entry) for entry in info.siblings or ()}
    commit = str(info.sha)
    files = _needed(name, list(listing), lambda file: _read_index(_fetch(hub, name, [file]) / file))
    wanted = {file: listing[file] for file in files}
    if not record.covers(commit, wanted):
        size = sum(entry["size"] or 0 for entry in wanted.values())
        what = f"{len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:,.1f} MB"
        print(f"nomatmul: {name}: downloading {what}", file=sys.stderr)
    directory = _fetch(hub, name, files)
    if directory.name != commit:
        raise ValueError(f"{name} has changed while it was downloaded; try again")
    record.check(directory, commit, wanted)
    return Snapshot(directory / name.file if name.file else model_path(directory, files), commit)


def _fetch(hub: Any, name: HubName, files: list[str]) -> Path:
    """Download these files; returns the directory in which they lie."""
    patterns = [glob.escape(file) for file in files]
    with _explained(name), _bars_for_people(hub):
        for left in reversed(range(_ATTEMPTS)):
            try:
                found: str = hub.snapshot_download(
                    name.repository, revision=name.revision, allow_patterns=patterns
                )
                break
            except Exception as error:
                # older versions of the library leave it to the next call to go on after a break
                if not left or type(error).__module__.partition(".")[0] not in _TRANSPORTS:
                    raise
    return Path(found)


def _needed(name: HubName, files: list[str], shards: Callable[[str], set[str]]) -> list[str]:
    """The files of a model among all of a repository.

    shards: reads an index of weights. Raises ValueError where there is none, or more than one.
    """
    models = _gguf_models(name, files)
    defaults = [GENERATION_FILE] if GENERATION_FILE in files else []
    choice = f"hf:{name.repository}/FILE with one of {', '.join(models)}"
    if name.file is not None:
        if name.file not in files:
            hint = f"; write {choice}" if models else ""
            raise ValueError(f"hf:{name.repository} has no file {name.file}{hint}")
        return [*next(parts for parts in models.values() if name.file in parts), *defaults]
    small = [file for file in _SMALL if file in files]
    for weights in _WEIGHTS if "config.json" in files else ():
        if weights in files:
            return [*small, weights]
        index = f"{weights}.index.json"
        if index in files:
            return [*small, index, *sorted(shards(index))]
    if len(models) == 1:
        return [*next(iter(models.values())), *defaults]
    if models:
        raise ValueError(f"hf:{name.repository} holds {len(models)} models; write {choice}")
    raise ValueError(
        f"hf:{name.repository} holds no model: neither a config.json with {' or '.join(_WEIGHTS)}"
        " nor a .gguf file"
    )


def _gguf_models(name: HubName, files: list[str]) -> dict[str, list[str]]:
    """{file of each GGUF model, the first of its parts: all of its files}.

    Raises ValueError for the model that is asked for if a part is missing.
    """
    found: dict[str, list[str]] = {}
    for file in (file for file in files if file.endswith(".gguf")):
        parts = part_names(file) or [file]
        found[parts[0]] = parts
    for parts in found.values():
        missing = next((part for part in parts if part not in files), None)
        if missing is not None and (name.file in parts or len(found) == 1):
            raise ValueError(f"hf:{name.repository} lacks {missing}, of {len(parts)} parts")
    return found


def _read_index(path: Path) -> set[str]:
    from nomatmul.formats.files.weights import read_index

    return set(read_index(path).values())


def _digest(entry: Any) -> dict[str, Any]:
    """What the Hub says of a file: large ones have a sha256, small ones the sha1 of git's blob."""
    if entry.lfs is not None:
        return {"size": entry.lfs.size, "sha256": entry.lfs.sha256}
    return {"size": entry.size, "sha1": entry.blob_id}


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ImportError(
            f'models of the Hub need huggingface_hub ({error}): pip install "nomatmul[hub]"'
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _bars_for_people(hub: Any) -> Iterator[None]:
    """No bars where nobody watches: there they would fill a log."""
    silent = not sys.stderr.isatty() and not hub.utils.are_progress_bars_disabled()
    if silent:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if silent:
            hub.utils.enable_progress_bars()


def _is_final(hub: Any, error: Exception) -> bool:
    """Whether the Hub answered, and the answer was no."""
    errors = hub.errors
    return isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)


@contextlib.contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """The library's errors as one line of ours."""
    try:
        yield
    except Exception as error:  # see `download`; whatever it is, it is about this download
        from huggingface_hub import errors

        repository = f"hf:{name.repository}"
        if isinstance(error, errors.GatedRepoError):
            why = f"{repository} is given only to those who asked for it on its page; set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = f"{repository} does not exist, or is private: then set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"{repository} has no revision {name.revision or 'main'!r}"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            why = f"{name} cannot be downloaded: {reason}"
        raise ValueError(why) from error
