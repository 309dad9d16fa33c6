"""A model as the kernels see it, from the table of parts, and the work space that they take.

The blocks of a model that runs here are all alike (formats/capability.py), so one of them tells
the sizes of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nomatmul.formats.architecture import FFF, GLU, MLGRU, Architecture, architecture_of
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
    """A causal model of MLGRUs whose blocks hold a GLU each, or trees, or no channel mixer.

    inner: inner size of the GLU, 0 without one. norm_eps: of the norms in front of mixers and of
    the final one; linear_eps: of those inside linears; gate_eps: of MLGRU's norm of g.
    """

    model: Architecture
    layers: int
    size: int
    vocabulary: int
    bounded: bool
    glu: GLU | None
    trees: FFF | None
    inner: int
    norm_eps: float
    linear_eps: float
    gate_eps: float

    @staticmethod
    def of(config: ModelConfig) -> Plan:
        """The plan of a model that formats/capability.py lets in."""
        model = architecture_of(config)
        block = model.blocks[0]
        mixer, channel = block.mixer, block.channel
        assert isinstance(mixer, MLGRU)
        assert mixer.i_proj.norm_eps is not None
        glu = channel if isinstance(channel, GLU) else None
        return Plan(
            model=model,
            layers=len(model.blocks),
            size=model.size,
            vocabulary=model.vocabulary,
            bounded=mixer.bounded,
            glu=glu,
            trees=channel if isinstance(channel, FFF) else None,
            inner=glu.down_proj.inputs if glu is not None else 0,
            norm_eps=block.mixer_norm.eps,
            linear_eps=mixer.i_proj.norm_eps,
            gate_eps=mixer.g_norm.eps,
        )

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
