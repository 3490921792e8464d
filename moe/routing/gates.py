"""Gates other than a linear layer, and the dict of all.

T tokens, D hidden, E experts, R width of a projection, B sequences.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import fill_normal
from ..config import MoEConfig, RouterConfig
from ..types import Decision, Routing
from . import noise
from .by_token import HashRouter, TaskRouter
from .compose import sum_by_sequence
from .router import Router
from .slots import SlotRouter


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


class CosineRouter(Router):
    """Compares a projection of the hidden state with a direction per expert by their cosine (X-MoE, arXiv 2204.09179).

    The logits are cosine / temperature; a temperature below 1/100 counts as 1/100. The temperature is learned, but the
    balance loss uses the initial one, and always softmax: a temperature could otherwise lower the loss by itself. The
    lengths of hidden states, and those of ``weight`` [E, R], have no effect.
    """

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        width = config.projected(num_experts)
        self.fixed_temperature = config.temperature
        self.projection = nn.Parameter(torch.empty(width, hidden_size))
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        #: [1], because FSDP2 cannot shard a scalar: -log(temperature)
        self.log_scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, the temperature with its first value, the bias with zero."""
        super().reset_parameters()
        fill_normal(self.projection, self.init_std)
        nn.init.constant_(self.log_scale, -math.log(self.fixed_temperature))

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> Routing:
        cosines_TE = self.cosines(self.disturbed(x_TD) if self.training else x_TD)
        routing = self.routing(self._scaled(cosines_TE), mask_T, sequences, decision)
        probs_TE = (cosines_TE / self.fixed_temperature).softmax(-1)
        if mask_T is not None:
            probs_TE = torch.where(mask_T[:, None], probs_TE, 0.0)
        return replace(routing, prob_sums_BE=sum_by_sequence(probs_TE, sequences))

    def cosines(self, x_TD: Tensor) -> Tensor:
        """Return the cosine between each token and each expert, [T, E]."""
        self.check_rounding()
        projected_TR = F.normalize(self.product(x_TD, self.projection), dim=-1)
        return self.product(projected_TR, F.normalize(self.weight.to(projected_TR.dtype), dim=-1))

    def logits(self, x_TD: Tensor) -> Tensor:
        return self._scaled(self.cosines(x_TD))

    def probabilities(self, x_TD: Tensor, codes_T: Tensor | None = None) -> Tensor:
        return (self.cosines(x_TD) / self.fixed_temperature).softmax(-1)

    def _scaled(self, cosines_TE: Tensor) -> Tensor:
        return cosines_TE * self.log_scale.to(cosines_TE.dtype).clamp_max(math.log(100)).exp()


class PassedLogits:
    """The logits of the MoE layer before, on their way through one forward of a model. Each layer has an object."""

    def __init__(self, before_TE: Tensor | None = None) -> None:
        self.before_TE = before_TE
        #: those of this layer, after its forward
        self.own_TE: Tensor | None = None

    def next(self) -> PassedLogits:
        """Return the object of the next layer. A layer without a router passes on what it has got."""
        return PassedLogits(self.before_TE if self.own_TE is None else self.own_TE)


class ResidualRouter(Router):
    """Adds W_g times the logits of the MoE layer before to its own (MoE++, arXiv 2410.07348).

    The sum is passed on, and gradients return the same way. ``residual_weight`` is W_g [E, E]. It has no effect in the
    first layer, before which all logits are zero, but is there too, so that layers are alike.
    """

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        super().make_parameters(hidden_size, num_experts, config)
        self.residual_weight = nn.Parameter(torch.empty(num_experts, num_experts))

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and the bias with zero."""
        super().reset_parameters()
        fill_normal(self.residual_weight, self.init_std)

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
        passed: PassedLogits | None = None,
    ) -> Routing:
        logits_TE = self._summed(self.training_logits(x_TD) if self.training else self.logits(x_TD), passed)
        if passed is not None:
            passed.own_TE = logits_TE
        return self.routing(logits_TE, mask_T, sequences, decision)

    def probabilities(self, x_TD: Tensor, codes_T: Tensor | None = None, passed: PassedLogits | None = None) -> Tensor:
        return self.score(self._summed(self.logits(x_TD), passed)).softmax(-1)

    def _summed(self, logits_TE: Tensor, passed: PassedLogits | None) -> Tensor:
        first = passed is None or passed.before_TE is None
        before_TE = logits_TE.new_zeros(()).expand_as(logits_TE) if first else passed.before_TE  # type: ignore[union-attr]
        return logits_TE + self.product(before_TE, self.residual_weight)  # type: ignore[arg-type]


#: name -> class of the router
GATES: dict[str, type[Router]] = {
    "linear": Router,
    "noisy": NoisyRouter,
    "cosine": CosineRouter,
    "hash": HashRouter,
    "task": TaskRouter,
    "slots": SlotRouter,
    "residual": ResidualRouter,
}


def build_router(config: MoEConfig) -> Router:
    """Build a layer's router."""
    size = (config.hidden_size, config.all_experts, config.top_k)
    return GATES[config.router.gate](*size, config.router, config.init_std, config.backend)
