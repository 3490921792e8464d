"""The experts: MLPs on rows, which know nothing of tokens' origin. E experts, F width, D hidden."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...kernels.expert_mlp import expert_mlp
from ..collectives import fill_normal
from ..types import DispatchPlan


class GroupedExperts(nn.Module):
    """E MLPs in two stacked weights, laid out as Hugging Face transformers v5 does.

    ``gate_up_proj`` is [E, 2F, D] with the gate rows first, or [E, F, D] of experts that are not ``gated``, and
    ``down_proj`` [E, D, F]. Under expert parallelism they are DTensors split over E, and each rank computes with its
    own part; where ranks split each expert's width, ``gate_up_proj`` is [E, 2, F, D], split over F. ``activation``
    and ``recompute`` as in :func:`expert_mlp`.
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
        self.mlp = partial(expert_mlp, backend=backend, activation=activation, gated=gated, recompute=recompute)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width if gated else width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again from random weights."""
        for weight in self.parameters():
            fill_normal(weight, self.init_std)

    def forward(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Each source row's weighted sum over the experts it chose on this rank: [S, D]."""
        gate_up, down = _local(self.gate_up_proj), _local(self.down_proj)
        return self.mlp(rows_SD, plan.weights_SK, plan.order, gate_up.flatten(1, -2), down)


def _local(weight: Tensor) -> Tensor:
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()
