"""The instructions of a model, beside the regions of memory that they take.

The program is

    constants that many instructions take (SCONST)
    loop: TOKEN, EMBED, STREAM body, the layers
    SKIP loop, STREAM head, the head, JUMP loop

and repeats, instruction by instruction, what `reference.integer` computes: each one has the names
of the values in that model's trace (reference/integer/trace.py) that it leaves in a memory.

Vector memory holds the residual x, then u (what a mixer makes of its gates; of trees the activated
nodes) and g. Parameters are loaded fold by fold, from address 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nomatmul.hardware import isa
from nomatmul.hardware.compile import image as layout
from nomatmul.hardware.compile import trees
from nomatmul.hardware.compile.folds import FACTORS, FoldWriter, Step
from nomatmul.hardware.compile.image import Image, Region
from nomatmul.hardware.design import Design
from nomatmul.hardware.isa import Epilogue
from nomatmul.reference.integer.folds import Fold, Forest, Gated, Mixer
from nomatmul.reference.integer.model import IntegerModel


@dataclass(frozen=True)
class Plan:
    """Addresses in elements: of the residual, of u, of g, of the state of each layer."""

    x: int
    u: int
    g: int
    state: tuple[int, ...]


class Builder(FoldWriter):
    """Writes a model's stream to an image and makes the program that takes it."""

    def __init__(self, model: IntegerModel, design: Design, image: Image) -> None:
        super().__init__(model, design, image)
        self._plan = self._planned()
        # records that are fetched lie behind the stream: (index of an instruction, what adds them)
        self._later: list[tuple[int, Callable[[], Region]]] = []

    def build(self) -> list[Step]:
        """The whole program; the image then holds all that it reads."""
        self._keep_constants()
        loop = len(self.steps)
        network = self._model.network
        self._emit(isa.Token(tokens=len(network.embedding)))
        self._embed()
        stream = self._begin_stream()
        for number, layer in enumerate(network.layers):
            self._mixer(layer.mixer, number)
            if isinstance(layer.channel, Gated):
                self._gated(layer.channel, number)
            elif layer.channel is not None:
                self._forest(layer.channel)
        self._end_stream(*stream)
        self._emit(isa.Skip(loop))
        stream = self._begin_stream()
        self._head()
        self._end_stream(*stream)
        self._emit(isa.Jump(loop))
        for index, add in self._later:
            region = add()
            self._patch(index, base=region.address)
        return self.steps

    # -- what lies where --------------------------------------------------------------------------

    def _planned(self) -> Plan:
        network = self._model.network
        x, inner, gates, states = self._up(network.size), 0, 0, []
        for layer in network.layers:
            gates = max(gates, self._up(layer.mixer.leave.inputs))
            inner = max(inner, self._up(layer.mixer.leave.inputs))
            states.append(self._up(layer.mixer.leave.inputs))
            if layer.channel is not None:
                inner = max(inner, self._up(layer.channel.leave.inputs))
        self._fits("vector_words", x + inner + gates, "elements of vectors")
        self._fits("state_words", sum(states), "elements of state")
        return Plan(0, x, x + inner, tuple(int(at) for at in np.cumsum([0, *states[:-1]])))

    # -- instructions -----------------------------------------------------------------------------

    def _begin_stream(self) -> tuple[int, int]:
        self._emit(isa.Stream(0, 1))
        return len(self.steps) - 1, self._image.words

    def _end_stream(self, index: int, first: int) -> None:
        self._patch(index, address=first, words=self._image.words - first)

    def _embed(self) -> None:
        network, scale = self._model.network, self._model.embedding_scale
        words = self._design.piece_words(8 * (8 + network.size))
        fraction = self._model.fractions.residual
        self._emit(isa.Embed(0, words, words, network.size, self._plan.x, fraction), "embed")
        scales = np.stack([scale.m, scale.e], axis=-1).astype(np.int32)
        self._later.append(
            (
                len(self.steps) - 1,
                lambda: self._image.add(
                    "embedding",
                    "embedding",
                    layout.embedding_records(network.embedding, scales, self._design),
                ),
            )
        )

    def _mixer(self, part: Mixer, number: int) -> None:
        plan, fractions, kept = self._plan, self._model.fractions, self._design.vector_fraction
        extra = {} if part.lower_bound is None else {"bound": part.lower_bound}
        at = self._fold(part.enter, plan.x, extra)
        product = isa.Product(
            **self._rows(part.enter),
            epilogue=Epilogue.MLGRU,
            dst=plan.u,
            aux=plan.state[number],
            lb=at.get("bound", 0),
            bounded=part.lower_bound is not None,
            fraction=kept,
            u_shift=2 * kept - fractions.mixer[number],
            dst2=plan.g,
        )
        self._emit(product, *(f"{part.name}.{value}" for value in ("h", "g", "u")))
        self._fold(part.leave, plan.u, {}, gate=plan.g)
        self._residual(part.leave, f"{part.name}.residual")

    def _gated(self, part: Gated, number: int) -> None:
        kept = self._design.vector_fraction
        self._fold(part.enter, self._plan.x, {})
        product = isa.Product(
            **self._rows(part.enter),
            epilogue=Epilogue.GLU,
            dst=self._plan.u,
            fraction=kept,
            u_shift=2 * kept - self._model.fractions.channel[number],
        )
        self._emit(product, f"{part.name}.u")
        self._fold(part.leave, self._plan.u, {})
        self._residual(part.leave, f"{part.name}.residual")

    def _residual(self, fold: Fold, value: str) -> None:
        x = self._plan.x
        product = isa.Product(
            **self._rows(fold),
            epilogue=Epilogue.ADD,
            dst=x,
            aux=x,
            fraction=self._model.fractions.residual,
        )
        self._emit(product, value)

    def _head(self) -> None:
        fold = self._model.network.head
        self._fold(fold, self._plan.x, {})
        fraction = self._model.fractions.logits
        product = isa.Product(**self._rows(fold), epilogue=Epilogue.LOGITS, fraction=fraction)
        self._emit(product, "logits")

    def _forest(self, part: Forest) -> None:
        trees.check_trees(part, self._design)
        plan, design = self._plan, self._design
        visits, beats = part.leave.inputs, design.beats(part.enter.inputs)
        self._fold(part.enter, plan.x, {})
        (gathered,) = part.leave.branches
        ((_, w_in),), ((_, w_out),) = part.enter.linears(), part.leave.linears()
        stride = design.words(beats * design.beat_bits) + 1
        walk = isa.Walk(
            trees=part.trees,
            depth=part.depth,
            base=0,
            stride=stride,
            beats=beats,
            act=0,
            m=FACTORS,
            dst=plan.u,
            wout=0,
            fraction=design.vector_fraction,
        )
        self._emit(walk, f"{part.name}.h", f"{part.name}.norm_out")
        self._add_later(
            w_in.name,
            "nodes",
            lambda: layout.node_records(w_in.values, gathered.weight.values, design),
        )
        self._scalars(part.leave, plan.u, {gathered.name: 0})
        columns = w_out.values.shape[1]
        combine = isa.Combine(
            base=0,
            stride=trees.out_words(columns, design),
            count=visits,
            rows=columns,
            act=0,
            m=FACTORS,
            dst=plan.x,
            aux=plan.x,
            fraction=self._model.fractions.residual,
        )
        self._emit(combine, f"{part.name}.residual")
        self._add_later(w_out.name, "out", lambda: trees.out_records(w_out.values, design))

    def _add_later(self, name: str, kind: str, records: Callable[[], np.ndarray]) -> None:
        self._later.append((len(self.steps) - 1, lambda: self._image.add(name, kind, records())))

    def _rows(self, fold: Fold) -> dict[str, Any]:
        """The fields of a product that say what it takes off the stream, which gets its rows."""
        linears = [linear for _, linear in fold.linears()]
        name = linears[0].name if len(linears) == 1 else fold.name
        rows = layout.interleaved([linear.values for linear in linears], self._design)
        self._image.add(f"{name}.rows", "rows", rows)
        beats = self._design.beats(fold.inputs)
        return {"rows": len(rows), "beats": beats, "slots": len(linears), "act": 0, "m": FACTORS}
