"""Where things lie on the host's bus of a board with a serial line: words of 32 bits."""

from __future__ import annotations

BUS_ADDRESS_BITS = 30
# Below it are the accelerator's registers, from it on the words of the SDRAM.
MEMORY_WINDOW = 1 << (BUS_ADDRESS_BITS - 1)
