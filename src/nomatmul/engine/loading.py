"""From a directory, or from nothing, to a model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from nomatmul._hub_names import is_hub_name, packed_directory
from nomatmul.engine.backend import Options, opener
from nomatmul.engine.language_model import LanguageModel
from nomatmul.engine.native import checked_threads, native
from nomatmul.engine.state import KV_FORMS, Layout
from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.files.paths import checked_path
from nomatmul.formats.packed.layout import Forms
from nomatmul.formats.packed.reader import PackedReader

if TYPE_CHECKING:
    from nomatmul.engine.encoder_model import EncoderModel
    from nomatmul.formats.config import ModelConfig
    from nomatmul.formats.encoder import EncoderReading

# The models in the box lie in the package itself: the base, the one that was tuned to talk, and an
# encoder.
BOX = Path(__file__).resolve().parent.parent / "box"
TALKING_BOX = BOX.with_name("box-talk")
ENCODER_BOX = BOX.with_name("box-encoder")


@overload
def load(
    path: str | Path | None = None,
    *,
    kind: Literal["language"],
    threads: int | None = None,
    isa: str | None = None,
    mmap: bool = False,
    private: bool = False,
    verify: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    kv: str = "f16",
) -> LanguageModel: ...


@overload
def load(
    path: str | Path | None = None,
    *,
    kind: Literal["encoder"],
    threads: int | None = None,
    isa: str | None = None,
    mmap: bool = False,
    private: bool = False,
    verify: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    kv: str = "f16",
) -> EncoderModel: ...


@overload
def load(
    path: str | Path | None = None,
    *,
    threads: int | None = None,
    isa: str | None = None,
    mmap: bool = False,
    private: bool = False,
    verify: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    kv: str = "f16",
) -> Any: ...


def load(
    path: str | Path | None = None,
    *,
    kind: Literal["language", "encoder"] | None = None,
    threads: int | None = None,
    isa: str | None = None,
    mmap: bool = False,
    private: bool = False,
    verify: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    kv: str = "f16",
) -> LanguageModel | EncoderModel:
    """Load a packed model directory; without a path, the model in the box (of this kind).

    path may also be `hf:owner/name[@revision]`, or `hf:owner/name/file.gguf[@revision]`: the model
    is downloaded from the Hugging Face Hub and, unless it is packed, packed into a cache, once.

    Returns a LanguageModel, or an EncoderModel where the directory holds an encoder (then isa,
    threads and backend have the same meaning, and there is no device but the CPU). kind:
    "language" or "encoder" where only one of them will do; type checkers then know the result.

    threads: default the physical cores that this process may use. isa: an instruction set of
    `nomatmul doctor` (default the best one, or NOMATMUL_ISA). mmap: map the file, which several
    processes then share, instead of reading it into huge pages, which decodes faster. private:
    leave nothing in the file, not even a large embedding of which few rows are looked at; otherwise
    who cuts the file short ends this process. verify: check every byte (checksums, codes, finite
    values). backend: "native" (default) or "numpy", the slow oracle, which also steps in, with a
    warning, where the native core is missing.
    device: "cpu", or "cuda" or "cuda:1" for a GPU (needs torch and triton), where weights stay
    two bits in device memory; threads, isa, mmap and backend are about the CPU and refused there.
    kv: how a model with attention keeps keys and values, "f16" or, in half the memory and a
    little less exactly, "int8", or, in twice the memory and exactly, "f32".

    Raises ValueError for a bad argument, and FormatError (a ValueError) for a directory that is
    missing, damaged, or holds a model that this engine does not run.
    """
    if kind not in (None, "language", "encoder"):
        raise ValueError(f'kind is {kind!r}; it must be "language" or "encoder"')
    if mmap and private:
        raise ValueError("mmap leaves the weights in the file, and private nothing: choose one")
    options = Options(
        _checked_threads(threads), isa, mmap, verify, _checked_device(device), kv, private
    )
    _check_backend(backend, device)
    reader = PackedReader(encoder_directory(path) if kind == "encoder" else model_directory(path))
    _check_kv(kv, reader.config, reader.directory)
    if reader.reading is not None:
        if kind == "language":
            raise ValueError(
                f"{path} is an encoder, which continues no text; nomatmul embed, fill-mask and"
                " classify run it"
            )
        return _open_encoder(reader, reader.reading, backend or _available_backend(), options)
    if kind == "encoder":
        raise ValueError(f"{path} is a language model, not an encoder; `nomatmul generate` runs it")
    # what the oracle can do alone is no model of the engine
    capability.check(reader.config, "native" if device == "cpu" else "cuda")
    name = "cuda" if device != "cpu" else backend or _available_backend()
    return LanguageModel(
        opener(name).open_packed(reader, options),
        reader.config,
        fingerprint=reader.fingerprint,
        packing=reader.packing,
        embedding_form=reader.embedding_form,
        path=reader.directory,
        tokenizer_path=reader.tokenizer_path,
    )


def _open_encoder(
    reader: PackedReader, reading: EncoderReading, name: str, options: Options
) -> EncoderModel:
    if options.device != "cpu" or options.mmap:
        wrong = f"device {options.device!r}" if options.device != "cpu" else "mmap"
        raise ValueError(
            f"{reader.directory} is an encoder: the engine runs it on the CPU, without {wrong}"
        )
    from nomatmul.engine.encoder_model import EncoderModel

    capability.check(reader.config, name)
    return EncoderModel(
        opener(name).open_packed(reader, options),
        reader.config,
        reading,
        fingerprint=reader.fingerprint,
        forms=reader.forms,
        path=reader.directory,
        tokenizer_path=reader.tokenizer_path,
    )


def random_model(
    config: ModelConfig,
    packing: str = "2bit",
    embedding: str = "int8",
    seed: int = 0,
    *,
    head: str = "int8",
    dense: str = "bf16",
    scale: str = "f16",
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
    kv: str = "f16",
) -> LanguageModel:
    """Return a model of `config` whose weights are random legal codes; no file is involved.

    packing, embedding, head, dense, scale: forms (`formats.packed.Forms`) of the matrices that the
    model has; a tied head is the embedding. Scales keep the activations near 1. The same seed gives
    the same model (on one device: a GPU draws other numbers). Raises ValueError for a config that
    the engine does not run, an unknown form, or a device or kv that cannot be used (see `load`).
    """
    if not config.causal:
        raise ValueError("random weights are drawn for causal models only, this one is an encoder")
    name = "native" if device == "cpu" else "cuda"
    capability.check(config, name)
    _check_kv(kv, config, "this model")
    forms = Forms.of(
        config, ternary=packing, embedding=embedding, head=head, dense=dense, scale=scale
    )
    options = Options(_checked_threads(threads), isa, device=_checked_device(device), kv=kv)
    where = "" if device == "cpu" else f"{device}-"
    return LanguageModel(
        opener(name).open_random(config, forms, seed, options),
        config,
        fingerprint=f"random-{seed}-{'-'.join(forms.to_dict().values())}-{where}{config}",
        packing=forms.ternary,
        embedding_form=forms.embedding,
    )


def _check_kv(kv: str, config: ModelConfig, name: object) -> None:
    if kv not in KV_FORMS:
        raise ValueError(f"kv is {kv!r}; it must be {' or '.join(map(repr, KV_FORMS))}")
    if kv != "f16" and not Layout.of(architecture_of(config)).grows:
        raise ValueError(
            f"kv {kv!r} is about keys and values, and {name} keeps none: it is no language model"
            " with attention"
        )


def _checked_threads(threads: int | None) -> int | None:
    return None if threads is None else checked_threads(threads)


def _checked_device(device: str) -> str:
    if not isinstance(device, str):
        raise ValueError(f'device must be a text such as "cuda", got {device!r}')
    return device


def _check_backend(backend: str | None, device: str) -> None:
    if backend is not None and device.startswith("cuda"):
        raise ValueError(f"backend is about the CPU; with device {device!r} leave it out")
    if backend not in (None, "native", "numpy"):
        raise ValueError(f'backend is {backend!r}; it must be "native" or "numpy"')


def model_directory(path: str | Path | None) -> Path:
    """The directory of a packed model: of a path, a name on the Hub, or the model in the box."""
    return _directory(path, BOX, "model")


def encoder_directory(path: str | Path | None) -> Path:
    """The same; without a path that of the encoder in the box."""
    return _directory(path, ENCODER_BOX, "encoder")


def _directory(path: str | Path | None, box: Path, what: str) -> Path:
    if path is not None:
        return packed_directory(path) if is_hub_name(path) else checked_path(path, f"the {what}")
    if not (box / "config.json").exists():
        raise ValueError(f"this installation carries no {what}; give the path of a packed {what}")
    return box


def talking_directory() -> Path:
    """The directory of the box's talking model; of its base where the package has none.

    Raises ValueError where there is neither.
    """
    return TALKING_BOX if (TALKING_BOX / "config.json").exists() else model_directory(None)


def _available_backend() -> str:
    try:
        native()
    except ImportError as error:
        if os.environ.get("NOMATMUL_ISA"):
            raise ValueError(f"NOMATMUL_ISA asks for a native kernel: {error}") from None
        warnings.warn(f"{error}; running the slow numpy reference", RuntimeWarning, stacklevel=3)
        return "numpy"
    return "native"
