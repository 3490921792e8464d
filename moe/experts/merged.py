"""Linear experts that are merged into one before they compute (MEO, arXiv 2310.09832).

B sequences, S tokens, I input and O output width, E experts, K top-k, L tokens of a segment, G segments of a sequence,
N = B * G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import fill_normal, reset


class MergedLinear(nn.Module):
    """A linear layer whose weight and bias are sums of those of K of E experts, weighted by a router.

    Experts are linear, so this computes the mixture of their outputs exactly, for 2 L O I + 2 K O I operations per L
    tokens that share a merged weight. It takes [B, S, I] and returns [B, S, O].

    With ``segment=L``, each L tokens share a weight, which the router chooses from the mean of all tokens before them:
    no output depends on later tokens, as a decoder needs. The first segment's weight does not depend on the tokens.
    With ``segment=None``, the tokens of a sequence share a weight that depends on all of them. Use it in encoders only.
    """

    def __init__(
        self, in_features: int, out_features: int, num_experts: int, top_k: int, segment: int | None, init_std: float
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: must be between 1 and num_experts={num_experts}")
        if segment is not None and segment < 1:
            raise ValueError(f"segment={segment}: must be at least 1, or None for encoders")
        self.top_k, self.segment, self.init_std = top_k, segment, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.router = nn.Parameter(torch.empty(num_experts, in_features))
        #: what the router sees before any token
        self.start = nn.Parameter(torch.empty(in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and the biases with zero."""
        for weight in (self.weight, self.router, self.start):
            fill_normal(weight, self.init_std)
        nn.init.zeros_(self.bias)

    def gates(self, x_BSI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate weights [B, G, K] of each segment, and the ids of their experts."""
        logits_BGE = F.linear(self._seen(x_BSI), self.router)
        chosen_BGK, ids_BGK = logits_BGE.topk(self.top_k, dim=-1)
        return chosen_BGK.softmax(-1), ids_BGK

    def forward(self, x_BSI: Tensor) -> Tensor:
        gates_BGK, ids_BGK = self.gates(x_BSI)
        gates_N1K, ids_NK = gates_BGK.flatten(0, 1)[:, None], ids_BGK.flatten(0, 1)
        weight_NOI = (gates_N1K @ self.weight[ids_NK].flatten(2)).view(-1, *self.weight.shape[1:])
        bias_N1O = gates_N1K @ self.bias[ids_NK]
        x_NLI = _segments(x_BSI, self.segment).flatten(0, 1)
        y_NLO = x_NLI @ weight_NOI.mT + bias_N1O
        return y_NLO.view(len(x_BSI), -1, y_NLO.shape[-1])[:, : x_BSI.shape[1]]

    def _seen(self, x_BSI: Tensor) -> Tensor:
        """Return what the router sees for each segment, [B, G, I]."""
        if self.segment is None:
            return x_BSI.mean(1, keepdim=True)
        sums_BGI = _segments(x_BSI, self.segment).sum(2)
        earlier_BGI = sums_BGI.cumsum(1)[:, :-1]
        tokens_G1 = self.segment * torch.arange(1, sums_BGI.shape[1], device=x_BSI.device)[:, None]
        start_B1I = self.start.to(x_BSI.dtype).expand(len(x_BSI), 1, -1)
        return torch.cat((start_B1I, earlier_BGI / tokens_G1), dim=1)


class MergedSwiGLU(nn.Module):
    """The MLP down(silu(gate(x)) * up(x)) of three :class:`MergedLinear`, each with experts and a router of its own."""

    def __init__(
        self, hidden_size: int, width: int, num_experts: int, top_k: int, segment: int | None, init_std: float
    ) -> None:
        super().__init__()
        experts = num_experts, top_k, segment, init_std
        self.gate_proj = MergedLinear(hidden_size, width, *experts)
        self.up_proj = MergedLinear(hidden_size, width, *experts)
        self.down_proj = MergedLinear(width, hidden_size, *experts)

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and the biases with zero."""
        for part in self.children():
            reset(part)

    def forward(self, x_BSI: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSI)) * self.up_proj(x_BSI))


def importance_loss(gates_BGK: Tensor, ids_BGK: Tensor, num_experts: int) -> Tensor:
    """Return the squared coefficient of variation of the experts' sums of gate weights; 0 if they are equal."""
    sums_E = gates_BGK.new_zeros(num_experts).index_add(0, ids_BGK.flatten(), gates_BGK.flatten())
    return sums_E.var(correction=0) / sums_E.mean().square()


def _segments(x_BSI: Tensor, segment: int | None) -> Tensor:
    """Return segments of equal length, [B, G, L, I]; the last one is filled with zeros."""
    length = segment or x_BSI.shape[1]
    return F.pad(x_BSI, (0, 0, 0, -x_BSI.shape[1] % length)).unflatten(1, (-1, length))
