"""SoftMoE: experts process slots, which are mixtures of a sequence's tokens (arXiv 2308.00951).

B sequences, S tokens per sequence, T = B S tokens, D hidden, E experts, X slots of all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import RouterConfig
from ..types import Decision, Mixing, Routing
from .router import Router


class SlotRouter(Router):
    """Mixes the tokens of each sequence into slots for the experts, and the results into each token's output.

    The logits are x W, with one column per slot; expert e has the ``slots`` columns from e * ``slots`` on. A slot's
    input is the mean of the tokens weighted by the softmax of its column; a token's output is the mean of all slots'
    results weighted by the softmax of its row. No token is dropped, every expert gets equally many rows, and every
    token depends on every other. ``weight`` is [X, D]. Masked tokens take no part.
    """

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        self.num_experts, self.slots = num_experts, config.slots
        self.weight = nn.Parameter(torch.empty(num_experts * config.slots, hidden_size))

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> Routing:
        logits_BSX = self.logits(x_TD).unflatten(0, (sequences, len(x_TD) // sequences))
        valid_BS1 = torch.ones_like(logits_BSX[..., :1], dtype=torch.bool)
        if mask_T is not None:
            valid_BS1 = mask_T.view(valid_BS1.shape)
        # not -inf, of which a sequence without any token has no softmax
        lowest = torch.finfo(logits_BSX.dtype).min
        dispatch_BSX = torch.where(valid_BS1, logits_BSX, lowest).softmax(1) * valid_BS1
        combine_BSX = logits_BSX.softmax(2) * valid_BS1
        tokens_B = valid_BS1.long().sum((1, 2))
        expert_X = torch.arange(logits_BSX.shape[2], device=x_TD.device) // self.slots
        ids_BX = torch.where(tokens_B[:, None] > 0, expert_X, -1)
        decision = Decision(ids_BX.view(-1, 1), ids_BX.view(-1, 1))  # always the same one
        z_BS = torch.where(valid_BS1[..., 0], logits_BSX.logsumexp(2).square(), 0.0)
        return Routing(
            decision,
            logits_BSX.new_ones(decision.ids_TK.shape),
            self.slots * (tokens_B[:, None] > 0).long().expand(sequences, self.num_experts),
            tokens_B,
            combine_BSX.sum(1).unflatten(1, (self.num_experts, self.slots)).sum(2),
            z_BS.sum(),
            mixing=Mixing(dispatch_BSX, combine_BSX),
        )

    def probabilities(self, x_TD: Tensor, codes_T: Tensor | None = None) -> Tensor:
        combine_TX = self.logits(x_TD).softmax(1)
        return combine_TX.unflatten(1, (self.num_experts, self.slots)).sum(2)
