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


class CountingPass:
    """A pass over the micro-batches of a step that counts them ahead, and the steps it counts for."""

    def __init__(self) -> None:
        self.steps: weakref.WeakSet[AutoStep] = weakref.WeakSet()


_counting: ContextVar[CountingPass | None] = ContextVar("equimoe_counting_pass", default=None)


class _Registry:
    """All layers of the process, so that those that nobody drives find each other on all ranks."""

    def __init__(self) -> None:
        self._new = itertools.count()
        self._copies: Counter[int] = Counter()
        self.layers: weakref.WeakValueDictionary[Number, Balancer] = weakref.WeakValueDictionary()

    def add(self, balancer: Balancer, copy_of: Number | None) -> Number:
        """Number a new layer, or a copy of another one."""
        place = next(self._new) if copy_of is None else copy_of[0]
        self._copies[place] += copy_of is not None
        number = place, self._copies[place] if copy_of is not None else 0
        self.layers[number] = balancer
        return number

    def rows(self, axis: Axis) -> dict[Number, tuple[Any, ...]]:
        """What the free layers sum over an axis. Where ranks have made different numbers of copies of a layer, nobody
        knows which of these belong together, so their rows differ."""
        free = {number: b.widths(axis) for number, b in sorted(self.layers.items()) if b.free(axis)}
        return {n: (n, self._copies[n[0]] if n[1] else 0, *widths.items()) for n, widths in free.items()}


_registry = _Registry()


def number_of_layer(balancer: Balancer, copy_of: Number | None) -> Number:
    """The number of a layer of this process that is new, or a copy of the layer with another number."""
    return _registry.add(balancer, copy_of)


@contextmanager
def counting_pass() -> Iterator[None]:
    """Within it, forwards without gradient count their micro-batch ahead of its training forward.

    Run it over all micro-batches of a step, then train on them in the same order: the estimator is then exact. It puts
    the random state back at its end, so that dropout repeats itself in training. Counts are discarded if the block
    raises, or if a new counting pass starts before every counted micro-batch has been trained.
    """
    counting = CountingPass()
    token = _counting.set(counting)
    try:
        with random_state_kept(), torch.no_grad():
            yield
    except BaseException:
        for step in counting.steps:
            step.forget_ahead()
        raise
    finally:
        _counting.reset(token)


def share_sums(axis: Axis) -> None:
    """Let all layers that nobody drives share their sums over an axis, matched by number. All its ranks call this."""
    gc.collect()  # layers that are no more, but in a cycle of references, would have a place in every sum
    # in a group of their own, where no other library's collective can come between
    own, rows = private_axis(axis), _registry.rows(axis)
    agreed = held_by_all(list(rows.values()), own)
    sums = Sums(own, {(n, kind): width for n, _, *widths in agreed for kind, width in widths}, early=True)
    for number, *_ in agreed:
        _registry.layers[number].shared[axis] = sums


