"""How much memory a run needs: said before work, and again if the device runs out.

What a step needs is counted from the config: 16 bytes a parameter (weight, gradient, two moments,
float32) shared by the ranks, what FSDP gathers, one byte for each ternary weight (in full precision
those of its type), what the layers keep for the backward pass, and the logits of one chunk. What is
kept was counted from the tensors that autograd saves (bfloat16 autocast, not compiled; compiling
saves some of it). On a CPU the process may use what `formats.host_memory` says, and activations are
float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.host_memory import available_memory
from nomatmul.models.block import fused_forms
from nomatmul.models.layers import is_plain
from nomatmul.train.config import TrainConfig
from nomatmul.train.parallelize import blocks_in_group
from nomatmul.train.plan import DevicePlan
from nomatmul.train.ranks import Ranks
from nomatmul.train.teacher_files import TeacherSize

MODES = ("none", "mlp", "block")

# Bytes a token that one layer keeps: (times hidden_size, times intermediate_size).
_KEPT = {
    "fused": {"none": (10, 4), "mlp": (10, 0), "block": (4, 0)},
    "plain": {"none": (72, 16), "mlp": (60, 0), "block": (2, 0)},
    "dense": {"none": (38, 14), "mlp": (26, 0), "block": (2, 0)},
}
# Of the one layer at work, the larger of its two halves.
_WORKING = {"fused": (24, 12), "plain": (72, 24), "dense": (38, 20)}
_LOGIT_BYTES = 10  # bfloat16 and float32 logits and their gradient
# Of a teacher's logits and what is made of them; plain PyTorch keeps seven tables of a chunk.
_TAUGHT, _TAUGHT_HOST = 6, 28
_FUSED_CHUNK = 2048  # tokens of a chunk of the fused loss when loss_chunks is 1
_CONTEXT = 1 << 30  # the driver, libraries' workspaces, holes between tensors
_HOST_CONTEXT = 1 << 28  # the same on a CPU, where the libraries are loaded already
_GIB = 1 << 30
FORCE = "--force tries it anyway"
_DOUBT = 1.5  # estimates up to so many times what a GPU has free are tried


class OutOfMemoryError(RuntimeError):
    """The device's memory is too small for this run; the message says what would fit."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of memory on each of `ranks` devices."""

    states: int
    gathered: int
    ternary: int
    activations: int
    logits: int
    host: bool = False  # a CPU's
    teacher: int = 0  # its weights
    looking: int = 0  # what it computes

    @property
    def certain(self) -> int:
        """What no estimate can be wrong about."""
        return self.states + self.gathered + self.teacher

    @property
    def total(self) -> int:
        parts = self.certain + self.ternary + self.activations + self.logits + self.looking
        return parts + (_HOST_CONTEXT if self.host else _CONTEXT)

    def text(self) -> str:
        """For people."""
        taught = self.teacher + self.looking
        other = self.total - self.states - self.activations - self.logits - taught
        return (
            f"{gib(self.total)} (optimiser, weights and gradients {gib(self.states)}, "
            f"activations {gib(self.activations)}, logits {gib(self.logits)}, "
            + (f"teacher {gib(taught)}, " if taught else "")
            + f"other {gib(other)})"
        )


