"""One optimizer step.  B sequences, S tokens of each, N domains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..collectives import LOCAL
from ..engines import DataParallel
from ..parallel import clip_grad_norm_, share_of
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
    device, mesh = losses.sums_N2.device, engine.mesh
    tokens = config.data.global_batch * config.data.seq_len
    shares = [share_of(inputs.to(device), labels.to(device), mesh=mesh) for inputs, labels, _ in batches]
    nats = engine.gradients(shares, tokens, exact=config.balance.estimator == "exact")
    if mesh is None or mesh["tp"].rank == 0:  # the others of a tensor-parallel group have the same
        for nats_BS, (_, _, domain_B) in zip(nats, batches, strict=False):  # none where the last stage is not
            losses.add(nats_BS, domain_B.to(device))
    stages = LOCAL if mesh is None else mesh["pp"]
    norm = clip_grad_norm_(engine.named_parameters().values(), config.optim.grad_clip, stages)
    if not bool(norm.isfinite()):
        optimizer.zero_grad()
        raise NonFiniteError(f"gradient norm is {float(norm)}: lower optim.lr, or resume from an earlier checkpoint")
    optimizer.step()
    optimizer.zero_grad()
    return norm
