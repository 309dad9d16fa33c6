"""What the kernels are told of a model, from the table of parts, and the work space that they take.

The blocks of a model that runs here are all alike (formats/capability.py), so one of them tells
the sizes of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nomatmul.formats.architecture import (
    FFF,
    GLU,
    MLGRU,
    Architecture,
    Block,
    architecture_of,
)
from nomatmul.formats.config import ModelConfig

ROW_ALIGN = 64
# Work space that a block of tokens may take.
SCRATCH_BYTES = 240 << 20
UNPACKED_BYTES = 76 << 20


def device_row_bytes(columns: int) -> int:
    """Bytes of a packed row in device memory."""
    return -(-columns // (4 * ROW_ALIGN)) * ROW_ALIGN


@dataclass(frozen=True)
class Plan:
    """A causal model of MLGRUs whose blocks hold a GLU each, or trees, or no channel mixer."""

    model: Architecture

    @staticmethod
    def of(config: ModelConfig) -> Plan:
        """The plan of a model that formats/capability.py lets in."""
        return Plan(architecture_of(config))

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def size(self) -> int:
        """Hidden size."""
        return self.model.size

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return self.model.vocabulary

    @property
    def block(self) -> Block:
        """What every block is."""
        return self.model.blocks[0]

    @property
    def mixer(self) -> MLGRU:
        """The token mixer of every block."""
        mixer = self.block.mixer
        assert isinstance(mixer, MLGRU)
        return mixer

    @property
    def glu(self) -> GLU | None:
        """The channel mixer of every block, where that is a GLU."""
        channel = self.block.channel
        return channel if isinstance(channel, GLU) else None

    @property
    def trees(self) -> FFF | None:
        """The channel mixer of every block, where that is trees."""
        channel = self.block.channel
        return channel if isinstance(channel, FFF) else None

    @property
    def inner(self) -> int:
        """Inner size of the GLU, 0 without one."""
        return self.glu.down_proj.inputs if self.glu is not None else 0

    @property
    def norm_eps(self) -> float:
        """Of the norms in front of mixers and of the final one."""
        return self.block.mixer_norm.eps

    @property
    def linear_eps(self) -> float:
        """Of the norms inside linears."""
        return self.mixer.i_proj.norm_eps

    @property
    def gate_eps(self) -> float:
        """Of MLGRU's norm of g."""
        return self.mixer.g_norm.eps

    def macros(self) -> dict[str, str]:
        """What decode.cu and prompt.cu both ask for."""
        return {
            "D": str(self.size),
            "M": str(self.inner),
            "NORM_EPS": f"{self.norm_eps!r}f",
            "LINEAR_EPS": f"{self.linear_eps!r}f",
            "GATE_EPS": f"{self.gate_eps!r}f",
        }

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes of int8 matrices that are unpacked at once: those of one product, if they fit."""
        short, long = device_row_bytes(self.size), device_row_bytes(self.inner)
        glu = (2 * self.inner + 256) * short  # whole tiles of gate and up
        return min(UNPACKED_BYTES, 4 * max(3 * self.size * short, glu, self.size * long))

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of work space that a token of a long block takes at the widest place."""
        size, inner = self.size, self.inner
        mixer = 4 * 3 * size + 3 * size
        channel = size + 4 * inner + inner  # a GLU's int8 inputs, its values and their int8
        if self.trees is not None:  # visited rows, their accumulators and int8
            channel = size + 9 * self.trees.active_rows + 4 * size
        return 4 * size + max(mixer, channel)

    @cached_property
    def chunk_tokens(self) -> int:
        """Tokens of a block, so that the work space stays near SCRATCH_BYTES."""
        room = max(SCRATCH_BYTES - self.scratch_bytes, SCRATCH_BYTES // 4)
        return max(128, min(2048, room // self.token_bytes // 128 * 128))

    @property
    def work_bytes(self) -> int:
        """Bytes of work space of a long prompt."""
        return self.scratch_bytes + self.token_bytes * self.chunk_tokens
