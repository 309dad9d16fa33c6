"""Design: every parameter of the accelerator's hardware, checked, and the sizes that follow from
them.

A design is what the Verilog is made from, what the compiler lays a model out for, and what the
board reads back from the host's registers. Widths are bits; `words` of the memory are `memory_bits`
wide.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKINGS = ("2bit", "1.6bit")
TREE_ROW_BITS = 18  # of the rows of all trees of a layer: one DSP finds a row's address

# Of each whole number: the least and the largest value, and whether it must be a power of two.
_LIMITS: dict[str, tuple[int, int, bool]] = {
    "lanes": (32, 2048, False),
    "element_lanes": (4, 32, True),
    "vector_bits": (16, 32, False),
    "vector_fraction": (6, 24, False),
    "state_bits": (16, 32, False),
    "state_fraction": (6, 30, False),
    "weight_bits": (16, 16, False),
    "sum_bits": (12, 32, False),
    "table_bits": (6, 11, False),
    "memory_bits": (16, 1024, True),
    "burst": (1, 256, True),
    "fifo_words": (4, 1 << 16, True),
    "vector_words": (64, 1 << 16, True),
    "parameter_words": (64, 1 << 16, True),
    "state_words": (64, 1 << 20, True),
    "activation_beats": (1, 256, False),
    "program_words": (16, 1 << 16, True),
    "combine_lanes": (4, 2048, True),
    "tree_rows": (4, 1 << 12, True),
}


@dataclass(frozen=True)
class Design:
    """The accelerator's parameters. ValueError names the parameter, its value and the limit.

    `lanes`: ternary products a cycle. `element_lanes`: elements that a vector instruction takes a
    cycle. `vector_bits`, `vector_fraction`: numbers of the vector memory; `state_*`: those of the
    recurrence. `sum_bits`: accumulators of products. `table_bits`: steps of the sigmoid's table.
    `burst`, `fifo_words`: memory words asked at once, and prefetched. `*_words`: sizes of the
    vector memory (elements), of the parameters (int16), of the state (elements), of the program
    (instructions); `activation_beats`: beats of `lanes` int8 activations. `trees`: with the unit of
    ternary trees, whose nodes are added `combine_lanes` columns a cycle, at most `tree_rows` visits
    a token. `probe`: with the outputs that a simulation compares.
    """

    lanes: int = 256
    packing: str = "2bit"
    element_lanes: int = 8
    vector_bits: int = 24
    vector_fraction: int = 12
    state_bits: int = 24
    state_fraction: int = 12
    weight_bits: int = 16
    sum_bits: int = 24
    table_bits: int = 9
    memory_bits: int = 512
    burst: int = 16
    fifo_words: int = 512
    vector_words: int = 16384
    parameter_words: int = 16384
    state_words: int = 32768
    activation_beats: int = 64
    program_words: int = 1024
    trees: bool = False
    combine_lanes: int = 32
    tree_rows: int = 256
    probe: bool = False

    def __post_init__(self) -> None:
        for name, (least, most, power) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"design: {name} is {value!r}, not a whole number in {least}..{most}"
                )
            if power and value & (value - 1):
                raise ValueError(f"design: {name} is {value}, not a power of two")
        for name in ("trees", "probe"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"design: {name} is {getattr(self, name)!r}, not true or false")
        if self.packing not in PACKINGS:
            raise ValueError(
                f"design: packing is {self.packing!r}, not one of {', '.join(PACKINGS)}"
            )
        self._check_together()

    def _check_together(self) -> None:
        at_most = (
            ("vector_fraction", self.vector_fraction, "vector_bits - 2", self.vector_bits - 2),
            ("state_fraction", self.state_fraction, "state_bits - 2", self.state_bits - 2),
            ("vector_fraction", self.vector_fraction, "state_fraction", self.state_fraction),
            # the interpolation of the table (a range of 16) has at least one bit
            ("table_bits", self.table_bits, "vector_fraction + 3", self.vector_fraction + 3),
            ("combine_lanes", self.combine_lanes, "lanes", self.lanes),
            ("twice the burst", 2 * self.burst, "fifo_words", self.fifo_words),
        )
        for name, value, limit_name, limit in at_most:
            if value > limit:
                raise ValueError(f"design: {name} is {value}, more than {limit_name} ({limit})")
        if self.lanes % 32:
            raise ValueError(f"design: lanes is {self.lanes}, not a multiple of 32")

    @property
    def beat_bits(self) -> int:
        """Bits of a beat: the weights of `lanes` products."""
        return 2 * self.lanes if self.packing == "2bit" else 8 * -(-self.lanes // 5)

    @property
    def memory_bytes(self) -> int:
        """Bytes of a memory word."""
        return self.memory_bits // 8

    @property
    def activation_groups(self) -> int:
        """Groups of `element_lanes` int8 that the activation memory holds."""
        return self.activation_beats * self.lanes // self.element_lanes

    @property
    def vector_groups(self) -> int:
        """Groups of `element_lanes` elements that the vector memory holds."""
        return self.vector_words // self.element_lanes

    @property
    def parameter_groups(self) -> int:
        """Groups of `element_lanes` int16 that the parameter memory holds."""
        return self.parameter_words // self.element_lanes

    def beats(self, inputs: int) -> int:
        """Beats of a row of `inputs` weights."""
        return -(-inputs // self.lanes)

    @property
    def tree_columns(self) -> int:
        """The most outputs that a layer of trees may have."""
        return self.vector_words // 2

    def words(self, bits: int) -> int:
        """Memory words of a region of `bits`."""
        return -(-bits // self.memory_bits)

    @property
    def piece_bits(self) -> int:
        """Bits that the loader takes at once: an int16 for each of `element_lanes`."""
        return 16 * self.element_lanes

    def piece_words(self, bits: int) -> int:
        """Memory words of `bits` that the loader takes: what it takes last is whole, too."""
        return self.words(-(-bits // self.piece_bits) * self.piece_bits)