def estimate(
    config: TrainConfig,
    ranks: int,
    recompute: str,
    fused: bool = True,
    host: bool = False,
    teacher: TeacherSize | None = None,
) -> Estimate:
    """What a step of `config` needs on each of `ranks` devices with this recompute mode.

    fused: whether Triton's kernels serve (else plain PyTorch, which keeps much more). host: on a
    CPU, in float32 unless the config says otherwise. teacher: each device has all of it.
    """
    model = config.model
    parameters = model.param_count()
    tokens = config.micro_batch_size * config.sequence_length
    root, block = _group_sizes(model)
    kept = any(is_plain(linear) for linear in architecture_of(model).linears().values())
    ternary = parameters - model.vocab_size * model.hidden_size if kept else 0
    # Sharded: weights and gradients of the root and of two groups (one is prefetched) are whole.
    joined = min(2 * block * blocks_in_group(block), block * model.num_layers)
    gathered = 8 * (root + joined) if ranks > 1 else 0
    chunk = config.targets // config.loss_chunks
    early = fused or teacher is not None  # the head's gradient is made beside the loss
    if early and config.loss_chunks == 1:
        chunk = min(config.targets, _FUSED_CHUNK)
    head = 6 * model.vocab_size * model.hidden_size if early else 0
    looking = 0 if teacher is None else _looking_bytes(teacher, tokens, chunk, host)
    return Estimate(
        states=16 * parameters // ranks,
        gathered=gathered,
        ternary=ternary * _weight_bytes(config) if fused else 0,
        activations=activation_bytes(
            model, tokens, recompute, fused, wide=host and config.precision != "bfloat16"
        ),
        logits=chunk * model.vocab_size * _LOGIT_BYTES + head,
        host=host,
        teacher=0 if teacher is None else (4 if host or teacher.wide else 2) * teacher.parameters,
        looking=looking,
    )


def _looking_bytes(teacher: TeacherSize, tokens: int, chunk: int, host: bool) -> int:
    """What a teacher computes of so many tokens, without gradients: one layer, and its logits."""
    layer = tokens * (8 * teacher.hidden + 4 * teacher.intermediate)
    logits = chunk * teacher.rows * (_TAUGHT_HOST if host else _TAUGHT)
    return (4 if host else 2) * (layer + tokens * teacher.hidden) + logits


def _weight_bytes(config: TrainConfig) -> int:
    """Of each weight of a ternary layer, as the fused operations keep it through a step."""
    if not config.full_precision:
        return 1
    return 4 if config.precision == "float32" else 2


def activation_bytes(
    model: ModelConfig, tokens: int, recompute: str, fused: bool, wide: bool = False
) -> int:
    """What the layers keep of so many tokens for the backward pass; wide: in float32."""
    kind = "dense" if model.linear == "dense" else "plain"
    if fused and fused_forms(model)[0]:
        kind = "fused"
    kept, working = _KEPT[kind][recompute], _WORKING[kind]
    channels = [block.channel for block in architecture_of(model).blocks]
    neurons = [0 if channel is None else channel.neurons for channel in channels]
    width = max(model.hidden_size, model.num_heads * model.head_size)
    a_token = sum(kept[0] * width + kept[1] * count for count in neurons)
    a_token += max(working[0] * width, working[1] * max(neurons))
    a_token += 8 * model.hidden_size
    return tokens * a_token * (2 if wide else 1)


