"""The optimizer step as an object: what every MoE layer counted in each of its micro-batches.

B sequences, E experts, M micro-batches, X values of a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..collectives import Axis, private_axis
from .losses import Loss, Term
from .sums import LayerNumber, SummedRow, Sums
from .visit import Visit

if TYPE_CHECKING:
    from .balancer import Balancer


class StepTotals:
    """What one layer counted in a step that has ended. Sums over its micro-batches are computed when they are read.

    ``sequence_ranks`` is the number of ranks that hold parts of the same sequences.
    """

    def __init__(self, visits: list[Visit], sequence_ranks: int) -> None:
        self.sequence_ranks, self.micro_batches = sequence_ranks, len(visits)
        self._totals = [v.total for v in visits]  # all ranks must wait for these sums at the same point
        self._local = [(v.counts_BE, v.tokens_B, v.prob_sums_BE) for v in visits]
        #: the main loss of each micro-batch, and all losses, as the backwards read them
        self.losses: list[Loss] = [v.loss for v in visits if v.loss is not None]
        self.terms: list[Term] = [term for v in visits for term in v.terms]

    @cached_property
    def totals_MX(self) -> Tensor:
        """int64 [M, E + 1]: counts and tokens of each micro-batch, over all ranks that count together."""
        return torch.stack(self._totals)

    @cached_property
    def total_X(self) -> Tensor:
        """int64 [E + 1]: their sum."""
        return self.totals_MX.sum(0)

    @property
    def counts_E(self) -> Tensor:
        """int64 [E], over all ranks that count together."""
        return self.total_X[:-1]

    @property
    def tokens(self) -> Tensor:
        """int64 scalar, over all ranks that count together."""
        return self.total_X[-1]

    @cached_property
    def local_counts_ME(self) -> Tensor:
        """int64 [M, E], of this rank's micro-batches."""
        return torch.stack([counts_BE.sum(0) for counts_BE, _, _ in self._local])

    @cached_property
    def local_tokens_M(self) -> Tensor:
        """int64 [M], of this rank's micro-batches."""
        return torch.stack([tokens_B.sum() for _, tokens_B, _ in self._local])

    @cached_property
    def local_prob_sums_ME(self) -> Tensor:
        """fp32 [M, E], of this rank's micro-batches."""
        return torch.stack([prob_sums_BE.sum(0) for _, _, prob_sums_BE in self._local])

    @property
    def local_sequences(self) -> Tensor:
        """int64 scalar, this rank's sequences with a valid token."""
        return torch.stack([(tokens_B > 0).sum() for _, tokens_B, _ in self._local]).sum()

    @property
    def local_tokens(self) -> Tensor:
        """int64 scalar, of this rank."""
        return self.local_tokens_M.sum()