class AutoStep(Step):
    """The step of one layer in somebody's training loop.

    A step ends

    - when an optimizer that holds the router's weight has stepped. While no such optimizer was seen, one that holds
      another weight of the layer ends it, or the only optimizer there is, since wrappers with master weights hold
      copies;
    - after ``balance.micro_batches`` backward passes, or as many as were counted ahead;
    - where neither number is known, when a backward has left a gradient that is gone before the next forward: the
      update was skipped, or made by hand, which shows where it has changed the router's weight in place.

    A micro-batch counts while its graph lives and once its backward has run, so a forward that is not trained on does
    not count. What turns out to have been something else, such as gradients that were taken away after each micro-batch
    and are put back for the update, is refused before the update, naming the call that would have told it.

    Every rank must run some layer in every forward pass; a step that the training loop drives does not need that.
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.join(balancer)
        self._number = itertools.count()
        self._of: Any = lambda: None
        self._axis: Axis | None = None
        self._pass: CountingPass | None = None
        #: the gradient that a backward has left on the witness, and the witness with its version when the step began
        self._left: tuple[Any, Any, int] | None = None
        self._seen: tuple[Any, int] = (lambda: None, 0)
        #: since the last update, steps that ended because the gradient was gone, and because they were full
        self._gone = self._full = 0
        #: how much of the layer the best known optimizer holds, and one that may hold copies
        self._held = 0
        self._stranger: Any = lambda: None
        #: what was found out of an optimizer, while it has as many parameters
        self._known_optimizers: weakref.WeakKeyDictionary[Any, tuple[Any, int]] = weakref.WeakKeyDictionary()
        for register, call in (
            (register_optimizer_step_pre_hook, AutoStep.optimizer_steps),
            (register_optimizer_step_post_hook, AutoStep.optimizer_stepped),
        ):
            weakref.finalize(self, register(_for(weakref.ref(self), call)).remove)

    # ---- the forward

    @property
    def counting(self) -> bool:
        return _counting.get() is not None

    def visit(self, index: int, of: nn.Module) -> Visit:
        counting, layer = _counting.get(), self.layers[0]
        self._of, layer.router = weakref.ref(of), weakref.ref(of.router)
        self._find_boundary(layer, counting)
        layer.visits = {key: v for key, v in layer.visits.items() if v.lives}
        weight = self._witness()
        if weight is not None and not layer.visits:
            self._seen = weakref.ref(weight), weight._version
        waiting = [v for v in layer.visits.values() if v.ahead is not None]
        if waiting and counting is None:
            return waiting[0]
        number = next(self._number)
        found = layer.visits[number, 0] = Visit(number, counting)
        return found

    def sums(self, index: int, axis: Axis) -> tuple[Sums, Number]:
        balancer = self.layers[0].balancer
        if axis not in balancer.shared:
            balancer.say_what_is_assumed()
            share_sums(axis)
        if axis not in balancer.shared:
            place, copy = balancer.number
            raise ValueError(
                f"MoE layer {place} of this process{f', copy {copy}' if copy else ''}: other ranks have not built it, "
                "or have made another number of copies; build the same layers in the same order on all ranks, give the "
                "ranks that hold it, MoE(config, group=...), or drive the step: Step.of(model)"
            )
        return balancer.shared[axis], balancer.number

    # ---- where the step ends

    def _find_boundary(self, layer: Layer, counting: CountingPass | None) -> None:
        """End the step that was under way if this forward does not belong to it."""
        axis, before = layer.balancer.counting_axis, self._axis
        self._axis = axis
        if before is not None and before != axis:  # the process group was made again
            self.discard()
            layer.balancer.shared = {}
        if counting is not None and counting is not self._pass:  # counting ahead begins a step
            self._pass = counting
            counting.steps.add(self)
            self.forget_ahead()
            self.end(applied=self._changed())
            return
        visits, told = list(layer.visits.values()), self.told(0)
        done, waiting = sum(v.done for v in visits), any(v.ahead is not None for v in visits)
        if not done:
            return
        gone, changed = self._gradient_is_gone(), self._changed()
        if told:
            broken_off = gone and not all(v.lives for v in visits)
            if broken_off or (done >= told and not waiting):
                self._full += not changed
                self.end(applied=changed)
        elif any(v.reaches is None for v in visits):
            raise ValueError(
                "balance.micro_batches=None: torch.autograd.grad leaves no trace from which the end of a step could be "
                f"seen; {_REMEDY}"
            )
        elif gone or (changed and self._left is None):
            self._gone += not changed
            self.end(applied=changed)
        elif done >= MOST:
            raise ValueError(f"balance.micro_batches=None: no update of the router after {done} backwards; {_REMEDY}")

    def _incomplete(self, index: int, seen: int) -> bool:
        return seen < self.told(index)

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        if applied and self.layers[0].known:
            self._gone = self._full = 0
        # the next step's first gradient may come after its first backward (of activations alone, in a split backward)
        self._left = None
        super().end(applied, overflow)

    def forget_ahead(self) -> None:
        """Drop what was counted ahead and not trained on."""
        layer = self.layers[0]
        layer.visits = {key: v for key, v in layer.visits.items() if v.ahead is None}

    def _witness(self) -> nn.Parameter | None:
        """The weight that tells of gradients and updates: the router's, or another of the layer where it is frozen."""
        of = self._of()
        return None if of is None else next((p for p in (of.router.weight, *of.parameters()) if p.requires_grad), None)

    def _changed(self) -> bool:
        (weight_seen, version), weight = self._seen, self._witness()
        return weight is not None and weight is weight_seen() and weight._version != version

    def read(self, index: int, visit: Visit) -> None:
        visit.reaches = reaches(self._witness())
        super().read(index, visit)

    def _read(self, visit: Visit) -> None:
        visit.done |= visit.reaches is not False
        self._after_backward()

    def _after_backward(self) -> None:
        weight, stranger = self._witness(), self._stranger()
        if stranger is not None and not self._held:  # it may train copies
            copies = (p for group in stranger.param_groups for p in group["params"])
            weight = next((p for p in copies if p.grad is not None), None)
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

    def _holds(self, optimizer: torch.optim.Optimizer) -> int:
        """2: the witness; 1: another weight of the layer; 0: perhaps copies; -1: nothing, as far as is known."""
        of, weight, groups = self._of(), self._witness(), [group["params"] for group in optimizer.param_groups]
        key = id(weight), sum(map(len, groups))
        known, holds = self._known_optimizers.get(optimizer, (None, 0))
        if known != key:
            theirs = {id(p) for group in groups for p in group}
            own = of is not None and any(id(p) in theirs for p in of.parameters())
            holds = 2 if id(weight) in theirs else int(own)
            self._known_optimizers[optimizer] = key, holds
        if holds < self._held:
            return -1
        return holds if holds or self._may_be_copies([p for group in groups for p in group]) else -1

    def _may_be_copies(self, theirs: list[Tensor]) -> bool:
        """Whether an optimizer may train copies of all of this layer's weights, each by itself or in flat buffers."""
        visits, of = self.layers[0].visits.values(), self._of()
        trained = [] if of is None else [p for p in of.parameters() if p.requires_grad]
        if not any(v.done for v in visits) or sum(v.done for v in visits) < self.told(0):
            return False
        steps = (b.driven for b in list(_registry.layers.values()))
        of_layers = {id(step._witness()) for step in steps if isinstance(step, AutoStep)} - {id(None)}
        if any(id(p) in of_layers for p in theirs):  # it trains another model
            return False
        flat = max((p.numel() for p in theirs if p.dim() == 1), default=0)
        shapes = {p.shape for p in theirs}
        return flat >= sum(p.numel() for p in trained) or all(p.shape in shapes for p in trained)

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step in the process: refuse one whose balance gradients are wrong."""
        holds, weight, told = self._holds(optimizer), self._witness(), self.told(0)
        visits = list(self.layers[0].visits.values())
        done = sum(v.done for v in visits)
        if holds < 0 or not done:
            return
        stranger = self._stranger()
        if not holds and weight is not None and stranger is not None and stranger is not optimizer:
            raise ValueError(
                f"{type(optimizer).__name__}: neither it nor {type(stranger).__name__}, which has stepped before, "
                f"holds a weight of this MoE layer, so the end of its step is unknown; {_REMEDY}"
            )
        put_back = self._left is not None and weight is self._left[0]() and weight.grad is not self._left[1]()
        if self._gone and weight is not None and (put_back or not holds):
            raise ValueError(
                "balance.micro_batches=None: the gradient that a backward pass had left was gone before the next one, "
                "and comes back in another tensor for the update; if the step has several backward passes, each was "
                f"balanced by itself; {_REMEDY}"
            )
        if self._full and done != told:
            raise ValueError(
                f"balance.micro_batches={told}: an update after {done} backward passes, and {told} before it without "
                f"an update; if a step was broken off, drive the steps: {_REMEDY}"
            )
        if any(v.counted and v.lives and not v.done for v in visits):
            raise ValueError(
                "MoE: a training forward has been counted whose backward has not run; run what is not trained on under "
                "torch.no_grad() or in model.eval(), or delete its output before the update"
            )
        before = self.layers[0].last
        if not told and before is not None and done != before.micro_batches:
            warnings.warn(
                "MoE: steps have different numbers of micro-batches, and each weighs its losses by the number of the "
                f"step before; {_REMEDY}",
                stacklevel=2,
            )

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimizer step in the process."""
        holds = self._holds(optimizer)
        if holds < 0:
            return
        self._held = holds
        if not holds:
            self._stranger = weakref.ref(optimizer)
        self.end(applied=True, overflow=getattr(optimizer, "found_inf", None))


def _for(step: weakref.ref[AutoStep], call: Callable[[AutoStep, torch.optim.Optimizer], None]) -> Callable[..., None]:
    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = step()
        if alive is not None:
            call(alive, optimizer)

    return hook
