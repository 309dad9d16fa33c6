"""From a packed directory to the folds of integer inference (`folds.Network`).

Legend: K inputs, D hidden size.
"""

from __future__ import annotations

import numpy as np

from nomatmul.formats import architecture as parts
from nomatmul.formats import capability
from nomatmul.formats.errors import FormatError
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.quantise import quantise_rows
from nomatmul.reference.integer.folds import (
    Branch,
    Fold,
    Forest,
    Gated,
    Layer,
    Linear,
    Mixer,
    Network,
    Real,
    Weight,
)
from nomatmul.reference.integer.gates import LOWER_BOUND_MAX
from nomatmul.reference.integer.numerics import GATE_FRACTION, Formats, Int

# {linear whose inner norm it is: linears that read its quantised input}
Branches = dict[str, tuple[str, ...]]


def network_of(reader: PackedReader, formats: Formats) -> Network:
    """The folds of a model; an embedding of floats is rounded to int8 rows with a scale each.

    Raises ValueError for parts that the accelerator lacks, FormatError for damaged tensors.
    """
    capability.check(reader.config, "hardware")
    return _Reading(reader, formats).network()


class _Reading:
    def __init__(self, reader: PackedReader, formats: Formats) -> None:
        self._reader, self._formats = reader, formats
        self._model = parts.architecture_of(reader.config)

    def network(self) -> Network:
        layers = tuple(self._layer(n, block) for n, block in enumerate(self._model.blocks))
        head = self._fold(
            "head", self._real("final_norm.weight"), {"head": ("head",)}, self._model.size
        )
        if self._reader.embedding_form == "int8":
            values, scale = self._reader.matrix("embedding")
            assert scale is not None
            return Network(values.astype(np.int8, copy=False), scale, layers, head)
        return Network(*quantise_rows(self._reader.embedding()), layers, head)

    def _layer(self, number: int, block: parts.Block) -> Layer:
        at, part = f"layers.{number}", block.channel
        assert isinstance(block.mixer, parts.MLGRU)
        mixer = self._mixer(f"{at}.mixer", self._real(f"{at}.mixer_norm.weight"), block.mixer)
        if part is None:
            return Layer(mixer, None)
        outer = self._real(f"{at}.channel_norm.weight")
        if isinstance(part, parts.GLU):
            return Layer(mixer, self._gated(f"{at}.channel", outer, part))
        assert isinstance(part, parts.FFF)
        return Layer(mixer, self._forest(f"{at}.channel", outer, part))

    def _mixer(self, at: str, outer: Real, part: parts.MLGRU) -> Mixer:
        inputs, inner = part.f_proj.inputs, part.o_proj.inputs
        names = [f"{at}.{name}" for name in ("f_proj", "i_proj", "g_proj")]
        enter = self._fold(at, outer, {name: (name,) for name in names}, inputs)
        o_proj, eps = f"{at}.o_proj", part.o_proj.norm_eps
        assert eps is not None
        norm, product = self._real(f"{at}.g_norm.weight"), eps * part.g_norm.eps
        leave = self._fold(o_proj, norm, {o_proj: (o_proj,)}, inner, eps=product, gate_eps=eps)
        bound_D = self._lower_bound(f"{at}.lower_bound") if part.bounded else None
        return Mixer(at, enter, leave, bound_D)

    def _lower_bound(self, name: str) -> Int:
        real_D = self._real(name)
        outside = (real_D < 0) | (real_D > 1)
        if outside.any():
            raise FormatError(f"{name} holds {real_D[outside][0]}, it must lie in 0..1")
        bound_D = np.rint(np.ldexp(real_D, GATE_FRACTION)).astype(np.int64)
        return np.minimum(bound_D, LOWER_BOUND_MAX)

    def _gated(self, at: str, outer: Real, part: parts.GLU) -> Gated:
        assert part.up_proj is None
        gate, up, down = (f"{at}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
        enter = self._fold(at, outer, {gate: (gate, up)}, part.gate_proj.inputs)
        eps = part.down_proj.norm_eps
        assert eps is not None
        leave = self._fold(down, None, {down: (down,)}, part.down_proj.inputs, eps=eps)
        return Gated(at, enter, leave)

    def _forest(self, at: str, outer: Real, part: parts.FFF) -> Forest:
        rows, scales = self._reader.rows(at)
        assert scales is not None
        w_in, w_out = (np.ascontiguousarray(rows[:, way]).astype(np.int8) for way in (0, 1))
        weight = self._inner(outer, self._real(f"{at}.norm_in.weight"))
        bits = self._formats.weight_bits
        norm_out = Weight.of(self._real(f"{at}.norm_out.weight"), bits)
        linears = [
            Linear(f"{at}.{way}", values, float(scale))
            for way, values, scale in zip(("w_in", "w_out"), (w_in, w_out), scales, strict=True)
        ]
        enter = Branch(f"{at}.w_in", weight, (linears[0],))
        leave = Branch(f"{at}.w_out", norm_out, (linears[1],))
        return Forest(
            at,
            Fold(at, Weight.of(outer, bits), part.size, (enter,)),
            Fold(leave.name, Weight.of_ones(1), part.active_rows, (leave,), part.norm_eps),
            part.trees,
            part.depth,
        )

    def _fold(
        self,
        name: str,
        outer: Real | None,
        branches: Branches,
        inputs: int,
        eps: float = 0.0,
        gate_eps: float = 0.0,
    ) -> Fold:
        """outer: w1, None for a norm without weights. Two linears of one branch are the halves of
        its rows."""
        root = Weight.of_ones(inputs)
        if outer is not None:
            root = Weight.of(outer, self._formats.weight_bits)
        made = []
        for source, names in branches.items():
            inner = self._real(f"{source}.norm.weight")
            weight = self._inner(np.ones(inputs) if outer is None else outer, inner)
            made.append(Branch(source, weight, self._linears(source, names)))
        return Fold(name, root, inputs, tuple(made), eps, gate_eps)

    def _inner(self, outer: Real, inner: Real) -> Weight:
        """w1 * w2; 0 where w1 is rounded to 0, so that no product is larger than w1 lets it be."""
        bits = self._formats.weight_bits
        kept = Weight.of(outer, bits).values != 0
        return Weight.of(outer * inner * kept, bits)

    def _linears(self, source: str, names: tuple[str, ...]) -> tuple[Linear, ...]:
        values, (scale,) = self._reader.ternary(source)
        halves = np.split(values, len(names))
        return tuple(
            Linear(name, half, float(scale)) for name, half in zip(names, halves, strict=True)
        )

    def _real(self, name: str) -> Real:
        return self._reader.read_float32(name).astype(np.float64)
