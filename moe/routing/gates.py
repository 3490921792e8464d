"""Gates other than a linear layer, and the dict of all.  T tokens, D hidden, E experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MoEConfig, RouterConfig
from . import noise
from .router import Router


class NoisyRouter(Router):
    """Adds normal noise to the logits in training, of a size that it learns (Shazeer et al., arXiv 1701.06538).

    The logits are x W + N(0, 1) softplus(x W_noise). The balance loss sees them too. W_noise is zero at first.
    """

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        super().make_parameters(hidden_size, num_experts, config)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and those of the noise and the bias with zero."""
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def training_logits(self, x_TD: Tensor) -> Tensor:
        x_TD = self.disturbed(x_TD)
        logits_TE = self.logits(x_TD)
        return logits_TE + noise.normal(logits_TE) * F.softplus(self.product(x_TD, self.noise_weight))


#: name -> class of the router
GATES: dict[str, type[Router]] = {"linear": Router, "noisy": NoisyRouter}


def build_router(config: MoEConfig) -> Router:
    """Build a layer's router."""
    size = (config.hidden_size, config.num_experts, config.top_k)
    return GATES[config.router.gate](*size, config.router, config.init_std, config.backend)
