"""One layer's load balancing: counts in, a gradient on the router out.

B sequences, E experts, K top-k, T tokens, X values of a row.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import LOCAL, Axis, world_axis
from ..config import BalanceConfig
from ..placement import Owners, Placement
from ..types import Decision, Routing
from .attach import attach
from .auto import AutoStep, registry
from .bias import bias_rule
from .estimators import ESTIMATORS
from .losses import SCOPES, StepView, Term, loss_value
from .recompute import remember, visit_being_recomputed
from .sent import sent
from .step import Layer, Step, StepTotals
from .sums import Number, Sums
from .visit import Visit, reaches

#: what a copy of a balancer does not share with the original
_OWN = ("step", "layer", "shared")


def loss_terms(config: BalanceConfig) -> list[tuple[str, float]]:
    """Scope and coefficient of the main loss and of the extra ones, one entry for each scope."""
    terms: dict[str, float] = {config.scope: config.coefficient}
    for name, coefficient in vars(config.extra).items():
        if coefficient:
            terms[name] = terms.get(name, 0.0) + coefficient
    return list(terms.items())


class Balancer:
    """Keeps a layer's counts of the optimizer step and attaches its losses.

    ``reach`` tells, for a number of expert-parallel ranks, to how many of them the router lets a token be sent.
    """

    def __init__(
        self,
        config: BalanceConfig,
        num_experts: int,
        top_k: int,
        z_coefficient: float = 0.0,
        reach: Callable[[int], int] | None = None,
    ) -> None:
        self.config, self.num_experts, self.top_k, self.z_coefficient = config, num_experts, top_k, z_coefficient
        self.bias = bias_rule(config)
        #: int64 [E + 2], counts, tokens and micro-batches of the step before; all zero when a resume is to fill it
        self.previous_X: Tensor | None = None
        self.reach = reach
        self._terms = loss_terms(config)
        scopes = [SCOPES[name] for name, _ in self._terms]
        self._of_all_ranks = any(scope.of_all_ranks for scope in scopes) or self.bias is not None
        self._of_own_sequences = not all(scope.of_all_ranks for scope in scopes)
        self._by_sequence = any(scope.by_sequence for scope in scopes)
        self._sent = any(scope.sent for scope in scopes)
        self._estimate = ESTIMATORS[config.estimator]
        self.placed: Placement | None = None
        self.owners = Owners.consecutive(num_experts, 1)
        self._start()

    def _start(self, copy_of: Number | None = None) -> None:
        self.number = registry.add(self, copy_of)
        #: the step that this layer counts for, and its share of it
        self.step: Step = AutoStep(self)
        self.layer: Layer = self.step.layers[0]
        #: the sums that it shares with other layers that nobody drives
        self.shared: dict[Axis, Sums] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start(copy_of=self.number)  # a copy is a layer of its own

    # ---- where the layer is, and whose step it counts for

    def place(self, placement: Placement) -> None:
        """Balance over the ranks of a placement."""
        self.placed, self.owners = placement, placement.owners_of(self.num_experts)

    def join(self, step: Step) -> None:
        """Count for a step that the training loop drives."""
        self.step, self.layer = step, step.join(self)

    def say_what_is_assumed(self) -> None:
        """Warn where several ranks were not told which of them hold different tokens."""
        axis = self.placement.tokens
        if self.placed is None and axis.size > 1:
            warnings.warn(
                f"MoE: the load is counted over all {axis.size} ranks of the default process group, each of which must "
                "take part, and the engine is taken to average gradients over them. If some of these ranks hold the "
                "same tokens, or gradients are joined otherwise, say so by MoE(config, group=...) or MoE.place(...)",
                stacklevel=2,
            )

    @property
    def previous_step(self) -> StepTotals | None:
        """Totals of the step that ended last; None before the first."""
        return self.layer.previous_step

    @property
    def visits(self) -> list[Visit]:
        """What has been counted in the step under way."""
        return self.layer.known

    @property
    def placement(self) -> Placement:
        """As told, or in a script that tells nothing: all ranks hold different tokens and gradients are averaged."""
        if self.placed is not None:
            return self.placed
        world = world_axis()
        return Placement(tokens=world, gradient_scale=float(world.size))

    @property
    def counting_axis(self) -> Axis:
        """The ranks whose tokens are counted together; scopes within one rank need no communication."""
        placement = self.placement
        return placement.tokens if self._of_all_ranks else placement.sequence

    def widths(self, axis: Axis) -> dict[str, int]:
        """How many values each row has that this layer sums over an axis."""
        found, placement = {}, self.placement
        if self._of_own_sequences and placement.sequence == axis:
            found["own"] = self.num_experts + 1
        if self._of_all_ranks and placement.tokens == axis:
            found["all"] = self.num_experts + 1 + (placement.ep.size if self._sent else 0)
        return found

    # ---- the forward

    def begin(self, module: nn.Module, x_TD: Tensor) -> tuple[Visit | None, Decision | None]:
        """Which visit the forward of an MoE layer is, and the decision to repeat where it recomputes another.

        None for evaluation and other forwards that leave no trace.
        """
        if not module.training or not (torch.is_grad_enabled() or self.step.counting):
            return None, None
        trained = x_TD.requires_grad or any(p.requires_grad for p in module.parameters())
        if not trained and not self.step.counting:  # without gradient, nothing tells what is trained before the layer
            return None, None  # a frozen teacher: nothing here is trained
        visit, certain = visit_being_recomputed(self.step, self.layer)
        if visit is None:
            visit = self.step.visit(self.layer, module)
        remember(visit)
        return visit, visit.decision if certain else None

    def count(self, visit: Visit, routing: Routing, mask_T: Tensor | None = None) -> bool:
        """Keep the decision and the counts, over the tokens where the mask is True; False where this forward
        recomputes another, of which they have been kept."""
        if visit.counted and not visit.ahead:
            return False
        routing = routing.outside_inference()
        visit.decision, visit.prob_sums_BE, visit.z_sum = routing.decision, routing.prob_sums_BE, routing.z_sum
        if visit.counted:  # ahead, and summed then
            visit.ahead = False
            return True
        visit.counted, visit.counts_BE, visit.tokens_B = True, routing.counts_BE, routing.tokens_B
        visit.size = len(routing.ids_TK) if mask_T is None else None
        placement = self.placement
        local_BX = torch.cat((routing.counts_BE, routing.tokens_B[:, None]), dim=1)
        total_1X = local_BX.sum(0, keepdim=True)
        own_BX = local_BX if self._by_sequence else total_1X
        own_axis = placement.sequence if self._of_own_sequences else LOCAL
        visit.own = visit.batch = self.step.entry(self.layer, "own", own_BX, own_axis)
        if self._of_all_ranks:
            if self._sent:
                total_1X = torch.cat((total_1X, sent(routing, mask_T, self.owners)[None]), dim=1)
            visit.batch = self.step.entry(self.layer, "all", total_1X, placement.tokens)
        return True

    def attach(self, visit: Visit | None, carrier: Tensor, routing: Routing, weight: Tensor) -> Tensor:
        """``carrier`` with the losses of a forward that takes part in the step; ``weight`` is the router's."""
        if visit is None or not carrier.requires_grad:
            return carrier
        losses = partial(self._pay, visit, weight)  # dies with the graph, which alone holds it
        if visit.graph() is None:  # a recomputation has a graph of its own, which ends before the backward does
            visit.graph = weakref.ref(losses)
        return attach(carrier, routing.prob_sums_BE, routing.z_sum, losses)

    # ---- the backward

    def view(self, visit: Visit) -> StepView:
        """The step as it is known now, around one visit."""
        step, layer, placement, owners = self.step, self.layer, self.placement, self.owners
        own_BX, batch_X = visit.own.get(), visit.total
        seen, micro_batches = len(layer.known), step.micro_batches(layer)
        estimate = self._estimate(layer.totals(visit), seen, micro_batches, self.previous_X)
        if step.tokens is not None:
            estimate = estimate._replace(step_tokens=step.tokens.double() * layer.runs)
        ranks = placement.tokens.size // placement.sequence.size
        known = StepView(
            counts_BE=own_BX[:, :-1],
            tokens_B=own_BX[:, -1],
            batch_counts_E=batch_X[:-1],
            batch_tokens=batch_X[-1],
            step=estimate,
            seen=seen,
            micro_batches=micro_batches,
            ranks=ranks,
            top_k=self.top_k,
            owners=owners,
            reach=min(owners.ranks, self.top_k, self.top_k if self.reach is None else self.reach(owners.ranks)),
        )
        if self._sent:
            known = replace(known, sent_P=visit.extras)
        return known

    def read(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """The gradients of a visit's losses with respect to its probability sums [E] or [B, E] and its z sum."""
        if visit not in self.layer.visits.values():
            raise ValueError(
                "MoE: a backward of a forward whose step has ended, or was discarded; run it before the update, and "
                "before Step.end() or Step.discard()"
            )
        self.step.read(self.layer, visit)
        self._check_counts()
        view, scale = self.view(visit), self.placement.scale
        losses = [SCOPES[scope].loss(view) for scope, _ in self._terms]
        visit.loss = losses[0]
        visit.terms = [
            Term(scope, coefficient * self._convention(scope, view), loss.gradient, visit.prob_sums_BE)
            for loss, (scope, coefficient) in zip(losses, self._terms, strict=True)
        ]
        gradient = sum(term.gradient * (term.coefficient * scale) for term in visit.terms)
        if self.z_coefficient:
            visit.terms.append(Term("z", self.z_coefficient, losses[0].token_weight, visit.z_sum))
        return torch.as_tensor(gradient), losses[0].token_weight * (self.z_coefficient * scale)

    def _pay(self, visit: Visit, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`read`, once: zeros in a second backward through the same forward."""
        gradient, of_z = self.read(visit)
        if visit.paid:
            return torch.zeros_like(gradient), torch.zeros_like(of_z)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            visit.paid = reaches(weight) is True
        return gradient, of_z

    def _convention(self, scope: str, view: StepView) -> float:
        """What a coefficient of this scope is multiplied by.

        Megatron-Core's global_aux_loss divides by the tokens of all ranks, and its engine then averages over the
        data-parallel ranks once more: with dp of them the loss weighs coefficient / dp. Its other losses do not.
        """
        return 1.0 / view.ranks if scope == "global" and self.config.scale_convention == "megatron" else 1.0

    def _check_counts(self) -> None:
        """Refuse losses that need counts, or a number of tokens, that only later micro-batches have."""
        if not self.step.early(self.layer):
            return
        if self.config.estimator == "exact" and any(coefficient for _, coefficient in self._terms):
            raise ValueError(
                "balance.estimator='exact': a backward has come before all micro-batches of the step were counted; run "
                "them within counting_pass() first, or all forwards before the first backward, or use 'rolling'"
            )
        # with a main loss of another scope, the z-loss is a mean over micro-batches
        over_step = self.z_coefficient and self.config.scope == "global" and self.step.tokens is None
        sizes = {v.size for v in self.layer.known}
        if over_step and (None in sizes or len(sizes) > 1):
            raise ValueError(
                f"router.z_loss={self.z_coefficient}: a mean over the step's valid tokens, of which micro-batches may "
                "have different numbers (masks, lengths); tell the number: step = Step.of(model), "
                "step.begin(tokens=...), or use balance.estimator='exact', or set router.z_loss=0"
            )

    # ---- what others ask

    def loss_values(self, routing: Routing, visit: Visit) -> dict[str, float]:
        """Unscaled losses of a micro-batch, as :attr:`equimoe.moe.types.RoutingStats.losses` describes them."""
        totals, k = self.layer.totals(visit), self.top_k
        counts_BE, tokens_B, prob_sums_BE = routing.counts_BE, routing.tokens_B, routing.prob_sums_BE.detach()
        counts_E, tokens, prob_sums_E = counts_BE.sum(0), tokens_B.sum(), prob_sums_BE.sum(0)
        per_sequence_B = loss_value(counts_BE, tokens_B, prob_sums_BE, tokens_B, k)
        return {
            "global": float(loss_value(totals[:-1], totals[-1], prob_sums_E, tokens, k)),
            "micro": float(loss_value(counts_E, tokens, prob_sums_E, tokens, k)),
            "sequence": float(per_sequence_B.sum() / (tokens_B > 0).sum().clamp_min(1)),
            "z": float(routing.z_sum.detach() / tokens.clamp_min(1)),
        }

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Tensors that a resumed run needs. A resume fills them in place and hands them to :meth:`restore`.

        Between steps that is the load of the step before, which ``carry`` reads; else nothing. (The bias belongs to the
        router.)
        """
        if self.config.estimator != "carry":
            return {}
        previous_X = torch.zeros(self.num_experts + 2, dtype=torch.int64, device=device)
        return {"step_before": previous_X if self.previous_X is None else self.previous_X}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a filled :meth:`state`."""
        self.previous_X = state.get("step_before")
