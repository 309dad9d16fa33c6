"""What several commands that train are asked alike."""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.cli.options import json_option, option


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts are cut into documents."""

    text_field: str = option("text", metavar="NAME", help="field of JSON and parquet rows")
    document_start: str | None = option(
        None,
        metavar="REGEX",
        help="a line that matches starts a new document of a text file, and is its first line",
    )
    drop_document_start: bool = option(
        False, help="leave that line out: for markers such as <|endoftext|>, else learnt as text"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(TextOptions):
    """And how a run goes."""

    tokens: str | None = option(
        None, metavar="DIR", help="where token shards are kept (default: in the run's directory)"
    )
    workers: int | None = option(
        None, metavar="N", help="processes that tokenise (default: one a usable CPU)"
    )
    time_limit: float | None = option(
        None, metavar="SECONDS", help="train so long instead; the schedule follows the clock"
    )
    seed: int | None = option(
        None, metavar="S", help="seed of the data's order, and of weights that are drawn"
    )
    device: str = option("auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1")
    resume: str = option("auto", metavar="MODE", help="auto continues a run, never starts anew")
    override_config: bool = option(False, help="continue although the settings differ")
    force: bool = option(False, help="train although memory seems too small")
    quiet: bool = option(False, help="no progress bar")
    json: bool = json_option()
    collective_timeout: float = option(
        600.0,
        metavar="SECONDS",
        help="with torchrun: give up when a process has not answered for so long",
    )
