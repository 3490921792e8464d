"""The router's product in fp32, differentiated by autograd, which keeps an fp32 copy of 16-bit hidden states."""

# T tokens, D hidden, E experts.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype))
