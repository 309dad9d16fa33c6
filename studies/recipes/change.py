"""What a cell of the second stay changes while it trains, beside its options.

The package trains none of this; `trainer.py` does, around the package's model and micro-step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nomatmul.train.config import TrainConfig
from studies.compare.plan import Cell
from studies.recipes.recurrences import MIXERS


@dataclasses.dataclass(frozen=True)
class Change:
    """All at their defaults: the run of the package, bit for bit.

    dense: share of the steps, from the start, whose weights are not rounded. teacher: directory of
    a model beside the others whose distribution is `weight` of the targets, while weights are
    rounded; start: one whose tensors replace the drawn ones of equal names and shapes. group: each
    row has a scale for so many inputs (0: a matrix has one); inputs stay int8 a token. mixer: in
    place of MLGRU (`recurrences.py`), in each `every`-th layer.

    What was tried and lost (Muon, relu^2, a short convolution, stages of rate and decay, how the
    ternary phase begins) stands in page.md with the commits that run it.
    """

    dense: float = 0.0
    teacher: str = ""
    weight: float = 1.0
    start: str = ""
    group: int = 0
    mixer: str = ""
    every: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.dense <= 1, self.dense
        assert 0 <= self.weight <= 1, self.weight
        assert self.mixer in ("", *MIXERS), self.mixer
        assert not (self.mixer and (self.teacher or self.dense or self.group)), "not tried"

    @property
    def needs(self) -> list[str]:
        """Directories of models that must be there before the run begins."""
        return [name for name in (self.teacher, self.start) if name]

    def to_dict(self) -> dict[str, object]:
        """What differs from the defaults."""
        default = Change()
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v != getattr(default, k)}


@dataclasses.dataclass(frozen=True)
class ChangedCell(Cell):
    """A cell whose `config` may hold a `change` beside the fields of a TrainConfig.

    There, because all of `config` is in the identity of a run.
    """

    @property
    def models(self) -> Path:
        """Where the models lie that cells leave to each other."""
        return Path(self.train[0]).parent / "models"

    @property
    def change(self) -> Change:
        return Change(**self.config.get("change", {}))

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig.from_dict({k: v for k, v in self.config.items() if k != "change"})
