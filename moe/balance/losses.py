"""The balance losses, pure functions of counts and probability sums.  B sequences, E experts, P expert-parallel ranks.

Every one has the form  sum_bi  g_bi * prob_sums_bi,  where g carries no gradient: the loads are counts of a
hard choice. A scope is therefore nothing but its g, the gradient of the loss with respect to the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..placement import Owners
from .estimators import Estimate


@dataclass(frozen=True)
class StepView:
    """What is known, at backward time, of a micro-batch and of the optimizer step it belongs to."""

    #: int64 [B, E] and [B], this micro-batch on the ranks that hold parts of its sequences; B is 1 where no loss is of
    #: sequences
    counts_BE: Tensor
    tokens_B: Tensor
    #: int64 [E] and scalar, this micro-batch on all ranks
    batch_counts_E: Tensor
    batch_tokens: Tensor
    #: what stands for all ranks and all micro-batches of the step
    step: Estimate
    #: micro-batches known, and in the whole step
    seen: int
    micro_batches: int
    #: ranks, or groups of ranks that hold parts of the same sequences, with different micro-batches
    ranks: int
    top_k: int
    #: which expert-parallel rank has which experts, and how many of these ranks a token can reach
    owners: Owners
    reach: int = 1
    #: int64 [P], tokens of this micro-batch on all ranks that chose an expert of each; for "communication"
    sent_P: Tensor | None = None


class Term(NamedTuple):
    """One loss of one forward: ``(gradient * sums).sum()`` is this rank's part of its value."""

    name: str
    #: the weight of the loss in the training objective
    coefficient: float
    gradient: Tensor
    sums: Tensor

    @property
    def value(self) -> Tensor:
        """fp64 scalar, without the coefficient."""
        return (self.gradient * self.sums).sum().double()


class Loss(NamedTuple):
    """One loss at backward time, in fp64; contributions of all ranks and micro-batches add up to it."""

    #: [E] or [B, E], 1.0 when balanced
    loads: Tensor
    #: scalar or [B]: the gradient with respect to prob_sums is loads * weight
    weight: Tensor
    #: scalar, the weight of one token in a mean over the step
    token_weight: Tensor
    #: scalar, tokens over which the loads were counted; the mean over sequences if there are several
    tokens: Tensor

    @property
    def gradient(self) -> Tensor:
        """Of the loss with respect to prob_sums, [E] or [B, E]."""
        return self.loads * self.weight.unsqueeze(-1)


def loads(counts: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """E times the share of the choices that went to each expert; all 1.0 when balanced. fp64, zero without tokens."""
    return counts.double() * counts.shape[-1] / (tokens.double().clamp_min(1) * top_k).unsqueeze(-1)


def loss_value(counts: Tensor, tokens: Tensor, prob_sums: Tensor, prob_tokens: Tensor, top_k: int) -> Tensor:
    """E * sum_i f_i * P_i over the last dimension, 1.0 when balanced (arXiv 2501.11873, equation 2)."""
    mean_prob = prob_sums.double() / prob_tokens.double().clamp_min(1).unsqueeze(-1)
    return (loads(counts, tokens, top_k) * mean_prob).sum(dim=-1)


def global_batch(view: StepView) -> Loss:
    """The load of the whole optimizer step on all ranks (arXiv 2501.11873)."""
    weight = 1.0 / view.step.step_tokens.clamp_min(1)
    return Loss(loads(view.step.counts_E, view.step.tokens, view.top_k), weight, weight, view.step.tokens)


def data_parallel(view: StepView) -> Loss:
    """The load of one micro-batch over all ranks; the step's loss is the mean over its micro-batches."""
    tokens = view.batch_tokens.double()
    weight = 1.0 / (tokens.clamp_min(1) * view.micro_batches)
    return Loss(loads(view.batch_counts_E, view.batch_tokens, view.top_k), weight, weight, tokens)


def micro_batch(view: StepView) -> Loss:
    """The load of one micro-batch of one data-parallel rank (Switch, GShard); the step's loss is their mean."""
    tokens = view.tokens_B.sum().double()
    weight = 1.0 / (tokens.clamp_min(1) * view.micro_batches * view.ranks)
    return Loss(loads(view.counts_BE.sum(0), tokens, view.top_k), weight, weight, tokens)


def sequence(view: StepView) -> Loss:
    """The load of each sequence (DeepSeek-V3, arXiv 2412.19437); the step's loss is the mean over sequences.

    One without a valid token has loss 0 in that mean, so that each weighs the same however they are spread. The load is
    of the experts that were chosen, as everywhere here; the paper's is of the K best scores, without bias and groups.
    """
    sequences = view.tokens_B.shape[0]
    tokens, present = view.tokens_B.sum().double(), (view.tokens_B > 0).sum().double().clamp_min(1)
    weight_B = 1.0 / (view.tokens_B.double().clamp_min(1) * (sequences * view.micro_batches * view.ranks))
    per_token = 1.0 / (tokens.clamp_min(1) * view.micro_batches * view.ranks)
    return Loss(loads(view.counts_BE, view.tokens_B, view.top_k), weight_B, per_token, tokens / present)


def device(view: StepView) -> Loss:
    """The load of each expert-parallel rank, the mean of its experts' (DeepSeek-V2, arXiv 2405.04434, equation 27).

    Over one micro-batch of all ranks, because that is what the ranks wait for each other in.
    """
    of_batch = data_parallel(view)
    return of_batch._replace(loads=view.owners.to_experts(view.owners.mean_by_rank(of_batch.loads)))


def communication(view: StepView) -> Loss:
    """The tokens sent to each expert-parallel rank (DeepSeek-V2, arXiv 2405.04434, equation 30).

    f''_p = P / (M T) * tokens with a choice on rank p, for the M ranks that a token can reach; 1.0 when every token
    reaches that many and all ranks alike, so less where tokens reach fewer. Over one micro-batch of all ranks.
    """
    assert view.sent_P is not None
    of_batch = data_parallel(view)
    per_rank = view.batch_tokens.double().clamp_min(1) * (view.reach / view.owners.ranks)
    return of_batch._replace(loads=view.owners.to_experts(view.sent_P.double() / per_rank))


class Scope(NamedTuple):
    """A loss, and the counts that it needs."""

    loss: Callable[[StepView], Loss]
    #: those of all ranks; otherwise of the ranks that hold parts of the same sequences
    of_all_ranks: bool
    #: of each sequence by itself
    by_sequence: bool = False
    #: also how many tokens are sent to each expert-parallel rank
    sent: bool = False


SCOPES: dict[str, Scope] = {
    "global": Scope(global_batch, of_all_ranks=True),
    "data_parallel": Scope(data_parallel, of_all_ranks=True),
    "micro": Scope(micro_batch, of_all_ranks=False),
    "sequence": Scope(sequence, of_all_ranks=False, by_sequence=True),
    "device": Scope(device, of_all_ranks=True),
    "communication": Scope(communication, of_all_ranks=True, sent=True),
}
