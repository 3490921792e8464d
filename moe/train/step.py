"""What a training step adds up to.  B sequences, S tokens of each, N domains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .config import TrainConfig


class NonFiniteError(RuntimeError):
    """A gradient that is not finite; the weights are those of the step before."""


class Losses:
    """Sums of the training loss by domain since the last report, on this rank."""

    def __init__(self, domains: int, device: torch.device) -> None:
        #: fp64 [N, 2]: nats and tokens
        self.sums_N2 = torch.zeros(domains, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, nats_BS: Tensor, domain_B: Tensor) -> None:
        """Add one micro-batch's loss per token."""
        tokens_B = torch.full_like(domain_B, nats_BS.shape[1], dtype=torch.float64)
        rows_B2 = torch.stack((nats_BS.double().sum(1), tokens_B), dim=1)
        self.sums_N2.index_add_(0, domain_B, rows_B2)


def mixed_precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Compute in bf16 from fp32 weights, or leave everything in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
