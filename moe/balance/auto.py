"""The step of a layer whose training loop does not drive one: the only code that infers where a step ends."""

from __future__ import annotations

import atexit
import gc
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..collectives import Axis, held_by_all, private_axis
from .hooks import register_while_alive
from .step import LayerStep, Step, random_state_kept
from .sums import LayerNumber, Sums
from .visit import Visit, accumulates

if TYPE_CHECKING:
    from .balancer import Balancer

#: number of training forwards without an update after which a step of unknown length raises
MAX_VISITS = 1024
_REMEDY = (
    "set balance.micro_batches to the layer's number of training forwards per optimizer step, or drive the step "
    "yourself: step = Step.of(model), step.micro_batch() around each forward, step.end(applied) after each update"
)

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

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.layers = [LayerStep(balancer, balancer.number)]
        self._number = itertools.count()
        self._axis: Axis | None = None

    @property
    def counting(self) -> bool:
        return _counting.get() is not None

    def visit(self, layer: LayerStep, module: nn.Module) -> Visit:
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


class AutoStep(OwnStep):
    """The step of one layer whose training loop does not drive it.

    It watches the router's weight, or if that is frozen, another weight of the layer. A step ends

    - when an optimizer that holds the watched weight has stepped (any optimizer if the whole layer is frozen), or
      with a number announced, one that holds copies;
    - after the backward of ``balance.micro_batches`` training forwards, or as many as were counted ahead;
    - if neither number is known, when a backward has left a gradient on the watched weight that is gone before the next
      forward. Then the update was skipped, or was made by hand if the weight has changed in place.

    A micro-batch counts if its backward has run or can still run; forwards without a backward do not count. Other loops
    raise before their update, and the error names the remedy: optimizers of copies of the weights, gradients that are
    removed and restored, and training forwards without a backward.

    Every rank must run some layer in every forward pass, unlike with a step that the training loop drives.
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__(balancer)
        #: weak references to the watched weight and the gradient that the last backward left on it, and its version
        self._left: tuple[Any, Any, int] | None = None
        #: a weak reference to the watched weight, and its version, when the step began
        self._at_start: tuple[Any, int] = (lambda: None, 0)
        #: whether an optimizer that holds the watched weight has ever stepped, and whether the previous step ended
        #: without an update
        self._optimized = self._skipped = False
        #: what ``_left`` was at the end of the previous step, if that had no update; and whether a backward of this
        #: step has added to that gradient
        self._kept: tuple[Any, Any, int] | None = None
        self._added = False
        register_while_alive(register_optimizer_step_pre_hook, self.before_optimizer_step)
        register_while_alive(register_optimizer_step_post_hook, self.after_optimizer_step)

    # ---- where the step ends

    def _begins(self) -> None:
        weight = self._watched()
        self._at_start = (lambda: None, 0) if weight is None else (weakref.ref(weight), weight._version)

    def _end_if_over(self, layer: LayerStep) -> None:
        visits, announced = layer.visits.values(), self.announced(layer)
        gone, changed = self._gradient_is_gone(), self._changed()
        done = sum(v.done for v in visits)
        if announced:
            interrupted = gone and not all(v.lives for v in visits)
            full = done >= announced and not any(v.ahead for v in visits)
            if done and (interrupted or full):
                self.end(applied=changed)
        elif done and (gone or (changed and self._left is None)):
            self.end(applied=changed)
        elif done >= MAX_VISITS:
            raise ValueError(
                f"balance.micro_batches=None: no update of the router after {done} training forwards of the layer; "
                f"{_REMEDY}"
            )

    def _more_to_come(self, layer: LayerStep) -> bool:
        return len(layer.known) < self.announced(layer)

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        if self.layers[0].known:
            self._skipped = not applied
        # the next step's first backward may leave no gradient (a split backward computes those of activations first)
        self._kept, self._left, self._added = None if applied else self._left, None, False
        super().end(applied, overflow)

    def _watched(self) -> nn.Parameter | None:
        return next((p for p in self.layers[0].weights() if p.requires_grad), None)

    def _changed(self) -> bool:
        (at_start, version), weight = self._at_start, self._watched()
        return weight is not None and weight is at_start() and weight._version != version

    def read(self, layer: LayerStep, visit: Visit, trains: bool = True) -> None:
        trains_watched = accumulates(self._watched())
        if trains_watched is None and not self.announced(layer):
            raise ValueError(
                "balance.micro_batches=None: torch.autograd.grad leaves no gradient on the weights, which would show "
                f"where the step ends; {_REMEDY}"
            )
        if trains_watched:
            self._added = self._added or self._adds_to_kept()
        super().read(layer, visit, trains_watched is not False)

    def _finished(self, visit: Visit) -> None:
        super()._finished(visit)
        weight = self._watched()
        grad = None if weight is None else weight.grad
        self._left = None if grad is None else (weakref.ref(weight), weakref.ref(grad), grad._version)

    def _gradient_is_gone(self) -> bool:
        """Return whether the gradient that the last backward left was removed or set to zero."""
        weight = None if self._left is None else self._left[0]()
        if self._left is None or weight is None:
            return False
        grad = weight.grad
        touched = type(grad) is Tensor and grad is self._left[1]() and grad._version != self._left[2]
        return grad is None or (touched and not bool(grad.any()))  # waits for the device, but only when touched

    def _adds_to_kept(self) -> bool:
        """Return whether the gradient of a step without an update is still there, as it was when that step ended."""
        kept, self._kept, weight = self._kept, None, self._watched()
        if kept is None or weight is None or weight.grad is None or weight is not kept[0]():
            return False
        return weight.grad is kept[1]() and weight.grad._version == kept[2]

    # ---- what optimizers do

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step in the process. Raises if the balance gradients are wrong."""
        layer, weight = self.layers[0], self._watched()
        visits, announced = layer.visits.values(), self.announced(layer)
        done = sum(v.done for v in visits)
        if not done:
            return
        if not announced and weight is not None and not _is_leaf(weight):
            raise ValueError(
                "MoE: its weights are views of a flat parameter, so the end of a step is unknown; use "
                f"FullyShardedDataParallel(..., use_orig_params=True), or fully_shard, or {_REMEDY}"
            )
        if not self._trained_by(optimizer):
            if not (announced or self._optimized) and may_hold_copies(layer, optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__}: it holds no weight of this MoE layer, but perhaps copies of them, so "
                    f"the end of a step is unknown; {_REMEDY}"
                )
            return
        restored = self._left is not None and weight is self._left[0]() and weight.grad is not self._left[1]()
        if self._skipped and not announced and restored:
            raise ValueError(
                "balance.micro_batches=None: the gradient of a backward pass was removed before the next one, and is "
                "back in another tensor for the update; if the step has several backward passes, each was balanced "
                f"separately; {_REMEDY}"
            )
        more = done - announced if done > announced else done
        if announced and (done > announced or self._added or (self._skipped and done < announced)):
            raise ValueError(
                f"balance.micro_batches={announced}: no update came after that many training forwards of the layer, "
                f"but one after {more} more; if a step was broken off, drive the steps: {_REMEDY}"
            )
        if any(v.counted and v.lives and not v.done for v in visits):
            raise ValueError(
                "MoE: the backward of a training forward has not run; run forwards that are not trained on under "
                "torch.no_grad() or in model.eval(), or delete their output before the update"
            )
        previous = layer.previous_step
        if done < announced:
            warnings.warn(
                f"MoE: {announced} micro-batches were announced, but this step has {done}, so that its balance loss is "
                f"{done}/{announced} of what it should be; give all steps as many, or {_REMEDY}",
                stacklevel=2,
            )
        if not announced and previous is not None and done != previous.micro_batches:
            warnings.warn(
                "MoE: steps have different numbers of micro-batches, but losses are weighted by the number in the "
                f"previous step; {_REMEDY}",
                stacklevel=2,
            )

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimizer step in the process."""
        if not self.layers[0].visits:
            return
        if self._trained_by(optimizer):
            self._optimized = True
        elif self._optimized or not self._updates_copies(optimizer):
            return
        self.end(applied=True, overflow=getattr(optimizer, "found_inf", None))

    def _updates_copies(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer has updated copies of this layer's weights at the end of an announced step.

        Such a step may be shorter than announced, as the last one of an epoch, if the optimizer holds tensors that are
        no parameters, as ZeRO's does: the optimizer of another model holds that model's parameters.
        """
        layer = self.layers[0]
        done, announced = sum(v.done for v in layer.visits.values()), self.announced(layer)
        if not (done and announced and may_hold_copies(layer, optimizer)):
            return False
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return done >= announced or any(not isinstance(p, nn.Parameter) for p in held)

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer holds the watched weight, or the flat parameter that it is a view of.

        If the whole layer is frozen, any optimizer may train what precedes it.
        """
        weight = self._watched()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return weight is None or any(p is weight or p is weight._base for p in held)


def _is_leaf(weight: Tensor) -> bool:
    try:
        return weight.is_leaf
    except RuntimeError:  # a view whose flat parameter has changed in place
        return False


def may_hold_copies(layer: LayerStep, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer may hold copies of a layer's weights, one by one, in flat buffers, or in parts.

    Tensors that are no module's parameters are suspect at any size: with ZeRO, each rank's optimizer holds only a part
    of a flat buffer, and experts may have an optimizer of their own.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    of_layers = {id(p) for b in list(registry.layers.values()) for p in b.layer.weights()}
    if any(id(p) in of_layers for p in held):  # it trains another model
        return False
    trained = [p for p in layer.weights() if p.requires_grad]
    shapes = {p.shape for p in trained}
    if any(p.dim() == 1 or p.shape in shapes for p in held if not isinstance(p, nn.Parameter)):
        return True
    largest_flat = max((p.numel() for p in held if p.dim() == 1), default=0)
    return largest_flat >= sum(p.numel() for p in trained) or shapes <= {p.shape for p in held}
