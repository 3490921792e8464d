"""One optimizer step.  B sequences, S tokens of each, N domains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ..balance import counting_pass
from ..collectives import LOCAL
from ..engines import DataParallel
from ..parallel import Share, clip_grad_norm_, share_of, token_nats, vocabulary_parallel
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


def gradients(
    engine: DataParallel,
    shares: list[Share],
    tokens: float,
    precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    exact: bool = False,
) -> list[Tensor]:
    """Forward, backward and reduction over the micro-batches of a step; the nats [B, S] of each share.

    The loss is the sum over all shares of all ranks, over ``tokens``. ``exact`` counts loads in a pass ahead.
    """
    if exact:
        with counting_pass(), precision():
            for share in shares:
                engine.model(share.inputs, share.layer_mask)
    found = []
    with vocabulary_parallel(engine.mesh):
        for i, share in enumerate(shares):
            with engine.accumulate(last=i + 1 == len(shares)):
                with precision():
                    logits_BSV = engine(share.inputs, share.layer_mask)
                nats_BS = token_nats(logits_BSV, share)
                (nats_BS.sum() / tokens).backward()
            found.append(nats_BS.detach())
    engine.reduce_gradients()
    return found


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
    exact = config.balance.estimator == "exact"
    nats = gradients(engine, shares, tokens, partial(mixed_precision, config, device), exact)
    if mesh is None or mesh["tp"].rank == 0:  # the others of a tensor-parallel group have the same
        for nats_BS, (_, _, domain_B) in zip(nats, batches, strict=True):
            losses.add(nats_BS, domain_B.to(device))
    stages = LOCAL if mesh is None else mesh["pp"]
    norm = clip_grad_norm_(engine.parameters(), config.optim.grad_clip, stages)
    if not bool(norm.isfinite()):
        optimizer.zero_grad()
        raise NonFiniteError(f"gradient norm is {float(norm)}: lower optim.lr, or resume from an earlier checkpoint")
    optimizer.step()
    optimizer.zero_grad()
    return norm
