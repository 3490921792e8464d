"""Random numbers of routers in training.  T tokens, D hidden.

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
