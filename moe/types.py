"""The values that cross stages of the layer.

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
    """Which experts each token takes; all that recomputation has to know to route alike."""

    #: int64 [T, K], the experts chosen, best first
    chosen_TK: Tensor
    #: the same, with -1 for choices that are not computed: masked tokens, dropped choices
    ids_TK: Tensor


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens, and the sums over them that the losses need.

    Sums leave masked tokens out. They are taken per sequence and before any drop, and carry everything a
    balance loss of any scope has to know, so that no [T, E] matrix outlives the router.
    """

    decision: Decision
    #: fp32 [T, K], differentiable
    weights_TK: Tensor
    #: int64 [B, E], choices per sequence and expert
    counts_BE: Tensor
    #: int64 [B], valid tokens per sequence
    tokens_B: Tensor
    #: fp32 [B, E], sum over tokens of the scores normalised to 1, differentiable
    prob_sums_BE: Tensor
    #: fp32 scalar, sum over tokens of logsumexp(logits)^2, differentiable
    z_sum: Tensor

    @property
    def ids_TK(self) -> Tensor:
        """int64 [T, K], the experts to compute; -1: none."""
        return self.decision.ids_TK

    def detach(self) -> Routing:
        """The same routing outside the graph."""
        return replace(
            self,
            weights_TK=self.weights_TK.detach(),
            prob_sums_BE=self.prob_sums_BE.detach(),
            z_sum=self.z_sum.detach(),
        )

    def outside_inference(self) -> Routing:
        """The same outside the graph, as tensors that later code may use even if ``torch.inference_mode`` made them."""
        if not self.counts_BE.is_inference():
            return self.detach()
        with torch.inference_mode(False):
            decision = Decision(*(ids_TK.clone() for ids_TK in self.decision))
            names = ("weights_TK", "counts_BE", "tokens_B", "prob_sums_BE", "z_sum")
            return replace(self, decision=decision, **{name: getattr(self, name).clone() for name in names})

    def keep(self, kept_TK: Tensor) -> Routing:
        """The same routing without the choices where ``kept_TK`` is False."""
        decision = self.decision._replace(ids_TK=self.ids_TK.masked_fill(~kept_TK, -1))
        return replace(self, decision=decision)


@dataclass(frozen=True)
class DispatchPlan:
    """What experts must know of the S source rows that they are given."""

    #: fp32 [S, k], the weight of each choice that is computed here, differentiable
    weights_SK: Tensor
    #: where the S*k choices stand, sorted by the experts of this rank
    order: ExpertOrder


#: source rows [S, D] and their plan to each row's weighted sum over its choices [S, D]
Experts = Callable[[Tensor, DispatchPlan], Tensor]


@dataclass(frozen=True)
class RoutingStats:
    """What the last training forward of a layer did. Reading a number is what costs a synchronisation."""

    #: int64 [E], choices per expert before any drop, on this rank
    counts: Tensor
    #: int64 scalar, valid tokens on this rank
    tokens: Tensor
    #: int64 scalar, choices that were not computed for want of capacity
    dropped_choices: Tensor
    #: makes :attr:`losses`
    loss_values: Callable[[], dict[str, float]]

    @property
    def losses(self) -> dict[str, float]:
        """Unscaled losses of this rank's micro-batch: "micro", "sequence" and "global" (with the load of the step so
        far on all ranks) are 1.0 when balanced; "z" is the mean of logsumexp(logits)^2."""
        return self.loss_values()

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load; 1.0 when balanced."""
        return load_summary(self.counts)["max_over_mean"]

    @property
    def cv(self) -> float:
        """Standard deviation of the load over its mean; 0.0 when balanced."""
        return load_summary(self.counts)["cv"]

    @property
    def entropy(self) -> float:
        """Entropy of the load over that of a uniform one, in [0, 1]; 1.0 when balanced."""
        return load_summary(self.counts)["entropy"]

    @property
    def dead_experts(self) -> int:
        """Experts that no token chose."""
        return int(load_summary(self.counts)["dead"])

    @property
    def dropped_fraction(self) -> float:
        """Share of the valid tokens' choices that were not computed for want of capacity."""
        return float(self.dropped_choices) / max(int(self.counts.sum()), 1)


def load_summary(counts_E: Tensor) -> dict[str, float]:
    """Max/mean, coefficient of variation, normalised entropy and idle experts of a load int64 [E]."""
    load = counts_E.double()
    total = float(load.sum())
    if total == 0:
        return {"max_over_mean": 1.0, "cv": 0.0, "entropy": 1.0, "dead": float(load.numel())}
    share = load / total
    entropy = float(torch.special.entr(share).sum())
    mean = total / load.numel()
    return {
        "max_over_mean": float(load.max()) / mean,
        "cv": float(load.std(correction=0)) / mean,
        "entropy": entropy / torch.log(torch.tensor(float(load.numel()))).item() if load.numel() > 1 else 1.0,
        "dead": float((load == 0).sum()),
    }
