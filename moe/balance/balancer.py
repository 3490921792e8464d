"""One layer's load balancing: takes counts in the forward, and gives the router a gradient in the backward.

B sequences, E experts, K top-k, T tokens, X values of a row.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..collectives import LOCAL, Axis, world_axis
from ..config import BalanceConfig
from ..placement import Owners, Placement
from ..transfer import Reading
from ..types import Decision, Routing
from . import traced
from .agreement import Agreement
from .attach import attach
from .auto import AutoStep, may_hold_copies
from .bias import bias_rule
from .estimators import ESTIMATORS
from .hooks import register_while_alive, untraced
from .losses import COUNTS, SCOPES, StepView, Term, loss_value, sent_tokens
from .own_step import registry
from .recompute import remember, visit_being_recomputed
from .scaler import Scaler, current_scale, refuse_two_scales, updating_scaler
from .step import LayerStep, Step, StepTotals
from .sums import LayerNumber, Sums
from .visit import Visit, accumulates

#: the placement of a layer that no other rank works with
_ALONE = Placement()
#: attributes that a copy does not take over
_NOT_COPIED = ("step", "layer", "shared", "scaler", "traced")


def loss_terms(config: BalanceConfig) -> list[tuple[str, float]]:
    """Return scope and total coefficient of each loss, the main loss first."""
    terms: dict[str, float] = {config.scope: config.coefficient}
    for name, coefficient in vars(config.extra).items():
        if coefficient:
            terms[name] = terms.get(name, 0.0) + coefficient
    return list(terms.items())


class Balancer:
    """Counts a layer's load in the optimizer step, and attaches the balance losses to its output.

    ``reach`` maps a number of expert-parallel ranks to the number of them that the router can send a token to.
    ``load_weights`` multiply the load of each expert in the losses. If there are more of them than ``num_experts``, the
    router has further experts, which no rank owns.
    """

    #: whether the losses are attached to the output, and not a part of the user's loss
    attached = True

    def __init__(
        self,
        config: BalanceConfig,
        num_experts: int,
        top_k: int,
        z_coefficient: float = 0.0,
        reach: Callable[[int], int] | None = None,
        entropy_coefficient: float = 0.0,
        load_weights: Sequence[float] | None = None,
    ) -> None:
        self.entropy_coefficient = entropy_coefficient
        self.load_weight_E = (
            None if load_weights is None else torch.tensor(load_weights, dtype=torch.float64, device="cpu")
        )
        self.owned, num_experts = num_experts, num_experts if load_weights is None else len(load_weights)
        self.config, self.num_experts, self.top_k, self.z_coefficient = config, num_experts, top_k, z_coefficient
        self.bias = bias_rule(config)
        #: which choices are the load, and how many of each token they are
        self._counts, self.counted = COUNTS[config.counts], config.counted(top_k)
        #: int64 [E + 2], counts, tokens and micro-batches of the previous step, if the estimator needs them; all zero
        #: before a resume fills it
        self.previous_X: Tensor | None = None
        #: how well earlier steps have predicted each other, if the estimator is "adaptive"
        self.agreement: Agreement | None = None
        self.reach = reach
        self._terms = loss_terms(config)
        scopes = [SCOPES[name] for name, _ in self._terms]
        self._of_all_ranks = any(scope.of_all_ranks for scope in scopes) or self.bias is not None
        self._of_own_sequences = not all(scope.of_all_ranks for scope in scopes)
        self._by_sequence = any(scope.by_sequence for scope in scopes)
        self._sent = any(scope.sent for scope in scopes)
        self._estimate = ESTIMATORS[config.estimator]
        self.placed: Placement | None = None
        self.owners = Owners.consecutive(self.owned, 1)
        self._register()

    def _register(self, copy_of: LayerNumber | None = None) -> None:
        self.number = registry.add(self, copy_of)
        #: the step that this layer counts for, and the layer's part of it
        self.step: Step = AutoStep(self)
        self.layer: LayerStep = self.step.layers[0]
        #: sums shared with other layers that no training loop drives
        self.shared: dict[Axis, Sums] = {}
        #: the training loop's gradient scaler, see :func:`equimoe.moe.use_gradient_scaler`
        self.scaler: Scaler | None = None
        #: what compiled forwards have begun
        self.traced = traced.Traced()
        register_while_alive(register_optimizer_step_pre_hook, self.refuse_unknown_scaler)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register(copy_of=self.number)

    # ---- ranks and steps

    def place(self, placement: Placement) -> None:
        """Balance over the ranks of ``placement``."""
        refuse_two_scales(self.scaler, placement.gradient_scale)
        self.placed, self.owners = placement, placement.owners_of(self.owned)

    def join(self, step: Step) -> None:
        """Count for a step that the training loop drives."""
        self.step, self.layer = step, step.join(self)

    def warn_of_assumed_ranks(self) -> None:
        """Warn if there are several ranks, and the layer was not told which of them hold different tokens."""
        axis = self.placement.tokens
        if self.placed is None and axis.size > 1:
            warnings.warn(
                f"MoE: the load is counted over all {axis.size} ranks of the default process group. This assumes that "
                "every rank takes part, holds different tokens, and averages its gradients with the others. If not, "
                "use MoE(config, group=...) or MoE.place(...)",
                stacklevel=2,
            )

    @property
    def previous_step(self) -> StepTotals | None:
        """Totals of the previous step; None before the first one has ended."""
        return self.layer.previous_step

    @property
    def visits(self) -> list[Visit]:
        """The visits of the current step that count."""
        return self.layer.known

    @property
    def placement(self) -> Placement:
        """The placement; without one, all ranks are assumed to hold different tokens and to average gradients."""
        if self.placed is not None:
            return self.placed
        world = world_axis()
        return Placement(tokens=world, gradient_scale=float(world.size)) if world.size > 1 else _ALONE

    @property
    def counting_axis(self) -> Axis:
        """The ranks whose tokens are counted together."""
        placement = self.placement
        return placement.tokens if self._of_all_ranks else placement.sequence

    def widths(self, axis: Axis) -> dict[str, int]:
        """Return the rows that this layer sums over an axis, and their numbers of values."""
        found, placement = {}, self.placement
        if self._of_own_sequences and placement.sequence == axis:
            found["own"] = self.num_experts + 1
        if self._of_all_ranks and placement.tokens == axis:
            found["all"] = self.num_experts + 1 + (placement.ep.size if self._sent else 0)
        return found

    @property
    def has_attached_losses(self) -> bool:
        """Whether the backward adds gradients that no value of a loss shows."""
        of_tokens = self.z_coefficient or self.entropy_coefficient
        return self.attached and bool(of_tokens or any(coefficient for _, coefficient in self._terms))

    def refuse_unknown_scaler(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step. Raises ValueError if a gradient scaler divides this layer's losses."""
        pending = self.has_attached_losses and any(v.done for v in self.layer.visits.values())
        if not pending or callable(self.placement.gradient_scale):
            return
        scaler = updating_scaler()
        if scaler is None or scaler is self.scaler:
            return
        trained = set(self.layer.trained())
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if trained and trained.isdisjoint(held) and not may_hold_copies(self.layer, optimizer):
            return  # it trains another model
        name = "scaler" if isinstance(scaler, torch.amp.GradScaler) else "engine"
        remedy = f"call equimoe.moe.use_gradient_scaler(model, {name}) once, before training"
        if not trained:  # something before the layer is, and it is unknown by which optimizers
            remedy += "; or if it scales another model only, update this one first, as its MoE layer is frozen"
        raise ValueError(
            f"{type(scaler).__name__}: it multiplies your loss, but not the balance loss, whose gradient would "
            f"be {float(current_scale(scaler, 'cpu')):g} times too small; {remedy}"
        )

    # ---- the forward

    @untraced(traced.begin)
    def begin(self, module: nn.Module, x_TD: Tensor) -> tuple[Visit | None, Decision | None]:
        """Return the visit of a forward, and the routing decision to repeat if the forward recomputes another.

        The visit is None for evaluation and other forwards that are not counted.
        """
        if not self.counts_forward(module, x_TD):
            return None, None
        visit, certain = self.visit(module, x_TD)
        return visit, visit.decision if certain else None

    def counts_forward(self, module: nn.Module, x_TD: Tensor) -> bool:
        """Return whether a forward is counted. Evaluation is not."""
        if not module.training or not (torch.is_grad_enabled() or self.step.counting):
            return False
        # FSDP1 makes weights views of a flat parameter, so the router's is not among the module's parameters
        if x_TD.requires_grad or module.router.weight.requires_grad:  # type: ignore[union-attr]
            return True
        # a frozen model, such as a teacher, is not counted; a counting pass cannot tell, because it has no gradients
        return self.step.counting or any(weight.requires_grad for weight in module.parameters())

    def visit(self, module: nn.Module, x_TD: Tensor) -> tuple[Visit, bool]:
        """Return the visit of a forward, and whether the forward certainly recomputes another of the same visit."""
        visit, certain = visit_being_recomputed(self.step, self.layer)
        if visit is None:
            visit = self.step.visit(self.layer, module, x_TD)
        remember(visit)
        return visit, certain

    @untraced(traced.count)
    def count(self, visit: Visit, routing: Routing, mask_T: Tensor | None = None) -> bool:
        """Store a visit's decision and counts, and start to sum them. Returns False in a recomputation."""
        if visit.counted and not visit.ahead:
            return False
        routing = routing.outside_inference()
        visit.decision, visit.prob_sums_BE = routing.decision, routing.prob_sums_BE.detach()
        visit.z_sum = routing.z_sum.detach()
        visit.entropy_sum = None if routing.entropy_sum is None else routing.entropy_sum.detach()
        if visit.counted:  # its counting pass has summed the counts
            visit.ahead = False
            return True
        visit.counted, visit.counts_BE, visit.tokens_B = True, self._counts(routing, mask_T), routing.tokens_B
        visit.size = routing.ids_TK.shape[0] if mask_T is None else None
        placement = self.placement
        local_BX = torch.cat((visit.counts_BE, visit.tokens_B[:, None]), dim=1)
        total_1X = local_BX if local_BX.shape[0] == 1 else local_BX.sum(0, keepdim=True)
        own_BX = local_BX if self._by_sequence else total_1X
        own_axis = placement.sequence if self._of_own_sequences else LOCAL
        visit.own = visit.batch = self.step.sum_row(self.layer, "own", own_BX, own_axis)
        if self._of_all_ranks:
            if self._sent:
                total_1X = torch.cat((total_1X, sent_tokens(routing, mask_T, self.owners)[None]), dim=1)
            visit.batch = self.step.sum_row(self.layer, "all", total_1X, placement.tokens)
        return True

    @untraced(traced.attach)
    def attach(self, visit: Visit | None, carrier: Tensor, routing: Routing, weight: Tensor) -> Tensor:
        """Attach a visit's losses to ``carrier``, and return it. ``weight`` is the router's."""
        if visit is None or not carrier.requires_grad:
            return carrier
        gradients = partial(self.read_once, visit, weight)  # only the graph holds it, so they die together
        if visit.graph() is None:  # a recomputation has a graph of its own, which dies before the backward ends
            visit.graph = weakref.ref(gradients)
        return attach(carrier, routing.prob_sums_BE, routing.z_sum, routing.entropy_sum, gradients)

    # ---- the backward

    def view(self, visit: Visit) -> StepView:
        """Return what is known now about a visit and its step."""
        step, layer, placement, owners = self.step, self.layer, self.placement, self.owners
        seen, micro_batches = len(layer.known), step.expected(layer)
        estimate = self._estimate(layer.totals(visit), seen, micro_batches, self.previous_X, self.agreement)
        if step.tokens is not None:
            estimate = estimate._replace(step_tokens=step.tokens.double() * layer.runs)
        return StepView(
            own_BX=visit.own.get(),
            batch_X=visit.total,
            step=estimate,
            seen=seen,
            micro_batches=micro_batches,
            ranks=placement.tokens.size // placement.sequence.size,
            top_k=self.counted,
            owners=owners,
            reach=min(owners.ranks, self.top_k, self.top_k if self.reach is None else self.reach(owners.ranks)),
            sent_P=visit.extras if self._sent else None,
        )

    def read(self, visit: Visit | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of a visit's losses with respect to prob_sums ([E] or [B, E]), z_sum and entropy_sum.

        The last two are None if no loss needs them.
        """
        if visit is None or visit not in self.layer.visits.values():
            raise ValueError(
                "MoE: this backward pass comes too late, its step has ended or was discarded; run it before the "
                "optimizer's update, and before Step.end() or Step.discard()"
            )
        self.step.read(self.layer, visit)
        self._check_counts()
        view, scale = self.view(visit), self.placement.scale
        if self.scaler is not None and self.attached:
            scale = scale * current_scale(self.scaler, visit.prob_sums_BE.device)
        losses = [SCOPES[scope].loss(view) for scope, _ in self._terms]
        visit.loss = losses[0]
        visit.terms = [
            Term(scope, coefficient * self._convention(scope, view), self._weighted(loss.gradient), visit.prob_sums_BE)
            for loss, (scope, coefficient) in zip(losses, self._terms, strict=True)
        ]
        first, *others = [term.gradient * (term.coefficient * scale) for term in visit.terms]
        gradient = sum(others, start=first)
        if self.z_coefficient:
            visit.terms.append(Term("z", self.z_coefficient, losses[0].token_weight, visit.z_sum))
        if visit.entropy_sum is not None:
            visit.terms.append(Term("entropy", self.entropy_coefficient, losses[0].token_weight, visit.entropy_sum))
        of_tokens = self.z_coefficient, self.entropy_coefficient
        of_z, of_entropy = (losses[0].token_weight * (c * scale) if c else None for c in of_tokens)
        return gradient, of_z, of_entropy

    def _weighted(self, loads_XE: Tensor) -> Tensor:
        """Multiply the load of each expert by its weight."""
        if self.load_weight_E is None:
            return loads_XE
        if self.load_weight_E.device != loads_XE.device:  # move once, after the layer moved to another device
            self.load_weight_E = self.load_weight_E.to(loads_XE.device)
        return loads_XE * self.load_weight_E

    def read_once(self, visit: Visit | None, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Like :meth:`read`, but zeros if an earlier backward through the same forward has delivered the gradients."""
        gradients = self.read(visit)
        assert visit is not None  # or read has raised
        if visit.delivered:
            return torch.zeros_like(gradients[0]), None, None
        if torch._C._autograd._get_current_graph_task_keep_graph():
            visit.delivered = accumulates(weight) is True
        return gradients

    def _convention(self, scope: str, view: StepView) -> float:
        """Return the factor of a scope's coefficient.

        Megatron-Core divides its global_aux_loss by the tokens of all ranks, and then averages over the data-parallel
        ranks again, so with dp ranks the effective coefficient is coefficient / dp. Its other losses do not do this.
        """
        return 1.0 / view.ranks if scope == "global" and self.config.scale_convention == "megatron" else 1.0

    def _check_counts(self) -> None:
        """Raise ValueError if a loss needs counts or token numbers of micro-batches that have not been counted."""
        if not self.step.backward_came_early(self.layer):
            return
        if self.config.estimator == "exact" and any(coefficient for _, coefficient in self._terms):
            raise ValueError(
                "balance.estimator='exact': a backward has come before all micro-batches of the step were counted; run "
                "them within counting_pass() first, or all forwards before the first backward, or use 'rolling'"
            )
        # if the main loss has another scope, these two losses are means over micro-batches
        name, coefficient = "z_loss", self.z_coefficient
        if self.entropy_coefficient:
            name, coefficient = "entropy_loss", self.entropy_coefficient
        over_step = coefficient and self.config.scope == "global" and self.step.tokens is None
        sizes = {v.size for v in self.layer.known}
        if over_step and (None in sizes or len(sizes) > 1):
            raise ValueError(
                f"router.{name}={coefficient}: it is a mean over the step's valid tokens, but micro-batches may "
                "have different numbers of them (masks, lengths); give the step's number: step = Step.of(model), "
                f"step.begin(tokens=...), or use balance.estimator='exact', or set router.{name}=0"
            )

    # ---- statistics and checkpoints

    def loss_values(self, visit: Visit) -> dict[str, float]:
        """Return a micro-batch's losses, see :attr:`equimoe.moe.types.RoutingStats.losses`."""
        totals, top_k = self.layer.totals(visit), self.counted
        counts_BE, tokens_B = self._weighted(visit.counts_BE), visit.tokens_B
        prob_sums_BE = visit.prob_sums_BE
        counts_E, tokens, prob_sums_E = counts_BE.sum(0), tokens_B.sum(), prob_sums_BE.sum(0)
        per_sequence_B = loss_value(counts_BE, tokens_B, prob_sums_BE, tokens_B, top_k)
        values = {
            "global": loss_value(self._weighted(totals[:-1]), totals[-1], prob_sums_E, tokens, top_k),
            "micro": loss_value(counts_E, tokens, prob_sums_E, tokens, top_k),
            "sequence": per_sequence_B.sum() / (tokens_B > 0).sum().clamp_min(1),
            "z": visit.z_sum / tokens.clamp_min(1),
        }
        if visit.entropy_sum is not None:
            values["entropy"] = visit.entropy_sum / tokens.clamp_min(1)
        read = Reading(torch.stack([value.double() for value in values.values()])).get()
        return dict(zip(values, map(float, read), strict=True))

    @property
    def remembers(self) -> bool:
        """Whether the estimator needs the load of earlier steps."""
        return self.config.estimator in ("carry", "adaptive")

    def observe(self, totals_MX: Tensor) -> None:
        """Remember a step that has ended: counts and tokens of its micro-batches, int64 [M, E + 1]."""
        if self.config.estimator == "adaptive":
            self.agreement = self.agreement or Agreement(totals_MX.device)
            self.agreement.observe(totals_MX, self.previous_X)
        self.previous_X = F.pad(totals_MX.sum(0), (0, 1), value=len(totals_MX))

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must hold: the previous step's load if ``carry`` needs it.

        To resume, fill them in place and pass them to :meth:`restore`. The expert bias is a buffer of the router.
        """
        if not self.remembers:
            return {}
        empty_X = torch.zeros(self.num_experts + 2, dtype=torch.int64, device=device)
        state = {"step_before": empty_X if self.previous_X is None else self.previous_X}
        if self.config.estimator == "adaptive":
            state["agreement"] = (self.agreement or Agreement(device)).values
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Resume from a filled :meth:`state`."""
        self.previous_X = state.get("step_before")
        if (values := state.get("agreement")) is not None:
            self.agreement = Agreement(values.device)
            self.agreement.values = values
