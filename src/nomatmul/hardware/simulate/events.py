"""What the simulated design wrote, event by event, as the harness's log has it (events.h)."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.hardware.design import Design

Events = NDArray[Any]


class Kind(IntEnum):
    """Of an event: which memory was written, or that an instruction retired."""

    VECTOR = 1  # address: element; value
    ACTIVATION = 2  # address: group; data: E int8
    SCALAR = 3  # address: register; value: m; more: e
    PARAMETER = 4  # address: group; value: mask; data: E int16
    STATE = 5  # address: element; value
    LOGIT = 6  # address: whether it is the last; value
    RETIRED = 7  # address: index of the instruction


def event_type(design: Design) -> np.dtype[Any]:
    """The layout of an event."""
    return np.dtype(
        [
            ("kind", "u1"),
            ("pad", "V3"),
            ("address", "<u4"),
            ("value", "<i4"),
            ("more", "<i4"),
            ("data", "i1", (2 * design.element_lanes,)),
        ]
    )


def read_events(path: Path, design: Design) -> Events:
    """All events of a log."""
    return np.fromfile(path, event_type(design))


def segments(events: Events) -> list[tuple[int, Events]]:
    """(index of an instruction, what was written up to its retirement), in order."""
    ends = np.flatnonzero(events["kind"] == Kind.RETIRED)
    starts = [0, *(ends[:-1] + 1)]
    return [
        (int(events["address"][end]), events[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]
