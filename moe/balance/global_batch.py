"""One layer's load balancing: counts in, a gradient on the router out.

B sequences, E experts, K top-k, D expert-parallel ranks, N tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, Pending, world_axis
from ..config import BalanceConfig
from ..types import Decision, Routing
from .attach import attach
from .bias import bias_rule, sign
from .counts import MicroBatch, Summed, Term, Window, forget_ahead
from .draw import draw, of_all_ranks, sent, valid_choices
from .estimators import ESTIMATORS
from .ledger import sum_of_layer
from .losses import SCOPES, StepView, loss_value
from .recompute import remember, slot_being_recomputed

_counting: ContextVar[bool] = ContextVar("equimoe_counting_pass", default=False)


@contextmanager
def counting_pass() -> Iterator[None]:
    """Within it, forwards without gradient count their micro-batch ahead of its training forward.

    Run it over all micro-batches of a step, then train on them in the same order: the estimator is then exact.
    What was counted is forgotten when an exception leaves it, and when counting begins anew before all was trained on.
    """
    token = _counting.set(True)
    try:
        with torch.no_grad():
            yield
    except BaseException:
        forget_ahead()
        raise
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


#: scopes that look at the tokens of all ranks, and at those of a rank's own sequences
_OF_ALL_RANKS = {"global", "data_parallel", "device", "communication", "shuffled"}
_OF_OWN_SEQUENCES = {"micro", "sequence", "shuffled"}


def loss_terms(config: BalanceConfig) -> list[tuple[str, float]]:
    """Scope and coefficient of the main loss, and of those beside it; one for each scope."""
    terms: dict[str, float] = {config.scope: config.coefficient}
    for name, coefficient in vars(config.extra).items():
        if coefficient:
            terms[name] = terms.get(name, 0.0) + coefficient
    return list(terms.items())


class _Total:
    """The sum over the sequences of another sum."""

    def __init__(self, by_sequence: Summed) -> None:
        self._by_sequence = by_sequence

    def get(self) -> Tensor:
        return self._by_sequence.get().sum(0)


class Balancer:
    """Keeps the counts of the optimizer step and attaches the losses.

    ``axis`` names the ranks that hold different tokens; None: the default process group, if there is one by then.
    ``sequence_axis`` names those among them that hold parts of the same sequences.
    ``averaged_ranks`` is how many ranks' gradients the engine averages; None: those of the axis.
    ``loss_scale`` must be what the loss is multiplied by before its backward (a gradient scaler's scale).
    ``devices`` is over how many ranks the experts are spread, in equal runs of consecutive ones; ``reach`` how many of
    them a token can be sent to (None: as many as it has choices).
    """

    def __init__(self, config: BalanceConfig, top_k: int, z_coefficient: float) -> None:
        self.config = config
        self.top_k = top_k
        self.z_coefficient = z_coefficient
        self.window = Window(config.micro_batches, bias_rule(config))
        self.axis: Axis | None = None
        self.sequence_axis = LOCAL
        self.averaged_ranks: int | None = None
        self.loss_scale: float | Tensor = 1.0
        self.devices = 1
        self.reach: int | None = None
        self._terms = loss_terms(config)
        self._scopes = {scope for scope, _ in self._terms}
        self._estimate = ESTIMATORS[config.estimator]

    def begin(self, training: bool, weight: Tensor, bias_E: Tensor | None = None) -> Pass:
        """What the forward that begins now is, given the router's weight and bias as they are used."""
        counting = _counting.get()
        if not training or not (torch.is_grad_enabled() or counting):
            return Pass()
        slot, known = slot_being_recomputed(self.window)
        if slot is not None:
            remember(slot)
            return Pass(slot, slot.decision if known else None)
        self.window.begin_pass(weight, bias_E, ahead=counting)
        slot = self.window.open(ahead=counting)
        remember(slot)
        return Pass(slot, slot.decision if slot.ahead else None, first=True)

    def count(self, routing: Routing, this: Pass, mask_T: Tensor | None = None) -> None:
        """Keep the decision and counts of a pass that is made for the first time, over the tokens where the mask is."""
        slot = this.slot
        if slot is None or not this.first:
            return
        slot.prob_sums_BE, slot.z_sum = routing.prob_sums_BE.detach(), routing.z_sum.detach()
        if slot.ahead:  # counted and summed before
            slot.ahead = False
            return
        slot.sequence_ranks, slot.ranks = self.sequence_axis.size, self.counting_axis.size
        self._start_sums(slot, routing, mask_T)
        slot.ahead = _counting.get()

    def _start_sums(self, slot: MicroBatch, routing: Routing, mask_T: Tensor | None) -> None:
        """Start to sum this micro-batch's counts over the ranks that the losses and the bias ask for."""
        local_BX = torch.cat((routing.counts_BE, routing.tokens_B[:, None]), dim=1)
        total_1X = local_BX.sum(0, keepdim=True)
        own: Summed = Pending(total_1X)
        if self._scopes & _OF_OWN_SEQUENCES:
            value = local_BX if "sequence" in self._scopes else total_1X
            own = sum_of_layer(value, self.sequence_axis, (self.window.number, "own"))
        if not self._beyond_sequences:
            slot.assign(routing, own, _Total(own), None)
            return
        parts, choices_NK = [total_1X[0]], None
        if "communication" in self._scopes:
            parts.append(sent(valid_choices(routing, mask_T), routing.counts_BE.shape[1], self.devices))
        if self.window.bias is not None and self.window.bias.votes:
            parts.append(sign(routing.counts_BE.sum(0)))
        batch = sum_of_layer(torch.cat(parts), self.token_axis, (self.window.number, "all"))
        if "shuffled" in self._scopes:
            choices_NK = of_all_ranks(valid_choices(routing, mask_T), self.token_axis)
        slot.assign(routing, own, batch, choices_NK)

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
        return self.token_axis if self._beyond_sequences else self.sequence_axis

    @property
    def _beyond_sequences(self) -> bool:
        return bool(self._scopes & _OF_ALL_RANKS) or self.window.bias is not None

    def view(self, slot: MicroBatch) -> StepView:
        """The step as it is known now, around one of its micro-batches."""
        totals, own_BX, batch_X = self.window.totals(slot), slot.own.get(), slot.total
        seen, micro_batches = max(len(self.window.known), 1), self.window.micro_batches
        ranks = self.token_axis.size // self.sequence_axis.size
        known = StepView(
            counts_BE=own_BX[:, :-1],
            tokens_B=own_BX[:, -1],
            batch_counts_E=batch_X[:-1],
            batch_tokens=batch_X[-1],
            step=self._estimate(totals, seen, micro_batches, self.window.before_X),
            seen=seen,
            micro_batches=micro_batches,
            ranks=ranks,
            top_k=self.top_k,
            devices=self.devices,
            reach=min(self.devices, self.top_k, self.reach or self.top_k),
        )
        if "communication" in self._scopes:
            known = replace(known, sent_D=slot.beside[: self.devices])
        if "shuffled" in self._scopes:
            choices_NK = torch.cat(self.window.choices(slot))
            counts_E, tokens = draw(choices_NK, batch_X[-1] // ranks, len(batch_X) - 1, slot.number)
            known = replace(known, drawn_counts_E=counts_E, drawn_tokens=tokens)
        return known

    def _gradients(self, slot: MicroBatch) -> tuple[Tensor, Tensor]:
        """Gradients of the step's losses with respect to this micro-batch's sums, as the engine will join them."""
        view = self.view(slot)
        losses = [SCOPES[scope](view) for scope, _ in self._terms]
        slot.used = losses[0]
        self.window.used(slot)
        averaged = self.token_axis.size if self.averaged_ranks is None else self.averaged_ranks
        scale = self.loss_scale * (averaged if self.config.grad_reduction == "mean" else 1)
        slot.terms = [
            Term(scope, coefficient * self._convention(scope, view), loss.gradient, slot.prob_sums_BE)
            for loss, (scope, coefficient) in zip(losses, self._terms, strict=True)
        ]
        gradient: Any = 0.0
        for term in slot.terms:
            gradient = gradient + term.gradient * (term.coefficient * scale)
        if self.z_coefficient:
            slot.terms.append(Term("z", self.z_coefficient, losses[0].token_weight, slot.z_sum))
        return gradient, losses[0].token_weight * (self.z_coefficient * scale)

    def _convention(self, scope: str, view: StepView) -> float:
        """What a coefficient of this scope is multiplied by.

        Megatron-Core's global_aux_loss divides by the tokens of all ranks, and its engine then takes the mean over
        data-parallel ranks once more: with dp of them the loss weighs coefficient / dp. Its other losses do not.
        """
        return 1.0 / view.ranks if scope == "global" and self.config.scale_convention == "megatron" else 1.0

    def report(self) -> dict[str, float]:
        """How good the estimate of the load was in the step that ended last; empty before the first. It synchronises.

        ``balance_tokens`` and ``balance_sequences``: over how many tokens and sequences the main loss counted its load,
        in the mean over the step's backwards (the paper's balance batch size). ``estimator_error``: how far that load
        was from the whole step's, as a share of it. ``gradient_error``: the same as a share of that load's distance
        from an even one, which is about the relative error of the loss's gradient; absent where the load is even. (Of
        a scope within one rank, from this rank's own step, unless a loss or the bias beside it counts over all ranks.)
        """
        last = self.window.last
        if last is None:
            return {}
        names = ("balance_tokens", "balance_sequences", "estimator_error", "gradient_error")
        found = {name: getattr(last, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def state(self, num_experts: int, device: torch.device) -> dict[str, Tensor]:
        """Tensors that a resumed run must have to go on alike, filled in place by whoever restores them.

        Between steps that is the load of the step before, which ``carry`` looks at; else nothing. (The bias belongs to
        the router.)
        """
        if self.config.estimator != "carry":
            return {}
        if self.window.before_X is None:
            self.window.before_X = torch.zeros(num_experts + 2, dtype=torch.int64, device=device)
        return {"step_before": self.window.before_X}
