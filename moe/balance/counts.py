"""The counts of an optimizer step: one slot per micro-batch, assigned and never incremented.

A slot is opened by a training forward and finished by that forward's backward. Because a pass that happens
twice (recomputation) finds its slot again, nothing is ever counted twice; because slots go when the optimizer
steps, nothing is counted into the next step.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Term(NamedTuple):
    """One loss as a micro-batch's backward has used it: gradient * sums, summed, is this rank's part of its value."""

    name: str
    #: what it is weighed with in the training objective
    coefficient: float
    gradient: Tensor
    sums: Tensor

    @property
    def value(self) -> Tensor:
        """fp64 scalar, without the coefficient."""
        return (self.gradient * self.sums).sum().double()


class MicroBatch:
    """What one layer remembers of one micro-batch until the optimizer steps."""

    def __init__(self, number: int) -> None:
        #: unlike that of any other micro-batch of the layer, and the same on all ranks
        self.number = number
        self.decision: Decision
        self.counts_BE: Tensor
        self.tokens_B: Tensor
        #: fp32 [B, E] and scalar, outside the graph
        self.prob_sums_BE: Tensor
        self.z_sum: Tensor
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
        #: the backward within which its forward ran (-1: none), and the one that has used it, as autograd numbers them
        self.opened_in = -1
        self.backward_id: int | None = None
        #: training forwards in this process before it was opened
        self.session = 0
        #: the main loss as that backward has read it
        self.used: Loss | None = None
        #: all losses as it has read them
        self.terms: list[Term] = []
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
    #: int64 [M, E], int64 [M] and fp32 [M, E], of this rank's M micro-batches alone
    local_counts_ME: Tensor
    local_tokens_M: Tensor
    local_prob_sums_ME: Tensor
    #: int64 scalar, sequences of this rank with a valid token
    local_sequences: Tensor
    micro_batches: int
    #: ranks that hold parts of the same sequences
    sequence_ranks: int
    #: what the backward of each micro-batch used: the main loss, and every loss
    used: list[Loss]
    terms: list[Term]

    @property
    def local_tokens(self) -> Tensor:
        """int64 scalar, of this rank alone."""
        return self.local_tokens_M.sum()

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
        return float(self._apart / self._load_E.norm().clamp_min(1e-300)) if self.used else None

    @property
    def gradient_error(self) -> float | None:
        """The same difference as a share of the load's distance from an even one, which alone has a gradient: about the
        relative error of the loss's gradient. None where the load is even, and where no backward asked."""
        uneven = float((self._load_E - 1.0).norm())
        return float(self._apart) / uneven if self.used and uneven else None

    @property
    def _load_E(self) -> Tensor:
        """fp64 [E], the whole step's, 1.0 when even."""
        return self.counts_E.double() * len(self.counts_E) / self.counts_E.double().sum().clamp_min(1)

    @property
    def _apart(self) -> Tensor:
        used_XE = torch.cat([loss.loads.view(-1, len(self.counts_E)) for loss in self.used])
        return (used_XE - self._load_E).square().sum(1).mean().sqrt()


_numbers = itertools.count()


