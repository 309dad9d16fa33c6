"""What the engine thread counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Counts since the start, and what is going on now.

    running: choices that read or write. waiting: jobs of which a choice has not begun. Of jobs:
    submitted, refused (Busy), and of submitted ones that are over finished, cancelled, timed_out,
    failed (a choice ended with "error"), shut_down. Of tokens: prompt_tokens of submitted jobs,
    cached_tokens and computed_tokens of prompts that were read, completion_tokens; reread_tokens of
    what is no job's (`Scheduler.read_again`). Of turns of the engine thread that step a model for
    jobs, all its other work in them included: steps, step_s, longest_step_s.
    """

    running: int = 0
    waiting: int = 0
    max_streams: int = 0
    max_queue: int = 0
    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0
    shut_down: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0
    reread_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    longest_step_s: float = 0.0
