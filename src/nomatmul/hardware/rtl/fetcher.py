"""The reader of the rows that trees visit: short reads, so a shallow FIFO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nomatmul.hardware.rtl.streamer import Streamer

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


class RowFetcher(Streamer):
    """A Streamer with room for four bursts; it reads beside the stream of weights."""

    def __init__(self, design: Design) -> None:
        super().__init__(design, fifo_words=4 * design.burst)
