"""What a training loop asks of an engine.  B sequences, S positions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

#: makes the optimizer of the trainable parameters, which it is given by their names in the whole model
OptimizerFactory = Callable[[dict[str, nn.Parameter]], Optimizer]
#: (outputs of the model, labels) to the loss of each position [B, S]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Ranks that hold parts of the same sequences (context and tensor parallel) get the same one."""

    #: what the model reads [B, S, ...]: token ids, for a language model
    inputs: Tensor
    #: what the loss compares its outputs with [B, S, ...]: the next tokens, for a language model
    labels: Tensor
    #: bool [B, S], True where a position is valid; None: everywhere
    mask: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    #: the losses [B, S] of this rank's share of each batch; empty on the ranks of a pipeline without its last stage
    nats: list[Tensor]
    #: fp32 scalar, the 2-norm of the whole model's gradient before clipping
    norm: Tensor
    #: False where the norm was not finite: the weights are those of before
    applied: bool


class Engine(Protocol):
    """Owns data parallelism, gradient accumulation, precision, clipping and the optimizer. Every rank calls it."""

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """Take an optimizer step on ``batches``, this rank's micro-batches.

        The loss is the mean over the valid positions of all micro-batches on all ranks. If anything raises, the
        step's gradients are dropped, and the next step is not affected.
        """
        ...

    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """The losses [B, S] of this rank's share of each batch, zero where not valid; forward only, without a trace."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs of model and optimizer, by logical names. Reading them changes nothing.

        A resume fills them in place and then calls :meth:`restore`.
        """
        ...

    def expect(self, names: Collection[str]) -> None:
        """Let :meth:`state` also hold the moments of weights that are frozen now, where ``names``, those of a
        checkpoint's tensors, have them: they count again once such a weight is trained on."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state`` that a resume has filled: tensors that did not exist yet are taken over."""
        ...
