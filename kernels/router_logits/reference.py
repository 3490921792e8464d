"""The reference: one product in fp64, differentiated by autograd."""

# T tokens, D hidden, E experts.

from __future__ import annotations

import torch
from torch import Tensor


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return (x_TD.double() @ weight_ED.double().mT).to(dtype)
