"""The counts of an optimizer step: one slot per micro-batch, assigned and never incremented.

A slot is opened by a training forward and finished by that forward's backward. Because a pass that happens
twice (recomputation) finds its slot again, nothing is ever counted twice; because slots go when the optimizer
steps, nothing is counted into the next step.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..collectives import Axis, Pending, sum_over
from ..types import Decision, Routing


class MicroBatch:
    """What one layer remembers of one micro-batch until the optimizer steps."""

    def __init__(self) -> None:
        self.decision: Decision
        self.counts_BE: Tensor
        self.tokens_B: Tensor
        self.prob_sums_E: Tensor
        #: int64 [1 or B, E + 1], counts and tokens; by sequence where the loss is of sequences or micro-batches
        self.summed: Pending
        #: counted by a pass ahead of the training forward
        self.ahead = False
        #: the backward that has used it, as autograd numbers them
        self.backward_id: int | None = None
        #: int64 [E + 1], counts and tokens of its whole step, once that has ended
        self.step_total: Tensor | None = None

    @property
    def done(self) -> bool:
        """Its backward has run."""
        return self.backward_id is not None

    def assign(self, routing: Routing, axis: Axis, by_sequence: bool) -> None:
        """Take this micro-batch's decision and counts, and start to sum them over the ranks of ``axis``."""
        self.prob_sums_E = routing.prob_sums_BE.detach().sum(0)
        if self.ahead:  # counted and summed before
            self.ahead = False
            return
        self.decision = routing.decision
        self.counts_BE, self.tokens_B = routing.counts_BE, routing.tokens_B
        local = torch.cat((self.counts_BE, self.tokens_B[:, None]), dim=1)
        self.summed = sum_over(local if by_sequence else local.sum(0, keepdim=True), axis)

    @property
    def total(self) -> Tensor:
        """int64 [E + 1]: counts and tokens of this micro-batch on the ranks it was summed over."""
        return self.summed.get().sum(0)


@dataclass(frozen=True)
class StepTotals:
    """A step that has ended: sums over its micro-batches."""

    #: int64 [E] and scalar, over all ranks of the counting axis
    counts_E: Tensor
    tokens: Tensor
    #: int64 [E], int64 scalar and fp32 [E], of this rank alone
    local_counts_E: Tensor
    local_tokens: Tensor
    local_prob_sums_E: Tensor
    micro_batches: int


class Window:
    """The micro-batches of the optimizer step under way.

    It starts anew
    - when an optimizer that holds the router's weight steps; as long as none was seen to hold it (wrappers with
      master weights of their own, FSDP) any optimizer's step counts;
    - when ``micro_batches`` were given and that many have been backpropagated;
    - when a forward finds the weight's gradient gone that a backward had left: the step was skipped. (Not where an
      engine takes gradients away by itself; there, the next optimizer step it is, or ``micro_batches``.)
    """

    def __init__(self, micro_batches: int | None) -> None:
        self.slots: list[MicroBatch] = []
        self.given = micro_batches
        #: totals of the step before this one
        self.last: StepTotals | None = None
        #: the slot that a backward has used last
        self.last_used: MicroBatch | None = None
        self._last_length = 1
        self._weight: Any = lambda: None
        self._held_by_optimizer = False
        self._trained_elsewhere = False
        self._gradient_left = False
        _windows.add(self)

    def __deepcopy__(self, memo: dict) -> Window:
        return Window(self.given)

    def __reduce__(self) -> tuple:
        return Window, (self.given,)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step: as configured, else as many as the step before had."""
        return self.given or self._last_length

    def begin_pass(self, weight: Tensor) -> None:
        """Tell the window that a training forward begins, with the router's weight as this pass uses it."""
        self._weight = weakref.ref(weight)
        finished = sum(slot.done for slot in self.slots)
        full = self.given is not None and finished >= self.given
        mine = self._held_by_optimizer or not self._trained_elsewhere
        skipped = mine and self._gradient_left and weight.grad is None
        if finished and (full or skipped):
            self.close(kept=[slot for slot in self.slots if not slot.done])

    def open(self, ahead: bool) -> MicroBatch:
        """The slot of the micro-batch that is routed now: the next one counted ahead, else a new one."""
        waiting = [] if ahead else [slot for slot in self.slots if slot.ahead]
        if waiting:
            return waiting[0]
        self.slots.append(MicroBatch())
        return self.slots[-1]

    def used(self, slot: MicroBatch) -> None:
        """Note that a backward uses the slot now."""
        slot.backward_id = torch._C._current_graph_task_id()
        self.last_used = slot
        if not self._gradient_left:
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        weight = self._weight()
        self._gradient_left = weight is not None and weight.grad is not None

    def totals(self, slot: MicroBatch) -> Tensor:
        """int64 [E + 1]: counts and tokens of all micro-batches known, with ``slot`` among them."""
        if slot.step_total is not None:
            return slot.step_total
        return torch.stack([s.total for s in self.slots]).sum(0)

    def close(self, kept: list[MicroBatch] | None = None) -> None:
        """Start anew, remembering the totals of the step that ends."""
        kept = kept or []
        ended = [slot for slot in self.slots if slot not in kept]
        if ended:
            total = torch.stack([slot.total for slot in ended]).sum(0)
            for slot in ended:
                slot.step_total = total
            self.last = StepTotals(
                counts_E=total[:-1],
                tokens=total[-1],
                local_counts_E=torch.stack([slot.counts_BE.sum(0) for slot in ended]).sum(0),
                local_tokens=torch.stack([slot.tokens_B.sum() for slot in ended]).sum(),
                local_prob_sums_E=torch.stack([slot.prob_sums_E for slot in ended]).sum(0),
                micro_batches=len(ended),
            )
            self._last_length = len(ended)
        self.slots = kept
        # the next step's first gradient may come after its first backward (of activations alone, in a split backward)
        self._gradient_left = False

    def optimizer_stepped(self, parameters: set[int]) -> None:
        """Called after every optimizer step in the process, with the ids of that optimizer's parameters."""
        if id(self._weight()) in parameters:
            self._held_by_optimizer = True
        elif self._held_by_optimizer:
            return
        else:
            self._trained_elsewhere = True
        self.close()


_windows: weakref.WeakSet[Window] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for window in list(_windows):
        window.optimizer_stepped(parameters)


register_optimizer_step_post_hook(_after_optimizer_step)
