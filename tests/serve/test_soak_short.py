"""The soak of `make soak`, shortened: clients of all kinds, no fault."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from support.soak import soak
from support.soak_clients import BEHAVIOURS


def test_clients_of_all_kinds_get_what_they_were_promised(tmp_path):
    with (tmp_path / "soak.log").open("w") as log:
        world = soak(tmp_path, seconds=15, clients=24, known=40, log=log)
    assert not world.faults, "\n".join(world.faults[:10])
    assert set(world.done) == {behaviour.__name__ for behaviour in BEHAVIOURS}
    assert world.done["honest"] >= 20
    assert world.left.total() >= 3
