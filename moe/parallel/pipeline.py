"""Pipeline parallelism: runs the stages of a decoder with the schedules of ``torch.distributed.pipelining``.

B sequences per micro-batch, S tokens per sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules

from ..balance import Step, random_state_kept
from ..collectives import Axis
from ..config import require
from ..layer import MoE
from ..model import Decoder
from .local_batch import LossFunction
from .stages import SCHEDULES, check_pipeline, stage_ids
from .torch_stage import TorchStage

#: arguments of the decoder besides its inputs, by name, for each micro-batch
Rest = dict[str, list[Tensor]]


class Pipeline:
    """This rank's stages of a decoder, and the schedule that runs them together with the other ranks of ``axis``.

    * ``stages``: decoders from :func:`.stages.split`, in the order of :func:`.stages.stage_ids`, on ``device``. They
      must be parallelized already: every MoE layer must know the ranks that hold different tokens of its stage.
    * ``micro_batches``: number per optimizer step. One :meth:`step` is one optimizer step.
    * ``hidden_shape``, ``hidden_dtype``: [B, S, D] of one micro-batch as stages send it.
    * ``inputs_shape``: [B, S] of the inputs, if sequence parallelism gives them a different S.
    * ``precision``: returns the context of every stage's forward (autocast).

    Gradients are sums over the micro-batches. The balance estimator "exact" needs :meth:`count` before every
    :meth:`step`. "rolling" uses the counts of the forwards that the schedule has run on a stage before a backward:
    under "gpipe" all of them; under "1f1b", for the backward of micro-batch k, min(micro_batches, k + P - stage).
    """

    def __init__(
        self,
        stages: list[Decoder],
        axis: Axis,
        schedule: str,
        micro_batches: int,
        device: torch.device,
        hidden_shape: tuple[int, int, int],
        hidden_dtype: torch.dtype = torch.float32,
        inputs_shape: tuple[int, int] | None = None,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        num_stages = axis.size * len(stages)
        check_pipeline(schedule, axis.size, len(stages), micro_batches, num_stages, hidden_shape[0])
        self.kind = SCHEDULES[schedule]
        self.stages = stages
        self.micro_batches = micro_batches
        self.inputs_shape = tuple(inputs_shape or hidden_shape[:2])
        self.masks_shape = tuple(hidden_shape[:2])
        for stage in stages:
            _check_balance(stage, micro_batches)
        #: for each stage, the balancing step of its MoE layers
        self.steps = [Step.of(stage) for stage in stages]
        ids = stage_ids(schedule, axis.size, axis.rank, len(stages))
        self.holds_first, self.holds_last = 0 in ids, num_stages - 1 in ids
        inputs_BS = torch.empty(self.inputs_shape, dtype=torch.int64, device="meta")
        hidden_BSD = torch.empty(hidden_shape, dtype=hidden_dtype, device="meta", requires_grad=True)
        torch_stages = []
        for stage, number, step in zip(stages, ids, self.steps, strict=True):
            _check_stage(stage, schedule, number, num_stages)
            if self.kind.split_backward and isinstance(stage, FSDPModule):
                # torch looks up the weights before the backward gathers them, so they must stay gathered
                stage.set_reshard_after_forward(False)
            within = partial(self._micro_batch, step)
            torch_stages.append(
                TorchStage(stage, number, num_stages, device, axis.group, inputs_BS, hidden_BSD, precision, within)
            )
        self._loss_fn: LossFunction | None = None
        self._losses: list[Tensor] = []
        self._counting = False
        given: Any = torch_stages if len(torch_stages) > 1 else torch_stages[0]
        schedule_class = getattr(schedules, self.kind.torch_class)
        self._schedule = schedule_class(given, micro_batches, loss_fn=self._loss, scale_grads=False)

    def step(self, inputs: list[Tensor], labels: list[Tensor], rest: Rest, loss_fn: LossFunction) -> list[Tensor]:
        """Run forward and backward of all micro-batches; gradients accumulate in ``.grad``.

        All ranks of the pipeline must pass the same lists: ``inputs`` int64 [B, S], ``labels`` [B, ...] of any shape,
        and in ``rest``, by name, other arguments of the decoder: ``mask`` bool [B, S] and ``codes`` int64 [B, S] with
        the S of the hidden states, ``starts`` int64 [B, S] with that of the inputs. The rank with the last stage
        returns the result of ``loss_fn`` for each micro-batch, detached; others return an empty list. Raises ValueError
        unless the number and shapes of micro-batches are those that the pipeline was built for.
        """
        with self._loss_of(loss_fn) as losses:
            self._run(self._schedule.step, inputs, labels, rest)
        return losses

    def count(self, inputs: list[Tensor], rest: Rest | None = None) -> None:
        """Count the tokens per expert of a whole step before :meth:`step`, in a pass without gradients.

        ``estimator="exact"`` needs this. A no-op under "gpipe", where all forwards precede the first backward.
        """
        if self.kind.forwards_first:
            return
        self._counting = True
        try:
            with random_state_kept(), torch.no_grad(), self._loss_of(None):
                self._run(self._schedule.eval, inputs, inputs, rest or {})
        finally:
            self._counting = False

    @torch.no_grad()
    def evaluate(self, inputs: list[Tensor], labels: list[Tensor], rest: Rest, loss_fn: LossFunction) -> list[Tensor]:
        """Run the forwards and return the losses like :meth:`step`, without changing any state.

        Accepts fewer micro-batches than a step has.
        """
        number = len(inputs)
        pad = (self.micro_batches - number) if number else 0
        inputs, labels = inputs + inputs[:1] * pad, labels + labels[:1] * pad
        rest = {name: parts + parts[:1] * pad for name, parts in rest.items()}
        with self._loss_of(loss_fn) as losses:
            self._run(self._schedule.eval, inputs, labels, rest)
        return losses[:number]

    def _run(self, run: Any, inputs: list[Tensor], labels: list[Tensor], rest: Rest) -> None:
        first = tuple(labels[0].shape) if labels else ()
        wanted = {"inputs": self.inputs_shape, "labels": first, "mask": self.masks_shape, "starts": self.inputs_shape}
        wanted["codes"] = self.masks_shape
        for name, parts in ({"inputs": inputs, "labels": labels} | rest).items():
            want = wanted[name]
            shapes = [tuple(part.shape) for part in parts]
            require(
                len(shapes) == self.micro_batches and all(shape == want for shape in shapes),
                f"{name}.shape",
                shapes,
                f"pass one of shape {want} for each micro-batch ({self.micro_batches})",
            )
        args = (torch.cat(inputs),) if self.holds_first else ()
        target = torch.cat(labels) if self.holds_last else None
        run(*args, target=target, return_outputs=False, **{name: torch.cat(parts) for name, parts in rest.items()})

    def _micro_batch(self, step: Step, number: int) -> AbstractContextManager[None]:
        """Return the context for a stage's work on a micro-batch."""
        return step.micro_batch(number, ahead=self._counting)

    @contextmanager
    def _loss_of(self, loss_fn: LossFunction | None) -> Iterator[list[Tensor]]:
        """Within the block, compute losses with ``loss_fn``, and collect them in the list that is yielded."""
        self._loss_fn, self._losses = loss_fn, []
        try:
            yield self._losses
        finally:
            self._loss_fn, self._losses = None, []

    def _loss(self, logits_BSV: Tensor, labels: Tensor) -> Tensor:
        if self._loss_fn is None:
            return logits_BSV.new_zeros(())
        losses = self._loss_fn(logits_BSV, labels)
        self._losses.append(losses.detach())
        return losses.sum()


def _moe_layers(stage: nn.Module) -> list[MoE]:
    return [module for module in stage.modules() if isinstance(module, MoE)]


def _check_balance(stage: nn.Module, micro_batches: int) -> None:
    for layer in _moe_layers(stage):
        require(
            layer.balancer.placed is not None,
            "stages",
            type(stage).__name__,
            "its MoE layers do not know their ranks; parallelize every stage before you build the pipeline",
        )
        given = layer.balancer.config.micro_batches
        wanted = f"the pipeline runs {micro_batches} per step; set that, or None"
        require(given in (None, micro_batches), "balance.micro_batches", given, wanted)


def _check_stage(stage: Decoder, schedule: str, number: int, num_stages: int) -> None:
    for name, place in (("embedding", 0), ("head", num_stages - 1)):
        if (getattr(stage, name) is not None) != (number == place):
            raise ValueError(
                f"stage {number} of {num_stages}: {name} belongs to stage {place}; split the model by stage_ids"
            )
    if SCHEDULES[schedule].split_backward and stage.recomputes:
        raise ValueError(
            f"parallel.schedule={schedule!r}: a split backward would recompute each block once per weight; "
            "use 'interleaved_1f1b' or model.recompute=False"
        )
