"""Runners: run the micro-batches of a step through the whole model, or through the stages of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..balance import random_state_kept
from ..model import Decoder
from ..parallel import LocalBatch, LossFunction, Mesh, vocabulary_parallel
from .balance import StepBalance
from .main_grads import MainGrads
from .reduce import Reducer

if TYPE_CHECKING:
    from ..parallel.pipeline import Pipeline

#: returns the context of every forward (autocast)
Precision = Callable[[], AbstractContextManager[None]]


class Runner(Protocol):
    """Runs micro-batches on this rank's modules."""

    def train(self, batches: list[LocalBatch], tokens: Tensor, balance: StepBalance) -> list[Tensor]:
        """Run forward and backward of all ``batches`` of a step, and return their losses [B, S].

        Accumulates the gradients of their sum divided by ``tokens``. On return, FSDP has reduced those of the weights
        that it shards.
        """
        ...

    def evaluate(self, batches: list[LocalBatch]) -> list[Tensor]:
        """Run forwards only, and return the losses [B, S] of each batch."""
        ...


class WholeModel:
    """Runs micro-batches one after the other through a model that has all its layers on this rank.

    ``reducer`` reduces the gradients of weights that FSDP does not shard, during the last backward. ``main_grads`` adds
    those of experts over the micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh | None,
        loss: LossFunction,
        precision: Precision,
        reducer: Reducer,
        main_grads: MainGrads,
    ) -> None:
        self.model, self.mesh, self.loss, self.precision = model, mesh, loss, precision
        self.reducer, self.main_grads = reducer, main_grads

    def train(self, batches: list[LocalBatch], tokens: Tensor, balance: StepBalance) -> list[Tensor]:
        if balance.counts_ahead:
            with random_state_kept(), torch.no_grad():
                for m, batch in enumerate(batches):
                    with balance.micro_batch(m, ahead=True):
                        self._forward(batch)
        last = len(batches) - 1
        with self.main_grads.of_step(len(batches)):
            return [self._train_one(batch, m, tokens, balance, m == last) for m, batch in enumerate(batches)]

    def _train_one(self, batch: LocalBatch, m: int, tokens: Tensor, balance: StepBalance, last: bool) -> Tensor:
        overlap = self.reducer.overlapped() if last else nullcontext()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            overlap = nullcontext()
        with balance.micro_batch(m), vocabulary_parallel(self.mesh), overlap:
            losses_BS = self._losses(batch)
            self.reducer.check_alike()  # the device is busy with the forward by now
            (losses_BS.sum() / tokens).backward()
        return losses_BS.detach()

    def evaluate(self, batches: list[LocalBatch]) -> list[Tensor]:
        with vocabulary_parallel(self.mesh):
            return [self._losses(batch) for batch in batches]

    def _losses(self, batch: LocalBatch) -> Tensor:
        losses_BS = self.loss(self._forward(batch), batch.labels)
        if batch.mask is not None and batch.labels.is_floating_point():  # floats have no label IGNORED
            return losses_BS.masked_fill(~batch.mask, 0.0)
        return losses_BS

    def _forward(self, batch: LocalBatch) -> Any:
        with self.precision():
            return self._call(self.model, batch)

    def _call(self, model: Callable[..., Any], batch: LocalBatch) -> Any:
        """Call a model, or what wraps it, with a batch's inputs, and with its mask, documents and codes if there are
        any."""
        mask = () if batch.mask is None else (batch.mask,)
        codes = {} if batch.codes is None else {"codes": batch.codes}
        if batch.starts is None:
            return model(batch.inputs, *mask, **codes)
        if not self._takes_documents():
            raise ValueError(
                f"batch.documents: a {type(self.model).__name__} does not take them; leave them out, or give its "
                "forward an argument 'starts', the position at which each position's document starts"
            )
        return model(batch.inputs, *mask, starts=batch.starts, **codes)

    def _takes_documents(self) -> bool:
        named = "starts" in inspect.signature(self.model.forward).parameters
        return named or any(isinstance(module, Decoder) for module in self.model.modules())


class Stages:
    """Runs all micro-batches through this rank's pipeline stages, in the order of the schedule.

    ``reducer`` reduces the gradients of a stage's weights during its last backward, unless FSDP shards the weights or
    the schedule splits backwards, which computes gradients of weights by other means than autograd's accumulation.
    """

    def __init__(self, pipeline: Pipeline, mesh: Mesh, loss: LossFunction, reducer: Reducer) -> None:
        self.pipeline, self.mesh, self.loss, self.reducer = pipeline, mesh, loss, reducer
        self._overlaps = mesh.degrees.data_parallel != "fsdp" and not pipeline.kind.split_backward

    def train(self, batches: list[LocalBatch], tokens: Tensor, balance: StepBalance) -> list[Tensor]:
        inputs, labels, rest = _columns(batches)
        if balance.counts_ahead:
            self.pipeline.count(inputs, rest)
        found: list[Tensor] = []

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            losses_BS = self.loss(outputs, labels)
            found.append(losses_BS.detach())
            return losses_BS.sum() / tokens

        self.reducer.check_alike()  # the schedule mixes forwards and backwards, so it can be no later
        overlap = self.reducer.overlapped(len(batches)) if self._overlaps else nullcontext()
        with vocabulary_parallel(self.mesh), overlap:
            self.pipeline.step(inputs, labels, rest, loss)
        return found

    def evaluate(self, batches: list[LocalBatch]) -> list[Tensor]:
        found: list[Tensor] = []
        at_once, rows = self.pipeline.micro_batches, self.pipeline.inputs_shape[0]
        for first in range(0, len(batches), at_once):
            several = batches[first : first + at_once]
            filled = [_filled(batch, rows, self.pipeline.masks_shape) for batch in several]
            with vocabulary_parallel(self.mesh):
                losses = self.pipeline.evaluate(*_columns(filled), self.loss)
            found += [losses_BS[: len(batch.inputs)] for losses_BS, batch in zip(losses, several, strict=False)]
        return found


def _columns(batches: list[LocalBatch]) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
    """Return inputs, labels, and the other arguments of the model."""
    rest = {
        "mask": [batch.mask for batch in batches if batch.mask is not None],
        "starts": [batch.starts for batch in batches if batch.starts is not None],
        "codes": [batch.codes for batch in batches if batch.codes is not None],
    }
    given = {name: parts for name, parts in rest.items() if parts}
    return [batch.inputs for batch in batches], [batch.labels for batch in batches], given


def _filled(batch: LocalBatch, rows: int, mask_shape: tuple[int, ...]) -> LocalBatch:
    """Pad a batch to ``rows`` sequences. Padding is masked, so no layer counts it."""
    more = rows - len(batch.inputs)
    mask = batch.inputs.new_ones((len(batch.inputs), mask_shape[1]), dtype=torch.bool)
    mask = mask if batch.mask is None else batch.mask

    def pad(t: Tensor) -> Tensor:
        return torch.cat((t, t.new_zeros((more, *t.shape[1:]))))

    starts, codes = (None if t is None else pad(t) for t in (batch.starts, batch.codes))
    return LocalBatch(pad(batch.inputs), pad(batch.labels), pad(mask), starts, codes)
