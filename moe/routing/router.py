"""Hidden states to a :class:`Routing`. T tokens, D hidden, E experts, K top-k, B sequences, N tokens of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import RouterConfig
from ..types import Decision, Routing
from .score import SCORES, probabilities
from .select import top_k
from .weight import WEIGHTS


class Router(nn.Module):
    """A linear gate, then score, select and weight.

    Everything is computed in fp32 (fp64 for fp64 input) whatever the dtype of ``x`` or autocast.
    """

    def __init__(self, hidden_size: int, num_experts: int, k: int, config: RouterConfig, init_std: float) -> None:
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=init_std)
        self.score = SCORES[config.score]
        plain = "normalized" if config.normalize_weights else "raw"
        self.weigh = WEIGHTS["softmax_after_topk" if config.softmax_after_topk else plain]
        self.weight_scale = config.weight_scale

    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, sequences: int = 1, decision: Decision | None = None
    ) -> Routing:
        """Route T tokens that are ``sequences`` sequences of equal length.

        A ``decision`` made before is weighed again, not made again.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
            scores_TE = self.score(logits_TE)
            if decision is None:
                decision = _decide(scores_TE, self.k, mask_T)
            weights_TK = self.weigh(logits_TE, scores_TE, decision.chosen_TK) * self.weight_scale
            probs_TE, z_T = probabilities(scores_TE), logits_TE.logsumexp(dim=-1).square()
            if mask_T is not None:
                probs_TE = torch.where(mask_T[:, None], probs_TE, 0.0)
                z_T = torch.where(mask_T, z_T, 0.0)
            counts_BE, tokens_B = _count(decision.chosen_TK, mask_T, sequences, self.weight.shape[0])
            return Routing(
                decision=decision,
                weights_TK=weights_TK,
                counts_BE=counts_BE,
                tokens_B=tokens_B,
                prob_sums_BE=probs_TE.unflatten(0, (sequences, -1)).sum(dim=1),
                z_sum=z_T.sum(),
            )


def _decide(scores_TE: Tensor, k: int, mask_T: Tensor | None) -> Decision:
    chosen_TK = top_k(scores_TE, k)
    return Decision(chosen_TK, chosen_TK if mask_T is None else chosen_TK.masked_fill(~mask_T[:, None], -1))


@torch.no_grad()
def _count(ids_TK: Tensor, mask_T: Tensor | None, sequences: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices per sequence and expert, int64 [B, E], and valid tokens per sequence, int64 [B]."""
    if mask_T is None:
        mask_T = torch.ones(ids_TK.shape[0], dtype=torch.bool, device=ids_TK.device)
    valid_BN = mask_T.view(sequences, -1).long()
    ids_BX = ids_TK.view(sequences, -1)
    ones_BX = valid_BN.repeat_interleave(ids_TK.shape[1], dim=1)
    counts_BE = ids_TK.new_zeros(sequences, num_experts).scatter_add_(1, ids_BX, ones_BX)
    return counts_BE, valid_BN.sum(dim=1)
