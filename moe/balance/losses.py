"""The balance losses, pure functions of counts and probability sums.  B sequences, E experts.

Every one has the form  sum_bi  g_bi * prob_sums_bi,  where g carries no gradient: the loads are counts of a
hard choice. A scope is therefore nothing but its g, the gradient of the loss with respect to the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepView:
    """What is known, at backward time, of a micro-batch and of the optimizer step it belongs to."""

    #: int64 [B, E] and [B], this micro-batch on the ranks that hold parts of its sequences
    counts_BE: Tensor
    tokens_B: Tensor
    #: int64 [E] and scalar, all ranks and all micro-batches of the step known so far
    step_counts_E: Tensor
    step_tokens: Tensor
    #: micro-batches in step_counts, and in the whole step
    seen: int
    micro_batches: int
    #: ranks, or groups of ranks that hold parts of the same sequences, with different micro-batches
    ranks: int
    top_k: int


def loads(counts: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """E times the share of the choices that went to each expert; all 1.0 when balanced. fp64, zero without tokens."""
    return counts.double() * counts.shape[-1] / (tokens.double().clamp_min(1) * top_k).unsqueeze(-1)


def loss_value(counts: Tensor, tokens: Tensor, prob_sums: Tensor, prob_tokens: Tensor, top_k: int) -> Tensor:
    """E * sum_i f_i * P_i over the last dimension, 1.0 when balanced (arXiv 2501.11873, equation 2)."""
    mean_prob = prob_sums.double() / prob_tokens.double().clamp_min(1).unsqueeze(-1)
    return (loads(counts, tokens, top_k) * mean_prob).sum(dim=-1)


def global_batch(view: StepView) -> tuple[Tensor, Tensor]:
    """The load of the whole optimizer step on all ranks (arXiv 2501.11873).

    The tokens of micro-batches that are still to come are taken to be as many as those of the ones seen.
    """
    weight = 1.0 / _whole_step_tokens(view)
    return loads(view.step_counts_E, view.step_tokens, view.top_k) * weight, weight


def micro_batch(view: StepView) -> tuple[Tensor, Tensor]:
    """The load of one micro-batch of one data-parallel rank (Switch, GShard); the step's loss is the mean over these."""
    weight = 1.0 / (view.tokens_B.sum().double().clamp_min(1) * view.micro_batches * view.ranks)
    return loads(view.counts_BE.sum(0), view.tokens_B.sum(), view.top_k) * weight, weight


def sequence(view: StepView) -> tuple[Tensor, Tensor]:
    """The load of each sequence (DeepSeek-V3, arXiv 2412.19437); the step's loss is the mean over sequences."""
    sequences = (view.tokens_B > 0).sum().double().clamp_min(1) * view.micro_batches * view.ranks
    weight_B = 1.0 / (view.tokens_B.double().clamp_min(1) * sequences)
    per_token = 1.0 / (view.tokens_B.sum().double().clamp_min(1) * view.micro_batches * view.ranks)
    return loads(view.counts_BE, view.tokens_B, view.top_k) * weight_B[:, None], per_token


def _whole_step_tokens(view: StepView) -> Tensor:
    return view.step_tokens.double().clamp_min(1) * (max(view.micro_batches, view.seen) / view.seen)


#: scope -> (gradient of the summed loss with respect to prob_sums, [E] or [B, E]; weight of one token in a mean
#: over the step), both fp64, so that contributions of all ranks and micro-batches add up to the loss
SCOPES: dict[str, Callable[[StepView], tuple[Tensor, Tensor]]] = {
    "global": global_batch,
    "micro": micro_batch,
    "sequence": sequence,
}
