"""Random numbers of routers in training.  T tokens, D hidden, K top-k.

They come from torch's global generator, as those of dropout do. A training loop that seeds it by step and rank repeats
them after a resume. Recomputation and counting passes restore its state, so they draw the same numbers again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(like: Tensor) -> Tensor:
    """Return numbers between 0 and 1 of this tensor's shape, drawn in fp32 whatever its dtype."""
    return torch.rand_like(like, dtype=torch.float32, requires_grad=False).to(like.dtype)


def normal(like: Tensor) -> Tensor:
    """Return standard normal numbers of this tensor's shape, drawn in fp32 whatever its dtype."""
    return torch.randn_like(like, dtype=torch.float32, requires_grad=False).to(like.dtype)


def jittered(x_TD: Tensor, size: float) -> Tensor:
    """Multiply each value by a random number between 1 - size and 1 + size (Switch, arXiv 2101.03961)."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    return x_TD * (1 - size + 2 * size * uniform(x_TD))


def mixed(logits_TE: Tensor, share: float, mask_T: Tensor | None) -> Tensor:
    """Replace this share of the logits by normal noise of their own mean and deviation (Ling, arXiv 2503.05139).

    The paper takes running values of both; these are of the valid tokens at hand, so that a forward leaves nothing
    behind.
    """
    if share == 0.0:
        return logits_TE
    fixed_TE = logits_TE.detach()
    valid_T1 = torch.ones_like(fixed_TE[:, :1], dtype=torch.bool) if mask_T is None else mask_T[:, None]
    number = (valid_T1.sum() * fixed_TE.shape[1]).clamp_min(1)
    mean = torch.where(valid_T1, fixed_TE, 0.0).sum() / number
    variance = torch.where(valid_T1, (fixed_TE - mean).square(), 0.0).sum() / number
    noise_TE = mean + variance.sqrt() * normal(fixed_TE)
    return (1 - share) * logits_TE + share * noise_TE


@torch.no_grad()
def random_second(weights_TK: Tensor) -> Tensor:
    """Return bool [T, 2], which choices to keep: the first, and the second with probability min(1, 2 g), if g is its
    share of the token's gate weights (GShard, arXiv 2006.16668).
    """
    share_T = weights_TK[:, 1] / weights_TK.sum(1)
    kept_T = uniform(share_T) < 2 * share_T
    return torch.stack((torch.ones_like(kept_T), kept_T), dim=1)
