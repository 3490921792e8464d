"""The optimizer step as an object: what every MoE layer counted in each of its micro-batches.

B sequences, E experts, M micro-batches, X values of a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import Axis, private_axis
from .losses import Loss, Term
from .sums import Entry, Number, Sums
from .visit import Visit

if TYPE_CHECKING:
    from .balancer import Balancer


@dataclass(frozen=True)
class StepTotals:
    """What one layer counted in a step that has ended, summed over its micro-batches."""

    #: int64 [E] and scalar, over all ranks that count together
    counts_E: Tensor
    tokens: Tensor
    #: int64 [M, E], int64 [M] and fp32 [M, E], of this rank's M micro-batches alone
    local_counts_ME: Tensor
    local_tokens_M: Tensor
    local_prob_sums_ME: Tensor
    #: int64 scalar, sequences of this rank with a valid token
    local_sequences: Tensor
    #: ranks that hold parts of the same sequences
    sequence_ranks: int
    #: what each backward read: the main loss, and every loss
    losses: list[Loss]
    terms: list[Term]

    @property
    def micro_batches(self) -> int:
        return len(self.local_tokens_M)

    @property
    def local_tokens(self) -> Tensor:
        """int64 scalar, of this rank alone."""
        return self.local_tokens_M.sum()


class Layer:
    """A layer's share of a step: its visits by micro-batch and occurrence, and the totals of the step before."""

    def __init__(self, balancer: Balancer, number: Number) -> None:
        self._balancer = weakref.ref(balancer)
        #: in the sums that it shares with other layers
        self.number = number
        self.visits: dict[tuple[int, int], Visit] = {}
        #: totals of the step that ended last
        self.previous_step: StepTotals | None = None
        #: the visit whose losses a backward has read last, and visits known at the first backward of the step
        self.last_read: Visit | None = None
        self.first_known: int | None = None
        #: the MoE layer itself, while it exists
        self.module: Any = lambda: None

    @property
    def balancer(self) -> Balancer:
        balancer = self._balancer()
        assert balancer is not None
        return balancer

    def weights(self) -> list[nn.Parameter]:
        """The router's first."""
        module = self.module()
        return [] if module is None else list(dict.fromkeys((module.router.weight, *module.parameters())))

    @property
    def known(self) -> list[Visit]:
        """The visits that count: those that were backpropagated, or still can be."""
        return [v for v in self.visits.values() if v.counted and v.lives]

    @property
    def runs(self) -> int:
        """How often the layer runs in a forward pass."""
        return 1 + max((occurrence for _, occurrence in self.visits), default=0)

    def totals(self, of: Visit) -> Tensor:
        """int64 [E + 1]: counts and tokens of all visits known, ``of`` among them."""
        if of.step_total is not None:
            return of.step_total
        return torch.stack([v.total for v in dict.fromkeys((*self.known, of))]).sum(0)

    def close(self, applied: bool, overflow: Tensor | None) -> None:
        """End the step: keep its totals, and move the bias."""
        ended, balancer = self.known, self._balancer()
        self.visits, self.first_known = {}, None
        if not ended or balancer is None:
            return
        total = torch.stack([v.total for v in ended]).sum(0)
        for v in ended:
            v.step_total = total
        self.previous_step = StepTotals(
            counts_E=total[:-1],
            tokens=total[-1],
            local_counts_ME=torch.stack([v.counts_BE.sum(0) for v in ended]),
            local_tokens_M=torch.stack([v.tokens_B.sum() for v in ended]),
            local_prob_sums_ME=torch.stack([v.prob_sums_BE.sum(0) for v in ended]),
            local_sequences=torch.stack([(v.tokens_B > 0).sum() for v in ended]).sum(),
            sequence_ranks=balancer.placement.sequence.size,
            losses=[v.loss for v in ended if v.loss is not None],
            terms=[term for v in ended for term in v.terms],
        )
        balancer.previous_X = F.pad(total, (0, 1), value=len(ended))
        module, bias = self.module(), balancer.bias
        trained = module is not None and any(p.requires_grad for p in module.parameters())
        if applied and bias is not None and module is not None and trained and module.router.bias_E is not None:
            bias.move(module.router.bias_E, self.previous_step, overflow)


