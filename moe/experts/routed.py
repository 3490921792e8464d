"""The routed experts: MLPs on rows of any rank.  E experts, F width, D hidden, S source rows, K choices of a row."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...kernels.expert_mlp import MainGrads, expert_mlp
from ..collectives import Route, fill_normal, start_sparse_all_gather
from ..types import DispatchPlan
from .main_grads import weight_of
from .replicated import ReplicatedExperts


class RoutedExperts(nn.Module):
    """E MLPs in two stacked weights, in the layout of Hugging Face transformers v5.

    ``gate_up_proj`` is [E, 2F, D] with the gate rows first, or [E, F, D] if the experts are not ``gated``;
    ``down_proj`` is [E, D, F]. Under expert parallelism both are DTensors sharded over E, and each rank computes with
    its own experts. Under expert tensor parallelism ``gate_up_proj`` is [E, 2, F, D], sharded over F. See
    :func:`expert_mlp` for ``activation`` and ``recompute``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        backend: str,
        init_std: float,
        activation: str = "silu",
        gated: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.mlp = partial(expert_mlp, backend=backend, activation=activation, gated=gated, recompute=recompute)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width if gated else width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.init_std = init_std
        #: dtype in which the experts compute; None: that of their weights
        self.dtype: torch.dtype | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values."""
        for weight in self.parameters():
            fill_normal(weight, self.init_std)

    def forward(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return each source row's weighted sum over its experts on this rank, [S, D]."""
        (gate_up, gate_up_grad), (down, down_grad) = (
            weight_of(weight, self.dtype) for weight in (self.gate_up_proj, self.down_proj)
        )
        gate_up_grad = None if gate_up_grad is None else gate_up_grad.flatten(1, -2)
        return self.compute(rows_SD, plan, gate_up, down, (gate_up_grad, down_grad))

    def compute(
        self,
        rows_SD: Tensor,
        plan: DispatchPlan,
        gate_up: Tensor,
        down: Tensor,
        main_grads: MainGrads = (None, None),
    ) -> Tensor:
        """Do the same with these weights, of any number of experts, and their main gradients."""
        rows = rows_SD, plan.weights_SK, plan.order
        return self.mlp(*rows, gate_up.flatten(1, -2), down, main_grads=main_grads)

    def replicated(self, route: Route, first: ReplicatedExperts | None = None) -> ReplicatedExperts:
        """Start to copy experts between ranks, and return this rank's own experts together with those it gets.

        With ``first``, those it gets come after the experts that ``first`` has.

        Under autocast, weights travel in the dtype in which the experts compute.
        """
        dtype, device = self.dtype, self.down_proj.device.type
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return ReplicatedExperts(self.compute, lambda: start_sparse_all_gather(self._weights(dtype), route), first)

    def _weights(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the weights, in ``dtype`` if it is given."""
        return weight_of(self.gate_up_proj, dtype)[0], weight_of(self.down_proj, dtype)[0]
