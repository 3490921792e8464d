"""The router and the experts of a swapped block: the block's own modules, with the forward of this package's.

Each class here becomes the first base of a module's class, before the class that the module has had.

T tokens, D hidden, E experts, K top-k, S source rows, R routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import Router
from ..routing.compose import compose
from ..types import Decision, DispatchPlan, Routing


class SwappedRouter(Router):
    """Routes with the weight, the bias and the expert bias of another library's router.

    Forward hooks, which record the model's ``router_logits``, see the logits in the first and the third place of a
    tuple, where transformers has them. The caller gets the :class:`Routing`. Masked tokens are not counted, but they
    are computed, as in the model itself: with padding on the left, the last padding token predicts the first valid one.
    """

    #: name of the buffer with the expert bias
    bias_name: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Routing:
        return super().__call__(*args, **kwargs)[1]

    def forward(  # type: ignore[override]
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> tuple[Tensor, Routing, Tensor]:
        logits_TE = self.logits(x_TD)
        routing = self.routing(logits_TE, mask_T, sequences, decision)
        chosen_TK = routing.decision.chosen_TK
        return logits_TE, replace(routing, decision=Decision(chosen_TK, chosen_TK)), logits_TE

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE, bias = super().logits(x_TD), getattr(self, "bias", None)
        return logits_TE if bias is None else logits_TE + bias

    @property
    def bias_E(self) -> Tensor | None:  # type: ignore[override]
        return None if self.bias_name is None else self._buffers[self.bias_name]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.bias_name if name == "bias_E" and self.bias_name else name, value)


class KeptRouter(SwappedRouter):
    """Routes with the code of another library's router, and counts what it chooses.

    If activation checkpointing runs it again, it must choose the same experts: random choices need checkpointing's
    ``preserve_rng_state``, which is on by default.
    """

    def forward(  # type: ignore[override]
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> tuple[Tensor, Routing, Tensor]:
        logits_TE, weights_TK, ids_TK = super(Router, self).forward(x_TD)
        gate = compose(
            logits_TE.float(),
            score=self.score,
            select=_chosen_already,
            weigh=lambda *_: weights_TK.float(),
            mask_T=mask_T,
            sequences=sequences,
            ids_TK=ids_TK,
        )
        sums = gate.counts_BE, gate.tokens_B, gate.prob_sums_BE, gate.z_sum
        return logits_TE, Routing(Decision(ids_TK, ids_TK), gate.weights_TK, *sums), logits_TE


def _chosen_already(wanted_TE: Tensor) -> Tensor:
    raise AssertionError("the router has chosen the experts")


class KeptExperts(nn.Module):
    """Experts that compute with the code of another library: tokens, expert ids and gate weights -> output."""

    def forward(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return each source row's weighted sum over its experts, [S, D]."""
        order_R, offsets_E = plan.order.order_R, plan.order.offsets_E
        expert_R = torch.searchsorted(offsets_E, torch.arange(len(order_R), device=order_R.device), right=True) - 1
        ids_SK = torch.empty_like(order_R).scatter_(0, order_R, expert_R).view_as(plan.weights_SK)
        return super().forward(rows_SD, ids_SK, plan.weights_SK)


def stacked_experts(
    mlp: Callable[..., Tensor],
    weights: Callable[[Any], tuple[Tensor, Tensor]],
    block: nn.Module,
    rows_SD: Tensor,
    plan: DispatchPlan,
) -> Tensor:
    """Compute experts whose two stacked weights are a function of the block."""
    return mlp(rows_SD, plan.weights_SK, plan.order, *weights(block))
