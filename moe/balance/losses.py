"""The balance losses: pure functions of counts and probability sums.

Each has the form sum_bi g_bi * prob_sums_bi. g has no gradient, because the load is a count of hard choices. A scope is
therefore defined by its g, the gradient with respect to the sums.

T tokens, B sequences, E experts, P expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..placement import Owners
from ..types import Routing
from .estimators import Estimate


class StepView(NamedTuple):
    """What is known during a backward about one micro-batch, and about the optimizer step that contains it."""

    #: int64 [B, E + 1], counts and tokens of the micro-batch on the ranks that hold parts of its sequences; B is 1 if
    #: no loss needs sequences
    own_BX: Tensor
    #: int64 [E + 1], counts and tokens of the micro-batch on all ranks
    batch_X: Tensor
    #: the estimated load of all micro-batches on all ranks
    step: Estimate
    #: number of micro-batches that are known, and that the step has
    seen: int
    micro_batches: int
    #: number of ranks, or groups of ranks that hold parts of the same sequences, with different micro-batches
    ranks: int
    #: number of a token's choices that count
    top_k: int
    #: which expert-parallel rank owns which expert, and how many of these ranks a token can be sent to
    owners: Owners
    reach: int = 1
    #: int64 [P], tokens of the micro-batch on all ranks that chose an expert of each rank; for "communication"
    sent_P: Tensor | None = None

    @property
    def counts_BE(self) -> Tensor:
        """int64 [B, E], the micro-batch on the ranks that hold parts of its sequences."""
        return self.own_BX[:, :-1]

    @property
    def tokens_B(self) -> Tensor:
        """int64 [B], the micro-batch on the ranks that hold parts of its sequences."""
        return self.own_BX[:, -1]

    @property
    def batch_counts_E(self) -> Tensor:
        """int64 [E], the micro-batch on all ranks."""
        return self.batch_X[:-1]

    @property
    def batch_tokens(self) -> Tensor:
        """int64 scalar, the micro-batch on all ranks."""
        return self.batch_X[-1]


class Term(NamedTuple):
    """One loss of one forward. ``(gradient * sums).sum()`` is this rank's part of its value."""

    name: str
    #: weight of the loss in the training loss
    coefficient: float
    gradient: Tensor
    sums: Tensor

    @property
    def value(self) -> Tensor:
        """fp64 scalar, without the coefficient."""
        return (self.gradient * self.sums).sum().double()


class Loss(NamedTuple):
    """One loss during a backward, in fp64. The step's loss is the sum over all ranks and micro-batches."""

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
        """The gradient with respect to prob_sums, [E] or [B, E]."""
        return self.loads * _each_expert(self.weight)


def _each_expert(values: Tensor) -> Tensor:
    """Return a scalar or [B] such that it broadcasts over the experts of [E] or [B, E]."""
    return values.unsqueeze(-1) if values.dim() else values


