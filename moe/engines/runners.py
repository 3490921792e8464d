"""Runners: run the micro-batches of a step through the whole model, or through the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..balance import random_state_kept
from ..parallel import Mesh, Share, vocabulary_parallel
from ..parallel.pipeline import Pipeline
from .balance import StepBalance
from .base import Loss
from .reduce import Reducer

#: returns the context of every forward (autocast)
Precision = Callable[[], AbstractContextManager[None]]


class Runner(Protocol):
    """Runs micro-batches on this rank's modules."""

    def train(self, shares: list[Share], tokens: Tensor, balance: StepBalance) -> list[Tensor]:
        """Run forward and backward of all ``shares`` of a step, and return their losses [B, S].

        Accumulates the gradients of their sum divided by ``tokens``. On return, FSDP has reduced those of the weights
        that it shards.
        """
        ...

    def evaluate(self, shares: list[Share]) -> list[Tensor]:
        """Run forwards only, and return the losses [B, S] of each share."""
        ...


class WholeModel:
    """Runs micro-batches one after the other through a model that has all its layers on this rank.

    ``reducer`` reduces the gradients of weights that FSDP does not shard, during the last backward.
    """

    def __init__(self, model: nn.Module, mesh: Mesh | None, loss: Loss, precision: Precision, reducer: Reducer) -> None:
        self.model, self.mesh, self.loss, self.precision, self.reducer = model, mesh, loss, precision, reducer

    def train(self, shares: list[Share], tokens: Tensor, balance: StepBalance) -> list[Tensor]:
        if balance.counts_ahead:
            with random_state_kept(), torch.no_grad():
                for m, share in enumerate(shares):
                    with balance.micro_batch(m, ahead=True):
                        self._forward(share)
        return [self._train_one(share, m, tokens, balance, last=m + 1 == len(shares)) for m, share in enumerate(shares)]

    def _train_one(self, share: Share, m: int, tokens: Tensor, balance: StepBalance, last: bool) -> Tensor:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        overlap = self.reducer.overlapped() if last else nullcontext()
        with balance.micro_batch(m), vocabulary_parallel(self.mesh), overlap:
            losses_BS = self._losses(share)
            (losses_BS.sum() / tokens).backward()
        return losses_BS.detach()

    def evaluate(self, shares: list[Share]) -> list[Tensor]:
        with vocabulary_parallel(self.mesh):
            return [self._losses(share) for share in shares]

    def _losses(self, share: Share) -> Tensor:
        losses_BS = self.loss(self._forward(share), share.labels)
        if share.mask is not None and share.labels.is_floating_point():  # floats have no label IGNORED
            return losses_BS.masked_fill(~share.mask, 0.0)
        return losses_BS

    def _forward(self, share: Share) -> Any:
        mask = () if share.mask is None else (share.mask,)
        with self.precision():
            return self.model(share.inputs, *mask)


class Stages:
    """Runs all micro-batches through this rank's pipeline stages, in the order of the schedule."""

    def __init__(self, pipeline: Pipeline, mesh: Mesh, loss: Loss) -> None:
        self.pipeline, self.mesh, self.loss = pipeline, mesh, loss

    def train(self, shares: list[Share], tokens: Tensor, balance: StepBalance) -> list[Tensor]:
        inputs, labels, masks = _columns(shares)
        if balance.counts_ahead:
            self.pipeline.count(inputs, masks)
        found: list[Tensor] = []

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            losses_BS = self.loss(outputs, labels)
            found.append(losses_BS.detach())
            return losses_BS.sum() / tokens

        with vocabulary_parallel(self.mesh):
            self.pipeline.step(inputs, labels, masks, loss)
        return found

    def evaluate(self, shares: list[Share]) -> list[Tensor]:
        found: list[Tensor] = []
        at_once, rows = self.pipeline.micro_batches, self.pipeline.inputs_shape[0]
        for first in range(0, len(shares), at_once):
            several = shares[first : first + at_once]
            filled = [_filled(share, rows, self.pipeline.masks_shape) for share in several]
            with vocabulary_parallel(self.mesh):
                losses = self.pipeline.evaluate(*_columns(filled), self.loss)
            found += [losses_BS[: len(share.inputs)] for losses_BS, share in zip(losses, several, strict=False)]
        return found


def _columns(shares: list[Share]) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    masks = [share.mask for share in shares if share.mask is not None]
    return [share.inputs for share in shares], [share.labels for share in shares], masks or None


def _filled(share: Share, rows: int, mask_shape: tuple[int, ...]) -> Share:
    """Pad a share to ``rows`` sequences. Padding is masked, so no layer counts it."""
    more = rows - len(share.inputs)
    mask = share.inputs.new_ones((len(share.inputs), mask_shape[1]), dtype=torch.bool)
    mask = mask if share.mask is None else share.mask
    pad = [torch.cat((t, t.new_zeros((more, *t.shape[1:])))) for t in (share.inputs, share.labels, mask)]
    return Share(*pad)
