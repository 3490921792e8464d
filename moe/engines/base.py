"""The interface between a training loop and an engine.  B sequences, S positions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint import State

#: (trainable parameters by their names in the whole model) -> their optimizer
OptimizerFactory = Callable[[dict[str, nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of whole sequences. Context- and tensor-parallel peers must get the same one."""

    #: model inputs [B, S, ...]; for a language model, token ids
    inputs: Tensor
    #: targets of the loss [B, S, ...]; for a language model, the next tokens, or -100 where none is to be learned
    labels: Tensor
    #: bool [B, S], True where a position is valid; None: all are valid
    mask: Tensor | None = None
    #: integers [B, S], the number of each position's document; attention stays within runs of the same number. None:
    #: within the whole sequence
    documents: Tensor | None = None
    #: int64 [B], the task of each sequence, for routers that read it; -1: unknown
    tasks: Tensor | None = None


@dataclass(frozen=True)
class Computed:
    """What a step has computed before it updates the weights."""

    #: as in :class:`StepResult`
    losses: list[Tensor]
    norm: Tensor
    #: int64 scalar, the number of positions of all ranks that the loss counts
    tokens: Tensor
    #: returns this rank's part of the gradient, complete and clipped or not, as the engine has it
    gradient: Callable[[], list[Tensor]]


#: decides whether a step updates the weights; it must return the same answer on every rank
Accept = Callable[[Computed], bool]


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer step."""

    #: loss of each position [B, S] in this rank's part of each micro-batch; empty on pipeline ranks without the last
    #: stage
    losses: list[Tensor]
    #: fp32 scalar, 2-norm of the whole model's gradient before clipping
    norm: Tensor
    #: False if the update was not made; weights, moments and the state of load balancing are then unchanged
    applied: bool


class Engine(Protocol):
    """Owns data parallelism, gradient accumulation, precision, clipping and the optimizer.

    Every rank must call every method.
    """

    #: the model, or this rank's pipeline stages of it
    parts: list[nn.Module]

    def step(self, batches: list[Batch], lr: float, accept: Accept | None = None) -> StepResult:
        """Run an optimizer step on ``batches``, this rank's micro-batches.

        The loss is the mean over the valid positions with a label of all micro-batches on all ranks; without any, it is
        zero, and the gradient is that of load balancing alone. The weights are updated if ``accept`` says so; by
        default, if losses and norm are finite on every rank. If the step raises, its gradients are dropped and the next
        step is not affected.
        """
        ...

    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """Return, for each batch, the loss of every position [B, S] of this rank's part; zero where the mask is False
        or the label is -100.

        Runs forwards only and changes no state.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's weights and router biases by their names in the whole model: the tensors themselves, as
        DTensors where ranks hold different parts."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors that this rank holds as parts of whole ones, by logical names, without
        communication. An engine that keeps them in its own buffers returns none."""
        ...

    def state(self) -> State:
        """Return the model and optimizer tensors that a checkpoint must hold, by logical names. Changes nothing.

        To resume, fill these tensors in place and pass them to :meth:`restore`.
        """
        ...

    def expect(self, names: Collection[str]) -> None:
        """Prepare to resume from a checkpoint whose tensors have these ``names``.

        :meth:`state` then also has the checkpoint's moments of weights that are frozen now. They are needed if such a
        weight is trained again.
        """
        ...

    def restore(self, state: State) -> None:
        """Resume from a filled ``state``: adopt its tensors that did not exist before, such as optimizer moments."""
        ...
