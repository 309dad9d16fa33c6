"""Fine-tuning encoders on classification tasks: GLUE, or a TSV file of one's own.

`finetune(model, task, data, out)` from Python, `nomatmul finetune` from a shell. Importing this
package is cheap: torch is imported when a run starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nomatmul._extras import require_train
from nomatmul.finetune.tasks import TASKS, Task, find_task

if TYPE_CHECKING:
    from nomatmul.finetune.run import FinetuneConfig, TaskReport, finetune

__all__ = ["TASKS", "FinetuneConfig", "Task", "TaskReport", "find_task", "finetune"]


def __getattr__(name: str) -> Any:
    if name not in ("FinetuneConfig", "TaskReport", "finetune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_train("fine-tuning")
    return getattr(importlib.import_module("nomatmul.finetune.run"), name)
