"""The step of a layer whose training loop says nothing of steps: the only place that detects anything."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..collectives import Axis, held_by_all, private_axis
from .step import Layer, Step, random_state_kept
from .sums import Number, Sums
from .visit import Visit, reaches

if TYPE_CHECKING:
    from .balancer import Balancer

#: micro-batches without an optimizer step after which an automatic step gives up
MOST = 1024
_REMEDY = (
    "set balance.micro_batches to the number of backward passes per optimizer step, or drive the step yourself: "
    "step = Step.of(model), step.micro_batch() around each forward, step.end(applied) after each update"
)


#: the steps that the counting pass under way counts for; None where there is none
_counting: ContextVar[weakref.WeakSet[AutoStep] | None] = ContextVar("equimoe_counting_pass", default=None)


class Registry:
    """All layers of the process, so that those that nobody drives find each other on all ranks."""

    def __init__(self) -> None:
        self._new = itertools.count()
        self._copies: Counter[int] = Counter()
        self.layers: weakref.WeakValueDictionary[Number, Balancer] = weakref.WeakValueDictionary()

    def add(self, balancer: Balancer, copy_of: Number | None) -> Number:
        """Number a new layer, or a copy of another one."""
        if copy_of is None:
            number = next(self._new), 0
        else:
            self._copies[copy_of[0]] += 1
            number = copy_of[0], self._copies[copy_of[0]]
        self.layers[number] = balancer
        return number

    def steps(self) -> list[AutoStep]:
        """Those of the layers that nobody drives, by number."""
        return [b.step for _, b in sorted(self.layers.items()) if isinstance(b.step, AutoStep)]

    def share_sums(self, axis: Axis) -> None:
        """Let the layers that nobody drives share their sums over an axis, matched by number. All its ranks call this.

        Where ranks have made different numbers of copies of a layer, nobody knows which of these belong together.
        """
        gc.collect()  # layers that are no more, but in a cycle of references, would have a place in every sum
        rows = []
        for balancer in (step.layers[0].balancer for step in self.steps()):
            (place, copy), widths = balancer.number, balancer.widths(axis)
            if widths and axis not in balancer.shared:
                rows.append(((place, copy), self._copies[place] if copy else 0, widths))
        # in a group of their own, where no other library's collective can come between
        own = private_axis(axis)
        agreed = held_by_all(rows, own)
        places = {(number, kind): width for number, _, widths in agreed for kind, width in widths.items()}
        sums = Sums(own, places, early=True)
        for number, *_ in agreed:
            self.layers[number].shared[axis] = sums


registry = Registry()


@contextmanager
def counting_pass() -> Iterator[None]:
    """Within it, forwards without gradient count their micro-batch ahead of its training forward.

    Run it over all micro-batches of a step, then train on them in the same order: the estimator is then exact. It puts
    the random state back at its end, so that dropout repeats itself in training. Counts are discarded if the block
    raises, or if a new counting pass starts before every counted micro-batch has been trained.
    """
    steps: weakref.WeakSet[AutoStep] = weakref.WeakSet()
    token = _counting.set(steps)
    try:
        with random_state_kept(), torch.no_grad():
            yield
    except BaseException:
        for step in steps:
            step.forget_ahead()
        raise
    finally:
        _counting.reset(token)


class AutoStep(Step):
    """The step of one layer in somebody's training loop.

    Its witness is the router's weight, or another weight of the layer where that is frozen. A step ends

    - when an optimizer that holds the witness has stepped, or any where the whole layer is frozen;
    - after ``balance.micro_batches`` backward passes, or as many as were counted ahead;
    - where neither number is known, when a backward has left a gradient on the witness that is gone before the next
      forward: the update was skipped, or made by hand, which shows where it has changed the witness in place.

    A micro-batch counts while its graph lives and once its backward has run, so a forward that is not trained on does
    not count. Loops that do not fit are refused before their update, naming the call that tells what is missing: an
    optimizer of copies of the weights, gradients that are taken away and put back, forwards that nobody trains on.

    Every rank must run some layer in every forward pass; a step that the training loop drives does not need that.
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.layers = [Layer(balancer, balancer.number)]
        self._number = itertools.count()
        self._axis: Axis | None = None
        #: the gradient that a backward has left on the witness, and the witness with its version when the step began
        self._left: tuple[Any, Any, int] | None = None
        self._seen: tuple[Any, int] = (lambda: None, 0)
        #: an optimizer that holds the witness has stepped, and the last step ended without an update
        self._optimized = self._skipped = False
        for register, method in (
            (register_optimizer_step_pre_hook, self.optimizer_steps),
            (register_optimizer_step_post_hook, self.optimizer_stepped),
        ):
            weakref.finalize(self, register(_weak(method)).remove)

    # ---- the forward

    @property
    def counting(self) -> bool:
        return _counting.get() is not None

    def visit(self, layer: Layer, module: nn.Module) -> Visit:
        layer.module = weakref.ref(module)
        self._find_boundary(layer)
        layer.visits = {key: v for key, v in layer.visits.items() if v.lives}
        if not layer.visits:
            weight = self._witness()
            self._seen = (lambda: None, 0) if weight is None else (weakref.ref(weight), weight._version)
        waiting = [v for v in layer.visits.values() if v.ahead]
        if waiting and not self.counting:
            return waiting[0]
        number = next(self._number)
        found = layer.visits[number, 0] = Visit(number, self.counting)
        return found

    def sums(self, layer: Layer, axis: Axis) -> Sums:
        balancer = layer.balancer
        if axis not in balancer.shared:
            balancer.say_what_is_assumed()
            registry.share_sums(axis)
        if axis not in balancer.shared:
            place, copy = layer.number
            raise ValueError(
                f"MoE layer {place} of this process{f', copy {copy}' if copy else ''}: other ranks have not built it, "
                "or have made another number of copies; build the same layers in the same order on all ranks, give the "
                "ranks that hold it, MoE(config, group=...), or drive the step: Step.of(model)"
            )
        return balancer.shared[axis]

    # ---- where the step ends

    def _find_boundary(self, layer: Layer) -> None:
        """End the step that was under way if this forward does not belong to it."""
        axis, counting = layer.balancer.counting_axis, _counting.get()
        if axis != self._axis:  # the process group was made again
            self.discard()
            self._axis = axis
        if counting is not None and self not in counting:  # counting ahead begins a step
            counting.add(self)
            self.forget_ahead()
            self.end(applied=self._changed())
            return
        visits, told, gone, changed = layer.visits.values(), self.told(layer), self._gradient_is_gone(), self._changed()
        done = sum(v.done for v in visits)
        if told:
            broken_off = gone and not all(v.lives for v in visits)
            full = done >= told and not any(v.ahead for v in visits)
            if done and (broken_off or full):
                self.end(applied=changed)
        elif done and (gone or (changed and self._left is None)):
            self.end(applied=changed)
        elif done >= MOST:
            raise ValueError(f"balance.micro_batches=None: no update of the router after {done} backwards; {_REMEDY}")

    def _incomplete(self, layer: Layer) -> bool:
        return len(layer.known) < self.told(layer)

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        if self.layers[0].known:
            self._skipped = not applied
        # the next step's first gradient may come after its first backward (of activations alone, in a split backward)
        self._left = None
        super().end(applied, overflow)

    def forget_ahead(self) -> None:
        """Drop what was counted ahead and not trained on."""
        layer = self.layers[0]
        layer.visits = {key: v for key, v in layer.visits.items() if not v.ahead}

    def _witness(self) -> nn.Parameter | None:
        return next((p for p in self.layers[0].weights() if p.requires_grad), None)

    def _changed(self) -> bool:
        """The witness was changed in place since the step began."""
        (seen, version), weight = self._seen, self._witness()
        return weight is not None and weight is seen() and weight._version != version

    def read(self, layer: Layer, visit: Visit, trains: bool = True) -> None:
        reached = reaches(self._witness())
        if reached is None and not self.told(layer):
            raise ValueError(
                "balance.micro_batches=None: torch.autograd.grad leaves no trace from which the end of a step could be "
                f"seen; {_REMEDY}"
            )
        super().read(layer, visit, reached is not False)

    def _read(self, visit: Visit) -> None:
        super()._read(visit)
        weight = self._witness()
        grad = None if weight is None else weight.grad
        self._left = None if grad is None else (weakref.ref(weight), weakref.ref(grad), grad._version)

    def _gradient_is_gone(self) -> bool:
        """What the last backward left was taken away, or set to zero."""
        weight = None if self._left is None else self._left[0]()
        if self._left is None or weight is None:
            return False
        grad = weight.grad
        touched = type(grad) is Tensor and grad is self._left[1]() and grad._version != self._left[2]
        return grad is None or (touched and not bool(grad.any()))  # waits for the device, but only when touched

    # ---- what optimizers do

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step in the process: refuse one whose balance gradients are wrong."""
        layer, weight = self.layers[0], self._witness()
        visits, told = layer.visits.values(), self.told(layer)
        done = sum(v.done for v in visits)
        if not done:
            return
        if not self._trained_by(optimizer):
            if not (told or self._optimized) and self._may_hold_copies(optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__}: it holds no weight of this MoE layer, but perhaps copies of them, so "
                    f"the end of a step is unknown; {_REMEDY}"
                )
            return
        put_back = self._left is not None and weight is self._left[0]() and weight.grad is not self._left[1]()
        if self._skipped and not told and put_back:
            raise ValueError(
                "balance.micro_batches=None: the gradient that a backward pass had left was gone before the next one, "
                "and comes back in another tensor for the update; if the step has several backward passes, each was "
                f"balanced by itself; {_REMEDY}"
            )
        if self._skipped and told not in (0, done):
            raise ValueError(
                f"balance.micro_batches={told}: an update after {done} backward passes, and {told} before it without "
                f"an update; if a step was broken off, drive the steps: {_REMEDY}"
            )
        if any(v.counted and v.lives and not v.done for v in visits):
            raise ValueError(
                "MoE: a training forward has been counted whose backward has not run; run what is not trained on under "
                "torch.no_grad() or in model.eval(), or delete its output before the update"
            )
        before = layer.previous_step
        if not told and before is not None and done != before.micro_batches:
            warnings.warn(
                "MoE: steps have different numbers of micro-batches, and each weighs its losses by the number of the "
                f"step before; {_REMEDY}",
                stacklevel=2,
            )

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimizer step in the process."""
        if self.layers[0].visits and self._trained_by(optimizer):
            self._optimized = True
            self.end(applied=True, overflow=getattr(optimizer, "found_inf", None))

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """It holds the witness. Where the whole layer is frozen, any optimizer may train what comes before it."""
        weight = self._witness()
        return weight is None or _holds(optimizer, weight)

    def _may_hold_copies(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer may train copies of all of this layer's weights, each by itself or in flat buffers."""
        theirs = [p for group in optimizer.param_groups for p in group["params"]]
        of_layers = {id(p) for b in list(registry.layers.values()) for p in b.layer.weights()}
        if any(id(p) in of_layers for p in theirs):  # it trains another model
            return False
        trained = [p for p in self.layers[0].weights() if p.requires_grad]
        flat = max((p.numel() for p in theirs if p.dim() == 1), default=0)
        return flat >= sum(p.numel() for p in trained) or {p.shape for p in trained} <= {p.shape for p in theirs}


def _holds(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    return any(p is weight for group in optimizer.param_groups for p in group["params"])


def _weak(method: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
    """An optimizer hook that calls a method while its object is alive."""
    method_of_the_living = weakref.WeakMethod(method)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = method_of_the_living()
        if alive is not None:
            alive(optimizer)

    return hook
