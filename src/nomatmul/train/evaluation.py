"""Held-out loss and bits per byte, text samples, diagnostics: what a run looks at now and then.

None of it draws from the random states that training uses, so it cannot change a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nomatmul.models.hf.cache import cache_of
from nomatmul.train.batches import held_out_batches, held_out_length, held_out_masked
from nomatmul.train.config import TrainConfig
from nomatmul.train.masking import Masking
from nomatmul.train.model import TrainedModel
from nomatmul.train.optimizer import Loss
from nomatmul.train.parallelize import eager
from nomatmul.train.plan import DevicePlan
from nomatmul.train.ranks import Ranks
from nomatmul.train.tokens import TokenStream


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Loss in nats a token, and in bits a byte of the text.

    text_bytes: of all of it, the first token's too, which alone is not predicted.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int

    def row(self) -> dict[str, float]:
        """What metrics.jsonl gets."""
        return {
            "valid_loss": self.loss,
            "valid_bits_per_byte": self.bits_per_byte,
            "valid_tokens": self.tokens,
            "valid_bytes": self.text_bytes,
        }

    def text(self) -> str:
        """For people."""
        return f"loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte"


@dataclasses.dataclass(frozen=True)
class MaskedHeldOut:
    """Of an encoder: loss in nats a hidden token, share of them that were guessed right."""

    loss: float
    accuracy: float
    tokens: int

    def row(self) -> dict[str, float]:
        """What metrics.jsonl gets."""
        return {
            "valid_loss": self.loss,
            "valid_perplexity": math.exp(min(self.loss, 700.0)),
            "valid_accuracy": self.accuracy,
            "valid_tokens": self.tokens,
        }

    def text(self) -> str:
        """For people."""
        return (
            f"masked loss {self.loss:.4f}, perplexity {math.exp(min(self.loss, 700.0)):.2f}, "
            f"accuracy {self.accuracy:.4f}"
        )


class Evaluator:
    """Evaluates on the first eval_tokens of the held-out stream, the same ones every time.

    Many ranks take turns at its batches.
    """

    def __init__(
        self,
        stream: TokenStream,
        config: TrainConfig,
        plan: DevicePlan,
        ranks: Ranks | None = None,
    ) -> None:
        self.stream, self.config, self.plan = stream, config, plan
        self.ranks = ranks if ranks is not None else Ranks.alone()
        self.length = held_out_length(stream, config.eval_tokens)
        self.text_bytes = stream.bytes_of(0, self.length)

    @torch.no_grad()
    def evaluate(self, loss: Loss) -> HeldOut:
        """One pass. Shapes are those of training, so a compiled loss is compiled once more only."""
        config, device = self.config, self.plan.device
        sizes = config.sequence_length, config.micro_batch_size, config.eval_tokens
        batches = held_out_batches(self.stream, *sizes, device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        nats = _in_turns(
            batches, self.ranks, total, lambda x, y, count: loss(x, y)[0].double() * count
        ).item()
        tokens = self.length - 1
        bits = nats / math.log(2) / max(self.text_bytes, 1)
        return HeldOut(nats / tokens, bits, tokens, self.text_bytes)


class MaskedEvaluator:
    """Guesses hidden tokens in the first eval_tokens of the held-out stream.

    The windows and what is hidden of them are the same every time and in every run, whatever its
    seed. Many ranks take turns at the batches.
    """

    def __init__(
        self,
        stream: TokenStream,
        config: TrainConfig,
        plan: DevicePlan,
        model: TrainedModel,
        masking: Masking,
        ranks: Ranks | None = None,
    ) -> None:
        self.stream, self.config, self.plan = stream, config, plan
        self.model, self.masking = model, masking
        self.ranks = ranks if ranks is not None else Ranks.alone()

    @torch.no_grad()
    def evaluate(self, loss: Loss | None = None) -> MaskedHeldOut:
        """One pass, the model in evaluation mode. loss: not used, there for `Evaluator`'s sake."""
        config, device = self.config, self.plan.device
        sizes = config.sequence_length, config.micro_batch_size, config.eval_tokens
        batches = held_out_masked(self.stream, *sizes, self.masking, device)
        total = torch.zeros(3, dtype=torch.float64, device=device)
        training = self.model.training
        self.model.eval()
        scores = _in_turns(batches, self.ranks, total, lambda x, y, count: self._score(x, y))
        self.model.train(training)
        nats, right, tokens = scores.tolist()
        return MaskedHeldOut(nats / tokens, right / tokens, int(tokens))

    def _score(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """[3] float64: summed loss, right guesses, guesses."""
        total = torch.zeros(3, dtype=torch.float64, device=self.plan.device)
        with self.plan.autocast(), eager(self.model):
            logits_BTV = self.model(input_ids=x_BT).logits
        for logits_TV, y_T in zip(logits_BTV, y_BT, strict=True):
            log_p = torch.log_softmax(logits_TV.float(), dim=-1)
            counts = y_T != -100
            picked = log_p.gather(-1, y_T.clamp(min=0)[:, None])[:, 0]
            right = (log_p.argmax(-1) == y_T) & counts
            total += torch.stack([-(picked * counts).sum(), right.sum(), counts.sum()]).double()
        return total


def _in_turns(
    batches: Iterable[tuple[Tensor, Tensor, int]],
    ranks: Ranks,
    total: Tensor,
    score: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """`total` and the scores of all batches; ranks take turns at them."""
    number = 0
    for number, (x_BT, y_BT, count) in enumerate(batches, 1):
        if (number - 1) % ranks.size == ranks.rank:
            total += score(x_BT, y_BT, count)
    # Parameters are gathered by all ranks together, so all take the same number of passes.
    if ranks.rank >= number % ranks.size > 0:
        score(x_BT, torch.full_like(y_BT, -100), 0)
    return ranks.sum(total)


@torch.no_grad()
def sample_text(
    model: TrainedModel,
    tokenizer: Tokenizer,
    config: TrainConfig,
    plan: DevicePlan,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    agree: Callable[[int], int] = lambda id_: id_,
) -> str:
    """Continue config.sample_prompt by config.sample_tokens; the same text for equal weights.

    An empty prompt starts a document. agree: makes every rank go on with the same token.
    """
    ends = config.model.end_token_ids
    start = config.model.bos_token_id
    if start is None:
        start = ends[0] if ends else 0
    ids = [start, *tokenizer.encode(config.sample_prompt, add_special_tokens=False).ids]
    random = torch.Generator().manual_seed(config.seed)
    model.eval()
    cache, fed, out = None, ids, list(ids)
    with plan.autocast():
        for _ in range(min(config.sample_tokens, config.model.max_position_embeddings - len(ids))):
            result = model(
                input_ids=torch.tensor([fed], device=plan.device), cache=cache, use_cache=True
            )
            cache = cache_of(result)
            values, indices = (
                result.logits[0, -1].float().cpu().topk(min(top_k, config.model.vocab_size))
            )
            share = torch.softmax(values / temperature, dim=0)
            id_ = agree(int(indices[torch.multinomial(share, 1, generator=random)]))
            if id_ in ends:
                break
            out.append(id_)
            fed = [id_]
    model.train()
    return tokenizer.decode(out[1:], skip_special_tokens=True)
