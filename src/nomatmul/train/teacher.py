"""A frozen model that looks at each micro-batch before its student does, and mixes into the loss.

It keeps what its head reads, at one address, and makes logits of it chunk by chunk while the
student's loss is computed (`ops.loss`). So a CUDA graph of the student's step reads the new hidden
states at every replay, and all logits of a micro-batch never exist at once.

Shape suffixes: B sequences, T steps, N tokens, E hidden size of the teacher, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nomatmul.models import CausalLM
from nomatmul.models.hf.loading import check_finite
from nomatmul.ops.loss import Taught, TeacherLogits
from nomatmul.train.model import no_progress_bars
from nomatmul.train.parallelize import compile_parts
from nomatmul.train.plan import DevicePlan, records_by_default
from nomatmul.train.teacher_files import TeacherFiles, find_teacher, first_line, not_causal

_PROBE = 8  # tokens of the texts by which a teacher is tried
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_NEAR = 1e-2  # a factor so near 1 is rounding
_PARTS = 64  # blocks are alike but for their numbers, by which torch.compile tells them apart


class Teacher:
    """A causal language model that is never trained and in no checkpoint.

    On a GPU with bfloat16 it computes in that, else in float32 whatever its file holds (a model of
    ours keeps float32 weights and runs under autocast as its student does). Each process of a
    training with several has all of it. vocab_size: the student's; rows of the head beyond it are
    left out, so that their probability is shared by the others.
    """

    def __init__(
        self, model: Any, files: TeacherFiles, plan: DevicePlan, vocab_size: int | None = None
    ) -> None:
        self.model, self.files, self.plan = model, files, plan
        self.vocab_size = files.entries if vocab_size is None else vocab_size
        assert files.entries <= self.vocab_size <= files.size.rows
        self.own = isinstance(model, CausalLM)
        self.head = model.get_output_embeddings()
        self._scale, self._cap = 1.0, 0.0  # what follows the head
        self._hidden_NE: Tensor | None = None
        self._source = TeacherLogits(lambda part, _: self.logits(part))

    @classmethod
    def open(
        cls, teacher: str | TeacherFiles, plan: DevicePlan, vocab_size: int | None = None
    ) -> Teacher:
        """Load a teacher onto the plan's device and try it.

        vocab_size: of the student; None for the entries of the tokenizer.
        Raises ValueError or OSError as `find_teacher`; ValueError for weights that are missing,
        damaged or not finite, for a model that looks at later tokens, and for one whose logits are
        no linear function of its last hidden states, but for a factor or a soft cap.
        """
        files = find_teacher(teacher) if isinstance(teacher, str) else teacher
        opened = cls(_load(files, plan), files, plan, vocab_size)
        opened._try()
        opened._compile()
        return opened

    def _compile(self) -> None:
        """Of ours, what torch.compile makes faster, unless the run asks for no such thing."""
        plan, wanted = self.plan, self.plan.compile is not None or self.plan.graph
        if plan.memory != "device" or not self.own or not wanted:
            return
        if not records_by_default(self.files.model_config, plan):
            torch._dynamo.config.recompile_limit = max(_PARTS, torch._dynamo.config.recompile_limit)
            compile_parts(self.model, "default")

    @property
    def sha256(self) -> str:
        return self.files.sha256

    @property
    def tokenizer_file(self) -> Any:
        return self.files.tokenizer_file

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def taught(self, share: float, temperature: float) -> Taught:
        """What the student's loss is told. The teacher must outlive it."""
        return Taught(self._source.number, share, temperature)

    @torch.no_grad()
    def look(self, x_BT: Tensor) -> None:
        """Read a micro-batch; `logits` then speaks of it. All of them have one shape."""
        hidden_NE = self._hidden(x_BT).flatten(0, 1)
        if self._hidden_NE is None:
            self._hidden_NE = torch.empty_like(hidden_NE, memory_format=torch.contiguous_format)
        assert self._hidden_NE.shape == hidden_NE.shape, "graphs read it at one address"
        self._hidden_NE.copy_(hidden_NE)

    @torch.no_grad()
    def logits(self, part: slice) -> Tensor:
        """[n, vocab_size], any strides, for these of the B x T tokens that were looked at last."""
        assert self._hidden_NE is not None, "the teacher looks before the student does"
        return self._logits(self._hidden_NE[part])[:, : self.vocab_size]

    def _arithmetic(self) -> contextlib.AbstractContextManager[None]:
        return self.plan.autocast() if self.own else contextlib.nullcontext()

    def _hidden(self, x_BT: Tensor) -> Tensor:
        """[B, T, E]: what the head reads."""
        with self._arithmetic():
            if self.own:
                return self.model.hidden(x_BT)
            return self.model.base_model(input_ids=x_BT, use_cache=False).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        with self._arithmetic():
            logits = self.head(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap:
            logits = torch.tanh(logits.float() / self._cap) * self._cap
        return logits

    @torch.no_grad()
    def _try(self) -> None:
        """Read two texts that differ in their last token, and see whether we understand the model.

        Raises ValueError.
        """
        x_BT = (torch.arange(2 * _PROBE, device=self.plan.device) * 31 + 5) % self.vocab_size
        x_BT = x_BT.view(2, _PROBE)
        x_BT[1, :-1] = x_BT[0, :-1]
        name, kind = self.files.path, type(self.model).__name__
        try:
            hidden_BTE = self._hidden(x_BT)
            raw = self.head(hidden_BTE) if not self.own else self._logits(hidden_BTE)
            with self._arithmetic():
                options = {"use_cache": False}
                wanted = self.model(input_ids=x_BT, **options).logits.float()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"teacher {name} ({kind}) has not the form of a causal language model: "
                f"{first_line(error)}"
            ) from error
        bound = _TOLERANCE[torch.bfloat16 if self.plan.bfloat16 else torch.float32]
        first, second = hidden_BTE[:, :-1].float()
        if not bool(hidden_BTE.isfinite().all()) or not bool(wanted.isfinite().any()):
            raise ValueError(f"teacher {name}: its hidden states or logits are not finite")
        if _distance(second, first) > bound:
            raise ValueError(not_causal(name, f"{kind} sees later tokens"))
        self._find_what_follows(raw.float(), wanted, bound)

    def _find_what_follows(self, raw: Tensor, wanted: Tensor, bound: float) -> None:
        """Set the factor or the soft cap by which the head's output becomes logits."""
        raw, wanted = raw[..., : self.vocab_size], wanted[..., : self.vocab_size]
        cap = getattr(self.files.config.get_text_config(), "final_logit_softcapping", None)
        factor = float((raw * wanted).sum() / raw.square().sum().clamp(min=1e-30))
        factor = 1.0 if abs(factor - 1) < _NEAR else factor
        # A cap that is far above these logits hardly shows in them: what the config says is first.
        for scale, soft in ((1.0, float(cap or 0.0)), (factor, 0.0)):
            logits = raw * scale
            if _distance(torch.tanh(logits / soft) * soft if soft else logits, wanted) <= bound:
                self._scale, self._cap = scale, soft
                return
        raise ValueError(
            f"teacher {self.files.path} ({type(self.model).__name__}) makes logits otherwise than "
            "by a linear head on its last hidden states: this form is not supported"
        )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _load(files: TeacherFiles, plan: DevicePlan) -> Any:
    """The model on the plan's device, frozen. Raises ValueError."""
    low = plan.bfloat16 and plan.memory == "device" and not files.own
    try:
        with no_progress_bars():
            found: Any = AutoModelForCausalLM.from_pretrained(
                files.directory,
                dtype=torch.bfloat16 if low else torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which we refuse, by name
            )
    except ValueError:
        raise
    except Exception as error:  # classes of many authors, over a config that anybody wrote
        raise ValueError(f"teacher {files.path} cannot be loaded: {first_line(error)}") from error
    model, info = found
    for what in ("missing", "mismatched"):
        if names := sorted(str(name) for name in info.get(f"{what}_keys", ())):
            raise ValueError(f"teacher {files.path}: {what} tensor {', '.join(names[:3])}")
    check_finite(model, files.path)
    # A decoder of ours has no dropout; in training mode it does not look at the values of ids,
    # for which a GPU would wait.
    model.train(isinstance(model, CausalLM))
    return model.requires_grad_(False).to(plan.device)
