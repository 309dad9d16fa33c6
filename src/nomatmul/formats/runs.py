"""Where the newest weights lie in the directory of a training run or of a fine-tuning."""

from __future__ import annotations

import contextlib
import json
import shlex
import warnings
from pathlib import Path

from nomatmul._hub_names import hub_advice
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf_header import MAGIC
from nomatmul.formats.files.gguf_names import part_names

GGUF_SUFFIX = ".gguf"
ADAPTER_FILE = "adapter_config.json"
MODEL_STEP_FILE = "training.json"  # in the finished model of a run: the step it is of


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one in a directory without other
    weights, be there a config.json or not; the first of the parts of one model. Raises FormatError
    where several lie there."""
    if path.is_file():
        return path if path.suffix == GGUF_SUFFIX or _begins_as_gguf(path) else None
    found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if found and (path / "config.json").exists() and _has_weights(path):
        return None
    parts = part_names(found[0].name) if found else []
    if len(found) > 1 and not {file.name for file in found} <= set(parts):
        names = ", ".join(file.name for file in found[:4])
        raise FormatError(f"{path} holds several GGUF files ({names}): give one of them")
    return found[0] if found else None


def _begins_as_gguf(path: Path) -> bool:
    """Whether a file of another name is GGUF all the same, as the blobs of a cache are."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def _has_weights(path: Path) -> bool:
    """Whether weights lie in a directory that are not GGUF's."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
    return any(next(path.glob(pattern), None) for pattern in patterns)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory, or GGUF file, that `path` means.

    A directory with a config.json is one itself. In a model's directory of the Hugging Face cache
    (models--OWNER--NAME) the snapshot of its branch main is taken. In the directory of a training
    run the newest weights are taken: the finished model, or the latest checkpoint where the run has
    not finished or has been continued since (a warning says so, with its step). In that of a
    fine-tuning it is the best seed's model. Raises FormatError when there is none, or several tasks
    have one.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist{hub_advice(path)}")
    path = _snapshot(path)
    if (gguf := gguf_file(path)) is not None:
        return gguf
    if not path.is_dir():
        advice = f": give {path.parent}" if (path.parent / "config.json").is_file() else ""
        raise FormatError(f"{path} is a file; a model is a directory with a config.json{advice}")
    if (path / ADAPTER_FILE).is_file() and not (path / "config.json").is_file():
        raise FormatError(f"{path} holds an adapter, no model: merge it into its model first")
    if (path / "config.json").is_file():
        return path
    model, latest = path / "model", _latest_checkpoint(path)
    finished = (model / "config.json").is_file()
    if latest is None:
        return model if finished else _fine_tuned(path)
    if finished and not _is_newer(latest, model):
        return model
    what = f"the finished model in {model} is older" if finished else "the run has not finished"
    warnings.warn(f"{path}: taking its checkpoint {latest.name}; {what}", stacklevel=2)
    return latest


def _snapshot(path: Path) -> Path:
    """Of a model's directory in the Hugging Face cache the snapshot of main, else the only one."""
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    snapshots = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    with contextlib.suppress(OSError, ValueError):  # without main another revision was asked for
        main = path / "snapshots" / (path / "refs" / "main").read_text("utf-8").strip()
        if main in snapshots:
            return main
    if len(snapshots) == 1:
        return snapshots[0]
    names = ", ".join(entry.name for entry in snapshots[:4]) or "none"
    raise FormatError(f"{path} is a cache of several snapshots ({names}): give one of them")


def refuse_unpacked(path: Path) -> None:
    """Raise FormatError, with the command that packs it, for a model that is not packed.

    Of a run's directory as of a checkpoint; whatever else is wrong is for the reader to tell.
    """
    config = path / "config.json"
    if config.is_file():
        try:
            values = json.loads(config.read_bytes())
        except (OSError, ValueError, RecursionError):
            return
        if not isinstance(values, dict) or "format" in values or "model_type" not in values:
            return
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which weights they are: `pack` says it
            try:
                find_checkpoint(path)
            except FormatError:
                if any(path.glob("*/model/config.json")):  # several tasks: it names them
                    raise
                return
    source = shlex.quote(str(path))
    target = shlex.quote(f"{path.with_suffix('') if path.is_file() else path}-packed")
    raise FormatError(f"{path} is not packed: `nomatmul pack {source} {target}` packs it")


def _latest_checkpoint(path: Path) -> Path | None:
    """Of a training run: what `checkpoints/latest` names, else the one of the last step."""
    found = sorted(path.glob("checkpoints/step-*/config.json"))
    if not found:
        return None
    with contextlib.suppress(OSError, ValueError):  # the last is a good answer without it too
        latest = path / "checkpoints" / (path / "checkpoints" / "latest").read_text("utf-8").strip()
        if latest / "config.json" in found:
            return latest
    return found[-1].parent


def _is_newer(checkpoint: Path, model: Path) -> bool:
    """Whether the run went on after its finished model was written: by steps, else by time."""
    steps = _step(checkpoint / "state.json"), _step(model / MODEL_STEP_FILE)
    if steps[0] is not None and steps[1] is not None:
        return steps[0] > steps[1]
    return _written(checkpoint) > _written(model)


def _step(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text("utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):  # of an older run: the time tells
        return None


def _written(directory: Path) -> int:
    files = [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _fine_tuned(path: Path) -> Path:
    """The model in a directory of `nomatmul finetune`, which has one a task."""
    tasks = sorted(file.parent.parent for file in path.glob("*/model/config.json"))
    if len(tasks) == 1:
        return tasks[0] / "model"
    if tasks:
        names = ", ".join(task.name for task in tasks)
        raise FormatError(f"{path} holds models of several tasks ({names}): give {tasks[0]}")
    raise FormatError(
        f"{path} holds no model: no config.json, no checkpoints/, no task whose fine-tuning has "
        "finished a seed"
    )
