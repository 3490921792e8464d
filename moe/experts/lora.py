"""Experts that share the frozen weights of one MLP and differ by products of low rank (MixLoRA, arXiv 2404.15159).

E experts, F width, D hidden, r rank, S source rows, K choices of a row, R = S * K rows in expert order.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.grouped_gemm import grouped_gemm
from ...kernels.permute import combine, permute
from ..collectives import fill_normal, local_rows
from ..types import DispatchPlan
from .routed import RoutedExperts
from .shared import SwiGLU


class LoRAExperts(nn.Module):
    """E experts down(silu(gate(x)) * up(x)), each of whose three matrices is W + alpha / r * B A.

    W is ``base``'s, frozen and shared by all experts; A [r, in] and B [out, r] are an expert's own, and B is zero at
    first. ``gate_up_a`` is [E, 2r, D], with the gate's rows first, ``gate_b`` and ``up_b`` are [E, F, r], ``down_a`` is
    [E, r, F] and ``down_b`` [E, D, r]. The products with W are computed once per source row, not once per choice.

    Replaces ``MoE.experts``. Expert parallelism splits A and B, and every rank holds W.
    """

    def __init__(self, base: SwiGLU, num_experts: int, rank: int, alpha: float, backend: str = "auto") -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1; 8 is usual")
        (width, hidden), like = base.gate_proj.weight.shape, base.gate_proj.weight
        self.base = base.requires_grad_(False)
        self.scale, self.backend = alpha / rank, backend

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_empty(num_experts, *shape))

        self.gate_up_a, self.gate_b, self.up_b = weight(2 * rank, hidden), weight(width, rank), weight(width, rank)
        self.down_a, self.down_b = weight(rank, width), weight(hidden, rank)
        #: dtype in which the experts compute; None: that of their weights
        self.dtype: torch.dtype | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize each A with new random values, and each B with zero. The base stays."""
        for weight in (self.gate_up_a, self.down_a):
            fill_normal(weight, 1 / math.sqrt(weight.shape[-1]))
        for weight in (self.gate_b, self.up_b, self.down_b):
            nn.init.zeros_(weight)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return ``gate_up_a``, ``gate_b``, ``up_b``, ``down_a`` and ``down_b`` of the experts on this rank."""
        return (
            local_rows(self.gate_up_a),
            local_rows(self.gate_b),
            local_rows(self.up_b),
            local_rows(self.down_a),
            local_rows(self.down_b),
        )

    def forward(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return each source row's weighted sum over its experts on this rank, [S, D]."""
        dtype, order, base = self._dtype(rows_SD), plan.order, self.base
        rows_SD = rows_SD.to(dtype)
        grouped = partial(grouped_gemm, offsets_E=order.offsets_E, backend=self.backend)
        sort = partial(permute, order=order, backend=self.backend)
        gate_up_a, gate_b, up_b, down_a, down_b = (weight.to(dtype) for weight in self.weights())
        gate_low_RL, up_low_RL = grouped(sort(rows_SD), gate_up_a).chunk(2, dim=1)
        gate_RF = sort(base.gate_proj(rows_SD)) + self.scale * grouped(gate_low_RL.contiguous(), gate_b)
        up_RF = sort(base.up_proj(rows_SD)) + self.scale * grouped(up_low_RL.contiguous(), up_b)
        weights_R1 = plan.weights_SK.reshape(-1)[order.order_R, None].to(dtype)
        hidden_RF = F.silu(gate_RF) * up_RF * weights_R1
        own_RD = self.scale * grouped(grouped(hidden_RF, down_a), down_b)
        together = partial(combine, order=order, backend=self.backend)
        return base.down_proj(together(hidden_RF)) + together(own_RD)

    def _dtype(self, rows_SD: Tensor) -> torch.dtype:
        device = rows_SD.device.type
        if torch.is_autocast_enabled(device) and rows_SD.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.dtype or self.gate_up_a.dtype

    @torch.no_grad()
    def merged(self) -> RoutedExperts:
        """Return experts with whole weights that compute the same. All experts must be on this rank."""
        base, scale = self.base, self.scale
        gate_up_a, gate_b, up_b, down_a, down_b = self.weights()
        gate_a, up_a = gate_up_a.chunk(2, dim=1)
        gate = base.gate_proj.weight + scale * gate_b @ gate_a
        up = base.up_proj.weight + scale * up_b @ up_a
        experts, width, hidden = gate.shape
        found = RoutedExperts(experts, hidden, width, self.backend, 0.0)
        found.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1))
        found.down_proj = nn.Parameter(base.down_proj.weight + scale * down_b @ down_a)
        return found