def loads(counts: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """Return E times the fraction of choices that went to each expert, in fp64; 0 without tokens."""
    return counts.double() * counts.shape[-1] / _each_expert(tokens.double().clamp_min(1) * top_k)


def loss_value(counts: Tensor, tokens: Tensor, prob_sums: Tensor, prob_tokens: Tensor, top_k: int) -> Tensor:
    """Return E * sum_i f_i * P_i over the last dimension, 1.0 when balanced (arXiv 2501.11873, equation 2)."""
    mean_prob = prob_sums.double() / prob_tokens.double().clamp_min(1).unsqueeze(-1)
    return (loads(counts, tokens, top_k) * mean_prob).sum(dim=-1)


def global_batch(view: StepView) -> Loss:
    """Balance the whole optimizer step on all ranks (arXiv 2501.11873)."""
    weight = view.step.step_tokens.clamp_min(1).reciprocal()
    return Loss(loads(view.step.counts_E, view.step.tokens, view.top_k), weight, weight, view.step.tokens)


def data_parallel(view: StepView) -> Loss:
    """Balance each micro-batch over all ranks; the step's loss is the mean over micro-batches."""
    tokens = view.batch_tokens.double()
    weight = 1.0 / (tokens.clamp_min(1) * view.micro_batches)
    return Loss(loads(view.batch_counts_E, view.batch_tokens, view.top_k), weight, weight, tokens)


def micro_batch(view: StepView) -> Loss:
    """Balance each micro-batch of each data-parallel rank (Switch, GShard); the step's loss is the mean over both."""
    tokens = view.tokens_B.sum().double()
    weight = 1.0 / (tokens.clamp_min(1) * view.micro_batches * view.ranks)
    return Loss(loads(view.counts_BE.sum(0), tokens, view.top_k), weight, weight, tokens)


def sequence(view: StepView) -> Loss:
    """Balance each sequence (DeepSeek-V3, arXiv 2412.19437); the step's loss is the mean over sequences.

    A sequence without a valid token contributes 0 to that mean, so every sequence has the same weight however they are
    distributed. The load counts the experts that were chosen; the paper's counts the K best scores, without bias and
    groups.
    """
    sequences = view.tokens_B.shape[0]
    tokens, present = view.tokens_B.sum().double(), (view.tokens_B > 0).sum().double().clamp_min(1)
    weight_B = 1.0 / (view.tokens_B.double().clamp_min(1) * (sequences * view.micro_batches * view.ranks))
    per_token = 1.0 / (tokens.clamp_min(1) * view.micro_batches * view.ranks)
    return Loss(loads(view.counts_BE, view.tokens_B, view.top_k), weight_B, per_token, tokens / present)


def device(view: StepView) -> Loss:
    """Balance the mean load of each expert-parallel rank's experts (DeepSeek-V2, arXiv 2405.04434, equation 27).

    Counted over one micro-batch of all ranks, because ranks wait for each other in every micro-batch.
    """
    of_batch = data_parallel(view)
    return of_batch._replace(loads=view.owners.to_experts(view.owners.mean_by_rank(of_batch.loads)))


def communication(view: StepView) -> Loss:
    """Balance the tokens sent to each expert-parallel rank (DeepSeek-V2, arXiv 2405.04434, equation 30).

    f''_p = P / (M T) * tokens with a choice on rank p, if a token can be sent to at most M ranks. It is 1.0 if every
    token is sent to M ranks and all ranks get equally many tokens, and less if tokens are sent to fewer ranks. Counted
    over one micro-batch of all ranks.
    """
    assert view.sent_P is not None
    of_batch = data_parallel(view)
    per_rank = view.batch_tokens.double().clamp_min(1) * (view.reach / view.owners.ranks)
    return of_batch._replace(loads=view.owners.to_experts(view.sent_P.double() / per_rank))


def sent_tokens(routing: Routing, mask_T: Tensor | None, owners: Owners) -> Tensor:
    """Return int64 [P]: valid tokens with a choice on each expert-parallel rank, before any drop."""
    rank_TK = owners.rank_of(routing.decision.chosen_TK)
    sent_TP = torch.zeros(len(rank_TK), owners.ranks, dtype=torch.int64, device=rank_TK.device)
    sent_TP = sent_TP.scatter_add_(1, rank_TK.clamp_min(0), (rank_TK >= 0).long()) > 0  # -1: no choice
    return (sent_TP if mask_T is None else sent_TP & mask_T[:, None]).sum(0)


def all_choices(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """Return int64 [B, E]: how often each expert was chosen."""
    return routing.counts_BE


def first_choices(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """Return int64 [B, E]: of how many tokens each expert was the first choice (GShard, arXiv 2006.16668)."""
    (sequences, _), first_T = routing.counts_BE.shape, routing.decision.chosen_TK[:, 0]
    one_T = first_T >= 0  # else the token has no expert
    one_T = (one_T if mask_T is None else one_T & mask_T).long()
    counts_BE = torch.zeros_like(routing.counts_BE)
    return counts_BE.scatter_add_(1, first_T.clamp_min(0).reshape(sequences, -1), one_T.reshape(sequences, -1))


#: name -> function from a routing and the valid tokens to the choices that are the load, before any drop
COUNTS: dict[str, Callable[[Routing, Tensor | None], Tensor]] = {"all": all_choices, "first": first_choices}


class Scope(NamedTuple):
    """A loss, and the counts that it needs."""

    loss: Callable[[StepView], Loss]
    #: counts of all ranks; if False, of the ranks that hold parts of the same sequences
    of_all_ranks: bool
    #: counts of each sequence
    by_sequence: bool = False
    #: also the result of :func:`sent_tokens`
    sent: bool = False


SCOPES: dict[str, Scope] = {
    "global": Scope(global_batch, of_all_ranks=True),
    "data_parallel": Scope(data_parallel, of_all_ranks=True),
    "micro": Scope(micro_batch, of_all_ranks=False),
    "sequence": Scope(sequence, of_all_ranks=False, by_sequence=True),
    "device": Scope(device, of_all_ranks=True),
    "communication": Scope(communication, of_all_ranks=True, sent=True),
}