class LayerStep:
    """One layer's part of a step: its visits, and the totals of the previous step."""

    def __init__(self, balancer: Balancer, number: LayerNumber) -> None:
        self._balancer = weakref.ref(balancer)
        self.number = number
        #: by micro-batch, and by how often the layer has run in it before
        self.visits: dict[tuple[int, int], Visit] = {}
        self.previous_step: StepTotals | None = None
        #: the last visit whose losses a backward read, and the number of visits known at the step's first backward
        self.last_read: Visit | None = None
        self.first_known: int | None = None
        #: a weak reference to the MoE layer
        self.module: Any = lambda: None
        #: a weak reference to a trained parameter that precedes the layer, if that is frozen and nobody drives the step
        self.before: Any = lambda: None

    @property
    def balancer(self) -> Balancer:
        balancer = self._balancer()
        assert balancer is not None
        return balancer

    def forget_module(self) -> None:
        """Forget the layer and its visits, because its module is no MoE layer any more."""
        self.visits, self.module = {}, lambda: None

    def weights(self) -> list[nn.Parameter]:
        """Return the layer's weights, the router's first."""
        module = self.module()
        return [] if module is None else list(dict.fromkeys((module.router.weight, *module.parameters())))

    def trained(self) -> list[nn.Parameter]:
        """Return the weights that are trained, the router's first; if there is none, the one before the layer."""
        before = self.before()
        return [p for p in self.weights() if p.requires_grad] or (
            [before] if before is not None and before.requires_grad else []
        )

    def first_trained(self) -> nn.Parameter | None:
        """Return the first of :meth:`trained`, or None."""
        module = self.module()
        weight = None if module is None else module.router.weight
        if weight is not None and weight.requires_grad:  # nearly always
            return weight
        return next(iter(self.trained()), None)

    @property
    def known(self) -> list[Visit]:
        """The visits that count: their backward has run or can still run."""
        return [v for v in self.visits.values() if v.counted and v.lives]

    @property
    def runs(self) -> int:
        """How often the layer runs in a forward pass."""
        return 1 + max((occurrence for _, occurrence in self.visits), default=0)

    def totals(self, of: Visit) -> Tensor:
        """Return int64 [E + 1]: counts and tokens of all known visits, including ``of``.

        If the step of ``of`` has ended, they are those of that step.
        """
        if of.ended is not None:
            return of.ended.total_X
        first, *others = [v.total for v in dict.fromkeys((*self.known, of))]
        return torch.stack((first, *others)).sum(0) if others else first

    def close(self, applied: bool, overflow: Tensor | None) -> None:
        """End the step: keep its totals, and move the expert bias if the update was ``applied``."""
        ended, balancer = self.known, self._balancer()
        self.visits, self.first_known = {}, None
        if not ended or balancer is None:
            return
        totals = self.previous_step = StepTotals(ended, balancer.placement.sequence.size)
        for v in ended:
            v.ended = totals
        if balancer.remembers:
            balancer.observe(totals.totals_MX)
        module, bias = self.module(), balancer.bias
        if not applied or bias is None or module is None or module.router.bias_E is None:
            return
        if any(p.requires_grad for p in module.parameters()):
            bias.move(module.router.bias_E, totals, overflow)


