"""How many threads torch may use here."""

from __future__ import annotations

import torch

from nomatmul.formats.cpus import usable_cpus


def limit_threads() -> None:
    """Take no more threads than the process may use CPUs; a lower setting stays as it is.

    OpenMP knows the affinity mask, but not the quota of a control group.
    """
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