class Window:
    """The micro-batches of the optimizer step under way.

    It starts anew
    - when an optimizer that holds the router's weight steps; as long as none was seen to hold it (wrappers with
      master weights of their own, FSDP) any optimizer's step counts;
    - when ``micro_batches`` were given and that many have been backpropagated;
    - when a forward finds the weight's gradient gone that a backward had left: the step was skipped, or broken off.
      (Where a wrapper's optimizer holds it in another guise: that optimizer's gradients, after its first step. Not
      where an engine takes gradients away by itself, or sets them to zero and not to None; there, the next optimizer
      step it is, or ``micro_batches``.)
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
        #: micro-batches that were counted ahead
        self._counted = 0
        #: so many micro-batches and the sum of their totals: a backward adds the new ones only
        self._prefix: tuple[int, Tensor | None] = (0, None)
        self._weight: Any = lambda: None
        self._bias_E: Any = lambda: None
        self._held_by_optimizer = False
        #: the last optimizer that may train the weight in another guise
        self._elsewhere: Any = lambda: None
        self._gradient_left = False
        _windows.add(self)

    def __reduce__(self) -> tuple:
        return Window, (self.given, self.bias)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step: as configured, else as many as were counted ahead or the step before had."""
        return self.given or self._counted or self._last_length

    def begin_pass(self, weight: Tensor, bias_E: Tensor | None, ahead: bool) -> None:
        """Tell the window that a training forward begins, or a pass that counts ahead of one, with the router's weight
        and bias as it uses them."""
        global _training_forwards
        if not ahead:
            _training_forwards += 1
        elif any(slot.ahead and slot.session != _training_forwards for slot in self.slots):
            self.forget_ahead()  # of a step that was broken off in its training
        self._weight = weakref.ref(weight)
        if bias_E is not None:
            self._bias_E = weakref.ref(bias_E)
        finished = sum(slot.done for slot in self.slots)
        full = self.given is not None and finished >= self.given
        skipped = self._gradient_left and not self._has_gradient()
        if finished and skipped:  # forwards without a backward were broken off with it
            over = {slot.session for slot in self.slots if slot.done}
            self.close(kept=[slot for slot in self.slots if slot.ahead and slot.session not in over])
        elif finished and full:
            self.close(kept=[slot for slot in self.slots if not slot.done])

    def open(self, ahead: bool) -> MicroBatch:
        """The slot of the micro-batch that is routed now: the next one counted ahead, else a new one."""
        waiting = [] if ahead else [slot for slot in self.slots if slot.ahead]
        slot = waiting[0] if waiting else MicroBatch(self._opened)
        slot.opened_in = torch._C._current_graph_task_id()
        if not waiting:
            self.slots.append(slot)
            self._opened += 1
            self._counted += ahead
            slot.session = _training_forwards
        return slot

    def forget_ahead(self) -> None:
        """Drop what was counted ahead and not trained on: other tokens will come than those."""
        self.slots, self._prefix = [slot for slot in self.slots if not slot.ahead], (0, None)
        self._counted = 0

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
        self._gradient_left = self._has_gradient()

    def _has_gradient(self) -> bool:
        weight, optimizer = self._weight(), self._elsewhere()
        if optimizer is None or self._held_by_optimizer:
            return weight is not None and weight.grad is not None
        return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])

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
        self.slots, self._prefix, self._counted = kept, (0, None), sum(slot.ahead for slot in kept)
        # the next step's first gradient may come after its first backward (of activations alone, in a split backward)
        self._gradient_left = False
        return self.last if ended else None

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer, parameters: set[int]) -> None:
        """Called after every optimizer step in the process, with the ids of that optimizer's parameters."""
        if id(self._weight()) in parameters:
            self._held_by_optimizer = True
        elif self._held_by_optimizer:
            return
        else:
            self._elsewhere = weakref.ref(optimizer)
        slots, bias_E = self.known, self._bias_E()
        ended = self.close()
        if ended is not None and self.bias is not None and bias_E is not None:
            votes_E = torch.stack([slot.beside[-len(bias_E) :] for slot in slots]).sum(0) if self.bias.votes else None
            # fp32 scalar of a gradient scaler: not zero where a fused optimizer was called and did nothing
            overflow = getattr(optimizer, "found_inf", None)
            self.bias.move(bias_E, ended.counts_E, votes_E, sum(slot.ranks for slot in slots), overflow)


def _step_totals(ended: list[MicroBatch], total: Tensor) -> StepTotals:
    return StepTotals(
        counts_E=total[:-1],
        tokens=total[-1],
        local_counts_ME=torch.stack([slot.counts_BE.sum(0) for slot in ended]),
        local_tokens_M=torch.stack([slot.tokens_B.sum() for slot in ended]),
        local_prob_sums_ME=torch.stack([slot.prob_sums_BE.sum(0) for slot in ended]),
        local_sequences=torch.stack([(slot.tokens_B > 0).sum() for slot in ended]).sum(),
        micro_batches=len(ended),
        sequence_ranks=ended[-1].sequence_ranks,
        used=[slot.used for slot in ended if slot.used is not None],
        terms=[term for slot in ended for term in slot.terms],
    )


_windows: weakref.WeakSet[Window] = weakref.WeakSet()
_training_forwards = 0


def forget_ahead() -> None:
    """Drop what all layers counted ahead and did not train on."""
    for window in _windows:
        window.forget_ahead()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for window in sorted(_windows, key=lambda w: w.number):  # in one order on all ranks: sums may be started here
        window.optimizer_stepped(optimizer, parameters)


register_optimizer_step_post_hook(_after_optimizer_step)
