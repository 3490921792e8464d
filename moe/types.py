"""Values that are passed between the stages of the MoE layer.

T tokens, D hidden, E experts, K top-k, B sequences, S source rows on the expert's rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.sort_by_expert import ExpertOrder


class Decision(NamedTuple):
    """The experts chosen for each token. Recomputation needs only this to repeat the routing exactly."""

    #: int64 [T, K], ids of the chosen experts, best first; -1 if fewer than K were chosen
    chosen_TK: Tensor
    #: int64 [T, K], the same with -1 for choices that are not computed (masked tokens and dropped choices)
    ids_TK: Tensor


class Mixing(NamedTuple):
    """How tokens are mixed into slots and back (SoftMoE). X slots, S tokens of each sequence."""

    #: fp32 [B, S, X], a token's share in the input of each slot, which sums to 1 over the tokens; differentiable
    dispatch_BSX: Tensor
    #: fp32 [B, S, X], the weight of each slot's result in a token's output, which sums to 1 over slots; differentiable
    combine_BSX: Tensor


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens, and the sums over these tokens that the losses need.

    Sums exclude masked tokens and include dropped choices. They are kept per sequence, which suffices for balance
    losses of every scope, so no [T, E] matrix outlives the router.
    """

    decision: Decision
    #: fp32 [T, K], gate weights, differentiable
    weights_TK: Tensor
    #: int64 [B, E], choices of each expert per sequence
    counts_BE: Tensor
    #: int64 [B], valid tokens per sequence
    tokens_B: Tensor
    #: fp32 [B, E], sum over tokens of the scores, normalised to 1 per token; differentiable
    prob_sums_BE: Tensor
    #: fp32 scalar, sum over tokens of logsumexp(logits)^2, differentiable
    z_sum: Tensor
    #: fp32 scalar, sum over tokens of the entropy of the scores, differentiable; None if no loss needs it
    entropy_sum: Tensor | None = None
    #: if not None, the decision and the weights are those of B X slots instead of T tokens, with K = 1
    mixing: Mixing | None = None

    @property
    def ids_TK(self) -> Tensor:
        """int64 [T, K], ids of the experts to compute; -1 means none."""
        return self.decision.ids_TK

    def outside_inference(self) -> Routing:
        """Return the same routing, in tensors that autograd may use later.

        Tensors that were created under ``torch.inference_mode`` are cloned into normal tensors.
        """
        if not self.counts_BE.is_inference():
            return self
        with torch.inference_mode(False):
            return self.cloned()

    def cloned(self) -> Routing:
        """Return the same routing in memory of its own."""
        decision = Decision(*(ids_TK.clone() for ids_TK in self.decision))
        names = ("weights_TK", "counts_BE", "tokens_B", "prob_sums_BE", "z_sum", "entropy_sum")
        values = {name: value.clone() for name in names if (value := getattr(self, name)) is not None}
        return replace(self, decision=decision, mixing=None, **values)

    def keep(self, kept_TK: Tensor) -> Routing:
        """Return the same routing with the choices dropped where ``kept_TK`` is False."""
        decision = self.decision._replace(ids_TK=self.ids_TK.masked_fill(~kept_TK, -1))
        return replace(self, decision=decision)


@dataclass(frozen=True)
class DispatchPlan:
    """Tells the experts of this rank which choices to compute for each of their S source rows.

    K is the number of choices per source row: top-k, or 1 if a row was sent for each choice.
    """

    #: fp32 [S, K], gate weight of each choice that this rank computes, differentiable
    weights_SK: Tensor
    #: the S * K choices, sorted by local expert
    order: ExpertOrder
    #: numbers of the local experts; empty: not said
    experts: tuple[int, ...] = ()


#: maps source rows [S, D] and their plan to the weighted sum over each row's choices [S, D]
Experts = Callable[[Tensor, DispatchPlan], Tensor]


@dataclass(frozen=True)
class RoutingStats:
    """Routing statistics of a layer's last training forward. They are computed when they are read.

    Reading a number from it synchronises with the device; creating it does not.
    """

    #: int64 [B, E] and [B], on this rank, before any drop
    counts_BE: Tensor
    tokens_B: Tensor
    #: int64 [T, K], ids of the experts that were computed, -1 for none; None if none can have been dropped
    ids_TK: Tensor | None
    #: computes :attr:`losses`
    loss_values: Callable[[], dict[str, float]]

    @property
    def counts(self) -> Tensor:
        """int64 [E], choices of each expert on this rank, before any drop."""
        return self.counts_BE.sum(0)

    @property
    def tokens(self) -> Tensor:
        """int64 scalar, valid tokens on this rank."""
        return self.tokens_B.sum()

    @property
    def dropped_choices(self) -> Tensor:
        """int64 scalar, choices dropped because their expert was full."""
        if self.ids_TK is None:
            return torch.zeros_like(self.tokens)
        return self.counts_BE.sum() - (self.ids_TK >= 0).sum()

    @property
    def losses(self) -> dict[str, float]:
        """Losses of this rank's micro-batch, without coefficients.

        "micro", "sequence" and "global" are 1.0 when balanced; "global" uses the load of the step so far on all ranks.
        "z" is the mean of logsumexp(logits)^2.
        """
        return self.loss_values()

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert divided by the mean load; 1.0 when balanced."""
        return load_summary(self.counts)["max_over_mean"]

    @property
    def cv(self) -> float:
        """Coefficient of variation of the load: standard deviation divided by mean; 0.0 when balanced."""
        return load_summary(self.counts)["cv"]

    @property
    def entropy(self) -> float:
        """Entropy of the load divided by the entropy of a uniform load, in [0, 1]; 1.0 when balanced."""
        return load_summary(self.counts)["entropy"]

    @property
    def dead_experts(self) -> int:
        """Number of experts that no token chose."""
        return int(load_summary(self.counts)["dead"])

    @property
    def dropped_fraction(self) -> float:
        """Share of the valid tokens' choices that were dropped because their expert was full."""
        return float(self.dropped_choices) / max(int(self.counts.sum()), 1)


def load_summary(counts_E: Tensor) -> dict[str, float]:
    """Return max/mean, coefficient of variation, normalised entropy and number of dead experts of a load int64 [E]."""
    load = counts_E.cpu().double()
    total = float(load.sum())
    if total == 0:
        return {"max_over_mean": 1.0, "cv": 0.0, "entropy": 1.0, "dead": float(load.numel())}
    entropy = float(torch.special.entr(load / total).sum())
    mean = total / load.numel()
    return {
        "max_over_mean": float(load.max()) / mean,
        "cv": float(load.std(correction=0)) / mean,
        "entropy": entropy / torch.log(torch.tensor(float(load.numel()))).item() if load.numel() > 1 else 1.0,
        "dead": float((load == 0).sum()),
    }
