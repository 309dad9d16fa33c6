"""What a teacher says of the windows of a text, on disk: its likeliest tokens, and the rest's mass.

DIR/cache.json names what it is of and the SHA-256 of each part; DIR/part-00000.bin, ... hold the
windows in the order in which a run's first epoch reads them, so that a longer run adds parts to
those of a shorter one. A token is a record: `ids` (uint16, or uint32 for vocabularies above 65,536)
and `log_p` (float16) of the k likeliest tokens, `rest` (float16): the log of what all others have.
Both logs are those of softmax(logits / temperature).

Shape suffixes: B windows, T tokens, N = B x T, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import remove_leftovers, write_json
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.files.lock import LOCK, locked
from nomatmul.ops.loss import Taught, TeacherLogits
from nomatmul.train.batches import WindowOrder
from nomatmul.train.config import TrainConfig
from nomatmul.train.manifest import sha256_of
from nomatmul.train.memory import gib
from nomatmul.train.prepare import Prepared
from nomatmul.train.shards import Progress
from nomatmul.train.teacher import Teacher
from nomatmul.train.teacher_files import TeacherFiles

_FORMAT, _VERSION, _INDEX = "nomatmul-teacher-cache", 1, "cache.json"
_PART = 1 << 26  # bytes of a part, about
_CHUNK = 2048  # tokens whose logits exist at once
_NOTHING = -6e4  # log of no mass at all, as far as float16 goes


def record_of(vocab_size: int, top: int) -> np.dtype:
    """What is kept of a token."""
    ids = "<u2" if vocab_size <= 1 << 16 else "<u4"
    return np.dtype([("ids", ids, (top,)), ("log_p", "<f2", (top,)), ("rest", "<f2")])


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """The cache of a run in `directory`. facts: all that decides its contents."""

    directory: Path
    facts: dict[str, Any]
    order: WindowOrder
    wanted: int  # windows that the run reads

    @classmethod
    def of(
        cls, directory: str | Path, config: TrainConfig, files: TeacherFiles, data: Prepared
    ) -> TeacherCache:
        """The cache that the run of `config` needs. Raises ValueError if another one lies there."""
        order = WindowOrder(len(data.train), config.sequence_length, config.seed)
        facts = {
            "teacher": files.sha256,
            "tokenizer": data.train.tokenizer_sha256,
            "data": data.sha256["train"],
            "tokens": len(data.train),
            "sequence_length": config.sequence_length,
            "seed": config.seed,  # decides the order of the windows
            "vocab_size": config.model.vocab_size,
            "top": min(config.teacher_top, config.model.vocab_size),
            "temperature": config.temperature,
        }
        wanted = min(config.steps * config.batch_size, order.windows)
        cache = cls(Path(directory), facts, order, wanted)
        cache._parts()
        return cache

    @property
    def record(self) -> np.dtype:
        return record_of(self.facts["vocab_size"], self.facts["top"])

    @property
    def _rows(self) -> int:
        """Windows of a part."""
        return max(1, _PART // (self.order.sequence_length * self.record.itemsize))

    def _parts(self) -> list[str]:
        """The checksums of the parts that are there. Raises ValueError for a foreign cache."""
        place, file = self.directory, self.directory / _INDEX
        if not file.exists():
            found = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
            # a part without an index is what the first start left when it was killed
            foreign = [n for n in found if not n.startswith((".", "part-")) and n != LOCK]
            if place.exists() and (foreign or not place.is_dir()):
                what = f"holds {foreign[0]!r}" if foreign else "is a file"
                raise ValueError(f"{place} {what} and is no cache of a teacher: choose another")
            return []
        index = read_json_object(file)
        if index.get("format") != _FORMAT or index.get("version") != _VERSION:
            raise ValueError(f"{file} is no cache of a teacher that this version reads")
        old, parts = index.get("of"), index.get("parts")
        if not isinstance(old, dict) or not isinstance(parts, list):
            raise ValueError(f"{file} is damaged: choose another directory")
        for name, value in self.facts.items():
            if old.get(name) != value:
                raise ValueError(
                    f"{place} is the cache of another run: its {name} is {old.get(name)}, this "
                    f"run's {value}; choose another directory"
                )
        return parts

    def _file(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.bin"

    def _windows(self, part: int) -> int:
        return min(self._rows, self.order.windows - part * self._rows)

    def missing(self) -> list[int]:
        """Parts that the run needs and that are not there, after a look at those that are.

        Raises ValueError naming one that is damaged.
        """
        parts = self._parts()
        needed = -(-self.wanted // self._rows)
        for part, checksum in enumerate(parts[:needed]):
            file = self._file(part)
            if not file.is_file() or sha256_of([file]) != checksum:
                raise ValueError(
                    f"{file} is damaged or missing: remove {self.directory}, or choose another one"
                )
        return list(range(len(parts), needed))

    def check_disk(self, missing: list[int]) -> None:
        """Raise ValueError where the missing parts have no room."""
        size = self.order.sequence_length * self.record.itemsize
        need = size * sum(map(self._windows, missing))
        place = next(path for path in (self.directory, *self.directory.absolute().parents)
                     if path.exists())  # fmt: skip
        free = shutil.disk_usage(place).free
        if need > free:
            raise ValueError(
                f"the cache {self.directory} needs {gib(need)} more ({self.record.itemsize} bytes a"
                f" token), {gib(free)} are free: name a larger disk, or keep fewer tokens (--top)"
            )

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Only this run writes to the cache. Raises ValueError while another one does."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory, "the cache", "run that fills it"):
            yield

    def fill(
        self,
        teacher: Teacher,
        data: Prepared,
        rows: int,
        missing: list[int],
        progress: Progress = lambda what, done, of: None,
    ) -> None:
        """Let the teacher read the windows of the missing parts, `rows` at a time.

        A part is there whole or not at all, and the next start goes on behind it.
        Call it while `filling`. Raises OSError for a full disk.
        """
        remove_leftovers(self.directory)
        parts = self._parts()
        total = self._windows(missing[-1]) + missing[-1] * self._rows
        for part in missing:
            if part < len(parts):  # another run has filled it since it was looked for
                continue
            first, count = part * self._rows, self._windows(part)
            kept = np.empty((count, self.order.sequence_length), self.record)
            for at in range(0, count, rows):
                progress("windows that the teacher has read", first + at, total)
                starts = self.order.starts(first + at, min(rows, count - at))
                kept[at : at + rows] = self._ask(teacher, data, starts, rows)
            write_file(self._file(part), kept.tobytes())
            parts.append(sha256_of([self._file(part)]))
            index = {"format": _FORMAT, "version": _VERSION, "of": self.facts, "parts": parts}
            write_json(self.directory / _INDEX, index)

    def _ask(self, teacher: Teacher, data: Prepared, starts: np.ndarray, rows: int) -> np.ndarray:
        """Records [B, T] of the windows at `starts`; the teacher reads `rows` of them at once."""
        length = self.order.sequence_length
        padded = np.resize(starts, rows)  # all that a teacher reads has one shape
        ids = torch.from_numpy(data.train.windows(padded, length).astype(np.int64))
        teacher.look(ids.to(teacher.plan.device))
        found = np.empty(rows * length, self.record)
        for at in range(0, len(found), _CHUNK):
            part = slice(at, min(at + _CHUNK, len(found)))
            found[part] = self._records(teacher.logits(part))
        return found.reshape(rows, length)[: len(starts)]

    def _records(self, logits_NV: Tensor) -> np.ndarray:
        log_p_NV = torch.log_softmax(logits_NV.float() / self.facts["temperature"], -1)
        log_p_NK, ids_NK = log_p_NV.topk(self.facts["top"], -1)
        rest_N = log_p_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1).clamp(min=_NOTHING)
        found = np.empty(len(logits_NV), self.record)
        found["ids"] = ids_NK.cpu().numpy()
        found["log_p"] = log_p_NK.clamp(min=_NOTHING).cpu().numpy()
        found["rest"] = rest_N.cpu().numpy()
        return found

    def reader(self) -> Callable[[np.ndarray], np.ndarray]:
        """The function from the starts [B] of windows in the text to their records [B, T]."""
        starts = self.order.starts(0, self.wanted)
        by_start = np.argsort(starts)
        shape, parts = self.order.sequence_length, -(-self.wanted // self._rows)
        maps = [
            np.memmap(self._file(part), self.record, "r", shape=(self._windows(part), shape))
            for part in range(parts)
        ]

        def read(starts_B: np.ndarray) -> np.ndarray:
            rows = by_start[np.searchsorted(starts, starts_B, sorter=by_start)]
            assert np.array_equal(starts[rows], starts_B), "a window that is not in the cache"
            return np.stack([maps[row // self._rows][row % self._rows] for row in rows])

        return read


class CachedTeacher:
    """In a `Teacher`'s place: it reads in the cache what the teacher has said, in the run's order.

    The k likeliest tokens keep their probabilities q_i, all others are one class with the rest q_r
    of the mass: with the student's p, what the loss calls divergence is

        sum_i q_i ln(q_i / p_i)  +  q_r ln(q_r / p_r)            p_r = 1 - sum_i p_i

    at the temperature (the top k plus a tail class: arXiv 2608.14728; renormalising the k alone
    teaches that the others are impossible, arXiv 2503.16870). Its gradient of the student's logits
    is p - t, with t_i = q_i and t_j = q_r p_j / p_r for the others: that of a dense teacher whose
    other tokens stand to each other as the student's do. So `logits` gives just these, and the
    loss is the one of every teacher.
    """

    def __init__(self, cache: TeacherCache, files: TeacherFiles, device: torch.device) -> None:
        self.files, self.device = files, device
        self.parameters = files.size.parameters
        self._temperature = float(cache.facts["temperature"])
        self._read = cache.reader()
        self._starts: Iterator[np.ndarray] = iter(())
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._source = TeacherLogits(self.logits)

    def taught(self, share: float, temperature: float) -> Taught:
        """What the student's loss is told. This object must outlive it."""
        assert temperature == self._temperature
        return Taught(self._source.number, share, temperature)

    def follow(self, starts: Iterator[np.ndarray]) -> None:
        """starts: of the windows of each micro-batch that comes, in order."""
        self._starts = starts

    def look(self, x_BT: Tensor) -> None:
        """Fetch what was said of the next micro-batch, which is x."""
        found = self._read(next(self._starts))
        assert found.shape == x_BT.shape
        names = (("ids", np.int64), ("log_p", np.float32), ("rest", np.float32))
        fresh = [
            torch.from_numpy(found[n].astype(t)).flatten(0, 1).to(self.device) for n, t in names
        ]
        if self._kept is None:
            self._kept = fresh[0], fresh[1], fresh[2]
        for old, new in zip(self._kept, fresh, strict=True):  # graphs read at one address
            old.copy_(new)

    def logits(self, part: slice, student_NV: Tensor) -> Tensor:
        """[n, V] for these of the tokens that were looked at last."""
        assert self._kept is not None, "the teacher looks before the student does"
        ids_NK, log_p_NK, rest_N = (kept[part] for kept in self._kept)
        x_NV = student_NV if student_NV.dtype == torch.float64 else student_NV.float()
        x_NV = x_NV / self._temperature
        others_N = x_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)
        x_NV += (rest_N - others_N)[:, None]
        return x_NV.scatter_(-1, ids_NK, log_p_NK.to(x_NV.dtype)).mul_(self._temperature)
