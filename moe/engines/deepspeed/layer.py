"""The layer with the signature of ``deepspeed.moe.layer.MoE``: a DeepSpeed script changes one import.

from equimoe.moe.engines.deepspeed import MoE
"""

# T tokens, D hidden, E experts, N rows of an expert, R routed rows, S source rows, K choices of a row.

from __future__ import annotations

import copy
import inspect
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.permute import combine, permute
from ...balance import AutoStep, Balancer, LayerStep, Visit, loss_value
from ...collectives import axis_of, world_axis
from ...config import BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from ...layer import MoE as EquiMoE
from ...placement import Placement
from ...types import DispatchPlan, Routing
from .experts import Known

#: names in the state dict of DeepSpeed's own layer
_NAMES = {"router.weight": "deepspeed_moe.gate.wg.weight", "experts.": "deepspeed_moe.experts."}


class ModuleExperts(nn.Module):
    """Copies of a module of any kind, one for each expert of this rank. Rows go to each in turn."""

    def __init__(self, expert: nn.Module, number: int, group_name: str) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(number))
        for parameter in self.deepspeed_experts.parameters():
            parameter.allreduce, parameter.group_name = False, group_name  # type: ignore[attr-defined]

    def forward(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return each source row's weighted sum over its experts on this rank, [S, D]."""
        rows_RD = permute(rows_SD, plan.order)
        sizes = plan.order.offsets_E.diff().tolist()
        parts = rows_RD.split([*sizes, len(rows_RD) - sum(sizes)])
        # an expert without rows runs too, so that its weights have a gradient on every rank
        outs = [_first(expert(part_ND)) for expert, part_ND in zip(self.deepspeed_experts, parts, strict=False)]
        out_RD = torch.cat([*outs, parts[-1].to(outs[0].dtype)])
        weights_R = plan.weights_SK.reshape(-1)[plan.order.order_R]
        return combine(out_RD * weights_R[:, None].to(out_RD.dtype), plan.order)


def _first(output: Any) -> Tensor:
    """Return an expert's output; some experts return a tuple of it and a bias."""
    return output[0] if isinstance(output, tuple) else output


class _LossOutput(torch.autograd.Function):
    """A loss of which the caller takes a multiple. Its gradients are asked for in the backward, times that multiple."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        prob_sums_BE: Tensor,
        z_sum: Tensor,
        gradients: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]],
        visits: Callable[[], int],
    ) -> Tensor:
        ctx.gradients, ctx.visits, ctx.shape = gradients, visits, prob_sums_BE.shape
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_BE, grad_z, _ = ctx.gradients()
        # this forward's gradients are its share of the step's loss; the caller takes the mean or the sum over forwards
        factor = grad * ctx.visits()
        of_z = None if grad_z is None else (grad_z * factor).to(grad.dtype)
        return None, (grad_BE.expand(ctx.shape) * factor).to(grad.dtype), of_z, None, None


class _Balancer(Balancer):
    """Returns the balance loss separately, instead of attaching it to the layer's output."""

    attached = False
    #: the loss, and int64 [E] the choices of each expert, of the last forward
    outputs: tuple[Tensor, Tensor] | None = None

    def _register(self, copy_of: Any = None) -> None:
        super()._register(copy_of)
        self.step = _Step(self)
        self.layer = self.step.layers[0]

    def attach(self, visit: Visit | None, carrier: Tensor, routing: Routing, weight: Tensor) -> Tensor:
        counts_E, tokens = routing.counts_BE.sum(0), routing.tokens_B.sum()
        value = loss_value(counts_E, tokens, routing.prob_sums_BE.detach().sum(0), tokens, self.top_k).float()
        if visit is not None and carrier.requires_grad:
            gradients = partial(self.read_once, visit, weight)  # only the graph holds it, so they die together
            if visit.graph() is None:
                visit.graph = weakref.ref(gradients)
            value = _LossOutput.apply(value, routing.prob_sums_BE, routing.z_sum, gradients, self._visits)
        self.outputs = value, counts_E
        return carrier

    def _visits(self) -> int:
        """Return the number of visits by which a visit's share of the step's loss is divided, during its backward."""
        return max(self.step.expected(self.layer), len(self.layer.known))


class _Step(AutoStep):
    """Knows DeepSpeed's engine: when its steps end, and its optimizer, which holds copies of the weights."""

    #: a reference to DeepSpeed's engine, and the number of its steps when this step began
    engine: Callable[[], Any] = staticmethod(lambda: None)
    _engines_step = 0

    def announced(self, layer: LayerStep) -> int:
        """See :meth:`Step.announced`. A backward may contain several forwards, so there may be more visits than
        DeepSpeed's engine has micro-batches."""
        engine = self.engine()
        found = super().announced(layer)
        return found if found or engine is None else max(engine.gradient_accumulation_steps(), len(layer.known))

    def _begins(self) -> None:
        super()._begins()
        engine = self.engine()
        self._engines_step = 0 if engine is None else engine.global_steps

    def _over(self, layer: LayerStep) -> bool:
        engine = self.engine()
        # the number of steps also grows if an update was skipped
        return super()._over(layer) if engine is None else engine.global_steps != self._engines_step

    def _end_if_over(self, layer: LayerStep) -> None:
        if self.engine() is None:
            super()._end_if_over(layer)
        elif self._over(layer):
            self.end(applied=self._changed())

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        engine = self.engine()
        return super()._trained_by(optimizer) if engine is None else optimizer is engine.basic_optimizer


class _NotBuilt(DeepSpeedMoE):
    """DeepSpeed's layer as a type, without its parts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class MoE(Known, EquiMoE, _NotBuilt):
    """A layer with the arguments and results of ``deepspeed.moe.layer.MoE``, and the global-batch balance loss.

    It is called with hidden states [..., D] (and bool or int ``used_token`` [...], which masks) and returns the output,
    ``l_aux`` and int64 ``exp_counts`` [E] on this rank. Add ``coefficient * l_aux`` to your loss, as before. The value
    of ``l_aux`` is that of this micro-batch, 1 when balanced; its gradient is that of the loss over all micro-batches
    and ranks of the step (arXiv 2501.11873). DeepSpeed's engine says how many micro-batches a step has. In a loop
    without it, give ``micro_batches``.

    The state dict has DeepSpeed's names. What differs from DeepSpeed's layer:

    * any ``k``; for k > 1 the weights are normalised before choices are dropped, not after;
    * a full expert keeps the choices with the highest weights (``use_rts`` has no effect);
    * for k = 2, ``l_aux`` counts both choices of a token, and DeepSpeed's the first one only;
    * the second expert is the second best (``top2_2nd_expert_sampling`` has no effect), and nothing adds noise:
      ``noisy_gate_policy`` is refused, and so are ``use_tutel`` and ``enable_expert_tensor_parallelism``.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        micro_batches: int | None = None,
    ) -> None:
        refused = {
            "noisy_gate_policy": noisy_gate_policy not in (None, "None"),
            "use_tutel": use_tutel,
            "enable_expert_tensor_parallelism": enable_expert_tensor_parallelism,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"{name}: this layer has no such thing; leave it out")
        if num_experts % ep_size:
            raise ValueError(f"ep_size={ep_size}: must divide num_experts={num_experts}")
        config = MoEConfig(
            hidden_size,
            1,
            num_experts,
            k,
            router=RouterConfig(normalize_weights=k > 1),
            balance=BalanceConfig(coefficient=1.0, micro_batches=micro_batches),
            capacity=CapacityConfig() if drop_tokens else None,
        )
        super().__init__(config)
        balance, router = config.balance, config.router
        self.balancer = _Balancer(balance, num_experts, k, router.z_loss, router.reach)
        self.num_experts, self.ep_size = num_experts, ep_size
        self.num_local_experts, self.expert_group_name = num_experts // ep_size, f"ep_size_{ep_size}"
        self.experts = ModuleExperts(expert, self.num_local_experts, self.expert_group_name)  # type: ignore[assignment]
        self._capacities = {True: capacity_factor, False: eval_capacity_factor}
        self._min_capacity = min_capacity
        self.use_residual = use_residual
        if use_residual:
            self.mlp, self.coefficient = expert, nn.Linear(hidden_size, 2)
        self.register_state_dict_post_hook(_with_deepspeeds_names)
        self.register_load_state_dict_pre_hook(_with_our_names)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine, and only by it: work on its groups, and know it."""
        caller = inspect.currentframe().f_back.f_locals.get("self")  # type: ignore[union-attr]
        if isinstance(caller, DeepSpeedEngine):
            self.balancer.step.engine = weakref.ref(caller)  # type: ignore[attr-defined]
        if groups.mpu is not None:
            raise ValueError("mpu: this layer has no tensor parallelism of DeepSpeed's; leave mpu out")
        tokens = world_axis()
        if tokens.size % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size}: must divide the number of ranks, {tokens.size}; change either")
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        ep = axis_of("ep", groups._get_expert_parallel_group(self.expert_group_name))
        self.place(Placement(tokens=tokens, ep=ep, gradient_scale=float(tokens.size)))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, used_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (output, l_aux, exp_counts)."""
        if self.ep_size > 1 and self.balancer.placed is None:
            raise ValueError(f"ep_size={self.ep_size}: the layer has no groups yet; call deepspeed.initialize first")
        mask = None if used_token is None else used_token.bool().view(hidden_states.shape[:-1])
        if self.capacity is not None:
            self.capacity.factor = self._factor(hidden_states.shape[:-1].numel(), mask)
        output = super().forward(hidden_states, mask)
        (l_aux, exp_counts), self.balancer.outputs = self.balancer.outputs, None  # type: ignore[attr-defined]
        if self.use_residual:
            other = _first(self.mlp(hidden_states))
            share = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., :1] + other * share[..., 1:]
        return output, l_aux, exp_counts

    def _factor(self, tokens: int, mask: Tensor | None) -> Any:
        """Return the factor with which experts get the rows that DeepSpeed gives them: masked tokens count."""
        choices = self.config.top_k / self.num_experts
        rows = max(math.ceil(self._capacities[self.training] * tokens * choices), self._min_capacity)
        valid = max(tokens, 1) if mask is None else mask.sum().clamp_min(1)
        return (rows - 0.5) / (valid * choices)  # the capacity rounds up


def _with_deepspeeds_names(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    _rename(state, prefix, _NAMES)


def _with_our_names(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, {theirs: ours for ours, theirs in _NAMES.items()})


def _rename(state: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        for old, new in names.items():
            if key.startswith(prefix + old):
                state[prefix + new + key[len(prefix + old) :]] = state.pop(key)