def random_state_kept() -> AbstractContextManager[None]:
    """Return a context that restores the random state at its end, so that the next code draws the same numbers."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng([torch.cuda.current_device()] if cuda else [])


class Step:
    """The optimizer step of all MoE layers of a model part. The training loop drives it:

    >>> step = Step.of(model)
    >>> for batch in micro_batches:
    ...     with step.micro_batch():
    ...         loss(model(batch)).backward()
    >>> optimizer.step()
    >>> step.end()

    Counts are assigned by micro-batch and layer, never incremented, so running a forward again replaces its counts. At
    the end of each forward pass, one asynchronous all-reduce sums the counts of all layers. Ranks may run different
    layers.
    """

    #: whether torch.compile can trace forwards, because the step itself says where it begins and ends
    traceable = True

    def __init__(self) -> None:
        self.layers: list[LayerStep] = []
        #: number of micro-batches of the step, and their valid tokens on all ranks (int64 scalar); None if unknown
        self.length: int | None = None
        self.tokens: Tensor | None = None
        #: number of steps that have ended
        self.ended = 0
        self._sums: dict[Axis, Sums] = {}
        #: the micro-batches of this step whose forward pass has been summed
        self._summed: set[int] = set()
        #: the current micro-batch, and whether a counting pass runs it
        self._current: int | None = None
        self._ahead = False
        #: how often each layer has run in the current micro-batch
        self._occurrence: dict[LayerStep, int] = {}

    @classmethod
    def of(cls, *parts: nn.Module) -> Step:
        """Create a step for all MoE layers of these modules."""
        step = cls()
        for module in (module for part in parts for module in part.modules()):
            balancer = getattr(module, "balancer", None)
            if balancer is not None:
                balancer.join(step)
                balancer.layer.module = weakref.ref(module)
        return step

    def join(self, balancer: Balancer) -> LayerStep:
        """Add a layer, and return its part of the step."""
        self.layers.append(LayerStep(balancer, (len(self.layers), 0)))
        return self.layers[-1]

    # ---- for the training loop

    def begin(self, micro_batches: int | None = None, tokens: int | Tensor | None = None) -> None:
        """Start a step, and discard forwards that were not followed by a backward.

        If you know them, give the number of ``micro_batches`` and the ``tokens`` (integer scalar) that all ranks will
        route in the step: they improve the estimate of the load and the weights of the losses. Raises ValueError if the
        previous step was trained but neither ended nor discarded.
        """
        if any(v.done for layer in self.layers for v in layer.visits.values()):
            raise ValueError(
                "Step.begin: the previous step was trained but has not ended; call Step.end() after the update, "
                "Step.end(applied=False) after a skipped one, or Step.discard() to forget it"
            )
        self.discard()
        self.length = micro_batches
        self.tokens = None if tokens is None else torch.as_tensor(tokens)

    @contextmanager
    def micro_batch(self, number: int | None = None, ahead: bool = False) -> Iterator[None]:
        """Context for the forward of a micro-batch, its backward, or both. ``number=None`` is the next number.

        ``ahead`` counts a forward without gradient before the training forward of the same number. If the block raises,
        its counts are discarded.
        """
        before = self._current, self._ahead, self._occurrence
        if number is None:
            taken = (key[0] for layer in self.layers for key, v in layer.visits.items() if ahead or not v.ahead)
            number = max(taken, default=-1) + 1
        self._current, self._ahead, self._occurrence = number, ahead, {}
        try:
            self._create_sums()
            started = {sums: sums.started for sums in self._sums.values()}
            yield
            if ahead or torch.is_grad_enabled():
                for sums, before_this in started.items():  # once per forward pass, even if no layer ran on this rank
                    sums.start(always=number not in self._summed and sums.started == before_this)
                self._summed.add(number)
        except BaseException:
            for sums in self._sums.values():
                sums.discard()
            for layer in self._occurrence:
                layer.visits = {key: v for key, v in layer.visits.items() if key[0] != number}
            raise
        finally:
            self._current, self._ahead, self._occurrence = before

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        """End the step, and move the expert biases if its update was ``applied``.

        ``overflow`` is a scalar, nonzero if a fused optimizer skipped the update on the device. Raises ValueError if an
        applied step did not have the number of micro-batches that :meth:`begin` was given.
        """
        if applied and self.length and self._summed and len(self._summed) != self.length:
            raise ValueError(
                f"Step.begin(micro_batches={self.length}): {len(self._summed)} have been trained, so their losses had "
                "wrong weights; give begin() the right number, or call Step.end(applied=False)"
            )
        for layer in self.layers:
            layer.close(applied, overflow)
        self.discard()
        self.ended += 1

    def discard(self) -> None:
        """Discard the current step."""
        for sums in self._sums.values():
            sums.discard()
        for layer in self.layers:
            layer.visits = {}
        self.length, self.tokens, self._summed = None, None, set()

    # ---- for the balancers of the layers

    def visit(self, layer: LayerStep, module: nn.Module, x: Tensor) -> Visit:
        """Return the visit for a training forward of ``module``, an MoE layer, with the input ``x``."""
        if self._current is None:
            raise ValueError(
                "step: a training forward outside of a micro-batch; enter step.micro_batch() around it, and around the "
                "backward if that recomputes; for a forward that is not trained on, use model.eval() or torch.no_grad()"
            )
        key = self._current, self._occurrence.get(layer, 0)
        layer.module, self._occurrence[layer] = weakref.ref(module), key[1] + 1
        found = layer.visits.get(key)
        if found is not None and found.done:
            raise ValueError(
                f"step.micro_batch({self._current}): this micro-batch has been trained; give the next number, or none, "
                "and call Step.end() after each update"
            )
        if found is None or not found.ahead or self.counting:
            found = layer.visits[key] = Visit(self._current, self.counting)
        return found

    def recomputed(self, layer: LayerStep) -> tuple[Visit | None, bool]:
        """Return the visit that a forward within a backward recomputes, and whether that is certain."""
        backward = torch._C._current_graph_task_id()
        # Within a backward, forwards run only in checkpointed regions. A reentrant region first ran without gradient
        # and was not counted, so this is its first counted forward. A non-reentrant region, which hooks saved tensors,
        # recomputes a visit whose backward has not run, or one that this backward has just read.
        if backward == -1 or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return None, False
        candidates = [v for v in layer.known if self._current in (None, v.number)]
        in_flight = [v for v in candidates if not (v.done or v.being_read or v.ahead or v.forward_in == backward)]
        if layer.last_read is not None and layer.last_read.read_in == backward:
            return layer.last_read, not in_flight
        return (in_flight[0], len(in_flight) == 1 and in_flight[0].forward_in == -1) if in_flight else (None, False)

    @property
    def counting(self) -> bool:
        """Whether forwards belong to a counting pass, which precedes the training forwards."""
        return self._ahead

    def sum_row(self, layer: LayerStep, kind: str, value_BX: Tensor, axis: Axis) -> SummedRow:
        """Sum a layer's row over an axis, together with the other layers of the forward pass."""
        return SummedRow(value_BX) if axis.size == 1 else self.sums(layer, axis).add((layer.number, kind), value_BX)

    def sums(self, layer: LayerStep, axis: Axis) -> Sums:
        """Return the sums over an axis that contain this layer."""
        return self._sums[axis]

    def _create_sums(self) -> None:
        """Create the sums that the layers need, unless they exist. All ranks do this at the same point."""
        balancers = [(layer.number, layer.balancer) for layer in self.layers]
        axes = {axis: b for _, b in balancers for axis in b.placement.axes if axis.size > 1 and b.widths(axis)}
        if axes.keys() == self._sums.keys():
            return
        self._sums = {}
        for axis, balancer in axes.items():
            balancer.warn_of_assumed_ranks()
            widths = {(n, kind): width for n, b in balancers for kind, width in b.widths(axis).items()}
            # layers that were not placed share the default group with other users, whose order of collectives differs
            own = private_axis(axis) if balancer.placed is None else axis
            self._sums[axis] = Sums(own, widths, start_when_full=False)

    def announced(self, layer: LayerStep) -> int:
        """Return how many visits a layer will have in the step, as configured, told or counted ahead; 0 if unknown."""
        if self.length:
            return self.length * layer.runs
        return layer.balancer.config.micro_batches or sum(v.was_ahead for v in layer.visits.values())

    def expected(self, layer: LayerStep) -> int:
        """Return how many visits a layer probably has: as announced, or as in the previous step; 1 if unknown."""
        return self.announced(layer) or (1 if layer.previous_step is None else layer.previous_step.micro_batches)

    def backward_came_early(self, layer: LayerStep) -> bool:
        """Return whether a backward runs before all forwards of the step have been counted."""
        known = len(layer.known)
        return self._more_to_come(layer) or known > (layer.first_known or known)

    def _more_to_come(self, layer: LayerStep) -> bool:
        # counts forward passes, not visits, because a layer need not run in each of them
        return self.length is not None and len(self._summed | ({self._current} - {None})) < self.length

    def read(self, layer: LayerStep, visit: Visit, trains: bool = True) -> None:
        """Record that the current backward reads a visit's losses; ``trains``: it adds to gradients of weights."""
        if trains and not visit.being_read:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._finished, visit))
        visit.read_in = torch._C._current_graph_task_id()
        layer.last_read = visit
        layer.first_known = layer.first_known or len(layer.known)

    def _finished(self, visit: Visit) -> None:
        """Called when a backward that read the visit's losses ends without an exception."""
        visit.done = True
