"""The counts of an optimizer step: one slot per micro-batch, assigned and never incremented.

A slot is opened by a training forward and finished by that forward's backward. Because a pass that happens
twice (recomputation) finds its slot again, nothing is ever counted twice; because slots go when the optimizer
steps, nothing is counted into the next step.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..types import Decision, Routing
from .bias import BiasRule
from .losses import Loss


class Summed(Protocol):
    """A tensor whose sum over ranks is under way."""

    def get(self) -> Tensor: ...


class MicroBatch:
    """What one layer remembers of one micro-batch until the optimizer steps."""

    def __init__(self, number: int) -> None:
        #: unlike that of any other micro-batch of the layer, and the same on all ranks
        self.number = number
        self.decision: Decision
        self.counts_BE: Tensor
        self.tokens_B: Tensor
        self.prob_sums_E: Tensor
        #: int64 [1 or B, E + 1], counts and tokens on the ranks that hold parts of the same sequences; by sequence
        #: where a loss is of sequences
        self.own: Summed
        #: int64 [E + 1 + X], counts and tokens on all ranks (where nothing asks for those, on the same as ``own``), and
        #: what losses and bias want beside
        self.batch: Summed
        #: int64 [N, K], the choices on all ranks, -1 for masked tokens; for a loss that draws from them
        self.choices_NK: Tensor | None = None
        self.assigned = False
        #: counted by a pass ahead of the training forward
        self.ahead = False
        #: the backward that has used it, as autograd numbers them
        self.backward_id: int | None = None
        #: the main loss as that backward has read it
        self.used: Loss | None = None
        #: ranks that hold parts of the same sequences, and that hold different tokens
        self.sequence_ranks = self.ranks = 1
        #: int64 [E + 1], counts and tokens of its whole step, once that has ended; and its choices
        self.step_total: Tensor | None = None
        self.step_choices_NK: Tensor | None = None

    @property
    def done(self) -> bool:
        """Its backward has run."""
        return self.backward_id is not None

    def assign(self, routing: Routing, own: Summed, batch: Summed, choices_NK: Tensor | None) -> None:
        """Take this micro-batch's decision and counts."""
        self.assigned = True
        self.decision = routing.decision
        self.counts_BE, self.tokens_B = routing.counts_BE, routing.tokens_B
        self.own, self.batch, self.choices_NK = own, batch, choices_NK

    @property
    def total(self) -> Tensor:
        """int64 [E + 1]: counts and tokens of this micro-batch on all ranks that count together."""
        return self.batch.get()[: self.counts_BE.shape[1] + 1]

    @property
    def beside(self) -> Tensor:
        """int64 [X]: what was summed beside counts and tokens."""
        return self.batch.get()[self.counts_BE.shape[1] + 1 :]


@dataclass(frozen=True)
class StepTotals:
    """A step that has ended: sums over its micro-batches."""

    #: int64 [E] and scalar, over all ranks that count together
    counts_E: Tensor
    tokens: Tensor
    #: int64 [E], int64 scalar and fp32 [E], of this rank alone
    local_counts_E: Tensor
    local_tokens: Tensor
    local_prob_sums_E: Tensor
    #: int64 scalar, sequences of this rank with a valid token
    local_sequences: Tensor
    micro_batches: int
    #: ranks that hold parts of the same sequences
    sequence_ranks: int
    #: what the backward of each micro-batch used
    used: list[Loss]

    @property
    def balance_tokens(self) -> float | None:
        """Tokens that the main loss's load stood for when a backward read it, in the mean over the micro-batches, with
        those of the step before among them under ``carry``. None where no backward asked."""
        if not self.used:
            return None
        return float(torch.stack([loss.tokens for loss in self.used]).mean())

    @property
    def balance_sequences(self) -> float | None:
        """The same in sequences, by the length that this rank's sequences have in the mean."""
        tokens = self.balance_tokens
        if tokens is None or not int(self.local_tokens):
            return None
        return tokens * int(self.local_sequences) / (int(self.local_tokens) * self.sequence_ranks)

    @property
    def estimator_error(self) -> float | None:
        """|load used - load of the whole step| / |load of the whole step|: 2-norms over the experts, root of the mean
        square over micro-batches (and sequences, where the main loss is of sequences). None where no backward asked."""
        if not self.used:
            return None
        load_E = self.counts_E.double() * len(self.counts_E) / self.counts_E.double().sum().clamp_min(1)
        used_XE = torch.cat([loss.loads.view(-1, len(load_E)) for loss in self.used])
        return float((used_XE - load_E).square().sum(1).mean().sqrt() / load_E.norm().clamp_min(1e-300))


_numbers = itertools.count()


