"""Loss-free balancing (arXiv 2408.15664): a bias on the scores that choose experts, moved once per optimizer step.

E experts.  The bias is fp32, the same on all ranks, chooses and never weighs (:class:`equimoe.moe.routing.Router`), and
has no gradient: what moves it are the counts of the step that has just ended, taken before any drop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import BalanceConfig


def sign(counts_E: Tensor) -> Tensor:
    """+1 for an expert below the mean load, -1 above, 0 at it; in integers, so that all ranks agree exactly."""
    return (counts_E.sum() - counts_E.shape[0] * counts_E).sign()


def proportional(counts_E: Tensor) -> Tensor:
    """(mean - load) / mean, fp64: the paper's other rule, made independent of the number of tokens."""
    mean = counts_E.double().mean()
    return (mean - counts_E) / mean.clamp_min(torch.finfo(torch.float64).tiny)


#: int64 [E] counts to the direction in which the bias of each expert goes
RULES: dict[str, Callable[[Tensor], Tensor]] = {"sign": sign, "proportional": proportional}


@dataclass(frozen=True)
class BiasRule:
    """How a step's counts move the bias."""

    rate: float
    rule: str
    #: each micro-batch of each rank asks for a move by its own counts, and their mean is made
    by_micro_batch: bool

    @property
    def votes(self) -> bool:
        """What each micro-batch asks for has to be summed over the ranks. (A proportional rule is linear in the counts:
        the mean of what micro-batches of one length ask for is what the whole step asks for.)"""
        return self.by_micro_batch and self.rule == "sign"

    @torch.no_grad()
    def move(
        self, bias_E: Tensor, counts_E: Tensor, votes_E: Tensor | None, voters: int, overflow: Tensor | None = None
    ) -> None:
        """Move ``bias_E`` in place by ``rate`` times the direction of counts int64 [E] of a step on all ranks, or by
        the mean of ``voters`` votes whose sum is int64 [E]; not at all where the scalar ``overflow`` is not zero."""
        direction_E = RULES[self.rule](counts_E) if votes_E is None else votes_E.double() / voters
        if overflow is not None:
            direction_E = direction_E * (overflow == 0).to(direction_E.device)
        bias_E.add_((self.rate * direction_E.double()).to(bias_E.dtype))


def bias_rule(config: BalanceConfig) -> BiasRule | None:
    """The rule that a configuration asks for; None for none."""
    if not config.bias_update_rate:
        return None
    return BiasRule(config.bias_update_rate, config.bias_rule, config.bias_scope == "micro")


def initial_bias(config: BalanceConfig, num_experts: int) -> Tensor | None:
    """Where the bias of a router starts: fp32 zeros [E], or None where nothing moves it."""
    return torch.zeros(num_experts, dtype=torch.float32) if config.bias_update_rate else None