def random_state_kept() -> AbstractContextManager[None]:
    """Puts the random state back at its end, so that what is computed after it draws what was drawn within it."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng([torch.cuda.current_device()] if cuda else [])


class Step:
    """The optimizer step of all MoE layers of a model part, driven by whoever runs the training loop.

    >>> step = Step.of(model)
    >>> for batch in micro_batches:
    ...     with step.micro_batch():
    ...         loss(model(batch)).backward()
    >>> optimizer.step()
    >>> step.end()

    Counts are assigned by micro-batch and layer, never incremented: a forward that is run again replaces what it
    counted before. One asynchronous sum over ranks at the end of each forward pass covers all layers, matched by layer,
    so ranks may run different ones.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        #: how many micro-batches the step has, and their valid tokens on all ranks (int64 scalar), where that is known
        self.length: int | None = None
        self.tokens: Tensor | None = None
        #: steps that have ended
        self.ended = 0
        self._sums: dict[Axis, Sums] = {}
        #: micro-batches of this step whose forward pass has been summed
        self._passed: set[int] = set()
        self._now: int | None = None
        self._ahead = False
        #: how often each layer has run in the micro-batch under way
        self._occurrence: dict[Layer, int] = {}

    @classmethod
    def of(cls, *parts: nn.Module) -> Step:
        """A step that all MoE layers of these modules have joined."""
        step = cls()
        for module in (module for part in parts for module in part.modules()):
            balancer = getattr(module, "balancer", None)
            if balancer is not None:
                balancer.join(step)
        return step

    def join(self, balancer: Balancer) -> Layer:
        """Take a layer in; returns its share of the step."""
        self.layers.append(Layer(balancer, (len(self.layers), 0)))
        return self.layers[-1]

    # ---- for the training loop

    def begin(self, micro_batches: int | None = None, tokens: int | Tensor | None = None) -> None:
        """Start a step, and drop forwards of which no backward has come.

        ``micro_batches`` it will have, and ``tokens`` (integer scalar) that all ranks together will route in it, where
        that is known: estimates of the load and the weights of the losses are then as good as they can be. Raises
        ValueError where a step has been trained and neither ended nor discarded.
        """
        if any(v.done for layer in self.layers for v in layer.visits.values()):
            raise ValueError(
                "Step.begin: the step before has been trained and not ended; call Step.end() after the update, "
                "Step.end(applied=False) after a skipped one, or Step.discard() to forget it"
            )
        self.discard()
        self.length = micro_batches
        self.tokens = None if tokens is None else torch.as_tensor(tokens)

    @contextmanager
    def micro_batch(self, number: int | None = None, ahead: bool = False) -> Iterator[None]:
        """Around the forward of a micro-batch, its backward, or both. None: the next number.

        ``ahead`` counts a forward without gradient, before the training forward of the same number. What the block
        counted is dropped when it raises.
        """
        before = self._now, self._ahead, self._occurrence
        if number is None:
            taken = (key[0] for layer in self.layers for key, v in layer.visits.items() if ahead or not v.ahead)
            number = max(taken, default=-1) + 1
        self._now, self._ahead, self._occurrence = number, ahead, {}
        try:
            self._meet()
            started = {sums: sums.started for sums in self._sums.values()}
            yield
            if ahead or torch.is_grad_enabled():
                for sums, before_this in started.items():  # one for each pass, also where no layer ran here
                    sums.start(always=number not in self._passed and sums.started == before_this)
                self._passed.add(number)
        except BaseException:
            for sums in self._sums.values():
                sums.drop()
            for layer in self._occurrence:
                layer.visits = {key: v for key, v in layer.visits.items() if key[0] != number}
            raise
        finally:
            self._now, self._ahead, self._occurrence = before

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        """Close the step and, if its update was ``applied``, move the biases that balance without a loss.

        ``overflow`` is a scalar that is not zero where a fused optimizer has skipped the update on the device. Raises
        ValueError where an applied step has had another number of micro-batches than :meth:`begin` was told.
        """
        if applied and self.length and self._passed and len(self._passed) != self.length:
            raise ValueError(
                f"Step.begin(micro_batches={self.length}): {len(self._passed)} have been trained, and the losses were "
                "weighed for the other number; tell begin the right one, or call Step.end(applied=False)"
            )
        for layer in self.layers:
            layer.close(applied, overflow)
        self.discard()
        self.ended += 1

    def discard(self) -> None:
        """Forget the step under way."""
        for sums in self._sums.values():
            sums.drop()
        for layer in self.layers:
            layer.visits = {}
        self.length, self.tokens, self._passed = None, None, set()

    # ---- for the layers' balancers

    def visit(self, layer: Layer, module: nn.Module) -> Visit:
        """The visit that begins with this forward of an MoE layer, ``module``."""
        if self._now is None:
            raise ValueError(
                "step: a training forward outside of a micro-batch; enter step.micro_batch() around it, and around the "
                "backward where that recomputes; or use model.eval() or torch.no_grad() for a forward that is not "
                "trained on"
            )
        key = self._now, self._occurrence.get(layer, 0)
        layer.module, self._occurrence[layer] = weakref.ref(module), key[1] + 1
        found = layer.visits.get(key)
        if found is not None and found.done:
            raise ValueError(
                f"step.micro_batch({self._now}): this micro-batch has been trained; give the next number, or none, and "
                "call Step.end() after each update"
            )
        if found is None or not found.ahead or self.counting:
            found = layer.visits[key] = Visit(self._now, self.counting)
        return found

    def recomputed(self, layer: Layer) -> tuple[Visit | None, bool]:
        """The visit that a forward inside a backward recomputes, and whether we are certain it is the same one."""
        backward = torch._C._current_graph_task_id()
        # Inside a backward, forwards run only in checkpointed regions. The reentrant kind ran without gradient at
        # first and was not counted, so this is its first pass. The non-reentrant kind, which hooks saved tensors,
        # recomputes a visit that is still open, or that this very backward has just read.
        if backward == -1 or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return None, False
        here = [v for v in layer.known if self._now in (None, v.number)]
        flying = [v for v in here if not (v.done or v.read_now or v.ahead or v.opened_in == backward)]
        if layer.last_read is not None and layer.last_read.backward_id == backward:
            return layer.last_read, not flying
        return (flying[0], len(flying) == 1 and flying[0].opened_in == -1) if flying else (None, False)

    @property
    def counting(self) -> bool:
        """A pass counts ahead of the training forwards."""
        return self._ahead

    def entry(self, layer: Layer, kind: str, value_BX: Tensor, axis: Axis) -> Entry:
        """Start to sum a layer's row over an axis, together with the other layers of the pass."""
        return Entry(value_BX) if axis.size == 1 else self.sums(layer, axis).add((layer.number, kind), value_BX)

    def sums(self, layer: Layer, axis: Axis) -> Sums:
        """The sums over an axis that a layer shares with others."""
        return self._sums[axis]

    def _meet(self) -> None:
        """Make the sums that the layers need, where they are not there yet: all ranks do it at the same point."""
        balancers = [(layer.number, layer.balancer) for layer in self.layers]
        axes = {axis: b for _, b in balancers for axis in b.placement.axes if axis.size > 1 and b.widths(axis)}
        if axes.keys() == self._sums.keys():
            return
        self._sums = {}
        for axis, balancer in axes.items():
            balancer.say_what_is_assumed()
            widths = {(n, kind): width for n, b in balancers for kind, width in b.widths(axis).items()}
            # where nobody placed the layers, others use the group too, in an order of their own
            own = private_axis(axis) if balancer.placed is None else axis
            self._sums[axis] = Sums(own, widths, early=False)

    def told(self, layer: Layer) -> int:
        """How many visits a layer has in the step, where that was told or they were counted ahead; else 0."""
        told = (self.length or 0) * layer.runs or layer.balancer.config.micro_batches or 0
        return told or sum(v.was_ahead for v in layer.visits.values())

    def micro_batches(self, layer: Layer) -> int:
        """How many visits a layer is taken to have: as told, or as many as in the step before, or as many as so far."""
        return self.told(layer) or (1 if layer.previous_step is None else layer.previous_step.micro_batches)

    def early(self, layer: Layer) -> bool:
        """A backward has come before all forwards of the step were counted."""
        known = len(layer.known)
        return self._incomplete(layer) or known > (layer.first_known or known)

    def _incomplete(self, layer: Layer) -> bool:
        """Passes are still to come. (A layer need not run in each of them.)"""
        return self.length is not None and len(self._passed | ({self._now} - {None})) < self.length

    def read(self, layer: Layer, visit: Visit, trains: bool = True) -> None:
        """Note that a backward reads a visit's losses now; ``trains``: and adds to the gradients of the weights."""
        if trains and not visit.read_now:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._read, visit))
        visit.backward_id = torch._C._current_graph_task_id()
        layer.last_read = visit
        layer.first_known = layer.first_known or len(layer.known)

    def _read(self, visit: Visit) -> None:
        """A backward that has read a visit's losses has come to its end; one that raises never does."""
        visit.done = True