def _group_sizes(model: ModelConfig) -> tuple[int, int]:
    """(parameters of the root group, of one block)."""
    tables = 1 if model.tie_embeddings else 2
    root = tables * model.vocab_size * model.hidden_size
    return root, (model.param_count() - root) // model.num_layers


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The recompute mode of a run, and words for the case that memory does not last."""

    config: TrainConfig
    ranks: int
    recompute: str
    free: int | None = None  # bytes on the smallest device; None: not asked
    fused: bool = True
    host: bool = False
    teacher: TeacherSize | None = None

    def need(self, config: TrainConfig, ranks: int, recompute: str) -> Estimate:
        """What a step of another config, number of ranks or mode would take."""
        return estimate(config, ranks, recompute, self.fused, self.host, self.teacher)

    @contextlib.contextmanager
    def advising(self) -> Iterator[None]:
        """The device's own refusal becomes one line with advice."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". GPU")[0].removeprefix("CUDA out of memory. ")
            raise OutOfMemoryError(
                f"out of device memory ({reason.strip()}); {self.advice()}"
            ) from error
        except (RuntimeError, MemoryError) as error:  # of a CPU: torch has no type for it
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            raise OutOfMemoryError(f"out of memory; {self.advice()}") from error

    def advice(self) -> str:
        """How much is needed, how much there is, and what would fit."""
        need = self.need(self.config, self.ranks, self.recompute)
        here = f", {gib(self.free)} are free" if self.free is not None else ""
        return (
            f"about {need.text()} are needed{'' if self.host else ' on each device'} with "
            f"recompute={self.recompute}{here}; {self.what_fits()}"
        )

    def what_fits(self) -> str:
        """The mildest change by which the run would fit, in words."""
        # After a real refusal the estimate was too low: the next milder step must save something.
        current = self.need(self.config, self.ranks, self.recompute).total
        room = min(self.free if self.free is not None else current, current - 1)
        later = MODES[MODES.index(self.recompute) + 1 :]
        for mode in later:
            if self.need(self.config, self.ranks, mode).total <= room:
                return f"--set recompute={mode} would fit"
        micro = self.config.micro_batch_size // 2
        while micro:
            chunks = self.config.loss_chunks
            if self.config.sequence_length * micro % chunks:
                chunks = 1
            smaller = dataclasses.replace(self.config, micro_batch_size=micro, loss_chunks=chunks)
            fits_batch = self.config.batch_size % (micro * self.ranks) == 0
            if fits_batch and self.need(smaller, self.ranks, "block").total <= room:
                return f"--set recompute=block micro_batch_size={micro} would fit".replace(
                    " micro", " --set micro"
                )
            micro //= 2
        one = dataclasses.replace(self.config, micro_batch_size=1, batch_size=4096, loss_chunks=1)
        for ranks in () if self.host else (2, 4, 8, 16, 32, 64):
            if ranks > self.ranks and self.need(one, ranks, "block").total <= room:
                return (
                    f"{ranks} devices would fit (torchrun --nproc-per-node {ranks}, "
                    "recompute=block, micro_batch_size=1)"
                )
        return "no setting of this model fits: choose a smaller one or a shorter sequence_length"


def plan_memory(
    config: TrainConfig,
    plan: DevicePlan,
    ranks: Ranks,
    force: bool = False,
    teacher: TeacherSize | None = None,
) -> MemoryPlan:
    """Choose the recompute mode; refuse what surely does not fit. The same answer at every rank.

    Raises OutOfMemoryError when the parameters and the optimiser alone are too large for a device,
    or when the estimate is so far above what is free that it cannot be that wrong; force: not then.
    """
    host = plan.memory == "host"
    modes = MODES if config.recompute == "auto" else (config.recompute,)
    if host:
        modes = modes[:1]  # on a CPU `auto` is none: the same step whatever else the machine does
    free = free_memory(plan, int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.size))
    if free is None:
        return MemoryPlan(config, ranks.size, modes[0], host=host, teacher=teacher)
    free = int(-ranks.most(-free)[0])
    chosen = MemoryPlan(config, ranks.size, modes[-1], free, plan.kernels, host, teacher)
    needs = {mode: chosen.need(config, ranks.size, mode) for mode in modes}
    mode = next((mode for mode in modes if needs[mode].total <= free), modes[-1])
    chosen = dataclasses.replace(chosen, recompute=mode)
    if not force and too_little(needs[mode], free):
        raise OutOfMemoryError(
            f"too little memory: {chosen.advice()} ({FORCE})"
            if host
            else f"too little device memory: {chosen.advice()}"
        )
    return chosen


def too_little(need: Estimate, free: int) -> bool:
    """Whether a run surely does not fit, as far as an estimate can be sure.

    A GPU refuses what is too much; the kernel of a host ends processes, so there is no trying.
    """
    doubt = 1.0 if need.host else _DOUBT
    return need.certain > free or need.total > doubt * free


def free_memory(plan: DevicePlan, processes: int = 1) -> int | None:
    """Bytes that this process could still allocate on a device; None where nobody knows.

    On a CPU what the process may use is shared by so many `processes` of this machine.
    """
    if plan.memory == "device":
        return torch.cuda.mem_get_info(plan.device)[0]
    if plan.memory != "host":
        return None
    available = available_memory()
    return None if available is None else available // max(processes, 1)


def gib(count: float) -> str:
    """Bytes, for people."""
    return f"{count / _GIB:.1f} GiB"
