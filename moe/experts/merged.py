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

    ``mask`` bool [B, S] is True where a token is valid. Other tokens get an output too, but enter no mean.
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
        #: what the router sees before any valid token
        self.start = nn.Parameter(torch.empty(in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and the biases with zero."""
        for weight in (self.weight, self.router, self.start):
            fill_normal(weight, self.init_std)
        nn.init.zeros_(self.bias)

    def gates(self, x_BSI: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the gate weights [B, G, K] of each segment, and the ids of their experts.

        They are computed in fp32 (fp64 for fp64 input), whatever autocast says.
        """
        with torch.autocast(x_BSI.device.type, enabled=False):
            seen_BGI = self._seen(x_BSI.to(torch.promote_types(x_BSI.dtype, torch.float32)), mask_BS)
            logits_BGE = F.linear(seen_BGI, self.router.to(seen_BGI.dtype))
        chosen_BGK, ids_BGK = logits_BGE.topk(self.top_k, dim=-1)
        return chosen_BGK.softmax(-1), ids_BGK

    def forward(self, x_BSI: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        gates_BGK, ids_BGK = self.gates(x_BSI, mask_BS)
        gates_N1K, ids_NK = gates_BGK.flatten(0, 1)[:, None].to(self.weight.dtype), ids_BGK.flatten(0, 1)
        weight_NOI = (gates_N1K @ self.weight[ids_NK].flatten(2)).view(-1, *self.weight.shape[1:])
        bias_N1O = gates_N1K @ self.bias[ids_NK]
        x_NLI = _segments(x_BSI, self.segment).flatten(0, 1)
        y_NLO = x_NLI @ weight_NOI.mT + bias_N1O
        return y_NLO.view(len(x_BSI), -1, y_NLO.shape[-1])[:, : x_BSI.shape[1]]

    def _seen(self, x_BSI: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Return what the router sees for each segment, [B, G, I]."""
        valid_BS1 = torch.ones_like(x_BSI[..., :1], dtype=torch.bool) if mask_BS is None else mask_BS[..., None]
        x_BSI = x_BSI if mask_BS is None else x_BSI.masked_fill(~valid_BS1, 0)
        sums_BGI, tokens_BG1 = (_segments(t, self.segment).sum(2) for t in (x_BSI, valid_BS1.long()))
        if self.segment is None:
            return sums_BGI / tokens_BG1.clamp_min(1)
        sums_BGI, tokens_BG1 = (
            F.pad(t.cumsum(1)[:, :-1], (0, 0, 1, 0)) for t in (sums_BGI, tokens_BG1)
        )  # earlier ones
        return torch.where(tokens_BG1 > 0, sums_BGI / tokens_BG1.clamp_min(1), self.start.to(x_BSI.dtype))


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

    def forward(self, x_BSI: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        hidden_BSI = F.silu(self.gate_proj(x_BSI, mask_BS)) * self.up_proj(x_BSI, mask_BS)
        return self.down_proj(hidden_BSI, mask_BS)


def importance_loss(gates_BGK: Tensor, ids_BGK: Tensor, num_experts: int) -> Tensor:
    """Return the squared coefficient of variation of the experts' sums of gate weights; 0 if they are equal."""
    sums_E = gates_BGK.new_zeros(num_experts).index_add(0, ids_BGK.flatten(), gates_BGK.flatten())
    return sums_E.var(correction=0) / sums_E.mean().square()


def _segments(x_BSI: Tensor, segment: int | None) -> Tensor:
    """Return segments of equal length, [B, G, L, I]; the last one is filled with zeros."""
    length = segment or x_BSI.shape[1]
    return F.pad(x_BSI, (0, 0, 0, -x_BSI.shape[1] % length)).unflatten(1, (-1, length))
