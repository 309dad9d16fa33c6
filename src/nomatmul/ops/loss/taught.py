"""Teachers of a loss: whose logits are mixed into the targets, found by a number.

The loss is one operator of torch, and operators take tensors and numbers only. A teacher is asked
for its logits of one chunk at a time, so it keeps its hidden states, not its logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor

_numbers = itertools.count()
_sources: WeakValueDictionary[int, TeacherLogits] = WeakValueDictionary()


class TeacherLogits:
    """Logits of a teacher for the tokens that it has looked at last.

    logits: of a part of them, [n, V'], in any float type, for at least as many tokens of the
    vocabulary as the student has; more are left out, as if they had no probability. It is given the
    student's [n, V], which it may not write over; the loss may write over what it gives. A CUDA
    graph that records it reads what lies at the same addresses at replay.
    number: under which an operator finds this one, as long as somebody holds it.
    """

    def __init__(self, logits: Callable[[slice, Tensor], Tensor]) -> None:
        self.logits = logits
        self.number = next(_numbers)
        _sources[self.number] = self


class Taught(NamedTuple):
    """What a teacher has to say in a loss, as plain numbers. See `linear.mixed_cross_entropy`."""

    teacher: int
    share: float
    temperature: float = 1.0


def logits_of(teacher: int, part: slice, student_NV: Tensor) -> Tensor:
    """Of the teacher with this number, beside the student's."""
    source = _sources.get(teacher)
    assert source is not None, f"teacher {teacher} is no longer held by anybody"
    return source.logits(part, student_NV)
