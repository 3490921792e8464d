"""The step of one layer that numbers its own forwards, and the sums that such layers of a process share."""

from __future__ import annotations

import atexit
import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..collectives import Axis, held_by_all, private_axis
from .step import LayerStep, Step, random_state_kept
from .sums import LayerNumber, Sums
from .visit import Visit

if TYPE_CHECKING:
    from .balancer import Balancer

#: the steps that take part in the current counting pass; None outside of one
_counting: ContextVar[weakref.WeakSet[OwnStep] | None] = ContextVar("equimoe_counting_pass", default=None)


class Registry:
    """Numbers all layers of the process. Layers that no training loop drives find each other on all ranks by number."""

    def __init__(self) -> None:
        self._new = itertools.count()
        self._copies: Counter[int] = Counter()
        self.layers: weakref.WeakValueDictionary[LayerNumber, Balancer] = weakref.WeakValueDictionary()
        atexit.register(self.forget_sums)

    def forget_sums(self) -> None:
        """Let go of process groups. Gloo's threads abort the process if they outlive the interpreter."""
        for balancer in list(self.layers.values()):
            for sums in balancer.shared.values():
                sums.close()
            balancer.shared.clear()
            if isinstance(balancer.step, OwnStep):
                balancer.step.forget_axis()
        gc.collect()

    def add(self, balancer: Balancer, copy_of: LayerNumber | None) -> LayerNumber:
        """Return the number of a new layer, or of a copy of another one."""
        if copy_of is None:
            number = next(self._new), 0
        else:
            self._copies[copy_of[0]] += 1
            number = copy_of[0], self._copies[copy_of[0]]
        self.layers[number] = balancer
        return number

    def create_sums(self, axis: Axis) -> None:
        """Create one :class:`Sums` over an axis for all layers that no training loop drives. Every rank must call this.

        Copies are left out if ranks have made different numbers of copies of a layer, because it is unknown which of
        them belong together.
        """
        gc.collect()  # deleted layers that wait for garbage collection would be in every sum
        rows = []
        for number, balancer in sorted(self.layers.items()):
            widths = balancer.widths(axis) if isinstance(balancer.step, OwnStep) else {}
            if widths and axis not in balancer.shared:
                rows.append((number, self._copies[number[0]] if number[1] else 0, widths))
        own = private_axis(axis)  # collectives of other libraries cannot come between ours
        agreed = held_by_all(rows, own)
        row_widths = {(number, kind): width for number, _, widths in agreed for kind, width in widths.items()}
        sums = Sums(own, row_widths, start_when_full=True)
        for number, *_ in agreed:
            self.layers[number].shared[axis] = sums


registry = Registry()


@contextmanager
def counting_pass() -> Iterator[None]:
    """Context in which forwards run without gradient and only count their micro-batch.

    For ``estimator="exact"``: run all micro-batches of a step in it, and then train on them in the same order. It
    restores the random state at its end, so that dropout is repeated in training. Counts are discarded if the block
    raises, or if a new counting pass starts before every counted micro-batch has been trained.
    """
    steps: weakref.WeakSet[OwnStep] = weakref.WeakSet()
    token = _counting.set(steps)
    try:
        with random_state_kept(), torch.no_grad():
            yield
    except BaseException:
        for step in steps:
            step.discard_counted_ahead()
        raise
    finally:
        _counting.reset(token)


class OwnStep(Step):
    """The step of one layer, which numbers the layer's training forwards itself. Subclasses know where it ends."""

    traceable = False

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.layers = [LayerStep(balancer, balancer.number)]
        self._number = itertools.count()
        self._axis: Axis | None = None

    @property
    def counting(self) -> bool:
        return _counting.get() is not None

    def visit(self, layer: LayerStep, module: nn.Module, x: Tensor) -> Visit:
        layer.module = weakref.ref(module)
        axis, counting = layer.balancer.counting_axis, _counting.get()
        if axis != self._axis:  # the process group was created again
            self.discard()
            self._axis = axis
        if counting is not None and self not in counting:  # a counting pass begins a step
            counting.add(self)
            self.discard_counted_ahead()
            self.end(applied=self._changed())
        else:
            self._end_if_over(layer)
        layer.visits = {key: v for key, v in layer.visits.items() if v.lives}
        if not layer.visits:
            self._begins()
        waiting = [v for v in layer.visits.values() if v.ahead]
        if waiting and not self.counting:
            return waiting[0]
        number = next(self._number)
        found = layer.visits[number, 0] = Visit(number, self.counting)
        return found

    def sums(self, layer: LayerStep, axis: Axis) -> Sums:
        balancer = layer.balancer
        if axis not in balancer.shared:
            balancer.warn_of_assumed_ranks()
            registry.create_sums(axis)
        if axis not in balancer.shared:
            position, copy = layer.number
            raise ValueError(
                f"MoE layer {position} of this process{f', copy {copy}' if copy else ''}: other ranks have not built "
                "it, or have made another number of copies; build the same layers in the same order on all ranks, pass "
                "the ranks that have it, MoE(config, group=...), or drive the step: Step.of(model)"
            )
        return balancer.shared[axis]

    def forget_axis(self) -> None:
        """Forget the ranks that counted together."""
        self._axis = None

    def discard_counted_ahead(self) -> None:
        """Discard visits that were counted ahead and have not been trained."""
        layer = self.layers[0]
        layer.visits = {key: v for key, v in layer.visits.items() if not v.ahead}

    def _begins(self) -> None:
        """Called before the first visit of a step."""

    def _end_if_over(self, layer: LayerStep) -> None:
        """End the current step if the forward that now starts does not belong to it."""

    def _changed(self) -> bool:
        """Return whether the layer's weights have been updated since the step began."""
        return False
