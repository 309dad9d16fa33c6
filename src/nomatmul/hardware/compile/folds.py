"""The instructions of a fold: from a vector to quantised activations and the factors of a product.

A fold (reference/integer/folds.py) is a norm, the inner norms and quantisers of the linears behind
it. Its weights come out of the stream; its scalar arithmetic is repeated operation by operation.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np

from nomatmul.hardware import isa
from nomatmul.hardware.compile.image import Image
from nomatmul.hardware.design import Design
from nomatmul.hardware.isa import Instruction
from nomatmul.reference.integer.folds import Fold
from nomatmul.reference.integer.model import IntegerModel
from nomatmul.reference.integer.numerics import Int
from nomatmul.reference.integer.run import LARGEST, ONE
from nomatmul.reference.integer.scalar import Scalar

Pair = tuple[int, int]  # a scalar constant, (m, e)

# Scalar registers: factors of a product's slots, values on the way, then constants: SPARE for those
# that one instruction takes, the others for those that many take.
FACTORS, _A, _SQUARE, _MEAN, _GATE, _ROOT, _R, _SPARE, _KEPT = 0, 3, 4, 5, 6, 7, 8, 9, 10
_MOST_SLOTS = 3


@dataclass(frozen=True)
class Step:
    """An instruction, and the names of the values that it leaves."""

    instruction: Instruction
    values: tuple[str, ...] = ()


def pair(scalar: Scalar) -> Pair:
    """The scalar of a constant as Python's numbers."""
    return int(scalar.m), int(scalar.e)


class FoldWriter:
    """Appends the instructions of folds to `steps` and their weights to the image.

    Constants that many instructions take are kept in registers, others are loaded where they are
    needed.
    """

    def __init__(self, model: IntegerModel, design: Design, image: Image) -> None:
        self._model, self._design, self._image = model, design, image
        self.steps: list[Step] = []
        self._kept = self._most_used()

    def _keep_constants(self) -> None:
        for register, constant in self._kept.items():
            self._emit(isa.Sconst(_KEPT + register, *constant))

    def _most_used(self) -> dict[int, Pair]:
        """{number of a kept register: constant}: those that most instructions take."""
        uses: Counter[Pair] = Counter()
        for constants in self._model.constants.values():
            scalars = [constants.mean, constants.eps, constants.gate, *constants.factors.values()]
            uses.update(map(pair, scalars))
            uses.update([pair(LARGEST)] * len(constants.factors) + [pair(ONE)])
        uses.pop((0, 0), None)
        room = isa.SCALARS - _KEPT
        often = [constant for constant, count in uses.most_common(room) if count > 1]
        return dict(enumerate(dict.fromkeys([pair(ONE), pair(LARGEST), *often[: room - 2]])))

    def _emit(self, instruction: Instruction, *values: str) -> None:
        self.steps.append(Step(instruction, values))

    def _patch(self, index: int, **fields: int) -> None:
        step = self.steps[index]
        changed = dataclasses.replace(step.instruction, **fields)
        self.steps[index] = Step(changed, step.values)

    def _up(self, count: int) -> int:
        """The next multiple of what vectors begin at."""
        unit = max(self._design.element_lanes, 4)
        return -(-count // unit) * unit

    def _fits(self, name: str, need: int, what: str) -> None:
        limit = getattr(self._design, name)
        if need > limit:
            raise ValueError(f"the model needs {need} {what}, and the design's {name} is {limit}")

    def _fold(
        self, fold: Fold, src: int, extra: dict[str, Int], gate: int | None = None
    ) -> dict[str, int]:
        """Load the weights of a fold (and `extra` vectors), and all of it up to its product."""
        vectors = {} if fold.root.ones else {"root": fold.root.values}
        vectors |= {branch.name: branch.weight.values for branch in fold.branches} | extra
        at, end = {}, 0
        for name, values in vectors.items():
            at[name], end = end, end + self._up(len(values))
        self._fits("parameter_words", end, f"parameters for {fold.name}")
        loaded = np.zeros(end, "<u2")
        for name, values in vectors.items():
            loaded[at[name] : at[name] + len(values)] = values.astype(np.int64) & 0xFFFF
        self._image.add(f"{fold.name}.parameters", "parameters", loaded)
        self._emit(isa.Loadp(0, end))
        self._scalars(fold, src, at, gate)
        return at

    def _scalars(self, fold: Fold, src: int, at: dict[str, int], gate: int | None = None) -> None:
        """From a vector to its quantised forms and the factors of their products."""
        self._inverse_root(fold, src, at, gate)
        slots, beats = len(fold.linears()), self._design.beats(fold.inputs)
        self._fits("activation_beats", slots * beats, f"beats of activations for {fold.name}")
        slot = 0
        for branch in fold.branches:
            name, count, w = branch.name, fold.inputs, at[branch.name]
            self._emit(isa.Scan(_A, src, count, w), f"{name}.scan")
            self._emit(isa.Sdiv(_R, self._constant(LARGEST), _A), f"{name}.inverse")
            for number in range(len(branch.linears)):
                to = (slot + number) * beats
                self._emit(isa.Quant(to, src, count, _A, _R, w), f"{name}.quantised")
            for linear in branch.linears:
                factor, m = self._model.constants[fold.name].factors[linear.name], FACTORS + slot
                self._emit(isa.Smul(m, _A, self._constant(factor)), f"{linear.name}.scaled")
                self._emit(isa.Smul(m, m, _ROOT), f"{linear.name}.factor")
                slot += 1
        assert slot <= _MOST_SLOTS

    def _inverse_root(self, fold: Fold, src: int, at: dict[str, int], gate: int | None) -> None:
        name, constants = fold.name, self._model.constants[fold.name]
        self._square(f"{name}.root", _SQUARE, src, fold.inputs, at.get("root"))
        if gate is not None:
            self._square(f"{name}.gate", _GATE, gate, fold.inputs, None)
        self._emit(isa.Smul(_MEAN, _SQUARE, self._constant(constants.mean)), f"{name}.root.mean")
        if gate is not None:
            self._emit(isa.Smul(_GATE, _GATE, self._constant(constants.gate)), f"{name}.gate.mean")
            self._emit(isa.Sadd(_MEAN, _MEAN, _GATE), f"{name}.root.sum")
        if fold.eps:
            self._emit(isa.Sadd(_MEAN, _MEAN, self._constant(constants.eps)), f"{name}.root.eps")
        self._emit(isa.Ssqrt(_ROOT, _MEAN), f"{name}.root")
        self._emit(isa.Sdiv(_ROOT, self._constant(ONE), _ROOT), f"{name}.root.inverse")

    def _square(self, name: str, to: int, src: int, count: int, w: int | None) -> None:
        """w: address of the weights, None for ones."""
        at, ones = 0 if w is None else w, w is None
        self._emit(isa.Scan(_A, src, count, at, ones), f"{name}.scan")
        self._emit(isa.Sumsq(to, src, count, _A, at, ones), f"{name}.square")

    def _constant(self, scalar: Scalar) -> int:
        """A register that holds a constant; it is loaded unless it is kept in one."""
        constant = pair(scalar)
        for register, kept in self._kept.items():
            if kept == constant:
                return _KEPT + register
        self._emit(isa.Sconst(_SPARE, *constant))
        return _SPARE
