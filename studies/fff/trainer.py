"""A process of the pool of run.py: cells whose layers the package does not have, and all others."""

from __future__ import annotations

from typing import Any

import torch

from nomatmul.train.fff_training import choose_implementation, training_options
from nomatmul.train.model import build_model
from studies.compare import cell as compare_cell
from studies.compare.plan import Cell
from studies.fff.plan import exchange_of
from studies.fff.symmetric import exchange


class StudyTrainer(compare_cell.CellTrainer):
    """A CellTrainer that knows the endings -after, -tanh, -abs and -ternary of variants."""

    def _new_model(self) -> Any:
        model = super()._new_model()
        if name := exchange_of(self.cell.variant):
            exchange(model, name)
            model.to(self.device)
            choose_implementation(model, self.cell.implementation)
            model.set_fff_training(training_options(self.config))
        return model

    @torch.no_grad()
    def _new_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        drawn: Any = build_model(self.config.model)
        if name := exchange_of(self.cell.variant):
            exchange(drawn, name)
        fresh = drawn.state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(fresh[name])


if __name__ == "__main__":
    compare_cell.main(Cell, StudyTrainer)
