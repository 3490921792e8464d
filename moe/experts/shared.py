"""Shared experts, which process every token (DeepSeekMoE, arXiv 2401.06066).  T tokens, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import fill_normal, reset, seeded


class SwiGLU(nn.Module):
    """The MLP down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int, init_std: float) -> None:
        super().__init__()
        with seeded(0):  # the values that torch draws here are not used
            self.gate_proj = nn.Linear(hidden_size, width, bias=False)
            self.up_proj = nn.Linear(hidden_size, width, bias=False)
            self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values."""
        for weight in self.parameters():
            fill_normal(weight, self.init_std)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute each token from itself alone; a ``mask``, as other feed-forwards take it, changes nothing."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SharedExperts(nn.Module):
    """Computes the output that is added to that of the routed experts; with ``gated``, times a gate per token."""

    def __init__(self, hidden_size: int, width: int, gated: bool, init_std: float) -> None:
        super().__init__()
        self.mlp = SwiGLU(hidden_size, width, init_std)
        self.gate = SharedGate(hidden_size, init_std) if gated else None

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values."""
        for part in self.children():
            reset(part)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp(x_TD)
        return y_TD if self.gate is None else self.gate(x_TD) * y_TD


class SharedGate(nn.Module):
    """Computes sigmoid(w . x), a token's factor on the output of the shared experts (Qwen2-MoE)."""

    def __init__(self, hidden_size: int, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values."""
        fill_normal(self.weight, self.init_std)

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x_TD, self.weight))
