"""One optimizer step.  B sequences, S tokens of each, N domains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from ..balance import counting_pass
from ..engines import DataParallel
from ..parallel import clip_grad_norm_
from .config import TrainConfig

#: inputs [B, S], labels [B, S], domain of each sequence [B]
Batch = tuple[Tensor, Tensor, Tensor]


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


def train_step(
    engine: DataParallel,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    config: TrainConfig,
    losses: Losses,
) -> Tensor:
    """Forward and backward over the step's micro-batches, clip, update; returns the gradient's norm.

    The loss is the mean over all tokens of the step on all ranks, whatever the number of micro-batches and ranks.
    Raises NonFiniteError, on every rank and before the update, when the norm is not finite.
    """
    device = losses.sums_N2.device
    tokens = config.data.global_batch * config.data.seq_len
    batches = [tuple(part.to(device) for part in batch) for batch in batches]  # type: ignore[misc]
    if config.balance.estimator == "exact":
        with counting_pass(), mixed_precision(config, device):
            for inputs_BS, _, _ in batches:
                engine.model(inputs_BS)
    for i, (inputs_BS, labels_BS, domain_B) in enumerate(batches):
        with engine.accumulate(last=i + 1 == len(batches)):
            with mixed_precision(config, device):
                logits_BSV = engine(inputs_BS)
            nats_BS = F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), reduction="none")
            nats_BS = nats_BS.view(labels_BS.shape)
            # the engine takes the mean over ranks of what are shares of one sum
            (nats_BS.sum() * (engine.ranks / tokens)).backward()
        losses.add(nats_BS.detach(), domain_B)
    engine.reduce_expert_gradients()
    norm = clip_grad_norm_(engine.model.parameters(), config.optim.grad_clip)
    if not bool(norm.isfinite()):
        optimizer.zero_grad()
        raise NonFiniteError(f"gradient norm is {float(norm)}: lower optim.lr, or resume from an earlier checkpoint")
    optimizer.step()
    optimizer.zero_grad()
    return norm
