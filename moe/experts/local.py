"""What every rank computes for its own tokens while their rows travel: shared and zero-computation experts.

T tokens, D hidden, K top-k, E MLPs, J constant experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import fill_normal
from ..config import MoEConfig, ZeroComputationConfig
from ..types import Routing


class OnlyShared:
    """Computes the shared experts, if there are any. All routed experts have an owner."""

    def sent(self, routing: Routing) -> Routing:
        """Return the choices that are sent to the owners of their experts."""
        return routing

    def __call__(self, shared: Callable[[Tensor], Tensor] | None, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """Return what is added to the results of the owners, [T, D]; None for nothing."""
        return None if shared is None else shared(x_TD)


class ZeroComputation(nn.Module):
    """Zero, copy and constant experts (MoE++, arXiv 2410.07348), and the shared experts, if there are any.

    A zero expert returns 0, and a copy expert its input. Constant expert j returns a x + b v_j, with the ``vectors`` v
    [J, D], and [a, b] = softmax(W_j x) of the ``mixing`` weights W [J, 2, D]. Their ids begin at E. The products with W
    and v are those of all tokens: they are small, and no size depends on the routing.
    """

    def __init__(self, num_experts: int, hidden_size: int, config: ZeroComputationConfig, init_std: float) -> None:
        super().__init__()
        self.first, self.config, self.init_std = num_experts, config, init_std
        if config.constant:
            self.mixing = nn.Parameter(torch.empty(config.constant, 2, hidden_size))
            self.vectors = nn.Parameter(torch.empty(config.constant, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values."""
        for weight in self.parameters():
            fill_normal(weight, self.init_std)

    def sent(self, routing: Routing) -> Routing:
        """Return the choices of MLPs."""
        return routing.keep(routing.ids_TK < self.first)

    def forward(self, shared: Callable[[Tensor], Tensor] | None, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum over each token's zero-computation experts, plus the shared experts, [T, D]."""
        y_TD = self.compute(x_TD, routing.ids_TK - self.first, routing.weights_TK)
        return y_TD if shared is None else y_TD + shared(x_TD)

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return each token's weighted sum. ``ids_TK`` counts from the first of these experts; others are ignored."""
        zero, copy = self.config.zero, self.config.copy
        place_TK = ids_TK - zero
        scale_T1 = torch.where((place_TK >= 0) & (place_TK < copy), weights_TK, 0.0).sum(1, keepdim=True)
        if not self.config.constant:
            return (scale_T1 * x_TD).to(x_TD.dtype)
        constants_J = torch.arange(copy, copy + self.config.constant, device=ids_TK.device)
        chosen_TJ = torch.where(place_TK[..., None] == constants_J, weights_TK[..., None], 0.0).sum(1)
        mixed_TJ2 = F.linear(x_TD, self.mixing.flatten(0, 1)).unflatten(1, (-1, 2)).to(chosen_TJ.dtype).softmax(-1)
        of_input_TJ, of_vector_TJ = (chosen_TJ[..., None] * mixed_TJ2).unbind(-1)
        scale_T1 = scale_T1 + of_input_TJ.sum(1, keepdim=True)
        vectors_TD = of_vector_TJ.to(self.vectors.dtype) @ self.vectors
        return (scale_T1 * x_TD + vectors_TD).to(vectors_TD.dtype)


def build_local(config: MoEConfig) -> Any:
    """Build what a rank computes for its own tokens."""
    if config.zero_computation is None:
        return OnlyShared()
    if config.backend == "triton":
        warnings.warn("backend='triton': zero_computation has no Triton kernel and runs in torch", stacklevel=3)
    return ZeroComputation(config.num_experts, config.hidden_size, config.zero_computation, config.init_std)
