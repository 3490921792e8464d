"""Loss-free balancing (arXiv 2408.15664): a bias on the scores that choose experts, moved once per optimizer step.

The bias [E] is fp32, equal on all ranks and without a gradient. It changes which experts are chosen, but not their gate
weights (:class:`equimoe.moe.routing.Router`). It moves by the counts of the step that has just ended, before any drop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import BalanceConfig

if TYPE_CHECKING:
    from .step import StepTotals


def sign(counts_E: Tensor) -> Tensor:
    """Return +1 for experts below the mean load, -1 above and 0 at it; int64, so all ranks agree exactly."""
    return (counts_E.sum() - counts_E.shape[0] * counts_E).sign()


def proportional(counts_E: Tensor) -> Tensor:
    """Return (mean - load) / mean in fp64: the paper's other rule, made independent of the number of tokens."""
    mean = counts_E.double().mean()
    return (mean - counts_E) / mean.clamp_min(torch.finfo(torch.float64).tiny)


#: name -> function from counts int64 [E] to the direction in which each expert's bias moves
RULES: dict[str, Callable[[Tensor], Tensor]] = {"sign": sign, "proportional": proportional}


@dataclass(frozen=True)
class BiasRule:
    """Moves the bias at the end of a step."""

    rate: float
    rule: str

    def direction(self, totals: StepTotals) -> Tensor:
        """Return the direction [E] in which the bias moves. It must be the same on all ranks."""
        return RULES[self.rule](totals.counts_E)

    @torch.no_grad()
    def move(self, bias_E: Tensor, totals: StepTotals, overflow: Tensor | None = None) -> None:
        """Add ``rate`` times the direction to ``bias_E``, unless the scalar ``overflow`` is nonzero."""
        direction_E = self.direction(totals)
        if overflow is not None:
            direction_E = direction_E * (overflow == 0).to(direction_E.device)
        bias_E.add_((self.rate * direction_E.double()).to(bias_E.dtype))


def bias_rule(config: BalanceConfig) -> BiasRule | None:
    """Return the rule that ``config`` selects; None if there is no bias."""
    return BiasRule(config.bias_update_rate, config.bias_rule) if config.bias_update_rate else None


def initial_bias(config: BalanceConfig, num_experts: int) -> Tensor | None:
    """Return fp32 zeros [E]; None if there is no bias."""
    return torch.zeros(num_experts, dtype=torch.float32) if config.bias_update_rate else None
