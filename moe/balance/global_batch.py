"""One layer's load balancing: counts in, a gradient on the router out.  B sequences, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, world_axis
from ..config import BalanceConfig
from ..types import Decision, Routing
from .attach import attach
from .counts import MicroBatch, Window
from .losses import SCOPES, StepView, loss_value
from .recompute import remember, slot_being_recomputed

_counting: ContextVar[bool] = ContextVar("equimoe_counting_pass", default=False)


@contextmanager
def counting_pass() -> Iterator[None]:
    """Within it, forwards without gradient count their micro-batch ahead of its training forward.

    Run it over all micro-batches of a step, then train on them in the same order: the estimator is then exact.
    """
    token = _counting.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _counting.reset(token)


@dataclass(frozen=True)
class Pass:
    """How one forward takes part in the step."""

    #: its micro-batch; None for evaluation and other passes that leave no trace
    slot: MicroBatch | None = None
    #: the decision to repeat, when it was made before
    decision: Decision | None = None
    #: not a recomputation
    first: bool = False


class Balancer:
    """Keeps the counts of the optimizer step and attaches the losses.

    ``axis`` names the ranks that hold different tokens; None: the default process group, if there is one by then.
    ``sequence_axis`` names those among them that hold parts of the same sequences.
    ``averaged_ranks`` is how many ranks' gradients the engine averages; None: those of the axis.
    ``loss_scale`` must be what the loss is multiplied by before its backward (a gradient scaler's scale).
    """

    def __init__(self, config: BalanceConfig, top_k: int, z_coefficient: float) -> None:
        self.config = config
        self.top_k = top_k
        self.z_coefficient = z_coefficient
        self.window = Window(config.micro_batches)
        self.axis: Axis | None = None
        self.sequence_axis = LOCAL
        self.averaged_ranks: int | None = None
        self.loss_scale: float | Tensor = 1.0
        self._gradients_of = SCOPES[config.scope]

    def begin(self, training: bool, weight: Tensor) -> Pass:
        """What the forward that begins now is, given the router's weight as it is used."""
        counting = _counting.get()
        if not training or not (torch.is_grad_enabled() or counting):
            return Pass()
        slot, known = slot_being_recomputed(self.window)
        if slot is not None:
            return Pass(slot, slot.decision if known else None)
        self.window.begin_pass(weight)
        slot = self.window.open(ahead=counting)
        remember(slot)
        return Pass(slot, slot.decision if slot.ahead else None, first=True)

    def count(self, routing: Routing, this: Pass) -> None:
        """Keep the decision and counts of a pass that is made for the first time."""
        if this.slot is not None and this.first:
            this.slot.assign(routing, self.counting_axis, by_sequence=self.config.scope != "global")
            this.slot.ahead = _counting.get()

    def attach(self, carrier: Tensor, routing: Routing, this: Pass) -> Tensor:
        """``carrier`` with the losses hung on it, for a pass that takes part in the step."""
        if this.slot is None or not carrier.requires_grad:
            return carrier
        return attach(carrier, routing.prob_sums_BE, routing.z_sum, partial(self._gradients, this.slot))

    def loss_values(self, routing: Routing, slot: MicroBatch) -> dict[str, float]:
        """Unscaled losses of a micro-batch, as :attr:`equimoe.moe.types.RoutingStats.losses` describes them."""
        totals, k = self.window.totals(slot), self.top_k
        counts_BE, tokens_B, prob_sums_BE = routing.counts_BE, routing.tokens_B, routing.prob_sums_BE.detach()
        counts_E, tokens, prob_sums_E = counts_BE.sum(0), tokens_B.sum(), prob_sums_BE.sum(0)
        per_sequence_B = loss_value(counts_BE, tokens_B, prob_sums_BE, tokens_B, k)
        return {
            "global": float(loss_value(totals[:-1], totals[-1], prob_sums_E, tokens, k)),
            "micro": float(loss_value(counts_E, tokens, prob_sums_E, tokens, k)),
            "sequence": float(per_sequence_B.sum() / (tokens_B > 0).sum().clamp_min(1)),
            "z": float(routing.z_sum.detach() / tokens.clamp_min(1)),
        }

    @property
    def token_axis(self) -> Axis:
        """The ranks that hold different tokens."""
        return world_axis() if self.axis is None else self.axis

    @property
    def counting_axis(self) -> Axis:
        """The ranks whose tokens are counted together; scopes within one rank need no communication."""
        return self.token_axis if self.config.scope == "global" else self.sequence_axis

    def view(self, slot: MicroBatch) -> StepView:
        """The step as it is known now, around one of its micro-batches."""
        totals, own_BX = self.window.totals(slot), slot.summed.get()
        return StepView(
            counts_BE=own_BX[:, :-1],
            tokens_B=own_BX[:, -1],
            step_counts_E=totals[:-1],
            step_tokens=totals[-1],
            seen=max(len(self.window.slots), 1),
            micro_batches=self.window.micro_batches,
            ranks=self.token_axis.size // self.sequence_axis.size,
            top_k=self.top_k,
        )

    def _gradients(self, slot: MicroBatch) -> tuple[Tensor, Tensor]:
        """Gradients of the step's losses with respect to this micro-batch's sums, as the engine will join them."""
        gradient, token_weight = self._gradients_of(self.view(slot))
        self.window.used(slot)
        averaged = self.token_axis.size if self.averaged_ranks is None else self.averaged_ranks
        scale = self.loss_scale * (averaged if self.config.grad_reduction == "mean" else 1)
        return gradient * (self.config.coefficient * scale), token_weight * (self.z_coefficient * scale)
