"""What a training run is: one frozen dataclass and its checks.

A recipe (recipes.py) is a function that returns a `TrainConfig`; overrides.py replaces fields by
name. Field names are the option list of the trainer and are frozen by a test: renaming one breaks
other people's scripts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig, drop_retired

SCHEDULES = ("cosine_halved", "cosine", "linear", "constant", "triangle")
PRECISIONS = ("auto", "float32", "bfloat16")
RECOMPUTES = ("auto", "none", "mlp", "block")
TREES = ("", "naive", "masked", "triton", "native")
COMPILES = (
    "auto", "graph", "on", "off",
    "default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs",
)  # fmt: skip
LARGEST_SEED = 2**63 - 1  # torch's generators take no larger one

# How a step is cut to fit a machine. The batch stays the same, results differ by float rounding:
# a run may go on with other values on another machine.
MACHINE_FIELDS = frozenset({"micro_batch_size", "recompute", "loss_chunks", "fff_implementation"})

FFF_FIELDS = ("fff_balance", "fff_route_gradient")

# Options that nomatmul no longer has, and their values in runs that did not use them.
RETIRED_OPTIONS = {"fff_hardening": 0.0, "fff_region_leak": 0.0, "fff_hard_at": 0.0}

# Options that older versions did not have, and what they did.
LATER_OPTIONS = {
    "full_precision": 0.0, "teacher_share": 0.0, "temperature": 1.0, "teacher_top": 0,
}  # fmt: skip

# Beyond them float32 keeps nothing of what distinguishes one token from another.
TEMPERATURES = (0.01, 100.0)

# Fields that change what is printed and kept, never what is learnt: free to differ on a resume.
FREE_FIELDS = MACHINE_FIELDS | frozenset(
    {
        "log_interval",
        "eval_interval",
        "eval_tokens",
        "sample_interval",
        "sample_tokens",
        "sample_prompt",
        "diagnostics_interval",
        "checkpoint_interval",
        "checkpoint_seconds",
        "checkpoint_keep",
    }
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, apart from the data. Raises ValueError for impossible values.

    Lengths are tokens, batch sizes sequences, intervals optimiser steps (0 switches one off).
    """

    recipe: str
    model: ModelConfig
    # batches
    sequence_length: int = 2048
    batch_size: int = 8  # sequences an optimiser step
    micro_batch_size: int = 8  # sequences a forward pass of one device
    batch_ramp: float = 0.0  # share of the run over which the batch grows to batch_size
    steps: int = 1000  # optimiser steps; with a time limit the most that are taken
    time_limit: float = 0.0  # seconds in the training loop; > 0: the schedule follows the clock
    seed: int = 0
    # optimiser
    learning_rate: float = 4e-3
    schedule: str = "linear"
    warmup_steps: int = 100
    final_rate: float = 0.0  # rate at the end as a share of learning_rate
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01  # matrices only
    clip_norm: float = 1.0  # 0: no clipping
    z_loss: float = 0.0  # weight of the mean squared log-partition, which keeps logits small
    mask_share: float = 0.25  # encoders: share of each sequence that is to be guessed
    # ternary layers: share of the run, from its start, in which weights are not rounded
    full_precision: float = 0.0
    # a teacher's distribution: its weight among the targets, and what divides both models' logits
    teacher_share: float = 0.0
    temperature: float = 1.0
    teacher_top: int = 0  # its likeliest tokens, kept on disk with the rest's mass; 0: it is asked
    # fast feedforward layers, in training only
    fff_balance: float = 0.0  # weight of the loss for unequal use of the sides of each decision
    fff_route_gradient: bool = False  # let the gradient reach hard decisions
    # execution
    precision: str = "auto"
    compile: str = "auto"  # auto (on CUDA), graph, on, off, or a torch.compile mode
    deterministic: bool = True
    # what the backward pass computes again: none, mlp (the channel mixer's product), block, or
    # auto (the first of them that fits into the device's memory)
    recompute: str = "auto"
    fff_implementation: str = ""  # how trees are computed; "": what serves the device best
    loss_chunks: int = 1  # the head and the loss in this many parts: less memory, equal result
    # data
    valid_fraction: float = 0.01  # held out from the end, unless a held-out text is given
    # reports
    log_interval: int = 10
    eval_interval: int = 250
    eval_tokens: int = 1_000_000  # at most this many held-out tokens an evaluation
    sample_interval: int = 1000
    sample_tokens: int = 100
    sample_prompt: str = ""
    diagnostics_interval: int = 250
    # checkpoints
    checkpoint_interval: int = 1000
    checkpoint_seconds: float = 300.0  # also after this much time; 0: by steps only
    checkpoint_keep: int = 2

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "micro_batch_size", "steps", "log_interval"):
            _at_least(self, name, 1)
        for name in ("loss_chunks", "checkpoint_keep", "eval_tokens"):
            _at_least(self, name, 1)
        for name in (
            "time_limit", "seed", "warmup_steps", "final_rate", "weight_decay", "clip_norm",
            "z_loss", "batch_ramp", "teacher_share", "teacher_top", "fff_balance",
            "eval_interval", "sample_interval", "sample_tokens",
            "diagnostics_interval", "checkpoint_interval", "checkpoint_seconds",
        ):  # fmt: skip
            _at_least(self, name, 0)
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed {self.seed} must be at most {LARGEST_SEED}")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            if value <= 0 or not math.isfinite(value):
                raise ValueError(f"{name} {value} must be above 0")
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise ValueError(f"temperature {self.temperature} must be from {low} to {high}")
        for name in ("beta1", "beta2", "valid_fraction", "full_precision"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} {value} must be in [0, 1)")
        for name in ("batch_ramp", "teacher_share", "final_rate"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at most 1")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        self._check_words()
        self._check_against_model()

    def _check_words(self) -> None:
        for name, choices in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("recompute", RECOMPUTES),
            ("compile", COMPILES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")
        if self.fff_implementation not in TREES:
            raise ValueError(
                f"fff_implementation {self.fff_implementation!r}: choose one of "
                f"{', '.join(TREES[1:])}, or nothing"
            )
        try:
            self.sample_prompt.encode("utf-8")
        except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
            raise ValueError(f"sample_prompt {self.sample_prompt!a} is no UTF-8 text") from None

    def _check_against_model(self) -> None:
        if not self.model.causal:
            self._check_masking()
        elif self.mask_share != type(self).mask_share:
            raise ValueError(f"mask_share {self.mask_share} belongs to encoders (model.causal=no)")
        self._check_trees()
        if self.full_precision:
            self._check_full_precision()
        limit = self.model.max_position_embeddings
        if not architecture_of(self.model).recurrent and self.sequence_length > limit:
            raise ValueError(
                f"sequence_length {self.sequence_length} is above "
                f"model.max_position_embeddings {limit}"
            )
        if self.targets % self.loss_chunks:
            what = "sequence_length" if self.model.causal else "masked tokens"
            raise ValueError(
                f"loss_chunks {self.loss_chunks} must divide {what} x micro_batch_size "
                f"({self.targets})"
            )

    def _check_trees(self) -> None:
        for name in FFF_FIELDS if not architecture_of(self.model).trees() else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name} {getattr(self, name)} belongs to fast feedforward layers, but "
                    f"model.channel_mixer is {self.model.channel_mixer!r}"
                )

    def _check_full_precision(self) -> None:
        if not architecture_of(self.model).is_ternary:
            raise ValueError(
                f"full_precision {self.full_precision} belongs to ternary layers, but "
                f"model.linear is {self.model.linear!r}"
            )
        if self.steps - self.full_precision * self.steps < 1:
            raise ValueError(
                f"full_precision {self.full_precision} of {self.steps} steps leaves none for "
                "ternary weights"
            )

    def _check_masking(self) -> None:
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share {self.mask_share} must be in (0, 1)")
        if self.masked_tokens < 1:
            raise ValueError(
                f"mask_share {self.mask_share} of sequence_length {self.sequence_length} "
                "masks no token"
            )

    @property
    def masked_tokens(self) -> int:
        """Tokens of each sequence that an encoder is to guess; the same number in all."""
        return round(self.mask_share * self.sequence_length)

    @property
    def targets(self) -> int:
        """Tokens that a micro-batch predicts."""
        length = self.sequence_length if self.model.causal else self.masked_tokens
        return length * self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the model under "model"; `from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["model"] = self.model.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises ValueError naming unknown or missing fields.

        Runs of before `recompute` have the switch activation_checkpointing in its place.
        """
        values = drop_retired(values, RETIRED_OPTIONS)
        if (old := values.pop("activation_checkpointing", None)) is not None:
            values.setdefault("recompute", "block" if old else "none")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"unknown training option {unknown[0]!r}")
        missing = sorted({"recipe", "model"} - set(values))
        if missing:
            raise ValueError(f"training config lacks {missing[0]!r}")
        return cls(**{**values, "model": ModelConfig.from_dict(values["model"])})


def _at_least(config: TrainConfig, name: str, low: int) -> None:
    value = getattr(config, name)
    if not math.isfinite(value) or value < low:
        raise ValueError(f"{name} {value} must be at least {low}")


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Fields that decide the result and differ: "name: old -> new", "model.name: old -> new"."""
    a, b = _flat(old), _flat(new)
    names = [name for name in a if name not in FREE_FIELDS]
    return [f"{name}: {a[name]} -> {b[name]}" for name in names if a[name] != b.get(name)]


def _flat(config: TrainConfig) -> dict[str, Any]:
    values = config.to_dict() | {"model": None}
    # not ModelConfig.to_dict, which leaves out newer fields at their default
    for field in dataclasses.fields(config.model):
        values[f"model.{field.name}"] = getattr(config.model, field.name)
    return values
