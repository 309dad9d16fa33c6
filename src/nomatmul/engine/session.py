"""One sequence and its memory: a state of fixed size that can be forked, saved and loaded.

Legend: L layers, D hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError, WriteError
from nomatmul.formats.files.atomic import write_file

if TYPE_CHECKING:
    from nomatmul.engine.backend import Float, Want
    from nomatmul.engine.language_model import LanguageModel

STATE_FORMAT = "nomatmul-state"
STATE_VERSION = "1"
_MAX_HEADER = 1 << 16


class Session:
    """A sequence in progress, made by `LanguageModel.session`.

    Results do not depend on how the ids were cut into calls, on other sessions in the same
    step, or on whether the state went through `fork` or a file: they are equal bit for bit.
    """

    def __init__(self, model: LanguageModel, state: Any, position: int = 0) -> None:
        self.model = model
        self._state = state  # opaque: what the backend's `new_state` makes
        self._position = position
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Session: {self.position} tokens, {self.nbytes} bytes>"

    @property
    def position(self) -> int:
        """Number of tokens that this sequence has seen."""
        return self._position

    @property
    def nbytes(self) -> int:
        """Bytes of the state; they do not grow with the sequence."""
        return 4 * self.model.config.num_layers * self.model.config.hidden_size

    @property
    def _state_LD(self) -> Float:
        """The state as float32 [L, D] on the host: the array itself, or a copy of a device's."""
        return self.model.backend.state_to_numpy(self._state)

    def append(self, ids: Sequence[int] | NDArray[Any], logits: Want = "last") -> Float:
        """Feed token ids; return float32 [V], the logits after the last one.

        logits="all" returns [T, V], one row after every id; "none" skips the head and returns
        an empty array. Raises ValueError, and leaves the session as it was, for no ids, an id
        out of range, or a model whose values stop being finite.
        """
        result = self.model.step([self], [ids], logits=logits)[0]
        assert isinstance(result, np.ndarray)
        return result

    def fork(self) -> Session:
        """Return an independent copy that goes on from here."""
        with self._lock:
            return Session(self.model, self.model.backend.copy_state(self._state), self._position)

    def save(self, path: str | Path) -> None:
        """Write the state to a small safetensors file, whole or not at all.

        Raises WriteError (a ValueError and an OSError) when the disk refuses.
        """
        with self._lock:
            # copied before another thread may feed this session: on the host it is the array itself
            state_LD = self._state_LD
            data = state_LD.astype("<f4").tobytes()
            position = self._position
        header = {
            "__metadata__": {
                "format": STATE_FORMAT,
                "format_version": STATE_VERSION,
                "model": self.model.fingerprint,
                "position": str(position),
                "crc32": f"{_checksum(position, data):08x}",
            },
            "state": {
                "dtype": "F32",
                "shape": list(state_LD.shape),
                "data_offsets": [0, len(data)],
            },
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        _write(Path(path), len(text).to_bytes(8, "little") + text + data)


def read_state(path: str | Path, shape: tuple[int, int], fingerprint: str) -> tuple[Float, int]:
    """Return (state float32 [L, D], position) of a file that `Session.save` wrote.

    Raises FormatError (a ValueError) for a file that is missing, foreign, truncated or changed,
    or that belongs to another model.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read the state {path}: {error.strerror or error}") from None
    header, data = _split(path, content)
    metadata, entry = header.get("__metadata__"), header.get("state")
    if not isinstance(metadata, dict) or metadata.get("format") != STATE_FORMAT:
        raise FormatError(f"{path} is no state of a session")
    if metadata.get("format_version") != STATE_VERSION:
        raise FormatError(
            f"{path} has state version {metadata.get('format_version')!r};"
            f" this nomatmul reads version {STATE_VERSION}"
        )
    if metadata.get("model") != fingerprint:
        raise FormatError(f"{path} is the state of another model")
    nbytes = 4 * shape[0] * shape[1]
    expected = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, nbytes]}
    if set(header) != {"__metadata__", "state"} or entry != expected or len(data) != nbytes:
        raise FormatError(f"{path} is damaged or truncated: the state's size is wrong")
    position = metadata.get("position")
    if not isinstance(position, str) or not position.isascii() or not position.isdigit():
        raise FormatError(f"{path} is damaged: its position is {position!r}")
    if metadata.get("crc32") != f"{_checksum(int(position), data):08x}":
        raise FormatError(f"{path} is damaged: it does not match its checksum")
    state_LD = np.frombuffer(data, dtype="<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(state_LD).all():
        raise FormatError(f"{path} holds a value that is not finite (NaN or infinity)")
    return state_LD, int(position)


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path, content)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


def _checksum(position: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(str(position).encode()))


def _split(path: Path, content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(_MAX_HEADER, len(content) - 8):
        raise FormatError(f"{path} is truncated or no state of a session")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is damaged or no state of a session") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path} is no state of a session")
    return header, content[8 + length :]