class Window:
    """The micro-batches of the optimizer step under way.

    It starts anew
    - when an optimizer that holds the router's weight steps; as long as none was seen to hold it (wrappers with
      master weights of their own, FSDP) any optimizer's step counts;
    - when ``micro_batches`` were given and that many have been backpropagated;
    - when a forward finds the weight's gradient gone that a backward had left: the step was skipped. (Not where an
      engine takes gradients away by itself; there, the next optimizer step it is, or ``micro_batches``.)
    """

    def __init__(self, micro_batches: int | None, bias: BiasRule | None = None) -> None:
        #: in the order in which layers are made, so the same on all ranks
        self.number = next(_numbers)
        self.slots: list[MicroBatch] = []
        self.given = micro_batches
        self.bias = bias
        #: totals of the step before this one
        self.last: StepTotals | None = None
        #: the slot that a backward has used last
        self.last_used: MicroBatch | None = None
        #: int64 [E + 2], counts, tokens and micro-batches of that step; all zero when a resume is to fill it
        self.before_X: Tensor | None = None
        self._last_length = 1
        self._opened = 0
        #: so many micro-batches and the sum of their totals: a backward adds the new ones only
        self._prefix: tuple[int, Tensor | None] = (0, None)
        self._weight: Any = lambda: None
        self._bias_E: Any = lambda: None
        self._held_by_optimizer = False
        self._trained_elsewhere = False
        self._gradient_left = False
        _windows.add(self)

    def __deepcopy__(self, memo: dict) -> Window:
        return Window(self.given, self.bias)

    def __reduce__(self) -> tuple:
        return Window, (self.given, self.bias)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step: as configured, else as many as the step before had."""
        return self.given or self._last_length

    def begin_pass(self, weight: Tensor, bias_E: Tensor | None = None) -> None:
        """Tell the window that a training forward begins, with the router's weight and bias as this pass uses them."""
        self._weight = weakref.ref(weight)
        if bias_E is not None:
            self._bias_E = weakref.ref(bias_E)
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
        self.slots.append(MicroBatch(self._opened))
        self._opened += 1
        return self.slots[-1]

    @property
    def known(self) -> list[MicroBatch]:
        """The micro-batches that have been counted."""
        return [slot for slot in self.slots if slot.assigned]

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
        known = self.known
        counted, total = self._prefix
        new = [s.total for s in known[counted:]]
        if new:
            total = torch.stack([*([] if total is None else [total]), *new]).sum(0)
            self._prefix = len(known), total
        assert total is not None
        return total

    def choices(self, slot: MicroBatch) -> list[Tensor]:
        """int64 [N, K] each: the choices of all micro-batches known, with ``slot`` among them."""
        if slot.step_choices_NK is not None:
            return [slot.step_choices_NK]
        return [s.choices_NK for s in self.known if s.choices_NK is not None]

    def close(self, kept: list[MicroBatch] | None = None) -> StepTotals | None:
        """Start anew, remembering the totals of the step that ends; None when there was none."""
        kept = kept or []
        ended = [slot for slot in self.known if slot not in kept]
        if ended:
            total = torch.stack([slot.total for slot in ended]).sum(0)
            for slot in ended:
                slot.step_total = total
                if slot.choices_NK is not None and not slot.done:  # its backward may still come
                    slot.step_choices_NK = torch.cat([s.choices_NK for s in ended if s.choices_NK is not None])
            self.last = _step_totals(ended, total)
            self.before_X = F.pad(total, (0, 1), value=len(ended))
            self._last_length = len(ended)
        self.slots, self._prefix = kept, (0, None)
        # the next step's first gradient may come after its first backward (of activations alone, in a split backward)
        self._gradient_left = False
        return self.last if ended else None

    def optimizer_stepped(self, parameters: set[int]) -> None:
        """Called after every optimizer step in the process, with the ids of that optimizer's parameters."""
        if id(self._weight()) in parameters:
            self._held_by_optimizer = True
        elif self._held_by_optimizer:
            return
        else:
            self._trained_elsewhere = True
        slots, bias_E = self.known, self._bias_E()
        ended = self.close()
        if ended is not None and self.bias is not None and bias_E is not None:
            votes_E = torch.stack([slot.beside[-len(bias_E) :] for slot in slots]).sum(0) if self.bias.votes else None
            self.bias.move(bias_E, ended.counts_E, votes_E, sum(slot.ranks for slot in slots))


def _step_totals(ended: list[MicroBatch], total: Tensor) -> StepTotals:
    return StepTotals(
        counts_E=total[:-1],
        tokens=total[-1],
        local_counts_E=torch.stack([slot.counts_BE.sum(0) for slot in ended]).sum(0),
        local_tokens=torch.stack([slot.tokens_B.sum() for slot in ended]).sum(),
        local_prob_sums_E=torch.stack([slot.prob_sums_E for slot in ended]).sum(0),
        local_sequences=torch.stack([(slot.tokens_B > 0).sum() for slot in ended]).sum(),
        micro_batches=len(ended),
        sequence_ranks=ended[-1].sequence_ranks,
        used=[slot.used for slot in ended if slot.used is not None],
    )


_windows: weakref.WeakSet[Window] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for window in sorted(_windows, key=lambda w: w.number):  # in one order on all ranks: sums may be started here
        window.optimizer_stepped(parameters)


register_optimizer_step_post_hook(_after_optimizer_step)
