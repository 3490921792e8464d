"""Loss sums, precision and errors of a training step.  B sequences, S tokens per sequence, N domains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .config import TrainConfig


class NonFiniteError(RuntimeError):
    """Raised if a gradient is not finite. The step was not applied."""


class Losses:
    """Accumulates this rank's training loss by domain between two records."""

    def __init__(self, domains: int, device: torch.device) -> None:
        #: fp64 [N, 2]: sum of the loss in nats, and tokens
        self.sums_N2 = torch.zeros(domains, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, nats_BS: Tensor, domain_B: Tensor) -> None:
        """Add the losses per token [B, S] of one micro-batch; ``domain_B`` is the domain of each sequence."""
        tokens_B = torch.full_like(domain_B, nats_BS.shape[1], dtype=torch.float64)
        rows_B2 = torch.stack((nats_BS.double().sum(1), tokens_B), dim=1)
        self.sums_N2.index_add_(0, domain_B, rows_B2)


def mixed_precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Return an autocast context that computes in bf16 if ``config.dtype`` is bfloat16, and else does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
